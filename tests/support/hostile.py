"""Peers that do what no shipd does: raw frames with lies in them, floods, silence, and other protocols.

Built on ``tests.support.naive`` and sockets alone. ``Attacker`` is a client that misbehaves, ``FakeDaemon`` something
that a sender meets where it expects a daemon. ATTACKS and ANSWERS list what they do.
"""

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgpack
import xxhash
from crc32c import crc32c

from tests.support import naive
from tests.support.naive import LEAF, MORE, TYPES, Tensor, encode_structure, hello, pack

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


# --- attacks on a daemon ---------------------------------------------------------------------------------------------

TRANSFER = bytes(range(16))


def offer(structure: bytes, tensors: int, nbytes: int, **fields: Any) -> dict[str, Any]:
    """The fields of an OFFER of an encoded structure."""
    digest = xxhash.xxh3_128_digest(structure)
    return {
        "model": "victim", "nbytes": nbytes, "structure": digest, "tensors": tensors, "transfer": TRANSFER, **fields,
    }  # fmt: skip


def _offer_structure(peer: Peer, structure: bytes, tensors: int = 1, nbytes: int = 4) -> None:
    """OFFER, and the structure when it is asked for."""
    peer.greet().send("Offer", offer(structure, tensors, nbytes))
    peer.expect("StructureWanted")
    with contextlib.suppress(ConnectionError):
        peer.message("StructureIs", {"transfer": TRANSFER}, structure)


def columns(**changes: Any) -> bytes:
    """A structure of one float32 scalar called "a", with other columns."""
    return pack({"dims": b"", "dtypes": b"\x02", "names": ["a"], "ndims": b"\x00", "ties": b"", **changes})


def _two(**changes: Any) -> bytes:
    return columns(**{"dtypes": b"\x02\x02", "names": ["a", "b"], "ndims": b"\x00\x00", **changes})


def _u64(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


STRUCTURES: dict[str, bytes] = {
    "not msgpack": b"\xc1\xc1\xc1",
    "a list": msgpack.packb([1, 2, 3]),
    "nothing": b"\x80",
    "one column too many": columns(zeta=b""),
    "a name twice": _two(names=["a", "a"]),
    "names unsorted": _two(names=["b", "a"]),
    "an empty name": columns(names=[""]),
    "an endless name": columns(names=["x" * 513]),
    "a name that breaks a line": columns(names=["a\ninfo all is well"]),
    "a name that is no text": pack({"dims": b"", "dtypes": b"\x02", "names": [b"\xff"], "ndims": b"\x00", "ties": b""}),
    "an unknown dtype": columns(dtypes=b"\xfe"),
    "fewer dtypes than names": columns(dtypes=b""),
    "more dimensions than there are": columns(ndims=b"\x03", dims=_u64(1, 1)),
    "33 dimensions": columns(ndims=b"\x21", dims=_u64(*[1] * 33)),
    "a negative size": columns(ndims=b"\x01", dims=_u64((1 << 64) - 4)),
    "sizes whose product overflows": columns(ndims=b"\x03", dims=_u64(1 << 22, 1 << 22, 1 << 22)),
    "sizes whose product wraps to 4": columns(ndims=b"\x02", dims=_u64((1 << 62) + 1, 4)),
    "a tie to itself": _two(ties=struct.pack("<II", 1, 1)),
    "a tie forwards": _two(ties=struct.pack("<II", 0, 1)),
    "a tie outside": _two(ties=struct.pack("<II", 1, 7)),
    "a tie to another dtype": _two(dtypes=b"\x02\x03", ties=struct.pack("<II", 1, 0)),
    "half a tie": _two(ties=b"\x01\x00\x00"),
    "keys out of order": b"\x85" + b"".join(msgpack.packb(part) for part in ("names", ["a"], "dims", b"")),
}
"""Encoded structures that no daemon must take, by what is wrong with them."""


def too_many_tensors(count: int = (1 << 20) + 1) -> bytes:
    """One more than is allowed, all of them well-formed."""
    names = [f"{at:07}" for at in range(count)]
    return columns(names=names, dtypes=b"\x02" * count, ndims=b"\x00" * count)


def _garbage(peer: Peer) -> None:
    peer.write(bytes(range(255, -1, -1)) * 40)


def _http(peer: Peer) -> None:
    peer.write(b"GET / HTTP/1.1\r\nHost: shipd\r\n\r\n")


def _tls(peer: Peer) -> None:
    peer.write(bytes.fromhex("16030100c8010000c40303") + bytes(190))


def _prelude_crc(peer: Peer) -> None:
    peer.greet().send("Ping", prelude_crc=1)


def _long_header(peer: Peer) -> None:
    peer.greet().send("Ping", header_length=0xFFFF)


def _long_payload(peer: Peer) -> None:
    peer.greet().send("Ping", payload_length=0xFFFFFFFF)


def _one_byte_too_long(peer: Peer) -> None:
    peer.greet().send("Data", {"chunk": 0}, payload_length=LEAF + 1)


def _out_of_sequence(peer: Peer) -> None:
    peer.greet().send("Ping", sequence=7)


def _unknown_type(peer: Peer) -> None:
    peer.greet().send(200)


def _unknown_flags(peer: Peer) -> None:
    peer.greet().send("Ping", flags=0x80)


def _data_first(peer: Peer) -> None:
    peer.greet().send("Data", {"chunk": 0}, bytes(100))


def _hello_twice(peer: Peer) -> None:
    peer.greet().send("Hello", hello(bytes(32)))


def _no_hello(peer: Peer) -> None:
    peer.send("StatusRequest")


def _bad_hello(peer: Peer) -> None:
    peer.send("Hello", hello(b"short"))


def _hello_of_no_version(peer: Peer) -> None:
    peer.send("Hello", hello(bytes(32), version_min=0, version_max=0))


def _huge_hello(peer: Peer) -> None:
    peer.send("Hello", hello(bytes(32), capabilities=["x" * 60] * 200))


def _hello_with_a_critical_field(peer: Peer) -> None:
    peer.send("Hello", {"!later": 1, **hello(bytes(32))})


def _keys_twice(peer: Peer) -> None:
    peer.greet().send("Ping", b"\x82" + (msgpack.packb("reply") + b"\xc3") * 2)


def _deep_header(peer: Peer) -> None:
    peer.greet().send("Ping", b"\x81" + msgpack.packb("later") + b"\x91" * 8000 + b"\xc0")


def _bomb(peer: Peer) -> None:
    peer.greet().send("Ping", b"\x81" + msgpack.packb("later") + b"\xdd\xff\xff\xff\xff" + bytes(10))


def _nacks(peer: Peer) -> None:
    peer.greet().send("Nack", {"sequences": list(range(1 << 40, (1 << 40) + 256))})


def _hello_again_and_again(peer: Peer) -> None:
    """Every repetition is a new frame, which can be asked for again, too."""
    peer.greet()
    for sequence in range(7):
        peer.send("Nack", {"sequences": [sequence]})


def _asked_for_structure(peer: Peer) -> Peer:
    """Where a daemon waits for a body that may be large: anything else of that size it receives into nothing."""
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    return peer


def _bodies_without_end(peer: Peer) -> None:
    _asked_for_structure(peer)
    for number in range(6):
        peer.send(
            "StructureIs", {"body_id": number + 1, "body_size": 1 << 25, "transfer": TRANSFER}, bytes(LEAF), flags=1
        )


def _endless_body(peer: Peer) -> None:
    peer.greet().send(
        "StructureIs", {"body_id": 1, "body_size": 1 << 40, "transfer": TRANSFER}, bytes(LEAF), flags=MORE
    )


def _pieces_out_of_place(peer: Peer) -> None:
    fields = {"body_id": 1, "body_size": 3 * LEAF, "transfer": TRANSFER}
    _asked_for_structure(peer).send("StructureIs", fields, bytes(LEAF), flags=MORE)
    peer.send("Body", {"body_id": 1, "offset": 5}, bytes(LEAF))


def _attach_over_tcp(peer: Peer) -> None:
    peer.greet().send(
        "Attach", {"mode": "copy", "model": "victim"}, msgpack.packb({"structure": b"", "transient": b""})
    )


def _other_transfer(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4, transfer=b"short"))


def _absurd_offer(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1 << 40, 1 << 60))


def _model_of_slashes(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4, model="../../etc/passwd"))


def _other_structure(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    peer.send("StructureIs", {"transfer": TRANSFER}, columns(names=["b"]))


def _commit_at_once(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    peer.send("StructureIs", {"transfer": TRANSFER}, columns())
    peer.expect("Want")
    peer.send("Commit", {"transfer": TRANSFER})


def _chunk_outside(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    peer.send("StructureIs", {"transfer": TRANSFER}, columns())
    peer.expect("Want")
    peer.send("Data", {"chunk": 1}, bytes(4))


def _chunk_of_another_size(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    peer.send("StructureIs", {"transfer": TRANSFER}, columns())
    peer.expect("Want")
    peer.send("Data", {"chunk": 0}, bytes(LEAF))


def _large_digests_of_a_small_model(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    peer.send("StructureIs", {"transfer": TRANSFER}, columns())
    peer.expect("Want")
    fields = {"body_id": 1, "body_size": 1 << 24, "digest": bytes(16), "label": "x", "transfer": TRANSFER}
    peer.send("Finish", fields, bytes(LEAF), flags=MORE)


def _short_digests(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    peer.send("StructureIs", {"transfer": TRANSFER}, columns())
    peer.expect("Want")
    peer.send("Data", {"chunk": 0}, bytes(4))
    peer.send("Finish", {"digest": bytes(16), "label": "x", "transfer": TRANSFER}, bytes(15))


def _daemon_talk(peer: Peer) -> None:
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    peer.send("Want", {"structure": bytes(16), "transfer": TRANSFER}, bytes(8))


ATTACKS: dict[str, Callable[[Peer], None]] = {
    attack.__name__.strip("_"): attack
    for attack in (
        *(_garbage, _http, _tls, _prelude_crc, _long_header, _long_payload, _one_byte_too_long, _out_of_sequence),
        *(_unknown_type, _unknown_flags, _data_first, _hello_twice, _no_hello, _bad_hello, _hello_of_no_version),
        *(_huge_hello, _hello_with_a_critical_field, _keys_twice, _deep_header, _bomb, _nacks, _hello_again_and_again),
        *(_bodies_without_end, _endless_body, _pieces_out_of_place, _attach_over_tcp, _other_transfer, _absurd_offer),
        *(_model_of_slashes, _other_structure, _commit_at_once, _chunk_outside, _chunk_of_another_size),
        *(_short_digests, _large_digests_of_a_small_model, _daemon_talk),
    )
}
"""Each of them must cost its own connection and nothing else."""


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


# --- what a sender may meet ------------------------------------------------------------------------------------------


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
