import os
import select
import signal

import pytest

from shipd.serving.gate import Gate
from tests.support.gates import DEADLINE, NEW, OLD, Holder, Worker, eventually, swap


@pytest.fixture
def gate():
    return Gate(OLD)


def in_child(work):
    """Run ``work`` in a forked child; its exception's text, or ''."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  there is no one to raise it to
                os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], DEADLINE)
        return os.read(read, 65536).decode() if ready else "the child hangs"
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


forking = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@forking
def test_a_child_does_not_wait_for_threads_that_it_has_not(gate):
    # So that the swapping thread has this thread's lock when it forks.
    with gate.hold():
        pass
    holder = Holder(gate)
    swapper = Worker(lambda: swap(gate))
    eventually(lambda: not gate.hold().acquire(blocking=False) or gate.hold().release())

    def child():
        assert not gate.shut
        with gate.hold() as version:
            assert version == OLD
        assert swap(gate, commit_timeout=1.0).attempts == 1
        with gate.hold() as version:
            assert version == NEW

    assert in_child(child) == ""
    holder.leave.set()
    swapper.finish()


@forking
def test_a_child_forked_within_a_hold_leaves_it_properly(gate):
    def child():
        with gate.hold():
            pass

    with gate.hold():
        assert in_child(child) == ""

        def leave():
            gate.hold().__exit__(None, None, None)
            assert not gate.hold().owned()
            swap(gate)

        assert in_child(leave) == ""
    assert swap(gate).attempts == 1


@forking
def test_a_child_forked_in_the_middle_of_a_swap_is_fenced(gate):
    texts = []

    def child():
        with gate.hold():
            pass

    def action():
        forker = Worker(lambda: texts.append(in_child(child)))
        forker.finish()
        return NEW

    swap(gate, action)
    assert texts[0].startswith("Fenced: this process was forked in the middle of a swap")
    with gate.hold() as version:
        assert version == NEW


@forking
def test_a_child_forked_during_a_callback_has_the_new_version(gate):
    texts = []

    def child():
        with gate.hold() as version:
            assert version == NEW

    swap(gate, then=lambda _: Worker(lambda: texts.append(in_child(child))).finish())
    assert texts == [""]


@forking
def test_a_callback_may_fork(gate):
    texts = []

    def child():
        with gate.hold() as version:
            assert version == NEW

    swap(gate, then=lambda _: texts.append(in_child(child)))
    assert texts == [""]
    assert swap(gate).attempts == 1
