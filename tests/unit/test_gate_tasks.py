import asyncio
import contextlib
import functools
import time

import pytest

from shipd.errors import Fenced
from shipd.serving.gate import Gate
from shipd.serving.version import Version
from tests.support.gates import DEADLINE, NEW, OLD, Holder, Worker, eventually, swap


@pytest.fixture
def gate():
    return Gate(OLD)


async def until(condition):
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  nothing tells of it
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
            pause = await asyncio.to_thread(swap, gate, functools.partial(Version, str(number), ""))
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
            assert list(await asyncio.gather(child(), asyncio.create_task(child()))) == [OLD, OLD]
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
