"""A worker for tests of `sam apply` that needs no spaCy: capitalised words are entities. Some texts bring their worker down.

As a program: `python scale_stub.py OUT N_PROCESS ENGINE INPUT...` does a run.
"""

import os
import re
import signal
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from spacy_sam.errors import SamError
from spacy_sam.plan import Plan, TaskModelSpec
from spacy_sam.scale.job import Job, Result
from spacy_sam.scale.readers import Item, Reader
from spacy_sam.scale.run import Prepared, Settings, apply_corpus
from spacy_sam.scale.schedule import Tally
from spacy_sam.scale.shards import Shard
from spacy_sam.scale.worker import run_shard
from spacy_sam.scale.writers import Annotated

CHUNK = 4
PLAN = Plan("base", (TaskModelSpec(("a",)),), {"a": "hash"})


def prepare(spec: Any) -> Prepared:
    return Prepared({"labels": {name: name for name in spec.labels}, "max_length": 0, "pipeline": "stub"}, None, check)


def check(plan: Plan) -> None:
    if plan.base_hash != "base":
        raise SamError("S112", found=plan.base_hash, expected="base")


class StubWorker:
    """Seconds a chunk are taken from SAM_STUB_DELAY."""

    def __init__(self, job: Job, device: Optional[str]) -> None:
        if device == "cpu:dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if device == "cpu:fails":
            raise RuntimeError("no such thing")
        self.job = job
        self.delay = float(os.environ.get("SAM_STUB_DELAY", "0"))

    def select(self, texts: List[str]) -> Dict[str, Any]:
        return PLAN.to_dict()

    def run(self, shard: Shard, plan: Dict[str, Any], tell: Any) -> Result:
        return run_shard(self.job, shard, Plan.from_dict(plan).fingerprint, self.chunks, tell)

    def chunks(self, reader: Reader) -> Iterator[List[Any]]:
        stream = iter(reader)
        while chunk := list(islice(stream, CHUNK)):
            time.sleep(self.delay)
            yield [annotate(item) if isinstance(item, Item) else item for item in chunk]


def annotate(item: Item) -> Annotated:
    if "KILL" in item.text:
        once = item.fields.get("once")
        if once is None or not os.path.exists(once):
            if once:
                Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if "CODED" in item.text:
        raise SamError("S401", name="density", expected="above 0", found=-1)
    if "BUG" in item.text:
        raise RuntimeError("a bug")
    entities = [(m.start(), m.end(), "name", 0.5) for m in re.finditer(r"\b[A-Z][a-z]+\b", item.text)]
    return Annotated(item.place, item.text, item.fields, entities)


def make_worker(job: Job, device: Optional[str]) -> StubWorker:
    return StubWorker(job, device)


def run(inputs: List[Path], out: Path, *, tally: Optional[Tally] = None, **settings: Any) -> Any:
    """`apply_corpus` with stub workers."""
    given = Settings(**settings)
    return apply_corpus(inputs, out, given, tally=tally, prepare=prepare, make_worker=make_worker)


if __name__ == "__main__":
    out, n_process, engine, *inputs = sys.argv[1:]
    done = run([Path(i) for i in inputs], Path(out), n_process=int(n_process), engine=engine, retries=100)
    print(done.documents, done.skipped, done.shards)
