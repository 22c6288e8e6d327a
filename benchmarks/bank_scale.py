"""How long a bank of many experts takes to open, and to be ranked by domain similarity.

Example: python -m benchmarks.bank_scale --n-experts 1000
The experts are copies of the bundled ones with noise in centroids and factors, of rank 1, in a temporary folder.
"""

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file

from benchmarks.common import write_results
from spacy_sam.bank import CARD_FILE, EXPERTS_DIR, ExpertBank, bundled_bank_path, write_json
from spacy_sam.lora_config import CONFIG_FILE, WEIGHTS_FILE
from spacy_sam.plan import Centroid, to_json
from spacy_sam.registered import make_domain_similarity
from spacy_sam.select.base import SelectionContext

NOISE = 0.01  # standard deviation, of a centroid's entries and of the factors'


def make_bank(path: Path, n_experts: int) -> None:
    """Write a bank of noisy copies of the bundled experts."""
    source = ExpertBank(bundled_bank_path())
    cards = source.experts
    names = [f"expert{number:05d}" for number in range(n_experts)]
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        card = cards[number % len(cards)]
        folder = path / EXPERTS_DIR / name
        folder.mkdir(parents=True)
        tensors = load_file(source.folder(card.name) / WEIGHTS_FILE)
        cut = {key: tensor[:1] if "lora_A" in key else tensor[:, :1] for key, tensor in tensors.items()}
        save_file({key: (t + NOISE * torch.randn(t.shape)).bfloat16() for key, t in cut.items()}, folder / WEIGHTS_FILE)
        config = json.loads((source.folder(card.name) / CONFIG_FILE).read_text(encoding="utf8"))
        write_json(folder / CONFIG_FILE, {**config, "r": 1})
        assert card.centroid is not None
        vector = (card.centroid.array + rng.normal(0, NOISE, len(card.centroid.vector))).round(7).tolist()
        centroid = Centroid(card.centroid.encoder, card.centroid.n_texts, tuple(vector))
        write_json(folder / CARD_FILE, to_json(replace(card, name=name, centroid=centroid)))
    shutil.copytree(source.base[0], path / "base")
    bank = json.loads((source.path / "bank.json").read_text(encoding="utf8"))
    write_json(path / "bank.json", {**bank, "experts": names})


def seconds(work: Callable[[], Any], n_runs: int) -> List[float]:
    found = []
    for _ in range(n_runs):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def main(
    n_experts: int = typer.Option(1000, help="Experts of the bank."),
    n_runs: int = typer.Option(5, help="Runs; the median is reported."),
) -> None:
    """Measure, and write `results/bank_scale.json`."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "bank"
        make_bank(path, n_experts)
        opening = seconds(lambda: ExpertBank(path), n_runs)
        bank = ExpertBank(path)
        bank.load_adapter(bank.experts[0].name)
        dimension = len(bank.experts[0].centroid.vector)  # type: ignore[union-attr]
        texts = np.random.default_rng(1).normal(size=(100, dimension)).astype(np.float32)
        context = SelectionContext(("A text.",), ("any",), bank, lambda _: texts, bank.encoder, lambda *_: [])
        rank = make_domain_similarity()
        first = []
        for _ in range(n_runs):
            fresh = replace(context, bank=ExpertBank(path))
            first += seconds(lambda: rank(fresh, 3), 1)  # noqa: B023  # called at once
        again = seconds(lambda: rank(context, 3), n_runs + 1)[1:]
    figures = {
        f"open_{n_experts}_s": round(statistics.median(opening), 3),
        f"rank_{n_experts}_ms": round(1000 * statistics.median(first), 1),
        f"rank_{n_experts}_again_ms": round(1000 * statistics.median(again), 1),
    }
    print(figures)
    details = {"open_s": opening, "rank_s": first, "rank_again_s": again}
    print(write_results("bank_scale", figures, runs={key: [round(x, 4) for x in row] for key, row in details.items()}))


if __name__ == "__main__":
    typer.run(main)
