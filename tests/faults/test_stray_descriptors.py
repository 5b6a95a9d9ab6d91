"""Descriptors that a local peer sends without being asked, some of which take long to close: nobody else waits.

Whoever closes a TCP socket last that lingers, with bytes that its own peer does not take, waits until that time is up.
Also where the socket is non-blocking.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

import shipd
from tests.conftest import StartDaemon
from tests.support import hostile
from tests.support.hostile import Peer, attacker
from tests.support.processes import status
from tests.support.proxy import until

LINGERS = 60
"""Seconds: more than anybody here waits for anything."""


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> shipd.Daemon:
    """With nothing in it."""
    return start_daemon(models={})


@contextlib.contextmanager
def lingering() -> Iterator[int]:
    """The descriptor of a socket that takes LINGERS seconds to close, until the block ends; the caller's to close."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(1 << 20))
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGERS))
        try:
            yield near.detach()
        finally:
            # A reset: there is nothing left to linger for.
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()


def ping_with(peer: Peer, descriptors: list[int]) -> None:
    """PING, and beside it descriptors, of which the peer keeps none."""
    raw = hostile.frame("Ping", {"reply": True}, b"", peer.sequence)
    peer.sequence += 1
    socket.send_fds(peer.sock, [raw], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("before", [0, 252], ids=["alone", "after as many as a message can carry"])
def test_a_descriptor_that_takes_long_to_close(daemon: shipd.Daemon, before: int) -> None:
    with lingering() as slow, attacker(daemon.config.socket) as peer:
        peer.greet()
        ping_with(peer, [os.open(os.devnull, os.O_RDONLY) for _ in range(before)] + [slow])
        peer.expect("Ping")
        assert status(f"127.0.0.1:{daemon.port}").models == [], "it answers"


def test_one_that_nobody_has_read_when_the_connection_ends(daemon: shipd.Daemon) -> None:
    with lingering() as slow, attacker(daemon.config.socket) as peer:
        peer.greet()
        daemon.call(_deaf(daemon, peer, slow))
        assert peer.receive() is None
        assert status(f"127.0.0.1:{daemon.port}").models == [], "it answers"


async def _deaf(daemon: shipd.Daemon, peer: Peer, slow: int) -> None:
    """On the daemon's loop, which reads nothing meanwhile: damage, and after it a message that it will not read."""
    peer.write(bytes(64))
    ping_with(peer, [slow])


def test_they_do_not_add_up(daemon: shipd.Daemon) -> None:
    def open_here() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    with attacker(daemon.config.socket) as peer:
        peer.greet()
        before = open_here()
        for _ in range(20):
            ping_with(peer, [os.dup(peer.sock.fileno()) for _ in range(100)])
            peer.expect("Ping")
        until(lambda: open_here() == before, "all that was sent has been closed")
