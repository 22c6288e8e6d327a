"""One process's work: a shard in, one output file and its manifest entry out."""

import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from .. import __version__
from ..plan import Plan
from .folder import OutputFolder, whole_file, write_json
from .job import Job, Result, Tell
from .readers import Item, Problem, Reader, UnreadableError
from .shards import Shard
from .writers import FORMATS, Annotated

MAX_PROBLEMS = 1000  # of a shard are listed; all are counted


class PipelineWorker:
    """Annotates shards with the job's pipeline, on one torch thread."""

    def __init__(self, job: Job, device: Optional[str] = None) -> None:
        """device: Where the model goes; None for the pipeline's own choice."""
        import torch

        from .pipeline import Annotator, load_pipeline

        torch.set_num_threads(1)
        self.job = job
        self.annotator = Annotator(*load_pipeline(job.spec, device))

    def select(self, texts: List[str]) -> Dict[str, Any]:
        """The plan for a sample. RAISES: SamError S301 to S305 if nothing can be selected."""
        sam = self.annotator.sam
        sam.cfg["look_ahead"] = max(1, len(texts))
        return sam.select(texts).to_dict()

    def run(self, shard: Shard, plan: Dict[str, Any], tell: Tell) -> Result:
        """Annotate a shard and write its output and entry."""
        parsed = Plan.from_dict(plan)
        vocab = self.annotator.nlp.vocab if shard.kind == "spacy" else None
        return run_shard(self.job, shard, parsed.fingerprint, lambda reader: self._chunks(reader, parsed), tell, vocab)

    def _chunks(self, reader: Reader, plan: Plan) -> Iterator[Sequence[Any]]:
        stream = iter(reader)
        while True:
            with self.annotator.memory(reader.shard.kind == "spacy"):
                chunk = list(islice(stream, self.annotator.chunk_size))
                items = [item for item in chunk if isinstance(item, Item)]
                yield [*(p for p in chunk if isinstance(p, Problem)), *self.annotator.annotate(items, plan)]
            if not chunk:
                return


def make_worker(job: Job, device: Optional[str]) -> PipelineWorker:
    """Make the worker of this process."""
    return PipelineWorker(job, device)


def run_shard(job: Job, shard: Shard, plan: str, annotate: Any, tell: Tell, vocab: Any = None) -> Result:
    """Read a shard, annotate it, write its output beside its place, rename it, write its entry.

    annotate (Callable): From a reader to chunks of `Annotated` and `Problem`.
    RETURNS (Result): The entry, or a failure if the shard cannot be read; then nothing is written.
    RAISES: SamError S813 if the output cannot be written.
    """
    folder = OutputFolder(Path(job.out), FORMATS[job.format].suffix)
    started = time.monotonic()
    reader = Reader(shard, text_field=job.text_field, vocab=vocab)
    try:
        state, digest = shard.state(), shard.digest()
        with whole_file(folder.output(shard.key)) as file:
            counts = _write(job, reader, file, plan, annotate, tell)
            if shard.state() != state:
                raise UnreadableError("it was changed while it was read")
    except (UnreadableError, OSError) as error:
        return Result(shard.key, failure=str(error))
    if shard.part and counts["problems"]:
        _number_from(counts["problems"], reader.first_line())
    output = folder.output(shard.key)
    entry = {
        "key": shard.key,
        "input": shard.path,
        "part": shard.part,
        "files": len(shard.files),
        "state": state,
        "sha256": digest,
        "plan": plan,
        "settings": job.settings,
        "output": output.relative_to(folder.path).as_posix(),
        "output_bytes": output.stat().st_size,
        **counts,
        "seconds": round(time.monotonic() - started, 3),
        "version": __version__,
    }
    write_json(folder.entry_path(shard.key), entry)
    return Result(shard.key, entry)


def _write(job: Job, reader: Reader, file: Any, plan: str, annotate: Any, tell: Tell) -> Dict[str, Any]:
    counts: Dict[str, Any] = {"documents": 0, "entities": 0, "malformed": 0, "failed": 0}
    problems: List[Dict[str, Any]] = []
    writer = FORMATS[job.format](file, plan)
    with closing(annotate(reader)) as chunks:
        for chunk in chunks:
            for item in chunk:
                problem = _count(counts, item)
                if problem and len(problems) < MAX_PROBLEMS:
                    problems.append({"place": item.place, "problem": problem})
                if isinstance(item, Annotated):
                    writer.write(item)
            tell(counts["documents"], counts["entities"], reader.position())
    writer.close()
    problems.sort(key=lambda problem: problem["place"])
    return {**counts, "problems": problems}


def _count(counts: Dict[str, Any], item: Any) -> Optional[str]:
    if isinstance(item, Problem):
        counts["malformed"] += 1
        return item.problem
    counts["documents"] += 1
    counts["entities"] += len(item.entities)
    counts["failed"] += item.error is not None
    return item.error


def _number_from(problems: List[Dict[str, Any]], first: int) -> None:
    """Lines counted from the beginning of the file, not of its part."""
    for problem in problems:
        problem["place"] += first - 1


def failure_of(error: BaseException) -> str:
    """What to say of an error that nobody foresaw."""
    return f"{type(error).__name__}: {error}"
