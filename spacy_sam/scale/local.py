"""Workers as processes of this machine, one torch thread each, spawned."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection, wait
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, cast

from ..errors import SamError
from .job import Job, MakeWorker
from .schedule import Event, set_up, work

POLL = 1.0  # seconds
PATIENCE = 5.0  # seconds that workers have to end by themselves


class _Process(NamedTuple):
    process: Any
    connection: Connection


class LocalPool:
    """Spawned processes, each with a pipe. They end when this process does, however it does."""

    def __init__(self, job: Job, make_worker: MakeWorker, devices: Sequence[Optional[str]] = (None,)) -> None:
        """devices: Given to the workers in turn."""
        self.job = job
        self.make_worker = make_worker
        self.devices = devices
        self._context = multiprocessing.get_context("spawn")
        self._processes: Dict[int, _Process] = {}
        self._places: Dict[int, int] = {}  # worker -> index of its device

    def start(self, worker: int) -> None:
        """Start a process; the "ready" event says when it can work."""
        ours, theirs = self._context.Pipe()
        place = min(range(len(self.devices)), key=list(self._places.values()).count)
        arguments = (theirs, self.job, self.make_worker, self.devices[place])
        process = self._context.Process(target=_serve, args=arguments, name=f"sam-apply-{worker}", daemon=True)
        with _ONE_THREAD:
            process.start()
        theirs.close()  # so that our end sees the end of the process
        self._processes[worker] = _Process(process, ours)
        self._places[worker] = place

    def send(self, worker: int, task: Tuple[Any, ...]) -> None:
        """Give a waiting worker a task. If it is dead, `events` says so."""
        try:
            self._processes[worker].connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            return

    def events(self) -> List[Event]:
        """What the workers say, and which of them died."""
        by_connection = {entry.connection: worker for worker, entry in self._processes.items()}
        found = []
        for connection in cast(List[Connection], wait(list(by_connection), timeout=POLL)):
            worker = by_connection[connection]
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                found.append(Event(worker, "died", self._end_of(worker)))
            else:
                found.append(Event(worker, kind, value))
        return found

    def _end_of(self, worker: int) -> str:
        """Wait for a dead worker. RETURNS (str): What it died of."""
        process, connection = self._processes.pop(worker)
        del self._places[worker]
        connection.close()
        process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def close(self) -> None:
        """End all of them; those that are in the middle of work are killed. Half-written files are not under their names yet."""
        for _, connection in self._processes.values():
            connection.close()  # a waiting worker ends by that
        last = time.monotonic() + PATIENCE
        for process, _ in self._processes.values():
            process.join(max(0.0, last - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        self._processes.clear()
        self._places.clear()


class _OneThread:
    """While processes start: libraries in them use one thread each, which they read when they are loaded."""

    NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self.NAMES}
        os.environ.update({name: "false" if name.startswith("TOKENIZERS") else "1" for name in self.NAMES})

    def __exit__(self, *_: Any) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_ONE_THREAD = _OneThread()


def _serve(connection: Connection, job: Job, make_worker: MakeWorker, device: Optional[str]) -> None:
    """The worker's process: make the worker, then a task at a time, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends us
    try:
        try:
            worker = set_up(make_worker, job, device)
        except SamError as error:
            connection.send(("error", error))
            return
        connection.send(("ready", None))
        while True:
            task = connection.recv()
            connection.send(work(worker, task, lambda *counts: connection.send(("progress", counts))))
    except (EOFError, ConnectionError):  # the parent is gone
        return
