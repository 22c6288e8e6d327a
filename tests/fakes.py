"""Stand-ins for tests, quick to import: engines that answer from the text alone, strategies that choose by rule."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import spacy

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate.engine import Completion, Request
from spacy_sam.plan import Centroid, Expert, Plan, Selection, TaskModelSpec
from spacy_sam.select.base import SelectionContext, make_selection

Answer = Tuple[str, str, float]  # surface, label, score
Find = Callable[[Request], List[Answer]]
NAME = re.compile(r"\b[A-Z][a-z]+\b")
WORD = re.compile(r"\w+|[^\w\s]")


def find_names(request: Request) -> List[Answer]:
    """Capitalised words, each once for each time it is there. The label and the score follow from the word's length.

    Every expert of the task model but "expert0" overlooks the names that begin with its number's letter: B, C, ...
    """
    blind = {chr(ord("A") + int(name[-1])) for name in request.task_model.experts} - {"A"}
    names = [word for word in NAME.findall(request.text) if word[0] not in blind]
    return [(name, request.labels[len(name) % len(request.labels)], 1 / len(name)) for name in names]


def find_numbered(request: Request) -> List[Answer]:
    """`X7` for the label `kind 7`, if the label is asked: for long lists of labels."""
    asked = {label.split()[-1]: label for label in request.labels}
    return [(f"X{n}", asked[n], 0.5) for n in re.findall(r"\bX(\d+)\b", request.text) if n in asked]


def complete(answers: Sequence[Answer]) -> Completion:
    """A finished completion in the bank's format: a line is one token with the line's score, the end token is sure."""
    text, logprobs, ends = "", [], []
    for surface, label, score in answers:
        text += f" {surface} | {label}\n"
        logprobs.append(math.log(score))
        ends.append(len(text))
    return Completion(text, (*logprobs, 0.0), (*ends, len(text)), True)


class FakeEngine:
    """An engine without a model. A text with the word BOOM fails; one with CODED fails with a coded error."""

    def __init__(self, find: Find = find_names, context: int = 512) -> None:
        self.find = find
        self.context = context
        self.calls: List[List[Request]] = []

    @property
    def requests(self) -> List[Request]:
        return [request for call in self.calls for request in call]

    def token_starts(self, text: str) -> List[int]:
        return [match.start() for match in WORD.finditer(text)]

    def prompt_length(self, labels: Sequence[str]) -> int:
        return 8 + sum(len(WORD.findall(label)) + 1 for label in labels)

    def generate(self, requests: Sequence[Request]) -> List[Completion]:
        self.calls.append(list(requests))
        for request in requests:
            if "BOOM" in request.text:
                raise RuntimeError("the engine fell over")
            if "CODED" in request.text:
                raise SamError("S401", name="density", expected="above 0", found=-1)
        return [complete(self.find(request)) for request in requests]


@dataclass
class FakeEngineMaker:
    """Makes fake engines and counts them, as `registered.TorchEngineMaker` does with real ones."""

    find: Find = find_names
    context: int = 512
    made: List[FakeEngine] = field(default_factory=list)

    def __call__(self, bank: ExpertBank) -> FakeEngine:
        self.made.append(FakeEngine(self.find, self.context))
        return self.made[-1]


@dataclass
class FakeStrategy:
    """Another expert at each call, so that plans can be told apart; keeps what it was asked."""

    contexts: List[SelectionContext] = field(default_factory=list)
    name = "fake"

    def __call__(self, context: SelectionContext) -> Plan:
        if not context.texts:
            raise SamError("S302")
        self.contexts.append(context)
        number = (len(self.contexts) - 1) % len(context.bank.experts)
        return plan_of(context.bank, context.bank.experts[number].name)

    def __getstate__(self) -> Dict[str, Any]:
        return {"contexts": []}

    @property
    def samples(self) -> List[Tuple[str, ...]]:
        return [context.texts for context in self.contexts]


def plan_of(bank: ExpertBank, *groups: Any) -> Plan:
    """A plan with one task model for each expert name or tuple of names."""
    specs = [TaskModelSpec((group,) if isinstance(group, str) else group) for group in groups]
    names = sorted({name for spec in specs for name in spec.experts})
    return Plan(bank.base_hash, tuple(specs), {name: bank.adapter_hash(name) for name in names})


# `sam_tests.*`, for configs. They have no settings; in another process, import this module to have them there.


@spacy.registry.misc("sam_tests.FakeEngine.v1")
def make_fake_engine() -> FakeEngineMaker:
    return FakeEngineMaker()


@spacy.registry.misc("sam_tests.NumberedEngine.v1")
def make_numbered_engine() -> FakeEngineMaker:
    return FakeEngineMaker(find_numbered)


@spacy.registry.misc("sam_tests.FakeStrategy.v1")
def make_fake_strategy() -> FakeStrategy:
    return FakeStrategy()


# For selection alone: no files


class Table(NamedTuple):
    """What task models find: experts, joined by a plus -> text -> spans."""

    answers: Mapping[str, Mapping[str, Sequence[Tuple[int, int, str]]]]

    def __call__(self, spec: TaskModelSpec, texts: Sequence[str]) -> List[frozenset]:
        name = "+".join(spec.experts)
        return [frozenset(self.answers.get(name, {}).get(text, ())) for text in texts]


@dataclass
class FakeBank:
    """Cards in the order given, and hashes that name the expert."""

    experts: List[Expert]
    base_hash: str = "base"

    def adapter_hash(self, name: str) -> str:
        return f"hash of {name}"


@dataclass(frozen=True)
class Fixed:
    """A selector with given scores."""

    name: str
    scores: Tuple[Tuple[str, float], ...]

    def __call__(self, context: SelectionContext, n_experts: int) -> Selection:
        return make_selection(self.name, dict(self.scores), context, n_experts)


def ranks(name: str, order: str) -> Fixed:
    """A selector that ranks experts with names of one letter in this order."""
    return Fixed(name, tuple((letter, 1 - place / 10) for place, letter in enumerate(order)))


def fake_bank(names: Sequence[str], centroids: Optional[Mapping[str, Sequence[float]]] = None) -> Any:
    vectors = {name: Centroid("fake", 5, tuple(centroids[name])) for name in names} if centroids else {}
    return FakeBank([Expert(name, name, ("a",), "base", centroid=vectors.get(name)) for name in names])


def fake_context(bank: Any, texts: Sequence[str] = ("one", "two"), **fields: Any) -> SelectionContext:
    """A context without an engine: nobody finds anything, and every text is embedded as [1, 0]."""
    settings = {
        "labels": ("a", "b"),
        "encode": lambda texts: np.tile(np.array([1, 0], dtype=np.float32), (len(texts), 1)),
        "encoder": "fake",
        "annotate": Table({}),
        **fields,
    }
    return SelectionContext(texts=tuple(texts), bank=bank, **settings)
