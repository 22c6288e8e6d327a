"""Tokens per second of an 8B model on one GPU, by the rows that are decoded together, and what share of the card that is.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --tiny

The model has Llama 3.1 8B's shape and random weights, made on the device; a bank around it is written without them. Answers of a
random model end by the grammar or at the limit, so speed is that of any model of the shape, and quality is not measured.

With one new token a run is the prompts' alone, so what more tokens take longer is decoding: each step reads all weights and the
keys and values of its rows, which gives the share of the memory's bandwidth. Prompts' arithmetic over their time gives the share
of the peak; the engine encodes the shared prefix once, before it is measured. `--tiny` runs all of it on a CPU.
"""

import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import typer
from wasabi import msg

from benchmarks.baselines import Generate
from benchmarks.common import write_results
from benchmarks.random_model import LLAMA_8B, TINY, Model
from benchmarks.timing import Output, timed
from spacy_sam.bank import ExpertBank
from spacy_sam.generate.engine import Request
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.plan import TaskModelSpec
from spacy_sam.prompts import PromptEncoder, make_format
from spacy_sam.registered import resolve_method


@dataclass(frozen=True)
class Work:
    """What is run. words: Of each text, which are as many tokens. n_labels: Asked in the prefix. entity_bias: Of the grammar."""

    rows: Tuple[int, ...]
    new_tokens: int
    words: int
    n_labels: int
    repeats: int
    entity_bias: float


@dataclass(frozen=True)
class Card:
    """What the device could do at most: bytes and floating point operations a second."""

    bandwidth: float
    flops: float


class Bench:
    """Runs requests of one length through engines and `generate`."""

    def __init__(self, model: Model, bank: ExpertBank, work: Work, card: Card) -> None:
        self.model = model
        self.bank = bank
        self.work = work
        self.card = card
        self.device: torch.device = model.model.device
        self._rng = random.Random(0)
        self._words = model.words()
        self._labels = tuple(self._rng.sample(self._words, work.n_labels))
        encoder = PromptEncoder(model.tokenizer, make_format(bank.prompt))
        self.n_prefix = len(encoder.prefix(self._labels))
        self.n_body = len(encoder.body(self._text()))
        self.generate = Generate(model.model, encoder)

    def engine(self, rows: int, new_tokens: int, constrained: bool) -> TorchEngine:
        """An engine on the model whose budget is of so many rows."""
        with self.model.loaded():
            return TorchEngine(
                self.bank,
                resolve_method,
                device=str(self.device),
                dtype=str(self.model.model.dtype).removeprefix("torch."),
                max_new_tokens=new_tokens,
                tokens_per_batch=rows * (self.n_prefix + self.n_body + new_tokens),
                constrained=constrained,
                entity_bias=self.work.entity_bias,
            )

    def requests(self, count: int) -> List[Request]:
        """Other texts at every call, of one length."""
        return [Request(TaskModelSpec(), self._labels, self._text()) for _ in range(count)]

    def _text(self) -> str:
        return " ".join(self._rng.choices(self._words, k=self.work.words))

    def run(self, rows: int) -> Dict[str, Any]:
        """All that is measured with batches of so many rows: two batches, as many times as said."""
        n, engines = self.work.new_tokens, {}
        for name, new_tokens, constrained in (
            ("grammar", n, True),
            ("engine", n, False),
            ("engine, prompts", 1, False),
        ):
            engines[name] = self.engine(rows, new_tokens, constrained)
        runs: Dict[str, Callable[[List[Request]], Output]] = {
            name: lambda asked, engine=engine: _complete(engine, asked)  # type: ignore[misc]
            for name, engine in engines.items()
        }
        runs["generate"] = lambda asked: self.generate(asked, [n] * len(asked), rows)
        runs["generate, prompts"] = lambda asked: self.generate(asked, [1] * len(asked), rows)
        took: Dict[str, List[float]] = {name: [] for name in runs}
        made: Dict[str, Output] = {}
        for run in runs.values():
            run(self.requests(rows))
        for _ in range(self.work.repeats):
            asked = self.requests(2 * rows)
            for name, run in runs.items():
                seconds, made[name] = timed(lambda: run(asked), self.device)  # noqa: B023  # called at once
                took[name].append(seconds)
        return self._line(rows, {name: median(seconds) for name, seconds in took.items()}, made)

    def _line(self, rows: int, took: Dict[str, float], made: Dict[str, Output]) -> Dict[str, Any]:
        pairs = list(zip(made["engine"].answers, made["generate"].answers))
        line: Dict[str, Any] = {
            name: {
                "docs_per_s": 2 * rows / took[name],
                "tokens_per_s": made[name].n_tokens / took[name],
                "seconds": took[name],
            }
            for name in ("grammar", "engine", "generate")
        }
        for name, n_encoded in (("engine", self.n_body), ("generate", self.n_prefix + self.n_body)):
            line[name].update(self._shares(rows, n_encoded, took[f"{name}, prompts"], took[name]))
        line["same_answers"] = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
        if self.device.type == "cuda":
            line["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            torch.cuda.reset_peak_memory_stats(self.device)
        return line

    def _shares(self, rows: int, n_encoded: int, prompts: float, whole: float) -> Dict[str, float]:
        """Speed of decoding and of reading prompts, and the shares of what the card can do."""
        n_steps = 2 * (self.work.new_tokens - 1)
        n_prompt = self.n_prefix + self.n_body
        read = n_steps * self.model.step_bytes(rows, n_prompt + self.work.new_tokens / 2)
        flops = 2 * rows * self.model.prompt_flops(n_encoded, n_prompt - n_encoded)
        decoding = whole - prompts
        is_seen = decoding > 0  # a tiny model's may be lost in the noise
        return {
            "decoded_per_s": n_steps * rows / decoding if is_seen else 0.0,
            "step_ms": 1000 * decoding / n_steps,
            "bandwidth_share": read / decoding / self.card.bandwidth if is_seen else 0.0,
            "prompts_per_s": 2 * rows / prompts,
            "peak_share": flops / prompts / self.card.flops,
        }


def _complete(engine: TorchEngine, requests: Sequence[Request]) -> Output:
    completions = engine.generate(requests)
    return Output(tuple(c.text for c in completions), sum(len(c.logprobs) for c in completions))


def figures(lines: Dict[str, Dict[str, Any]]) -> Dict[str, float]:
    """By the number of rows: tokens a second, `generate`'s time over the engine's, and the engine's shares of the card."""
    found: Dict[str, float] = {}
    for rows, line in lines.items():
        found[f"tokens_per_s/{rows}"] = line["engine"]["tokens_per_s"]
        found[f"tokens_per_s/grammar/{rows}"] = line["grammar"]["tokens_per_s"]
        found[f"tokens_per_s/generate/{rows}"] = line["generate"]["tokens_per_s"]
        found[f"generate/engine/{rows}"] = line["generate"]["seconds"] / line["engine"]["seconds"]
        found[f"bandwidth_share/{rows}"] = line["engine"]["bandwidth_share"]
        found[f"peak_share/{rows}"] = line["engine"]["peak_share"]
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def measure(
    model: Model, work: Work, card: Card, minutes: float, keep: Callable[[Dict[str, Any]], object]
) -> Dict[str, Any]:
    """Measure by the number of rows, fewest first, and begin none after so many minutes. keep (Callable): Told after each."""
    lines: Dict[str, Any] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, model.bank(Path(folder)), work, card)
        for rows in work.rows:
            if time.monotonic() - start > 60 * minutes:
                print(f"{rows} rows are left out: the time is over", flush=True)
                break
            lines[str(rows)] = bench.run(rows)
            print(
                rows,
                {name: lines[str(rows)][name]["tokens_per_s"] for name in ("engine", "grammar", "generate")},
                flush=True,
            )
            keep(lines)
    return lines


def main(
    rows: str = typer.Option("1,4,16,64,256", help="Rows of a batch that the budget has room for, comma-separated."),
    new_tokens: int = typer.Option(64, min=2, help="Tokens of each answer."),
    words: int = typer.Option(40, min=1, help="Tokens of each text."),
    labels: int = typer.Option(60, min=1, help="Types asked: two tokens each in the shared prefix."),
    repeats: int = typer.Option(3, min=1, help="Repetitions of two batches; figures are medians."),
    entity_bias: float = typer.Option(
        -2.5, help="Of the grammar: by this one a random model marks a word in ten or so."
    ),
    bandwidth: float = typer.Option(3350, min=1e-3, help="Of the card's memory, GB/s; an H100 SXM's by default."),
    tflops: float = typer.Option(989, min=1e-3, help="Of the card in bfloat16, dense; an H100 SXM's by default."),
    minutes: float = typer.Option(8, min=0, help="No more rows are begun after so many minutes."),
    tiny: bool = typer.Option(False, "--tiny", help="A tiny model on the CPU, to see that everything runs."),
    name: Optional[str] = typer.Option(None, help="Name of the results file: gpu, or gpu_tiny."),
) -> None:
    """Measure, and write `results/NAME.json` after each number of rows."""
    if not tiny and not torch.cuda.is_available():
        msg.fail("torch sees no CUDA device: --tiny runs the same on a CPU, with a tiny model", exits=1)
    if tiny:
        rows, new_tokens, words, labels, repeats = "1,2,4", 4, 6, 3, 1
    work = Work(tuple(sorted(map(int, rows.split(",")))), new_tokens, words, labels, repeats, entity_bias)
    card = Card(1e9 * bandwidth, 1e12 * tflops)
    device = torch.device("cpu" if tiny else "cuda")
    model = Model(TINY if tiny else LLAMA_8B, device, torch.float32 if tiny else torch.bfloat16)
    details = {
        "device": "cpu" if tiny else torch.cuda.get_device_name(),
        "settings": {**asdict(work), **asdict(card)},
        "model": {**(TINY if tiny else LLAMA_8B), "n_parameters": model.n_parameters, "dtype": str(model.model.dtype)},
    }
    file = name or ("gpu_tiny" if tiny else "gpu")
    lines = measure(
        model, work, card, minutes, lambda lines: write_results(file, figures(lines), **details, rows=lines)
    )
    print(write_results(file, figures(lines), **details, rows=lines))


if __name__ == "__main__":
    typer.run(main)
