import functools
import sys
import threading

import pytest

from shipd.errors import SwapFailed
from shipd.serving.gate import Gate
from tests.support.gates import DEADLINE, NEW, OLD, Worker, eventually, swap


@pytest.fixture
def gate():
    return Gate(OLD)


class Stack:
    """Stands in for torch's stack frames: which threads are inside how many calls."""

    def __init__(self):
        self.calls = {}
        self.doubtful = set()

    def find(self, frame, _module):
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
        thread = next((i for i, f in sys._current_frames().items() if self.root(f) is frame), None)
        return self.calls.get(thread, 0), thread in self.doubtful

    @staticmethod
    def root(frame):
        while frame.f_back is not None:
            frame = frame.f_back
        return frame


def test_forwards_hold_and_nest(gate):
    slot = gate.hold()
    gate.enter_forward(gate)
    assert slot.forward.owned()
    swapper = Worker(lambda: swap(gate))
    eventually(lambda: gate.shut)
    # Neither a forward within a forward nor a hold within one may wait for the swap that waits for them.
    gate.enter_forward(gate)
    with gate.hold() as version:
        assert version == OLD
    gate.leave_forward()
    assert gate.version == OLD
    gate.leave_forward()
    swapper.finish()
    assert not slot.forward.owned()


def test_a_forward_within_a_hold_needs_none_of_its_own(gate):
    with gate.hold():
        gate.enter_forward(gate)
        assert not gate.hold().forward.owned()
        gate.leave_forward()
    assert swap(gate).attempts == 1


def test_leaving_without_having_entered_is_harmless(gate):
    gate.leave_forward()
    with gate.hold():
        gate.leave_forward()
        assert gate.hold().owned()
    gate.leave_forward()
    assert swap(gate).attempts == 1


def test_a_forward_that_goes_on_is_never_taken_for_stale():
    stack = Stack()
    gate = Gate(OLD, calls=stack.find)
    entered, leave = threading.Event(), threading.Event()

    def forward(doubtful):
        if doubtful:
            stack.doubtful.add(threading.get_ident())
        else:
            stack.calls[threading.get_ident()] = 1
        gate.enter_forward(gate)
        entered.set()
        assert leave.wait(DEADLINE)
        gate.leave_forward()

    for doubtful in (True, False):
        entered.clear()
        leave.clear()
        worker = Worker(functools.partial(forward, doubtful), "long forward")
        assert entered.wait(DEADLINE)
        with pytest.raises(SwapFailed, match="long forward"):
            swap(gate, commit_timeout=0.1)
        leave.set()
        worker.finish()


def test_a_stale_forward_of_an_idle_thread_does_not_delay_a_swap_for_long():
    stack = Stack()
    gate = Gate(OLD, calls=stack.find)
    left, go = threading.Event(), threading.Event()
    results = []

    def work():
        me = threading.get_ident()
        stack.calls[me] = 1
        gate.enter_forward(gate)
        stack.calls[me] = 0  # as if a KeyboardInterrupt had ended it
        left.set()
        assert go.wait(DEADLINE)
        with gate.hold() as version:
            results.append(version)
        stack.calls[me] = 1
        gate.enter_forward(gate)
        results.append(gate.version)
        assert gate.hold().forward.owned()
        gate.leave_forward()
        stack.calls[me] = 0
        assert not gate.hold().forward.owned()

    worker = Worker(work)
    assert left.wait(DEADLINE)

    def action():
        # Its next hold must wait for this swap although its lock was never released.
        go.set()
        eventually(lambda: len(gate._waiting) == 1)
        return NEW

    assert swap(gate, action).wait_seconds < 5
    worker.finish()
    assert results == [NEW, NEW]
    assert swap(gate).attempts == 1


def test_a_stale_forward_is_reclaimed_at_the_threads_next_forward():
    stack = Stack()
    gate = Gate(OLD, calls=stack.find)
    stack.calls[threading.get_ident()] = 1
    for _ in range(3):
        gate.enter_forward(gate)  # never left, as after a KeyboardInterrupt
    gate.leave_forward()
    assert not gate.hold().forward.owned()


def test_a_judgement_ends_with_the_forward_that_it_was_about():
    """A forward judged stale, then ended by a post hook that came without its pre-hook: the next one is a new one."""
    stack = Stack()
    gate = Gate(OLD, calls=stack.find)
    steps = [threading.Event() for _ in range(4)]

    def work():
        gate.enter_forward(gate)
        steps[0].set()
        assert steps[1].wait(DEADLINE)
        gate.leave_forward()
        stack.calls[threading.get_ident()] = 1
        gate.enter_forward(gate)
        stack.calls[threading.get_ident()] = 2
        gate.enter_forward(gate)
        gate.leave_forward()
        steps[2].set()
        assert steps[3].wait(DEADLINE)
        gate.leave_forward()

    worker = Worker(work)
    assert steps[0].wait(DEADLINE)
    swap(gate)
    steps[1].set()
    assert steps[2].wait(DEADLINE)
    with pytest.raises(SwapFailed, match="worker"):
        swap(gate, commit_timeout=0.1)
    steps[3].set()
    worker.finish()


def test_a_thread_judged_stale_waits_even_where_its_stack_is_doubtful():
    """The swapping thread has stopped waiting for it, so it must not slip past as if it were nested."""
    stack = Stack()
    gate = Gate(OLD, calls=stack.find)
    left, go = threading.Event(), threading.Event()

    def work():
        gate.enter_forward(gate)
        left.set()
        assert go.wait(DEADLINE)
        stack.doubtful.add(threading.get_ident())
        gate.enter_forward(gate)
        version = gate.version
        gate.leave_forward()
        return version

    worker = Worker(work)
    assert left.wait(DEADLINE)

    def action():
        go.set()
        eventually(lambda: len(gate._waiting) == 1)
        return NEW

    swap(gate, action)
    assert worker.finish() == NEW
