"""The words of the design as frozen dataclasses: experts, selections, task models and plans, to and from JSON."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Dict, Mapping, Optional, Tuple, Type, TypeVar, Union

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from .errors import SamError

T = TypeVar("T")
_ADAPTERS: Dict[Any, TypeAdapter] = {}


class Strict:
    """What is read from JSON has no unknown fields, at any depth: a misspelt one would silently be its default."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Corpus(Strict):
    """One corpus an expert was trained on."""

    name: str
    n_records: int
    labels: Tuple[str, ...]


@dataclass(frozen=True)
class Centroid(Strict):
    """Mean of an encoder's embeddings over an expert's training texts, not normalised. `vector` is [dimension]."""

    encoder: str
    n_texts: int
    vector: Tuple[float, ...]

    @cached_property
    def array(self) -> np.ndarray:
        """`vector` as float32, made once: a bank of many experts is ranked again and again."""
        return np.fromiter(self.vector, np.float32, len(self.vector))


@dataclass(frozen=True)
class Score(Strict):
    """Strict span scores on one dev set, between 0 and 1."""

    p: float
    r: float
    f: float
    n_docs: int


@dataclass(frozen=True)
class Expert(Strict):
    """An adapter's card: what it knows, what it was made from, and what it must be used with.

    role: "expert" (takes part in selection) or "baseline" (kept for comparison, such as the unified adapter).
    base_hash: Hash of the base it was trained on; see `bank.hash_base`.
    lora: rank and alpha of the adapter, for reading; the adapter's own config decides.
    """

    name: str
    domain: str
    labels: Tuple[str, ...]
    base_hash: str
    role: str = "expert"
    corpora: Tuple[Corpus, ...] = ()
    lora: Dict[str, Any] = field(default_factory=dict)
    prompt: Dict[str, Any] = field(default_factory=dict)
    centroid: Optional[Centroid] = None
    scores: Dict[str, Score] = field(default_factory=dict)
    training: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection(Strict):
    """A ranking of all experts by one selector: `scores` best first, `chosen` the ones that go into a task model."""

    selector: str
    scores: Tuple[Tuple[str, float], ...]
    chosen: Tuple[str, ...]
    details: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskModelSpec(Strict):
    """A task model: experts, a weight for each, and the merge method as a config block (`{"@misc": ..., ...}`).

    No experts at all means the untuned base. Experts are a set: their order never changes the merge, so they are kept
    sorted by name and equal sets have equal fingerprints. One expert is not merged with anything, so no method is
    kept.

    adapter_hashes: The version of each expert, for what runs it; empty for the one that the bank holds when it is run. A plan
        has them for all of its task models, and so does not write these.
    """

    experts: Tuple[str, ...] = ()
    weights: Tuple[float, ...] = ()
    method: Dict[str, Any] = field(default_factory=dict)
    adapter_hashes: Annotated[Tuple[str, ...], Field(exclude=True)] = ()

    def __post_init__(self) -> None:
        weights = tuple(self.weights) or (1.0,) * len(self.experts)
        bad = len(weights) != len(self.experts) or len(set(self.experts)) != len(self.experts)
        if bad or not all(math.isfinite(w) for w in weights):
            raise SamError("S113", experts=list(self.experts), weights=list(self.weights))
        if len(weights) < 2:
            object.__setattr__(self, "method", {})
        order = sorted(range(len(weights)), key=lambda place: self.experts[place])
        object.__setattr__(self, "experts", tuple(self.experts[place] for place in order))
        object.__setattr__(self, "weights", tuple(float(weights[place]) for place in order))
        if self.adapter_hashes:
            object.__setattr__(self, "adapter_hashes", tuple(self.adapter_hashes[place] for place in order))

    @property
    def name(self) -> str:
        """For tables and tooltips."""
        return " + ".join(self.experts) if self.experts else "base"

    @property
    def fingerprint(self) -> str:
        """Hash of all of it: of the experts' versions, too, if it says them."""
        return fingerprint(_decides(self))

    def of_versions(self, adapter_hashes: Mapping[str, str]) -> "TaskModelSpec":
        """The same with the version of each expert, by name; as it is if one of them is not among these."""
        if not all(name in adapter_hashes for name in self.experts):
            return self
        return replace(self, adapter_hashes=tuple(adapter_hashes[name] for name in self.experts))


def _decides(spec: TaskModelSpec) -> Dict[str, Any]:
    """What decides a task model's weights. One without versions has the fingerprint it had before there were any."""
    return {key: value for key, value in asdict(spec).items() if key != "adapter_hashes" or value}


@dataclass(frozen=True)
class Plan(Strict):
    """What to run on a corpus: task models, and the selections they came from.

    base_hash: The bank's base; a plan is refused by a bank with another one.
    adapter_hashes: Content hash of every adapter that is used, so that a retrained expert makes another plan.
    labels: The target's labels at selection.
    sample_size: Texts the selection looked at.
    """

    base_hash: str
    task_models: Tuple[TaskModelSpec, ...]
    adapter_hashes: Dict[str, str] = field(default_factory=dict)
    selections: Tuple[Selection, ...] = ()
    strategy: str = ""
    labels: Tuple[str, ...] = ()
    sample_size: int = 0

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the merged weights: the base, the adapters' content, weights and methods."""
        specs = [_decides(spec) for spec in self.task_models]
        return fingerprint({"base": self.base_hash, "adapters": self.adapter_hashes, "task_models": specs})

    @property
    def versions(self) -> Tuple[TaskModelSpec, ...]:
        """The task models with the versions of their experts: what is run, whatever the bank holds by then."""
        return tuple(spec.of_versions(self.adapter_hashes) for spec in self.task_models)

    def to_dict(self) -> Dict[str, Any]:
        return {**to_json(self), "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """RAISES: SamError S111 if `data` is not a plan."""
        fields = {key: value for key, value in data.items() if key != "fingerprint"}
        return from_json(cls, fields, "S111")

    def to_disk(self, path: Union[str, Path]) -> None:
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf8")

    @classmethod
    def from_disk(cls, path: Union[str, Path]) -> "Plan":
        """RAISES: SamError S111 if the file is not there or not a plan."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise SamError("S111", reason=error) from error
        if not isinstance(data, dict):
            raise SamError("S111", reason="not a JSON object")
        return cls.from_dict(data)

    def __str__(self) -> str:
        lines = []
        for selection in self.selections:
            ranking = ", ".join(f"{name} {score:.3f}" for name, score in selection.scores)
            lines.append(f"{selection.selector}: {ranking}")
        for number, spec in enumerate(self.task_models, 1):
            lines.append(f"task model {number}: {spec.name}")
        return "\n".join(lines)


def fingerprint(data: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `data`."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def to_json(item: Any) -> Dict[str, Any]:
    """A dataclass as plain JSON types."""
    return _adapter(type(item)).dump_python(item, mode="json")


def from_json(cls: Type[T], data: Any, code: str, **fields: object) -> T:
    """Build a dataclass from JSON types. RAISES: SamError `code` with `fields` and the reason, if they do not fit."""
    try:
        return _adapter(cls).validate_python(data)
    except ValidationError as error:
        raise SamError(code, reason=_reasons(error), **fields) from error


def from_json_text(cls: Type[T], text: bytes, code: str, **fields: object) -> T:
    """Build a dataclass from the text of a JSON file, faster than `from_json`. RAISES: as `from_json`."""
    try:
        return _adapter(cls).validate_json(text)
    except ValidationError as error:
        raise SamError(code, reason=_reasons(error), **fields) from error


def _reasons(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())


def _adapter(cls: Any) -> TypeAdapter:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]
