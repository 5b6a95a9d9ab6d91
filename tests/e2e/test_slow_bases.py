"""Bases that take long to open: gigabytes read from a slow disk, to prove that they are what they should be."""

import asyncio

import pytest

import shipd
from shipd.bases.store import VersionStore
from shipd.errors import ShipError
from tests.support.checkpoints import as_state_dict, assert_installed
from tests.support.frames import PING
from tests.support.proxy import Proxy
from tests.support.successive import first, following

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

V0 = first()
V1 = following(V0)


class SlowStore(VersionStore):
    """Opens no version before the daemon has heard once more from the push that waits for it."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self._proxy = proxy

    def open(self, *arguments):
        self._proxy.wait_until_frames(self._proxy.count(PING) + 1, kind=PING)
        return super().open(*arguments)


class BrokenStore(VersionStore):
    def open(self, *_):
        raise ShipError("the disk is gone")


def push_both(proxy: Proxy, store: VersionStore) -> shipd.Receipt:
    async def converse() -> shipd.Receipt:
        async with shipd.connect(proxy.address, keep=store) as client:
            await client.push(as_state_dict(V0), model="model", label="v0", prefer="bytes")
            return await client.push(as_state_dict(V1), model="model", label="v1", prefer="bytes")

    return asyncio.run(converse())


def test_the_daemon_hears_from_a_push_that_opens_its_base(daemon):
    """Else it would close the connection after its stall deadline, and that of every attempt that follows."""
    with Proxy(daemon.port) as proxy:
        receipt = push_both(proxy, SlowStore(proxy))
        assert proxy.connections == 2
    assert receipt.base == V0.digest
    assert_installed(daemon, V1, label="v1")


def test_what_opening_a_base_raises_ends_the_push(daemon):
    with Proxy(daemon.port) as proxy, pytest.raises(ShipError, match="the disk is gone"):
        push_both(proxy, BrokenStore())
    assert_installed(daemon, V0, label="v0")
