"""A lock for what spaCy pickles, copies and forks."""

import os
import threading
import weakref
from contextlib import contextmanager
from typing import Iterator, Tuple, Type


class ProcessLock:
    """A re-entrant lock between the threads of one process.

    A forked process has a free one, whoever held it at the fork: that thread is not in the new process. So is a pickled or
    copied one.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock, and hold it in a `with` block. What is released is what was taken, even if the block forked."""
        with self._lock:
            yield

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = threading.RLock()

    def __reduce__(self) -> Tuple[Type["ProcessLock"], Tuple[()]]:
        return ProcessLock, ()


_LOCKS: "weakref.WeakSet[ProcessLock]" = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_LOCKS):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
