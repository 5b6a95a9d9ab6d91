"""Hosts by their names: a resolver that is silent keeps nobody beyond a deadline, and nobody who is told to stop."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import shipd
import shipd.client.client
from shipd.address import Address
from shipd.errors import Interrupted
from shipd.transfer.resolving import resolve
from shipd.transfer.waker import Waker
from tests.support.proxy import DEADLINE

NAME = "gpu-01"


class Resolver:
    """Stands in for getaddrinfo(3), and says nothing until it is ``let_go``."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.let_go = threading.Event()
        self.said = False

    def __call__(self, *_: Any, **__: Any) -> list[Any]:
        self.asked.set()
        self.let_go.wait(DEADLINE)
        self.said = True
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    """In place of the system's."""
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    yield resolver
    resolver.let_go.set()


def test_an_answer() -> None:
    assert {where[4][0] for where in resolve(Address("localhost", 1), time.monotonic() + DEADLINE)} <= {
        "127.0.0.1",
        "::1",
    }


def test_a_number_is_nobodys_question(resolver: Resolver) -> None:
    resolver.let_go.set()
    for number in ("127.0.0.1", "::1", "fe80::1%lo"):
        # However late it is: there is nothing to wait for.
        with pytest.raises(socket.gaierror, match="Name or service not known"):
            resolve(Address(number, 1), 0.0)


def test_what_it_says_is_raised(resolver: Resolver) -> None:
    resolver.let_go.set()
    with pytest.raises(socket.gaierror, match="Name or service not known"):
        resolve(Address(NAME, 1), time.monotonic() + DEADLINE)


def test_one_that_is_silent(resolver: Resolver) -> None:
    with pytest.raises(socket.gaierror, match="no name server has said in time"):
        resolve(Address(NAME, 1), time.monotonic() + 0.1)
    assert not resolver.said


def test_who_waits_is_woken(resolver: Resolver) -> None:
    waker = Waker()
    waker.wake()
    with pytest.raises(Interrupted):
        resolve(Address(NAME, 1), time.monotonic() + DEADLINE, waker)
    waker.close()
    assert not resolver.said


def test_connecting_ends_in_time(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipd.client.client, "CONNECT_SECONDS", 0.1)

    async def connect() -> None:
        async with shipd.connect(NAME):
            pass

    with pytest.raises(shipd.ConnectError, match="cannot connect to gpu-01:7447: no name server has said in time"):
        asyncio.run(connect())
    assert not resolver.said


def test_cancelling_ends_it_at_once(resolver: Resolver) -> None:
    async def connect() -> None:
        async with shipd.connect(NAME):
            pass

    async def cancel() -> None:
        connecting = asyncio.create_task(connect())
        await asyncio.to_thread(resolver.asked.wait, DEADLINE)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting

    asyncio.run(cancel())
    assert not resolver.said
