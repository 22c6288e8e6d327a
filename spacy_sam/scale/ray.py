"""Workers as Ray actors, on a cluster or a local Ray. They read and write shared paths; only names go over the network.

Ray Data is not used. It hands out rows, names its output files at random, by default writes them at the very end, and hangs
when actors leave no CPU for its own tasks (measured with Ray 2.60).
"""

import os
import socket
import time
from typing import Any, Dict, List, Optional, Tuple

from ..errors import SamError
from .job import Job, MakeWorker
from .readers import need
from .schedule import Event, set_up, work

POLL = 1.0  # seconds
ANSWER = 5.0  # seconds that a cluster has to take a connection
START = 300.0  # seconds that a cluster has to start the first worker
LOCAL_STORE = 100 << 20  # bytes; shards are passed by name, so there is next to nothing to store


class RayPool:
    """Actors with one CPU each, or one GPU each with a device."""

    def __init__(
        self,
        job: Job,
        make_worker: MakeWorker,
        *,
        n_workers: int,
        address: Optional[str] = None,
        device: Optional[str] = None,
        start_timeout: float = START,
    ) -> None:
        """address: Of a running cluster, as `ray.init` takes it; None for a Ray of our own on this machine.

        RAISES: SamError S814 without Ray, S815 if the cluster does not answer.
        """
        self._ray = need("ray", "ray", "ray", "--engine ray")
        self.job = job
        self.make_worker = make_worker
        self.device = device
        self.start_timeout = start_timeout
        self._actors: Dict[int, Any] = {}
        self._calls: Dict[Any, Tuple[int, str]] = {}  # reference -> worker, what was asked
        self._since: Optional[float] = None  # waiting for a first worker since then
        self._connect(address, n_workers)
        needs = {"num_gpus": 1} if device and device.startswith("cuda") else {"num_cpus": 1}
        self._actor = self._ray.remote(max_restarts=0, max_task_retries=0, **needs)(_Actor)

    def _connect(self, address: Optional[str], n_workers: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        settings: Dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "ignore_reinit_error": True}
        if address is None:
            # One CPU for each worker and one to spare, whatever the machine has: an actor that no CPU is left for never starts.
            settings.update(num_cpus=n_workers + 1, include_dashboard=False, object_store_memory=LOCAL_STORE)
            address = "local"
        else:
            _knock(address)
        try:
            self._ray.init(address=address, **settings)
        except Exception as error:
            raise SamError("S815", address=address, reason=error) from error

    def start(self, worker: int) -> None:
        """Ask for an actor; the "ready" event says when it can work."""
        actor = self._actor.remote(self.job, self.make_worker, self.device)
        self._actors[worker] = actor
        self._calls[actor.start.remote()] = (worker, "start")
        if self._since is None:
            self._since = time.monotonic()

    def send(self, worker: int, task: Tuple[Any, ...]) -> None:
        """Give a waiting actor a task."""
        self._calls[self._actors[worker].do.remote(task)] = (worker, "task")

    def events(self) -> List[Event]:
        """Answers of the actors, and which of them died. RAISES: SamError S816 if no worker was started in time."""
        done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=POLL)
        found = []
        for reference in done:
            worker, _ = self._calls.pop(reference)
            try:
                kind, value = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                del self._actors[worker]
                found.append(Event(worker, "died", _first_line(error)))
            else:
                found.append(Event(worker, kind, value))
        self._check_start(found)
        return found

    def _check_start(self, found: List[Event]) -> None:
        """Only a cluster that starts nobody is an error: with fewer workers than were asked for, work goes on."""
        if any(event.kind != "died" for event in found) or any(what == "task" for _, what in self._calls.values()):
            self._since = None
        elif self._since is not None and time.monotonic() - self._since > self.start_timeout:
            have = {name: n for name, n in self._ray.cluster_resources().items() if name in ("CPU", "GPU")}
            raise SamError("S816", reason=f"the cluster started none in {self.start_timeout:.0f} s; it has {have}")

    def close(self) -> None:
        """Leave the cluster, which ends our actors; a Ray of our own ends."""
        self._actors.clear()
        self._calls.clear()
        self._ray.shutdown()


class _Actor:
    """A worker in an actor. Ray makes it, so what goes wrong there is said by `start`."""

    def __init__(self, job: Job, make_worker: MakeWorker, device: Optional[str]) -> None:
        self._given = (make_worker, job, device)
        self._worker: Any = None

    def start(self) -> Tuple[str, Any]:
        try:
            self._worker = set_up(*self._given)
        except SamError as error:
            return "error", error
        return "ready", None

    def do(self, task: Tuple[Any, ...]) -> Tuple[str, Any]:
        return work(self._worker, task, lambda *counts: None)


def _knock(address: str) -> None:
    """RAISES: SamError S815 if nobody listens at `[ray://]host:port`. Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except OSError as error:
        raise SamError("S815", address=address, reason=error) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
