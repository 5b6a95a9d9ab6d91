"""What a sender may meet where it expects a daemon: ``FakeDaemon``, and the ANSWERS that no daemon must give."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Self

import xxhash

from tests.support.attacks import STRUCTURES
from tests.support.hostile import DEADLINE, Peer
from tests.support.naive import Tensor, encode_structure, hello


class FakeDaemon:
    """Listens on a port and gives each connection to ``answer``."""

    def __init__(self, answer: Callable[[Peer], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="fake daemon")
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0

    @property
    def address(self) -> str:
        """What a sender connects to."""
        return f"127.0.0.1:{self.port}"

    def _serve(self) -> None:
        while True:
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with Peer(sock) as peer, contextlib.suppress(OSError, AssertionError):
                self._answer(peer)
                sock.shutdown(socket.SHUT_WR)
                # Until the sender has left: closing with bytes unread would reset what was just said.
                while sock.recv(65536):
                    pass

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        self._listener.close()


def speaking(text: bytes) -> Callable[[Peer], None]:
    """Says this to whoever connects, at once."""

    def answer(peer: Peer) -> None:
        peer.write(text)

    return answer


Answer = Callable[[Peer, dict[str, Any]], object]


def after_hello(answer: Answer, **fields: Any) -> Callable[[Peer], None]:
    """Shakes hands, waits for an OFFER, and goes on as it likes."""

    def converse(peer: Peer) -> None:
        peer.expect("Hello")
        peer.send("Hello", hello(os.urandom(32), "fake", **fields))
        answer(peer, peer.expect("Offer").fields)

    return converse


def _want(peer: Peer, offered: dict[str, Any], ranges: bytes, **fields: Any) -> None:
    peer.send("Want", {"structure": offered["structure"], "transfer": offered["transfer"], **fields}, ranges)


def _structure(peer: Peer, offered: dict[str, Any], body: bytes) -> None:
    peer.send("StructureIs", {"transfer": offered["transfer"]}, body)
    _want(peer, offered, b"", structure=xxhash.xxh3_128_digest(body))


_NOT_OFFERED = encode_structure([Tensor("not.offered", "float32", (1 << 30,))])

ANSWERS: dict[str, Answer] = {
    "chunks that do not exist": lambda peer, offered: _want(peer, offered, struct.pack("<II", 0, 1 << 31)),
    "ranges out of order": lambda peer, offered: _want(peer, offered, struct.pack("<IIII", 5, 6, 1, 2)),
    "half a range": lambda peer, offered: _want(peer, offered, b"\0\0\0\0\1"),
    "frames never sent": lambda peer, _: peer.send("Nack", {"sequences": [99]}),
    "data": lambda peer, _: peer.send("Data", {"chunk": 0}, bytes(10)),
    "an offer": lambda peer, offered: peer.send("Offer", offered),
    "a payload of 4 GiB": lambda peer, _: peer.send("Ping", payload_length=0xFFFFFFFF),
    "a header of nonsense": lambda peer, _: peer.send("Ping", b"\xc1" * 50),
    "a type of its own": lambda peer, _: peer.send(250),
    "staged by a trillion": lambda peer, offered: peer.send(
        "Staged", {"processes": 1 << 40, "transfer": offered["transfer"]}
    ),
    "a structure of what was not offered": lambda peer, offered: _structure(peer, offered, _NOT_OFFERED),
    "a structure that is none": lambda peer, offered: _structure(peer, offered, STRUCTURES["names unsorted"]),
    "structure wanted twice": lambda peer, offered: [
        peer.send("StructureWanted", {"transfer": offered["transfer"]}) for _ in range(2)
    ],
    "an abort of nonsense": lambda peer, offered: peer.send(
        "Abort", {"code": "busy", "transfer": offered["transfer"]}, b"\xc1"
    ),
    "committed before anything was sent": lambda peer, offered: peer.send(
        "Committed", {"digest": bytes(16), "label": "what", "transfer": offered["transfer"]}
    ),
}
"""What a daemon must never say to an OFFER."""
