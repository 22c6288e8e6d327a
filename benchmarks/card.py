"""Markdown tables of a bank's own scores and of a targets run, for docs/bank.md.

Example: python -m benchmarks.card
"""

import json
from pathlib import Path
from typing import List, Optional, Sequence

import typer

from benchmarks.common import RESULTS
from spacy_sam.bank import ExpertBank, bundled_bank_path


def table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def dev_rows(bank: ExpertBank) -> List[List[str]]:
    """F1 on every dev set: its own expert, and the unified baseline."""
    unified = {name: score for card in bank.baselines for name, score in card.scores.items()}
    rows = [["dev set", "expert", "P", "R", "F1", "unified F1"]]
    values = []
    for card in bank.experts:
        for name, score in card.scores.items():
            other = f"{100 * unified[name].f:.1f}" if name in unified else "-"
            rows.append([name, card.name, *(f"{100 * x:.1f}" for x in (score.p, score.r, score.f)), other])
            values.append((score.f, unified[name].f if name in unified else float("nan")))
    own, shared = (sum(column) / len(values) for column in zip(*values))
    rows.append(["**mean**", "", "", "", f"**{100 * own:.1f}**", f"**{100 * shared:.1f}**"])
    return rows if unified else [row[:-1] for row in rows]


def target_rows(path: Path) -> List[List[str]]:
    """F1 of each row of a results file on each corpus, and the mean."""
    scores = json.loads(path.read_text(encoding="utf8"))["scores"]
    rows = [["", *scores, "mean"]]
    for row in next(iter(scores.values())):
        values = [scores[corpus][row]["f"] for corpus in scores]
        rows.append([row, *(f"{100 * f:.1f}" for f in values), f"{100 * sum(values) / len(values):.1f}"])
    return rows


def main(
    bank: Optional[Path] = typer.Option(None, help="Bank folder; the bundled one by default."),
    results: Optional[str] = typer.Option(None, help="Name of a results file of `benchmarks.targets`."),
) -> None:
    """Print the bank's own scores, and those of a targets run."""
    print(table(dev_rows(ExpertBank(bank or bundled_bank_path()))))
    if results is not None:
        print("\n" + table(target_rows(RESULTS / f"{results}.json")))


if __name__ == "__main__":
    typer.run(main)
