"""Pushes that are cancelled by the task that runs them, at every stage."""

import asyncio
import threading
import time

import pytest

import shipd
import shipd.client.push
from shipd.checkpoints import source
from shipd.client import shipment
from shipd.transfer.lane import Lane
from tests.support.checkpoints import assert_installed
from tests.support.frames import COMMIT, COMMITTED, Way
from tests.support.processes import push
from tests.support.proxy import until
from tests.support.upgrades import NEW, OLD, assert_fit

pytest_plugins = ["tests.support.upgrades"]

pytestmark = pytest.mark.usefixtures("short_backoff", "short_goodbye")


async def _cancelled_at(proxy, held, new, before_cancel=lambda: None, after_cancel=lambda: None, **options):
    async with shipd.connect(proxy.address) as client:
        pushing = asyncio.create_task(client.push(new, model="model", label="new", **options))
        await asyncio.to_thread(held.wait)
        await asyncio.to_thread(before_cancel)
        pushing.cancel()
        await asyncio.sleep(0)
        await asyncio.to_thread(after_cancel)
        with pytest.raises(asyncio.CancelledError):
            await pushing


def test_cancelling_the_task_ends_the_push(daemon, proxy, new):
    held = proxy.hold(nth=12)
    started = time.monotonic()
    asyncio.run(_cancelled_at(proxy, held, new, after_cancel=held.release))
    assert time.monotonic() - started < 20
    until(lambda: daemon.server.models["model"].incoming is None or not _attended(daemon), "the daemon knows")
    assert_fit(daemon, new)


def _attended(daemon):
    incoming = daemon.server.models["model"].incoming
    return incoming is not None and incoming.receiver.attended


def test_cancelling_while_nobody_listens(daemon, proxy, new, refused):
    held = proxy.hold(nth=12)

    def lose():
        proxy.refuse()
        proxy.sever_all()
        assert refused.acquire(timeout=20)

    started = time.monotonic()
    asyncio.run(_cancelled_at(proxy, held, new, before_cancel=lose))
    assert time.monotonic() - started < 20
    assert_fit(daemon, new)


def test_cancelling_during_the_commit_waits_for_it(daemon, proxy, new):
    """And tells how it went: that it was cancelled is not true of it."""
    held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)

    async def main():
        async with shipd.connect(proxy.address) as client:
            pushing = asyncio.create_task(client.push(new, model="model", label="new"))
            await asyncio.to_thread(held.wait)
            for _ in range(2):
                pushing.cancel()
                await asyncio.sleep(0)
            held.release()
            return await pushing

    assert asyncio.run(main()).label == "new"
    assert_installed(daemon, NEW, label="new")


def test_cancelling_while_connecting(proxy, monkeypatch):
    """Also where the connection stands by the time that the cancellation is noticed."""
    opened = Lane.open
    opening, go_on = threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        lane = opened(*arguments, **options)
        opening.set()
        assert go_on.wait(20)
        return lane

    monkeypatch.setattr(Lane, "open", slowly)

    async def main():
        client = shipd.connect(proxy.address)
        connecting = asyncio.create_task(client.__aenter__())
        await asyncio.to_thread(opening.wait)
        connecting.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await connecting

    asyncio.run(main())


def test_a_cancellation_that_comes_as_the_commit_leaves_cannot_be_half_obeyed(daemon, proxy, new, monkeypatch):
    """Between the look at whether the commit is under way and the wake-up, COMMIT may have left."""
    leave = shipd.client.push.Push._commit_leaves

    def woken_too_late(self, lane):
        self._waker.wake()
        leave(self, lane)

    monkeypatch.setattr(shipd.client.push.Push, "_commit_leaves", woken_too_late)
    try:
        push(proxy.address, new, label="new")
    except shipd.Interrupted:
        assert_installed(daemon, OLD, label="old")
        assert proxy.count(COMMIT) == 0
    else:
        assert_installed(daemon, NEW, label="new")


def test_cancelling_while_the_checkpoint_is_opened(daemon, new, monkeypatch):
    opened = source.open_source
    opening, go_on = threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        opening.set()
        assert go_on.wait(20)
        return opened(*arguments, **options)

    monkeypatch.setattr(shipment, "open_source", slowly)

    async def main():
        async with shipd.connect(f"127.0.0.1:{daemon.port}") as client:
            pushing = asyncio.create_task(client.push(new, model="model", label="new"))
            assert await asyncio.to_thread(opening.wait, 20)
            pushing.cancel()
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await pushing

    asyncio.run(main())
    assert_installed(daemon, OLD, label="old")
