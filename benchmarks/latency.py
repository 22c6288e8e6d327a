"""Milliseconds for one text of 30 words on one core, and for batches on several, beside one pass of the sentence encoder.

Example: python -m benchmarks.latency
"""

import itertools
import statistics
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch
import typer

from benchmarks.common import write_results
from spacy_sam import evaluate as ev
from spacy_sam.demo import MEDICINE, POLITICS
from spacy_sam.plan import Plan, TaskModelSpec
from spacy_sam.registered import make_ties
from spacy_sam.select.encoder import SentenceEncoder
from spacy_sam.settings import DENSITY, SCALE

LABELS = ["person", "organization", "location", "disease", "chemical"]
N_WORDS = 30
N_TEXTS = 24
N_BATCH = 192


def texts(count: int) -> List[str]:
    """Different texts of 30 words, from the sentences of the demo in different orders."""
    pairs = itertools.permutations([*POLITICS, *MEDICINE], 4)
    step = 24 * 23 * 22 * 21 // count
    chosen = itertools.islice(pairs, 0, None, step)
    return [" ".join(" ".join(found).split()[:N_WORDS]) for found in itertools.islice(chosen, count)]


def measure(bank: Optional[Path], dtype: str, models: Sequence[Sequence[str]], threads: int) -> Dict[str, float]:
    """Median milliseconds a text: one by one on one core, and all at once on `threads`.

    bank (Optional[Path]): The bank; None for the bundled one. dtype: Of the task models.
    models (Sequence[Sequence[str]]): Experts of each task model of the plan.
    """
    nlp, component = ev.make_pipeline(bank, LABELS, engine={"@misc": "spacy_sam.TorchEngine.v1", "dtype": dtype})
    opened = component.parts.bank
    specs = tuple(
        TaskModelSpec(tuple(names), (), dict(make_ties(DENSITY, SCALE).config) if len(names) > 1 else {})
        for names in models
    )
    hashes = {name: opened.adapter_hash(name) for names in models for name in names}
    plan = Plan(opened.base_hash, specs, hashes)
    warm, *single = texts(N_TEXTS + 1)
    torch.set_num_threads(1)
    list(component.pipe([nlp.make_doc(warm)], plan=plan))
    times = []
    for text in single:
        start = time.perf_counter()
        list(component.pipe([nlp.make_doc(text)], plan=plan))
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    start = time.perf_counter()
    list(component.pipe((nlp.make_doc(text) for text in texts(N_BATCH)), plan=plan))
    whole = (time.perf_counter() - start) / N_BATCH
    return {"one": 1000 * statistics.median(times), "slowest": 1000 * max(times), "batch": 1000 * whole}


def measure_encoder() -> float:
    """The baseline: median milliseconds of the sentence encoder for one text on one core."""
    encoder = SentenceEncoder()
    torch.set_num_threads(1)
    warm, *single = texts(N_TEXTS + 1)
    encoder([warm])
    times = []
    for text in single:
        start = time.perf_counter()
        encoder([text])
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main(
    bank: Optional[Path] = typer.Option(None, help="Bank folder; the bundled one by default."),
    threads: int = typer.Option(2, help="Cores for batches."),
    name: str = typer.Option("latency", help="Name of the results file."),
) -> None:
    """Measure and write `results/NAME.json`."""
    figures: Dict[str, float] = {}
    plans: Dict[str, List[List[str]]] = {
        "one task model": [["news"]],
        "two task models": [["legal", "news", "stem"], ["biomedical", "news", "social_media"]],
    }
    for title, models in plans.items():
        for dtype in ("float32", "bfloat16"):
            for key, value in measure(bank, dtype, models, threads).items():
                figures[f"{title}/{dtype}/{key}"] = round(value, 1)
            print(title, dtype, {key: value for key, value in figures.items() if key.startswith(f"{title}/{dtype}")})
    figures["sentence encoder/one"] = round(measure_encoder(), 1)
    figures["one task model/encoder"] = round(
        figures["one task model/float32/one"] / figures["sentence encoder/one"], 2
    )
    print(write_results(name, figures, unit="ms a text", n_words=N_WORDS, labels=LABELS, threads=threads))


if __name__ == "__main__":
    typer.run(main)
