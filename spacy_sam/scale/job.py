"""What every worker of a run is told. Plain data: it goes to other processes and machines."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Protocol, Tuple

from .shards import Shard

Tell = Callable[[int, int, int], None]  # documents, entities and bytes of the shard so far


@dataclass(frozen=True)
class PipelineSpec:
    """Which pipeline annotates.

    pipeline: Folder or name of a saved one with `sam_ner`; None: a blank English one with `sam_ner`.
    labels, bank: Of the blank one's `sam_ner`.
    code: Python file with registered functions, imported first.
    max_length: Longest document, in characters; None for the pipeline's own limit.
    """

    pipeline: Optional[str] = None
    labels: Tuple[str, ...] = ()
    bank: Optional[str] = None
    code: Optional[str] = None
    max_length: Optional[int] = None


@dataclass(frozen=True)
class Job:
    """A pipeline, and how its documents are read and written. settings: The fingerprint of all that decides the outputs."""

    spec: PipelineSpec
    out: str
    format: str = "jsonl"
    text_field: str = "text"
    settings: str = ""
    plan: Dict[str, Any] = field(default_factory=dict)


class Result(NamedTuple):
    """What became of a shard: its manifest entry, or why there is none."""

    key: str
    entry: Optional[Dict[str, Any]] = None
    failure: Optional[str] = None


class Worker(Protocol):
    """Does the work of one process. Made there, by a function of the job and the device."""

    def select(self, texts: List[str]) -> Dict[str, Any]:
        """The plan for a sample, as JSON."""

    def run(self, shard: Shard, plan: Dict[str, Any], tell: Tell) -> Result:
        """Annotate a shard. RAISES: SamError if no shard can be annotated, and the run is to end."""


MakeWorker = Callable[[Job, Optional[str]], Worker]
