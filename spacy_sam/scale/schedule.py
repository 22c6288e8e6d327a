"""Hands shards to workers, one at a time, and replaces workers that die. Knows neither processes nor Ray."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from ..errors import SamError
from .job import Job, MakeWorker, Result
from .shards import Shard
from .worker import failure_of

logger = logging.getLogger("spacy_sam")
DEAD_STARTS = 3  # workers in a row that die before they are ready


class Event(NamedTuple):
    """What a worker says: "ready", "plan" (JSON), "progress" (documents, entities, bytes), "result", "error" or "died"."""

    worker: int
    kind: str
    value: Any = None


class Pool(Protocol):
    """Workers, by number."""

    def start(self, worker: int) -> None:
        """Start one."""

    def send(self, worker: int, task: Tuple[Any, ...]) -> None:
        """Give one that waits its next task: ("select", texts) or ("run", shard, plan)."""

    def events(self) -> List[Event]:
        """Wait for something to happen, a few seconds at most."""

    def close(self) -> None:
        """End all of them at once."""


@dataclass
class Tally:
    """Told of all that happens, for progress bars."""

    on_progress: Callable[[str, int, int, int], None] = lambda key, documents, entities, size: None
    on_result: Callable[[Result], None] = lambda result: None
    on_retry: Callable[[str, str], None] = lambda key, reason: None


class Schedule:
    """One run over some shards."""

    def __init__(self, pool: Pool, n_workers: int, retries: int, tally: Tally) -> None:
        """retries: How often a shard is given to another worker when one died over it."""
        self.pool = pool
        self.n_workers = n_workers
        self.retries = retries
        self.tally = tally
        self._idle: Deque[int] = deque()
        self._busy: Dict[int, Optional[Shard]] = {}  # None: a worker that selects
        self._next = 0
        self._starting: set = set()
        self._dead_starts = 0

    def select(self, texts: List[str]) -> Dict[str, Any]:
        """Let one worker choose the plan. RAISES: SamError as `SamNer.select` does, S816 if the worker dies over it."""
        self._start_one()
        while not self._idle:
            self._handle_starts(self.pool.events())
        worker = self._idle.popleft()
        self._busy[worker] = None
        self.pool.send(worker, ("select", texts))
        while True:
            for event in self.pool.events():
                if event.kind == "error":
                    raise event.value
                if event.kind == "died":
                    raise SamError("S816", reason=f"the one that selected experts died ({event.value})")
                if event.kind == "plan":
                    del self._busy[worker]
                    self._idle.append(worker)
                    return event.value

    def run(self, shards: Sequence[Shard], plan: Dict[str, Any]) -> List[Result]:
        """Get all shards done. The largest go first, so that the last ones to end are small.

        RETURNS (List[Result]): One for each shard, in the order in which they ended.
        RAISES: SamError that a worker raised, S816 if no worker can be started.
        """
        todo = deque(sorted(shards, key=lambda shard: (-shard.size(), shard.key)))
        tries = {shard.key: 0 for shard in shards}
        results: List[Result] = []
        while len(results) < len(tries):
            self._fill(len(todo))
            while todo and self._idle:
                worker, shard = self._idle.popleft(), todo.popleft()
                self._busy[worker] = shard
                self.pool.send(worker, ("run", shard, plan))
            for event in self.pool.events():
                result = self._handle(event, todo, tries)
                if result is not None:
                    self.tally.on_result(result)
                    results.append(result)
        return results

    def _fill(self, n_waiting: int) -> None:
        """Start workers while there are shards that wait for one."""
        alive = len(self._idle) + len(self._busy) + len(self._starting)
        wanted = min(self.n_workers, n_waiting + len(self._busy))
        for _ in range(wanted - alive):
            self._start_one()

    def _start_one(self) -> None:
        self._starting.add(self._next)
        self.pool.start(self._next)
        self._next += 1

    def _handle_starts(self, events: List[Event]) -> None:
        for event in events:
            self._handle(event, deque(), {})
        if not self._starting and not self._idle:
            self._start_one()

    def _handle(self, event: Event, todo: Deque[Shard], tries: Dict[str, int]) -> Optional[Result]:
        if event.kind == "error":
            raise event.value
        if event.kind == "ready":
            self._starting.discard(event.worker)
            self._dead_starts = 0
            self._idle.append(event.worker)
        elif event.kind == "progress":
            shard = self._busy.get(event.worker)
            if shard is not None:
                self.tally.on_progress(shard.key, *event.value)
        elif event.kind == "result":
            del self._busy[event.worker]
            self._idle.append(event.worker)
            return event.value
        elif event.kind == "died":
            return self._bury(event, todo, tries)
        return None

    def _bury(self, event: Event, todo: Deque[Shard], tries: Dict[str, int]) -> Optional[Result]:
        """A worker died: its shard waits again, or is given up. RAISES: SamError S816 if workers die as they start."""
        if event.worker in self._starting:
            self._starting.discard(event.worker)
            self._dead_starts += 1
            if self._dead_starts == DEAD_STARTS:
                raise SamError("S816", reason=f"{DEAD_STARTS} died before they were ready ({event.value})")
            return None
        if event.worker in self._idle:
            self._idle.remove(event.worker)
            return None
        shard = self._busy.pop(event.worker)
        assert shard is not None
        tries[shard.key] += 1
        reason = f"a worker died over it ({event.value})"
        if tries[shard.key] > self.retries:
            return Result(
                shard.key, failure=f"{reason}, as {tries[shard.key]} did; if memory ran out, use fewer workers"
            )
        logger.warning("%s: %s; it is done again", shard.key, reason)
        self.tally.on_retry(shard.key, reason)
        todo.append(shard)
        return None


def work(worker: Any, task: Tuple[Any, ...], tell: Callable[[int, int, int], None]) -> Tuple[str, Any]:
    """Do one task in a worker's process. RETURNS (Tuple[str, Any]): The kind and the value of the event that it ends with."""
    try:
        if task[0] == "select":
            return "plan", worker.select(task[1])
        return "result", worker.run(task[1], task[2], tell)
    except (SamError, BrokenPipeError) as error:
        return "error", error
    except Exception as error:
        if task[0] == "select":
            return "error", SamError("S816", reason=f"selection failed with {failure_of(error)}")
        logger.exception("%s failed", task[1].key)
        return "result", Result(task[1].key, failure=failure_of(error))


def set_up(make_worker: MakeWorker, job: Job, device: Optional[str]) -> Any:
    """Make a worker in its process. RAISES: SamError, S816 for any other error."""
    try:
        return make_worker(job, device)
    except SamError:
        raise
    except Exception as error:
        raise SamError("S816", reason=f"it failed with {failure_of(error)}") from error
