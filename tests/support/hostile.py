"""Peers that do what no shipd does: frames with lies in them, offers of anything at all, and floods.

    frame       a frame whose prelude may claim what it likes
    Peer        one end of a socket that speaks frames, more or less; ``attacker`` connects one to a daemon
    offer       what is offered, and ``columns`` a structure for it
    flood       writes without end, and reads nothing

Built on ``tests.support.naive`` and sockets alone. What attackers do is listed in tests.support.attacks; what a sender
may meet where it expects a daemon, in tests.support.fake_daemon.
"""

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import xxhash
from crc32c import crc32c

from tests.support import naive
from tests.support.naive import LEAF, MORE, TYPES, hello, pack

DEADLINE = 10.0


def frame(name: str | int, header: dict[str, Any] | bytes, payload: bytes, sequence: int, **lies: Any) -> bytes:
    """A frame, with whatever its prelude is to claim instead of the truth."""
    raw = header if isinstance(header, bytes) else pack(header)
    kind = TYPES[name] if isinstance(name, str) else name
    checked = lies.get("magic", b"SHPD") + struct.pack(
        "!BBHIIQI",
        kind,
        lies.get("flags", 0),
        lies.get("header_length", len(raw)),
        lies.get("payload_length", len(payload)),
        lies.get("header_crc", crc32c(raw)),
        sequence,
        lies.get("payload_crc", crc32c(payload)),
    )
    return checked + struct.pack("!I", lies.get("prelude_crc", crc32c(checked))) + raw + payload


class Peer:
    """One end of a socket that speaks frames, more or less."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sequence = 0
        self._received = b""
        sock.settimeout(DEADLINE)

    def send(
        self, name: str | int, header: dict[str, Any] | bytes = b"\x80", payload: bytes = b"", **lies: Any
    ) -> Self:
        """A frame with the next sequence number, or the one in ``lies``."""
        sequence = lies.pop("sequence", self.sequence)
        self.sequence += 1
        return self.write(frame(name, header, payload, sequence, **lies))

    def message(self, name: str, fields: dict[str, Any], body: bytes) -> Self:
        """A message whose body may need BODY frames."""
        if len(body) <= LEAF:
            return self.send(name, fields, body)
        self.send(name, {**fields, "body_id": 1, "body_size": len(body)}, body[:LEAF], flags=MORE)
        for offset in range(LEAF, len(body), LEAF):
            self.send("Body", {"body_id": 1, "offset": offset}, body[offset : offset + LEAF])
        return self

    def write(self, data: bytes) -> Self:
        """Any bytes at all."""
        self.sock.sendall(data)
        return self

    def greet(self, **fields: Any) -> Self:
        """HELLO, and wait for the other's."""
        self.send("Hello", hello(os.urandom(32), "hostile", **fields))
        self.expect("Hello")
        return self

    def receive(self) -> naive.Frame | None:
        """The next frame, or None at the end of the stream (or where it was reset)."""
        while True:
            if len(self._received) >= 32:
                header, payload = struct.unpack_from("!HI", self._received, 6)
                size = 32 + header + payload
                if len(self._received) >= size:
                    raw, self._received = self._received[:size], self._received[size:]
                    return next(naive.frames(raw))
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self._received += data

    def expect(self, name: str) -> naive.Frame:
        """Frames up to the first of this type."""
        while (found := self.receive()) is not None:
            if found.name == name:
                return found
        raise AssertionError(f"the connection ended without {name}")

    def drain(self) -> list[str]:
        """Until the other side closes, or has said why it will not: the types of what it still said."""
        names: list[str] = []
        while "Abort" not in names and (found := self.receive()) is not None:
            names.append(found.name)
        return names

    def close(self) -> None:
        """Close."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attacker(target: int | str | Path) -> Peer:
    """A connection to a daemon's port, or to its Unix socket."""
    if isinstance(target, int):
        return Peer(socket.create_connection(("127.0.0.1", target)))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(target))
    return Peer(sock)


TRANSFER = bytes(range(16))


def offer(structure: bytes, tensors: int, nbytes: int, **fields: Any) -> dict[str, Any]:
    """The fields of an OFFER of an encoded structure."""
    digest = xxhash.xxh3_128_digest(structure)
    return {
        "model": "victim", "nbytes": nbytes, "structure": digest, "tensors": tensors, "transfer": TRANSFER, **fields,
    }  # fmt: skip


def columns(**changes: Any) -> bytes:
    """A structure of one float32 scalar called "a", with other columns."""
    return pack({"dims": b"", "dtypes": b"\x02", "names": ["a"], "ndims": b"\x00", "ties": b"", **changes})


def flood(peer: Peer, piece: bytes | Callable[[int], bytes], seconds: float, limit: int) -> int:
    """Write for ``seconds``, at most ``limit`` bytes, and read nothing; how much the other side has taken."""
    peer.sock.setblocking(False)
    end = time.monotonic() + seconds
    sent = number = 0
    data = b""
    while sent < limit and (remaining := end - time.monotonic()) > 0:
        while len(data) < 65536:
            data += piece if isinstance(piece, bytes) else piece(number)
            number += 1
        if not select.select([], [peer.sock], [], remaining)[1]:
            break
        try:
            count = peer.sock.send(data)
        except BlockingIOError:
            continue
        except ConnectionError:
            break
        sent += count
        data = data[count:]
    return sent
