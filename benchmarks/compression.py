"""Compressed experts against their originals: bytes, error of the weight change, and F1 alone and merged.

Example: python -m benchmarks.compression --data DATA
"""

import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
import typer

from benchmarks.common import write_results
from benchmarks.predictions import EXCLUDED, Target, read_target
from spacy_sam import evaluate as ev
from spacy_sam.adapters import Adapter, LoraFactors
from spacy_sam.bank import CARD_FILE, ExpertBank, bundled_bank_path
from spacy_sam.compress import compress_bank, levels
from spacy_sam.registered import make_ties
from spacy_sam.settings import DENSITY, SCALE

ORIGINAL = "original"


def n_numbers(adapter: Adapter) -> int:
    """Entries of an adapter's factors."""
    return sum(factors.a.numel() + factors.b.numel() for factors in adapter.matrices.values())


def n_bytes(folder: Path) -> int:
    """Size of an expert's files without its card."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != CARD_FILE)


def relative_error(adapter: Adapter, other: Adapter) -> float:
    """Norm of the difference of two weight changes over the norm of the first, all matrices together."""
    pairs = [(factors.delta(), other.matrices[key].delta()) for key, factors in adapter.matrices.items()]
    lost = sum(float((first - second).square().sum()) for first, second in pairs)
    return float(np.sqrt(lost / sum(float(first.square().sum()) for first, _ in pairs)))


def rounded_as_they_are(adapter: Adapter, bits: int) -> Adapter:
    """For comparison: every row of A and column of B rounded to the same bits, each by its own scale."""
    table = levels(bits)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        size = rows.square().mean(1, keepdim=True).sqrt()
        return table[torch.bucketize((rows / size).contiguous(), (table[1:] + table[:-1]) / 2)] * size

    matrices: Dict[str, LoraFactors] = {}
    for key, factors in adapter.matrices.items():
        a, b = rounded(factors.a), rounded(factors.b.T.contiguous()).T
        matrices[key] = LoraFactors(a, b, factors.scale, factors.transposed)
    return Adapter(matrices)


def sizes(bank: ExpertBank, other: ExpertBank, bits: int) -> Dict[str, Any]:
    """Ratios of bytes and errors, the mean over the experts."""
    rows: List[Dict[str, float]] = []
    for card in bank.experts:
        adapter = bank.load_adapter(card.name)
        size, full = n_bytes(other.folder(card.name)), n_numbers(adapter)
        row = {
            "bytes": size,
            "bytes/float32": size / (4 * full),
            "bytes/bfloat16": size / (2 * full),
            "error": relative_error(adapter, other.load_adapter(card.name)),
            "error, rounded as they are": relative_error(adapter, rounded_as_they_are(adapter, bits)),
        }
        rows.append(row)
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}


def scores(bank: ExpertBank, dev: Dict[str, List[Target]], targets: List[Target]) -> Dict[str, Dict[str, float]]:
    """F1 of each expert on its own dev sets, and of SaM on targets."""
    nlp, component = ev.make_pipeline(bank.path, labels=["any"])
    alone: Dict[str, float] = {}
    for name, own in dev.items():
        for target in own:
            component.set_labels(target.labels)
            alone[target.name] = round(ev.score(nlp, component, target.records, ev.plan_of(bank, [name])).f, 4)
    corpora = {target.name: target.records for target in targets}
    table = ev.evaluate(nlp, component, corpora, merge=make_ties(DENSITY, SCALE), rows=("sam",))
    return {"alone": alone, "SaM": {name: round(rows[ev.TITLES["sam"]].f, 4) for name, rows in table.items()}}


def main(
    data: Path = typer.Option(..., help="Folder with sources/DOMAIN/*.dev.jsonl and extra/*.test.jsonl."),
    bank: Optional[Path] = typer.Option(None, help="Bank folder; the bundled one by default."),
    limit: int = typer.Option(100, help="Sentences of each corpus; of longer ones a random sample."),
    bits: str = typer.Option("4,2,1", help="Bits for a number of an adapter, comma-separated."),
) -> None:
    """Measure, and write `results/compression.json`."""
    opened = ExpertBank(bank or bundled_bank_path())
    dev: Dict[str, List[Target]] = {
        card.name: [read_target(data / "sources" / card.name / f"{c.name}.dev.jsonl", limit) for c in card.corpora]
        for card in opened.experts
    }
    targets = [read_target(path, limit) for path in sorted((data / "extra").glob("*.test.jsonl"))]
    table: Dict[str, Any] = {ORIGINAL: scores(opened, dev, targets)}
    figures: Dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made:
        for each in map(int, bits.split(",")):
            small = compress_bank(opened, Path(made) / str(each), each)
            table[f"{each} bits"] = {**sizes(opened, small, each), **scores(small, dev, targets)}
    for name, row in table.items():
        means = {key: float(np.mean(list(row[key].values()))) for key in ("alone", "SaM")}
        figures |= {f"f1 {key}/{name}": round(mean, 4) for key, mean in means.items()}
        if name != ORIGINAL:
            figures |= {f"{key}/{name}": row[key] for key in ("bytes/float32", "bytes/bfloat16", "error")}
        print(name, {key: round(100 * mean, 1) for key, mean in means.items()}, flush=True)
    print(write_results("compression", figures, settings={"limit": limit, "excluded": EXCLUDED}, table=table))


if __name__ == "__main__":
    typer.run(main)
