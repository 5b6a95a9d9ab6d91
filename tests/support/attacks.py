"""What attackers do to a daemon: ATTACKS, each over one connection, and STRUCTURES that nobody must take."""

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import msgpack

from tests.support.hostile import TRANSFER, Peer, columns, offer
from tests.support.naive import LEAF, MORE, hello, pack


def offer_structure(peer: Peer, structure: bytes, tensors: int = 1, nbytes: int = 4) -> None:
    """OFFER, and the structure when it is asked for."""
    peer.greet().send("Offer", offer(structure, tensors, nbytes))
    peer.expect("StructureWanted")
    with contextlib.suppress(ConnectionError):
        peer.message("StructureIs", {"transfer": TRANSFER}, structure)


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


def asked_for_structure(peer: Peer) -> Peer:
    """Where a daemon waits for a body that may be large: anything else of that size it receives into nothing."""
    peer.greet().send("Offer", offer(columns(), 1, 4))
    peer.expect("StructureWanted")
    return peer


def _bodies_without_end(peer: Peer) -> None:
    asked_for_structure(peer)
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
    asked_for_structure(peer).send("StructureIs", fields, bytes(LEAF), flags=MORE)
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
