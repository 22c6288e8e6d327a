"""The lock that is pickled, copied and forked."""

import copy
import os
import pickle
import sys
import threading

import pytest

from spacy_sam.locks import ProcessLock

fork_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def is_free(lock: ProcessLock) -> bool:
    """Whether another thread gets it."""
    got = threading.Event()

    def take() -> None:
        with lock.held():
            got.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return got.wait(0.5)


def test_lock_excludes_other_threads_and_not_its_own():
    lock = ProcessLock()
    with lock.held(), lock.held():
        assert not is_free(lock)
    assert is_free(lock)


def test_lock_is_released_by_an_error():
    lock = ProcessLock()
    with pytest.raises(ValueError, match="inside"), lock.held():
        raise ValueError("inside")
    assert is_free(lock)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_lock_that_is_copied_is_a_free_one(copied):
    lock = ProcessLock()
    with lock.held():
        assert is_free(copied(lock))


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("by_itself", [True, False], ids=["own thread", "other thread"])
def test_lock_is_free_in_a_forked_process(by_itself):
    lock, release, taken = ProcessLock(), threading.Event(), threading.Event()

    def take() -> None:
        with lock.held():
            taken.set()
            release.wait(60)

    thread = threading.Thread(target=take, daemon=True)
    if not by_itself:
        thread.start()
        taken.wait(60)
        pid = fork(lock)
    else:
        with lock.held():
            pid = fork(lock)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        release.set()
    assert is_free(lock)


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_fork_waits_for_what_must_be_at_rest():
    """Not for its own thread, and not for other locks. The parent's threads go on afterwards."""
    locks = [ProcessLock(at_rest=True) for _ in range(3)]
    other, taken, working = ProcessLock(), threading.Event(), [True]

    def work() -> None:
        with locks[1].held(), other.held():
            taken.set()
            threading.Event().wait(0.5)
            working.clear()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    taken.wait(60)
    with locks[0].held():
        pid = os.fork()
        if not pid:
            os._exit(int(bool(working) or not all(map(is_free, [*locks, other]))))
        assert not is_free(locks[0])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread.join(60)
    assert all(map(is_free, [*locks, other]))


def fork(lock: ProcessLock) -> int:
    """A child that ends with 0 if the lock is free there, and with 1 if not. RETURNS (int): Its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = 0 if is_free(lock) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)
