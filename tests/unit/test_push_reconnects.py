"""When a push that loses its connection again and again gives up: what it counts, with connections that only break."""

from collections.abc import Iterator
from math import inf
from types import SimpleNamespace

import pytest
import torch

import shipd
import shipd.client.push
from shipd.address import Address
from shipd.checkpoints.source import open_source
from shipd.client.options import PushOptions
from shipd.client.push import Push
from shipd.transfer.lane import ConnectionLost


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch) -> Iterator[Push]:
    """One that waits for nothing between connections."""
    monkeypatch.setattr(shipd.client.push, "_BACKOFF", (0.0,))
    source = open_source({"w": torch.zeros(4)})
    push = Push(source, Address("h", 1), PushOptions(model="m", stall=60.0))
    yield push
    push._waker.close()
    source.close()


def breaking(push: Push, monkeypatch: pytest.MonkeyPatch, held: list[int]) -> None:
    """Have each connection break, with so many chunks held by then."""
    sender = SimpleNamespace(held=0)
    chunks = iter(held)

    def broken(_deadline: float) -> None:
        push._reached = push._established = True
        sender.held = next(chunks)
        raise ConnectionLost("it broke", peer="h:1")

    monkeypatch.setattr(push, "_sender", sender)
    monkeypatch.setattr(push, "_over_one_connection", broken)


def test_what_gets_nothing_through_is_given_up(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(push, monkeypatch, [3, 3, 4, 4, 4, 4, 4])
    with pytest.raises(shipd.TransferFailed, match=r"broke 5 times without a chunk getting through.* Last: it broke"):
        push._deliver(inf)


def test_what_is_lost_again_and_again_is_given_up(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time something gets through, and each time less is there than once was."""
    breaking(push, monkeypatch, [9, 5, 6, 5, 6, 5, 6, 5, 6, 5])
    with pytest.raises(
        shipd.TransferFailed, match=r"h:1 has lost 5 times what it had received: its daemon keeps restarting; the prev"
    ):
        push._deliver(inf)
