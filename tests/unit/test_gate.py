import functools
import gc
import threading
import time
import timeit

import pytest

from shipd.errors import Fenced, SwapFailed
from shipd.serving.gate import Gate
from shipd.serving.version import Version
from tests.support.gates import DEADLINE, NEW, OLD, Holder, Worker, enter, eventually, interrupts, swap


@pytest.fixture
def gate():
    return Gate(OLD)


# Holding and swapping -------------------------------------------------------------------------------------------


def test_a_hold_yields_the_version(gate):
    with gate.hold() as version:
        assert version == OLD
        with gate.hold() as inner:
            assert inner is version
    pause = swap(gate)
    assert (pause.attempts, gate.version) == (1, NEW)
    assert 0 <= pause.wait_seconds <= pause.pause_seconds < DEADLINE
    with gate.hold() as version:
        assert version == NEW


def test_a_hold_is_per_thread_and_reusable(gate):
    hold = gate.hold()
    assert gate.hold() is hold
    for _ in range(3):
        with hold:
            pass
    assert not hold.owned()
    assert Worker(gate.hold).finish() is not hold


def test_a_hold_of_another_thread_is_refused(gate):
    hold = gate.hold()

    def steal():
        with hold:
            pass

    with pytest.raises(RuntimeError, match="in every thread"):
        Worker(steal).finish()
    assert swap(gate).attempts == 1


def test_a_swap_waits_for_holders_and_new_holds_wait_for_the_swap(gate):
    first = Holder(gate)
    swapper = Worker(lambda: swap(gate))
    eventually(lambda: gate.shut)
    second = Worker(lambda: enter(gate))
    eventually(lambda: len(gate._waiting) == 1)
    assert gate.version == OLD
    first.leave.set()
    assert first.finish() == (OLD, OLD)
    pause = swapper.finish()
    assert 0 < pause.wait_seconds <= pause.pause_seconds
    assert second.finish() == NEW


def test_a_thread_that_holds_is_never_blocked(gate):
    entered, go = threading.Event(), threading.Event()

    def nest():
        with gate.hold():
            entered.set()
            assert go.wait(DEADLINE)
            with gate.hold() as one, gate.hold() as two:
                return one, two

    nested = Worker(nest)
    assert entered.wait(DEADLINE)
    swapper = Worker(lambda: swap(gate))
    eventually(lambda: gate.shut)
    go.set()
    assert nested.finish() == (OLD, OLD)
    swapper.finish()


def test_readers_see_no_mix_and_cannot_starve_a_swap(gate):
    parts = [0, 0]
    stop = threading.Event()
    seen = [0] * 8

    def read(index):
        while not stop.is_set():
            with gate.hold() as version:
                first = parts[0]
                if seen[index] % 7 == 0:
                    time.sleep(0)
                assert (first, parts[1]) == (parts[0], first)
                assert version.label == ("old" if not first else str(first))
            seen[index] += 1

    readers = [Worker(functools.partial(read, index), f"reader {index}") for index in range(8)]
    for number in range(1, 1001):

        def action(number=number):
            parts[0] = number
            if number % 5 == 0:
                time.sleep(0)
            parts[1] = number
            return Version(str(number), "")

        assert swap(gate, action).attempts == 1
    stop.set()
    for reader in readers:
        reader.finish()
    assert min(seen) > 0


def test_threads_that_come_for_the_first_time_during_a_swap_wait(gate):
    latecomers: list[Worker] = []

    def action():
        latecomers.extend(Worker(lambda: enter(gate)) for _ in range(5))
        eventually(lambda: len(gate._waiting) == 5)
        return NEW

    swap(gate, action)
    assert [worker.finish() for worker in latecomers] == [NEW] * 5


def test_what_the_action_raises_comes_out_and_the_gate_opens(gate):
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        swap(gate, fail)
    assert not gate.shut
    with gate.hold() as version:
        assert version == OLD
    assert swap(gate).attempts == 1


def test_the_swapping_thread_must_not_hold(gate):
    with gate.hold(), pytest.raises(RuntimeError, match="holds the gate itself"):
        swap(gate)
    assert not gate.shut


def test_a_callback_holds_while_others_wait(gate):
    waiting = []
    seen = []

    def then(version):
        with gate.hold() as held, gate.hold():
            seen.append((version, held))
        gate.enter_forward(gate)
        gate.leave_forward()
        waiting.append(Worker(lambda: enter(gate)))
        eventually(lambda: len(gate._waiting) == 1)

    swap(gate, then=then)
    assert seen == [(NEW, NEW)]
    assert waiting[0].finish() == NEW
    assert not gate.hold().owned()


def test_a_callback_cannot_fail_the_swap(gate, caplog):
    def then(_):
        raise ValueError("callback")

    swap(gate, then=then)
    assert gate.version == NEW
    assert "callback" in caplog.text


# Limits -----------------------------------------------------------------------------------------------------------


def test_a_straggler_fails_the_swap_by_name(gate):
    holder = Holder(gate, "slow generation")
    with pytest.raises(SwapFailed, match=r"at least [\d.]+ s: slow generation\."):
        swap(gate, commit_timeout=0.1, max_hold=1.0)
    assert gate.version == OLD
    assert not gate.shut
    holder.leave.set()
    assert holder.finish() == (OLD, OLD)
    assert swap(gate).attempts == 1


def test_new_holds_wait_no_longer_than_max_hold(gate):
    holder = Holder(gate)
    swapper = Worker(lambda: swap(gate, max_hold=0.02))
    # Both get in while the straggler still holds, because the gate reopens and lets those in who waited.
    for _ in range(2):
        eventually(lambda: gate.shut)
        assert Worker(lambda: enter(gate)).finish() == OLD
    holder.leave.set()
    pause = swapper.finish()
    assert pause.attempts > 1
    assert pause.pause_seconds < 10.0
    assert gate.version == NEW


# Fencing ----------------------------------------------------------------------------------------------------------


def test_a_fence_refuses_new_holds_and_lets_old_ones_finish(gate):
    with gate.hold():
        gate.fence("stale")
        with gate.hold() as version:
            assert version == OLD
    for _ in range(2):
        with pytest.raises(Fenced, match="stale"), gate.hold():
            pass
    with pytest.raises(Fenced, match="stale"):
        gate.enter_forward(gate)
    assert not gate.hold().owned()
    assert not gate.hold().forward.owned()
    swap(gate)
    with pytest.raises(Fenced, match="stale"), gate.hold():
        pass
    gate.unfence()
    with gate.hold() as version:
        assert version == NEW


def test_a_fence_from_within_the_action_comes_before_any_hold(gate):
    waiting = []

    def action():
        waiting.append(Worker(lambda: enter(gate)))
        eventually(lambda: len(gate._waiting) == 1)
        gate.fence("torn")
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        swap(gate, action)
    with pytest.raises(Fenced, match="torn"):
        waiting[0].finish()


def test_a_fence_reaches_a_thread_that_had_already_passed_the_closed_gate(gate):
    """One that looked while the gate was open, and gets its lock only after the swap that fenced."""
    hold = {}
    started, go = threading.Event(), threading.Event()

    def late():
        hold["slot"] = gate.hold()
        started.set()
        assert go.wait(DEADLINE)
        gate.shut = False
        with hold["slot"]:
            pass

    worker = Worker(late)
    assert started.wait(DEADLINE)

    def action():
        go.set()
        # It is past the check when it has reset the flag; then it can only be waiting for its own lock.
        eventually(lambda: not gate.shut)
        gate.fenced = "torn"
        return NEW

    swap(gate, action)
    with pytest.raises(Fenced, match="torn"):
        worker.finish()
    assert hold["slot"].acquire(blocking=False)


# What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hold", "forward"])
def test_a_thread_that_dies_holding_is_reclaimed(how, gate):
    def die():
        if how == "hold":
            enter(gate)
        else:
            gate.enter_forward(gate)

    for _ in range(3):
        Worker(die).finish()
    assert swap(gate).pause_seconds < 5
    gc.collect()
    assert len(gate._slots) == 1


def test_threads_come_and_go_without_a_trace(gate):
    def visit():
        with gate.hold():
            gate.enter_forward(gate)
            gate.leave_forward()

    for _ in range(50):
        Worker(visit).finish()
    assert len(gate._slots) <= 1


def test_a_gate_goes_when_nobody_uses_it():
    gate = Gate(OLD)
    with gate.hold():
        pass
    import weakref

    reference = weakref.ref(gate)
    del gate
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("swapping", [False, True])
def test_interrupts_leave_no_hold_behind_and_end_none_twice(swapping, gate):
    stop = threading.Event()
    swaps = []

    def keep_swapping():
        while not stop.is_set():
            swaps.append(swap(gate))
            time.sleep(0.0002)

    swapper = Worker(keep_swapping) if swapping else None
    strikes = 0
    hold = gate.hold()
    until = time.monotonic() + 1.5
    with interrupts() as alarm:
        delay = 0
        while time.monotonic() < until or strikes <= 100:
            delay = delay % 97 + 1
            inside = False
            try:
                alarm.set(delay * 1e-6)
                for _ in range(200):
                    with gate.hold():
                        inside = True
                        with gate.hold():
                            pass
                        inside = False
                alarm.clear()
            except KeyboardInterrupt:
                strikes += 1
            assert not hold.owned(), f"left behind, struck {'inside' if inside else 'outside'}"
    stop.set()
    if swapper is not None:
        swapper.finish()
        assert len(swaps) > 10
    assert swap(gate).attempts == 1


def test_a_wait_can_be_interrupted(gate):
    holder = Holder(gate)
    swapper = Worker(lambda: swap(gate))
    eventually(lambda: gate.shut)

    def wait():
        # Not before: the alarm may come as soon as it is set.
        alarm.set(0.02)
        with gate.hold():
            pass

    with interrupts() as alarm, pytest.raises(KeyboardInterrupt):
        wait()
    holder.leave.set()
    swapper.finish()
    assert len(gate._waiting) == 0
    assert not gate.hold().owned()


# Cost -------------------------------------------------------------------------------------------------------------


def test_a_hold_costs_next_to_nothing(gate):
    def hold():
        with gate.hold():
            pass

    number = 20_000
    # Of this thread's time: others may have the machine meanwhile.
    best = min(timeit.repeat(hold, number=number, repeat=7, timer=time.thread_time)) / number
    # 0.35 us where this was written; a lock that all threads share costs 8 us with 8 readers.
    assert best < 3e-6
