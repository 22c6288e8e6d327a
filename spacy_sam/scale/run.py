"""Apply a pipeline to a corpus: what is there, what is left to do, one plan, workers, what came of it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..errors import SamError
from ..plan import Plan, fingerprint
from .folder import OutputFolder
from .job import Job, MakeWorker, PipelineSpec, Result
from .readers import need
from .sample import draw_texts
from .schedule import Pool, Schedule, Tally
from .shards import Shard, find_shards
from .worker import make_worker as make_pipeline_worker
from .writers import FORMATS, check_format

ENGINES = ("local", "ray")
FOR_THE_PLAN = ("pipeline", "labels", "text_field", "sample")  # settings that decide what is selected
SHOWN = 5  # differences in a message


@dataclass(frozen=True)
class Settings:
    """How to annotate a corpus.

    spec: The pipeline.
    format: Of the outputs; one of `writers.FORMATS`.
    plan: File of a plan; None: that of the output folder, or of the saved pipeline, or one selected on a sample.
    sample_size, seed: Texts that selection looks at, drawn from all over the corpus.
    text_field: Where the text is, in JSONL and Parquet.
    txt: "lines", "files" or "auto"; see `shards.find_shards`.
    shard_size: Divide larger uncompressed files into parts of so many bytes.
    engine: "local" or "ray".
    n_process: Workers; None for one a device.
    devices: Where models go; workers take them in turn. With Ray, one: "cuda" gives each worker a GPU.
    address: Of a Ray cluster; None for a Ray of our own.
    retries: How often a shard is done again when a worker died over it.
    overwrite: Make the output folder what this run says: remove what differs, and what belongs to other inputs.
    """

    spec: PipelineSpec = field(default_factory=PipelineSpec)
    format: str = "jsonl"
    plan: Optional[Path] = None
    sample_size: int = 100
    seed: int = 0
    text_field: str = "text"
    txt: str = "auto"
    shard_size: Optional[int] = None
    engine: str = "local"
    n_process: Optional[int] = None
    devices: Tuple[str, ...] = ()
    address: Optional[str] = None
    retries: int = 2
    overwrite: bool = False


class Prepared(NamedTuple):
    """What is known of a pipeline before any weights are loaded.

    identity: What tells it from others, besides the plan.
    plan: The plan that it brings along.
    check: Raises SamError for a plan that is not for it.
    """

    identity: Dict[str, Any]
    plan: Optional[Plan]
    check: Callable[[Plan], None]


@dataclass(frozen=True)
class Summary:
    """What an output folder holds after a run. `problems` are malformed lines, failed documents and unreadable shards."""

    plan: Plan
    shards: int
    skipped: int
    documents: int
    entities: int
    malformed: int
    failed: int
    unreadable: int
    seconds: float
    problems: Optional[Path] = None

    @property
    def all_well(self) -> bool:
        return not (self.malformed or self.failed or self.unreadable)


def prepare_pipeline(spec: PipelineSpec) -> Prepared:
    """Load a pipeline without its weights, and see what it is."""
    from .pipeline import load_pipeline, own_plan, pipeline_hash

    nlp, sam = load_pipeline(spec)
    identity: Dict[str, Any] = {"labels": dict(sam.cfg["labels"]), "max_length": nlp.max_length}
    identity["pipeline"] = pipeline_hash(nlp) if spec.pipeline else "blank"
    return Prepared(identity, own_plan(sam) if spec.pipeline else None, sam.parts.bank.check_plan)


def apply_corpus(
    inputs: Sequence[Path],
    out: Path,
    settings: Settings,
    *,
    tally: Optional[Tally] = None,
    on_start: Callable[[List[Shard], List[Shard]], None] = lambda shards, todo: None,
    prepare: Callable[[PipelineSpec], Prepared] = prepare_pipeline,
    make_worker: MakeWorker = make_pipeline_worker,
) -> Summary:
    """Annotate a corpus; one output file for each shard. What an earlier run has finished is kept.

    inputs (Sequence[Path]): Files, folders and glob patterns.
    out (Path): The output folder; see `folder.OutputFolder`.
    settings (Settings): How.
    tally (Optional[Tally]): Told of progress.
    on_start (Callable): Told of all shards, and of those that are to be done.
    prepare, make_worker: Other than the pipeline, for tests.
    RETURNS (Summary): What the folder holds now.
    RAISES: SamError S810 to S818, and those of selection and of the bank. What was finished stays.
    """
    started = time.monotonic()
    _check(settings)
    shards = find_shards(inputs, out, shard_size=settings.shard_size, txt=settings.txt)
    _check_packages(shards)
    folder = OutputFolder(out, FORMATS[settings.format].suffix)
    folder.check_names(shards)
    prepared = prepare(settings.spec)
    run = _Run(folder, shards, settings, prepared)
    with folder.locked():
        todo = run.settle()
        on_start(shards, todo)
        results: List[Result] = []
        if todo:
            results = run.work(todo, tally or Tally(), make_worker)
        return run.summary(todo, results, time.monotonic() - started)


def _check(settings: Settings) -> None:
    check_format(settings.format)
    if settings.engine not in ENGINES:
        raise SamError("S802", problem=f"Unknown --engine '{settings.engine}'. Use one of {', '.join(ENGINES)}.")
    if settings.address and settings.engine != "ray":
        raise SamError("S802", problem="--address is of a Ray cluster: use it with --engine ray.")
    if settings.engine == "ray":
        need("ray", "ray", "ray", "--engine ray")
        if len(settings.devices) > 1:
            raise SamError(
                "S802", problem="With --engine ray, give one --device: Ray gives each worker a GPU of its own."
            )


def _check_packages(shards: Sequence[Shard]) -> None:
    """RAISES: SamError S814 for files that need a package which is not there."""
    for shard in shards:
        if shard.kind == "parquet":
            need("pyarrow.parquet", "pyarrow", "parquet", shard.path)
        elif shard.suffix.endswith(".zst"):
            need("zstandard", "zstandard", "zst", shard.path)


class _Run:
    """The steps of `apply_corpus` behind its checks."""

    def __init__(self, folder: OutputFolder, shards: List[Shard], settings: Settings, prepared: Prepared) -> None:
        self.folder = folder
        self.shards = shards
        self.settings = settings
        self.prepared = prepared
        self.plan = self._given_plan()
        sample = None if self.plan else {"size": settings.sample_size, "seed": settings.seed}
        self.described = {
            **prepared.identity,
            "format": settings.format,
            "text_field": settings.text_field,
            "sample": sample,
        }
        self.fingerprint = fingerprint({name: value for name, value in self.described.items() if name != "sample"})

    def _given_plan(self) -> Optional[Plan]:
        plan = Plan.from_disk(self.settings.plan) if self.settings.plan else self.prepared.plan
        if plan is not None:
            self.prepared.check(plan)
        return plan

    # What is there

    def settle(self) -> List[Shard]:
        """Compare the output folder with this run. RETURNS: The shards that are to be done. RAISES: SamError S811."""
        stored, stored_plan = self.folder.settings() or {}, self.folder.plan()
        same = all(name in stored and not _differ(name, stored[name], self.described[name]) for name in FOR_THE_PLAN)
        differences = _settings_differ(stored, self.described)
        keys = self.folder.keys()
        if self.plan is None and stored_plan is not None and (same or not self.settings.overwrite):
            self.prepared.check(stored_plan)
            self.plan = stored_plan
        elif keys and stored_plan is None:
            differences.append("its plan.json is missing")
        elif self.plan is not None and stored_plan is not None and stored_plan.fingerprint != self.plan.fingerprint:
            differences.append(f"plan (was {stored_plan.fingerprint}, is {self.plan.fingerprint})")
        self._refuse(differences if keys else [])
        stale = self._stale(keys)
        self._refuse([difference for _, difference in stale])
        for key, _ in stale:
            self.folder.remove(key)
        self.folder.write_settings(self.described)
        if self.plan is not None:
            self.folder.write_plan(self.plan)
        return [shard for shard in self.shards if self.folder.entry(shard.key) is None]

    def _refuse(self, differences: Sequence[str]) -> None:
        if differences and not self.settings.overwrite:
            more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            raise SamError("S811", path=self.folder.path, differences="; ".join(differences[:SHOWN]) + more)

    def _stale(self, keys: Sequence[str]) -> List[Tuple[str, str]]:
        """Finished shards that are not of this run, and why."""
        ours = {shard.key: shard for shard in self.shards}
        found = []
        for key in keys:
            if key not in ours:
                found.append((key, f"{key}: output of an input that is not given now"))
                continue
            entry = self.folder.entry(key)
            difference = self._difference(entry, ours[key]) if entry is not None else None
            if difference:
                found.append((key, f"{key}: {difference}"))
        return found

    def _difference(self, entry: Dict[str, Any], shard: Shard) -> Optional[str]:
        if entry.get("settings") != self.fingerprint:
            return "made with other settings"
        if self.plan is None or entry.get("plan") != self.plan.fingerprint:
            return "made by another plan"
        try:
            same_state = entry.get("state") == shard.state()
            changed = not same_state and entry.get("sha256") != shard.digest()
        except OSError:
            changed = True
        part = list(shard.part) if shard.part else None
        if changed or entry.get("part") != part:
            return "the input has changed"
        return None

    # What is to be done

    def work(self, todo: List[Shard], tally: Tally, make_worker: MakeWorker) -> List[Result]:
        """Choose a plan if there is none, and do all shards."""
        texts = [] if self.plan else self._sample()
        job = Job(
            self.settings.spec,
            out=str(self.folder.path.resolve()),
            format=self.settings.format,
            text_field=self.settings.text_field,
            settings=self.fingerprint,
        )
        n_workers = self.settings.n_process or max(1, len(self.settings.devices))
        pool = self._pool(job, make_worker, n_workers)
        try:
            schedule = Schedule(pool, n_workers, self.settings.retries, tally)
            if self.plan is None:
                self.plan = Plan.from_dict(schedule.select(texts))
                self.folder.write_plan(self.plan)
            return schedule.run(todo, self.plan.to_dict())
        finally:
            pool.close()

    def _sample(self) -> List[str]:
        texts = draw_texts(self.shards, self.settings.sample_size, self.settings.seed, self.settings.text_field)
        if not texts:
            raise SamError("S801", path=", ".join(sorted({shard.path for shard in self.shards})[:SHOWN]))
        return texts

    def _pool(self, job: Job, make_worker: MakeWorker, n_workers: int) -> Pool:
        devices: Tuple[Optional[str], ...] = self.settings.devices or (None,)
        if self.settings.engine == "ray":
            from .ray import RayPool

            address = self.settings.address
            return RayPool(job, make_worker, n_workers=n_workers, address=address, device=devices[0])
        from .local import LocalPool

        return LocalPool(job, make_worker, devices)

    # What came of it

    def summary(self, todo: Sequence[Shard], results: Sequence[Result], seconds: float) -> Summary:
        """Count what the folder holds, and write the list of problems."""
        failures = {result.key: result.failure for result in results if result.failure}
        totals = dict.fromkeys(("documents", "entities", "malformed", "failed"), 0)
        problems: List[Dict[str, Any]] = []
        for shard in self.shards:
            if shard.key in failures:
                problems.append({"input": shard.path, "place": None, "problem": failures[shard.key]})
                continue
            entry = self.folder.entry(shard.key) or {}
            for name in totals:
                totals[name] += entry.get(name, 0)
            problems += [{"input": shard.path, **problem} for problem in entry.get("problems", [])]
        assert self.plan is not None
        return Summary(
            plan=self.plan,
            shards=len(self.shards),
            skipped=len(self.shards) - len(todo),
            unreadable=len(failures),
            seconds=seconds,
            problems=self.folder.write_problems(problems),
            **totals,
        )


def _settings_differ(stored: Dict[str, Any], described: Dict[str, Any]) -> List[str]:
    return [
        f"{name} (was {stored[name]}, is {described[name]})"
        for name in described
        if name in stored and _differ(name, stored[name], described[name])
    ]


def _differ(name: str, stored: Any, given: Any) -> bool:
    """A sample matters where a plan is selected, and a plan that is given is compared itself."""
    if name == "sample" and None in (stored, given):
        return False
    return stored != given
