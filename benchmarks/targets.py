"""Strict span F1 of the base, the unified baseline, each expert, all merged, SaM and SaM-eco on target corpora.

Example: python -m benchmarks.targets --data DATA --limit 100
"""

from pathlib import Path
from typing import Optional

import typer
from wasabi import msg

from benchmarks.common import write_results
from spacy_sam import evaluate as ev
from spacy_sam.corpora import read_records
from spacy_sam.registered import make_ties
from spacy_sam.settings import DENSITY, SCALE


def main(
    data: Path = typer.Option(..., help="Folder with NAME/*.test.jsonl."),
    groups: str = typer.Option("targets", help="Comma-separated folders of `data`."),
    limit: Optional[int] = typer.Option(None, help="First sentences of each corpus."),
    bank: Optional[Path] = typer.Option(None, help="Bank folder; the bundled one by default."),
    density: float = typer.Option(DENSITY),
    scale: float = typer.Option(SCALE),
    name: str = typer.Option("targets", help="Name of the results file."),
) -> None:
    """Measure and write `results/NAME.json`. Nothing here is tuned on the targets."""
    paths = sorted(path for group in groups.split(",") for path in (data / group).glob("*.test.jsonl"))
    corpora = {path.name.split(".")[0]: ev.exclude(read_records(path)[:limit], ["miscellaneous"]) for path in paths}
    nlp, component = ev.make_pipeline(bank, labels=["any"])
    table = ev.evaluate(
        nlp,
        component,
        corpora,
        merge=make_ties(density, scale),
        on_result=lambda corpus, row, result: print(f"{corpus}: {row} {result.f:.3f} {result.task_models}", flush=True),
    )
    rows = ev.to_rows(table)
    msg.table(rows[1:], header=rows[0], divider=True, aligns=("l", *["r"] * (len(rows[0]) - 1)))
    means = {row: sum(t[row].f for t in table.values()) / len(table) for row in next(iter(table.values()))}
    figures = {f"f1/{row}": round(mean, 4) for row, mean in means.items()}
    settings = {"density": density, "scale": scale, "limit": limit, "groups": groups, "excluded": ["miscellaneous"]}
    print(write_results(name, figures, settings=settings, scores=ev.to_json(table)))


if __name__ == "__main__":
    typer.run(main)
