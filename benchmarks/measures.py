"""Pipelines of one bank, and what is measured on them alone: more task models, selection, forward passes, long streams."""

import statistics
import time
from itertools import cycle
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from benchmarks.timing import ForwardTime, Output, race, resident_mb, timed
from spacy_sam import evaluate as ev
from spacy_sam.bank import ExpertBank
from spacy_sam.generate.engine import Completion, Request
from spacy_sam.plan import Plan, TaskModelSpec
from spacy_sam.registered import make_ties
from spacy_sam.select.base import SelectionContext
from spacy_sam.select.sampling import SamplingEvaluation
from spacy_sam.settings import DENSITY, SCALE

N_POINTS = 20  # at which a long stream is looked at


def halves(bank: Path) -> List[TaskModelSpec]:
    """Two task models: the first half of a bank's experts, merged, and the second."""
    names = [card.name for card in ExpertBank(bank).experts]
    middle = len(names) // 2
    method = dict(make_ties(DENSITY, SCALE).config)
    return [TaskModelSpec(tuple(part), (), method) for part in (names[:middle], names[middle:])]


class Pipe:
    """A pipeline with `sam_ner`, a plan that stays, and an engine of its own."""

    def __init__(self, bank: Path, specs: Sequence[TaskModelSpec], engine: Dict[str, Any]) -> None:
        """bank (Path): The bank's folder. specs (Sequence[TaskModelSpec]): The plan's task models. engine (Dict): Its config."""
        self.nlp, self.component = ev.make_pipeline(bank, ["any"], engine=engine, selection="manual")
        self.bank = self.component.parts.bank
        hashes = {name: self.bank.adapter_hash(name) for spec in specs for name in spec.experts}
        self.component.plan = Plan(self.bank.base_hash, tuple(specs), hashes)

    @property
    def engine(self) -> Any:
        return self.component.parts.annotator.engine

    def run(self, texts: Sequence[str], labels: Sequence[str]) -> Output:
        """Annotate texts, as a user would, and drop the documents one by one."""
        self.component.set_labels(labels)
        for _ in self.nlp.pipe(texts):
            pass
        return Output((), 0)

    def recorded(self, text: str, labels: Sequence[str]) -> Tuple[List[Request], List[Completion]]:
        """Annotate a text. RETURNS: What the component asked its engine, and the completions."""
        requests: List[Request] = []
        completions: List[Completion] = []
        engine = self.engine

        def generate(asked: Sequence[Request]) -> List[Completion]:
            requests.extend(asked)
            completions.extend(type(engine).generate(engine, asked))
            return completions[-len(asked) :]

        engine.generate = generate
        try:
            self.run([text], labels)
        finally:
            del engine.generate
        return requests, completions

    def find(self, spec: TaskModelSpec, labels: Sequence[str], texts: Sequence[str]) -> List[Any]:
        """A task model's spans, as selection asks for them."""
        return self.component.parts.annotator.found(spec, labels, texts)


def two_models(one: Pipe, two: Pipe, labels: Sequence[str], jobs: Sequence[List[str]]) -> float:
    """How many times as long a plan of two task models takes as one of one."""
    runners = {"one": lambda texts: one.run(texts, labels), "two": lambda texts: two.run(texts, labels)}
    _warm_up([one, two], labels)
    return race(runners, jobs, one.engine.device).ratio("two", "one")


def sampling(all_experts: Pipe, one: Pipe, labels: Sequence[str], jobs: Sequence[List[str]]) -> float:
    """How many times as long sampling evaluation with all experts takes as one expert on the same texts.

    Both begin with the base's weights in the model, and with adapters that were read before.
    """
    names = [card.name for card in one.bank.experts]
    turn = cycle(names)

    def select(texts: List[str]) -> Output:
        SamplingEvaluation(len(texts))(_context(all_experts, labels, texts), len(names))
        return Output((), 0)

    def ask(texts: List[str]) -> Output:
        one.find(TaskModelSpec((next(turn),)), labels, texts)
        return Output((), 0)

    def to_base() -> None:
        for pipe in (all_experts, one):
            pipe.find(TaskModelSpec(), labels, ["One."])

    for pipe in (all_experts, one):
        for name in names:
            pipe.find(TaskModelSpec((name,)), labels, ["One."])
    return race({"all": select, "one": ask}, jobs, one.engine.device, to_base).ratio("all", "one")


def _context(pipe: Pipe, labels: Sequence[str], texts: Sequence[str]) -> SelectionContext:
    def encode(texts: Sequence[str]) -> Any:
        raise NotImplementedError("sampling evaluation compares no centroids")

    return SelectionContext(
        texts=tuple(texts),
        labels=tuple(labels),
        bank=pipe.bank,
        encode=encode,
        encoder=pipe.bank.encoder,
        annotate=lambda spec, asked: pipe.find(spec, labels, asked),
    )


def forward_share(pipe: Pipe, labels: Sequence[str], jobs: Sequence[List[str]]) -> float:
    """Share of the time of `nlp.pipe` that is spent inside the model's forward passes."""
    _warm_up([pipe], labels)
    device = pipe.engine.device
    shares = []
    for texts in jobs:
        with ForwardTime(pipe.engine.model, device) as inside:
            took, _ = timed(lambda: pipe.run(texts, labels), device)  # noqa: B023  # called at once
        shares.append(inside.seconds / took)
    return statistics.median(shares)


def stream(pipe: Pipe, labels: Sequence[str], texts: Sequence[str]) -> Dict[str, Any]:
    """Time and memory along one long stream.

    RETURNS (Dict[str, Any]): "documents", "seconds" and "resident_mb" at some points of it; "late/early", the time of the second
        half over that of the first; "growth_mb", from a tenth of the documents to the end.
    """
    _warm_up([pipe], labels)
    every = max(1, len(texts) // N_POINTS)
    points: Dict[str, List[float]] = {"documents": [0], "seconds": [0.0], "resident_mb": [resident_mb()]}
    start = time.perf_counter()
    for number, _ in enumerate(pipe.nlp.pipe(texts), 1):
        if number % every == 0:
            points["documents"].append(number)
            points["seconds"].append(time.perf_counter() - start)
            points["resident_mb"].append(resident_mb())
    seconds, resident = points["seconds"], points["resident_mb"]
    middle = len(seconds) // 2
    late = (seconds[-1] - seconds[middle]) / (len(seconds) - 1 - middle)
    early = seconds[middle] / middle
    return {**points, "late/early": late / early, "growth_mb": resident[-1] - resident[len(resident) // 10]}


def _warm_up(pipes: Sequence[Pipe], labels: Sequence[str]) -> None:
    for pipe in pipes:
        pipe.run(["One.", "Two of them."], labels)
