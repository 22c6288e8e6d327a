"""A lock for what spaCy pickles, copies and forks."""

import os
import threading
import weakref
from contextlib import contextmanager
from typing import Any, Iterator, List, Tuple, Type


class ProcessLock:
    """A re-entrant lock between the threads of one process.

    A forked process has a free one, whoever held it at the fork: that thread is not in the new process. So is a pickled or
    copied one.
    """

    def __init__(self, at_rest: bool = False) -> None:
        """at_rest: A fork waits until no other thread holds it, so that the new process has nothing half done.

        It is for models: a library that runs one may hold locks of its own, which a new process would wait for forever. Who holds
        such a lock must not wait for another of its kind.
        """
        self._at_rest = at_rest
        self._lock = threading.RLock()
        _LOCKS.add(self)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock, and hold it in a `with` block. What is released is what was taken, even if the block forked."""
        with self._lock:
            yield

    def __reduce__(self) -> Tuple[Type["ProcessLock"], Tuple[bool]]:
        return ProcessLock, (self._at_rest,)


_LOCKS: "weakref.WeakSet[ProcessLock]" = weakref.WeakSet()
_forking = threading.local()


def _before_fork() -> None:
    # In one order, so that two threads that fork do not wait for each other.
    waiting = sorted((lock for lock in list(_LOCKS) if lock._at_rest), key=id)
    taken: List[Any] = []
    for lock in waiting:
        taken.append(lock._lock)
        lock._lock.acquire()
    _forking.taken = taken


def _after_in_parent() -> None:
    for taken in _forking.taken:
        taken.release()


def _after_in_child() -> None:
    for lock in list(_LOCKS):
        lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
