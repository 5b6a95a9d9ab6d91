import asyncio
import contextlib
import gc
import os
import select
import signal
import sys
import threading
import time
import timeit

import pytest

from shipd.errors import Fenced, SwapFailed
from shipd.serving.gate import Gate
from shipd.serving.version import Version

OLD = Version("old", "00" * 16)
NEW = Version("new", "11" * 16)
DEADLINE = 20.0


@pytest.fixture
def gate():
    return Gate(OLD)


class Worker(threading.Thread):
    """A thread whose failure fails the test that joins it."""

    def __init__(self, work, name="worker"):
        super().__init__(name=name, daemon=True)
        self.work = work
        self.error = None
        self.result = None
        self.start()

    def run(self):
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error

    def finish(self):
        self.join(DEADLINE)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.error is not None:
            raise self.error
        return self.result


class Holder(Worker):
    """Holds from its start until ``leave`` is set."""

    def __init__(self, gate, name="holder"):
        self.gate = gate
        self.entered = threading.Event()
        self.leave = threading.Event()
        super().__init__(self.hold, name)
        assert self.entered.wait(DEADLINE)

    def hold(self):
        with self.gate.hold() as version:
            self.entered.set()
            assert self.leave.wait(DEADLINE)
            return version, self.gate.version


def eventually(condition):
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until, "never happened"
        time.sleep(0.0005)


def swap(gate, action=lambda: NEW, **options):
    return gate.swap(action, **{"commit_timeout": DEADLINE, "max_hold": DEADLINE, **options})


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
    second = Worker(lambda: gate.hold().__enter__())
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

    readers = [Worker(lambda index=index: read(index), f"reader {index}") for index in range(8)]
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
    latecomers = []

    def action():
        latecomers.extend(Worker(lambda: gate.hold().__enter__()) for _ in range(5))
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
        waiting.append(Worker(lambda: gate.hold().__enter__()))
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
    with pytest.raises(SwapFailed, match=r"at least 0\.\d+ s: slow generation\."):
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
        assert Worker(lambda: gate.hold().__enter__()).finish() == OLD
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
        waiting.append(Worker(lambda: gate.hold().__enter__()))
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
            gate.hold().__enter__()
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


@contextlib.contextmanager
def interrupts():
    """KeyboardInterrupt wherever the interpreter looks for signals, every few dozen bytecodes."""

    def strike(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    with interrupts():
        delay = 0
        while time.monotonic() < until:
            delay = delay % 97 + 1
            inside = False
            try:
                signal.setitimer(signal.ITIMER_REAL, delay * 1e-6)
                for _ in range(200):
                    with gate.hold():
                        inside = True
                        with gate.hold():
                            pass
                        inside = False
            except KeyboardInterrupt:
                strikes += 1
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert not hold.owned(), f"left behind, struck {'inside' if inside else 'outside'}"
    stop.set()
    if swapper is not None:
        swapper.finish()
        assert len(swaps) > 10
    assert strikes > 100
    assert swap(gate).attempts == 1


def test_a_wait_can_be_interrupted(gate):
    holder = Holder(gate)
    swapper = Worker(lambda: swap(gate))
    eventually(lambda: gate.shut)
    with interrupts():
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt), gate.hold():
            pass
    holder.leave.set()
    swapper.finish()
    assert len(gate._waiting) == 0
    assert not gate.hold().owned()


# Forwards ---------------------------------------------------------------------------------------------------------


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
        worker = Worker(lambda doubtful=doubtful: forward(doubtful), "long forward")
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


# asyncio ----------------------------------------------------------------------------------------------------------


async def until(condition):
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0)


def test_overlapping_tasks_cannot_starve_a_swap_nor_does_it_block_their_loop(gate):
    async def main():
        done = asyncio.Event()
        turns = 0

        async def serve():
            nonlocal turns
            while not done.is_set():
                async with gate.hold() as version:
                    await asyncio.sleep(0)
                    assert gate.version == version
                    turns += 1
                    await asyncio.sleep(0)

        async def tick():
            longest = 0.0
            last = time.monotonic()
            while not done.is_set():
                await asyncio.sleep(0)
                now = time.monotonic()
                longest = max(longest, now - last)
                last = now
            return longest

        servers = [asyncio.create_task(serve()) for _ in range(20)]
        ticker = asyncio.create_task(tick())
        for number in range(50):
            pause = await asyncio.to_thread(swap, gate, lambda number=number: Version(str(number), ""))
            assert pause.attempts == 1
        await until(lambda: turns > 100)
        done.set()
        await asyncio.gather(*servers)
        assert await ticker < 5

    asyncio.run(main())
    assert not gate.hold().owned()
    assert gate.hold().tasks == 0


def test_a_task_that_holds_is_let_through_and_so_are_those_it_waits_for(gate):
    async def main():
        async def child():
            async with gate.hold() as version:
                return version

        stranger_started = asyncio.Event()

        async def stranger():
            stranger_started.set()
            async with gate.hold() as version:
                return version

        start = asyncio.Event()

        async def wait_then(work):
            await start.wait()
            return await work()

        outside = asyncio.create_task(wait_then(stranger))
        async with gate.hold():
            swapper = asyncio.create_task(asyncio.to_thread(swap, gate))
            await until(lambda: gate.shut)
            start.set()
            await stranger_started.wait()
            async with gate.hold() as version:
                assert version == OLD
            with gate.hold() as version:
                assert version == OLD
            assert await asyncio.gather(child(), asyncio.create_task(child())) == [OLD, OLD]
            assert not outside.done()
        await swapper
        assert await outside == NEW

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_what_a_task_inherits_ends_with_its_parents_hold(gate):
    async def main():
        release = asyncio.Event()

        async def child():
            await release.wait()
            async with gate.hold() as version:
                return version

        async with gate.hold():
            orphan = asyncio.create_task(child())
            await asyncio.sleep(0)
        async with gate.hold():
            swapper = asyncio.create_task(asyncio.to_thread(swap, gate))
            await until(lambda: gate.shut)
            release.set()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not orphan.done()
        await swapper
        assert await orphan == NEW

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_async_within_a_plain_hold_of_the_same_task_is_let_through(gate):
    async def main():
        with gate.hold():
            swapper = asyncio.create_task(asyncio.to_thread(swap, gate))
            await until(lambda: gate.shut)
            async with gate.hold() as version:
                assert version == OLD
        await swapper

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_tasks_hold_several_gates_at_once(gate):
    other = Gate(OLD)

    async def main():
        async with gate.hold(), other.hold():
            swapper = asyncio.create_task(asyncio.to_thread(swap, gate))
            await until(lambda: gate.shut)
            async with gate.hold(), other.hold():
                pass
        await swapper

    asyncio.run(asyncio.wait_for(main(), DEADLINE))
    assert swap(other).attempts == 1


def test_a_waiting_task_can_be_cancelled(gate):
    async def main():
        async def wait():
            async with gate.hold():
                raise AssertionError("never gets here")

        holder = Holder(gate)
        swapper = asyncio.create_task(asyncio.to_thread(swap, gate))
        await until(lambda: gate.shut)
        waiter = asyncio.create_task(wait())
        await until(lambda: len(gate._waiting) == 1)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert len(gate._waiting) == 0
        holder.leave.set()
        await swapper

    asyncio.run(asyncio.wait_for(main(), DEADLINE))
    assert not gate.hold().owned()


def test_a_fence_reaches_tasks(gate):
    async def main():
        async with gate.hold():
            gate.fence("stale")
            async with gate.hold():
                pass
        with pytest.raises(Fenced, match="stale"):
            async with gate.hold():
                pass
        gate.unfence()
        holder = Holder(gate)

        def fail():
            gate.fence("torn")
            raise ValueError("torn")

        swapper = asyncio.create_task(asyncio.to_thread(swap, gate, fail))
        await until(lambda: gate.shut)

        async def enter():
            async with gate.hold():
                pass

        waiter = asyncio.create_task(enter())
        await until(lambda: len(gate._waiting) == 1)
        holder.leave.set()
        with pytest.raises(ValueError, match="torn"):
            await swapper
        with pytest.raises(Fenced, match="torn"):
            await waiter

    asyncio.run(asyncio.wait_for(main(), DEADLINE))
    assert not gate.hold().owned()


def test_a_loop_that_was_closed_while_a_task_waited_does_not_disturb_the_swap(gate):
    holder = Holder(gate)
    swapper = Worker(lambda: swap(gate))
    eventually(lambda: gate.shut)
    loop = asyncio.new_event_loop()
    waiting = gate.reopened()
    task = loop.create_task(waiting)
    loop.run_until_complete(asyncio.sleep(0))
    future = gate._futures[0][1]
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    assert future.cancelled()
    loop.close()
    holder.leave.set()
    swapper.finish()
    assert gate.version == NEW


# Forking ----------------------------------------------------------------------------------------------------------


def in_child(work):
    """Run ``work`` in a forked child; its exception's text, or ''."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            try:
                work()
            except BaseException as error:
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
def test_a_callback_may_fork(gate):
    texts = []

    def child():
        with gate.hold() as version:
            assert version == NEW

    swap(gate, then=lambda _: texts.append(in_child(child)))
    assert texts == [""]
    assert swap(gate).attempts == 1


# Cost -------------------------------------------------------------------------------------------------------------


def test_a_hold_costs_next_to_nothing(gate):
    def hold():
        with gate.hold():
            pass

    number = 20_000
    best = min(timeit.repeat(hold, number=number, repeat=7)) / number
    # 0.35 us where this was written; a lock that all threads share costs 8 us with 8 readers.
    assert best < 3e-6
