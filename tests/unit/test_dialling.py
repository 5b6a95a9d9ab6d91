"""Connecting at a Unix socket whose queue is full: as many processes start at once as it may well be."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shipd.errors import Interrupted
from shipd.transfer.dialling import dial_unix
from shipd.transfer.waker import Waker
from tests.support.processes import Background

MINUTE = 60.0


@pytest.fixture
def crowded(place: Path) -> Iterator[tuple[Path, socket.socket]]:
    """The path of a socket at which no more may wait, and the socket."""
    path = place / "s"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                peer = waiting.enter_context(socket.socket(socket.AF_UNIX))
                peer.setblocking(False)
                peer.connect(str(path))
        yield path, listener


@pytest.mark.parametrize("woken", [False, True], ids=["nobody wakes it", "somebody could wake it"])
def test_who_finds_the_queue_full_waits_for_a_place(crowded: tuple[Path, socket.socket], woken: bool) -> None:
    path, listener = crowded
    waker = Waker() if woken else None
    with Background(dial_unix, path, time.monotonic() + MINUTE, waker) as dialling:
        listener.accept()[0].close()
        dialling.result().close()
    if waker is not None:
        waker.close()


def test_and_no_longer_than_it_may(crowded: tuple[Path, socket.socket]) -> None:
    with pytest.raises(TimeoutError):
        dial_unix(crowded[0], time.monotonic() + 0.05, None)


def test_or_until_it_is_woken(crowded: tuple[Path, socket.socket]) -> None:
    waker = Waker()
    with Background(dial_unix, crowded[0], time.monotonic() + MINUTE, waker) as dialling:
        waker.wake()
        assert isinstance(dialling.error(), Interrupted)
    waker.close()
