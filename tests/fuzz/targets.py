"""What is fuzzed: for each target, ``fuzz_one(data)`` and the seeds that inputs are made from.

The invariant of all of them: the input is accepted, or refused with ProtocolError (TransferError and LocalError where
the core's documentation says so, CodecError by a decoder), and never anything else; what is accepted has one encoding
(but for zstd frames); and neither time nor memory grows beyond what the input paid for.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.registry import CODECS
from shipproto.aborts import read_abort
from shipproto.connection import Connection, Established
from shipproto.errors import ProtocolError, TransferError
from shipproto.frame import decode_prelude
from shipproto.headers import decode_header, encode_header
from shipproto.layout import Layout
from shipproto.limits import MAX_HEADER, MAX_PAYLOAD, MAX_STRUCTURE_BODY
from shipproto.messages import BY_TYPE, Abort, Coded, Data
from shipproto.rangeset import RangeSet
from shipproto.resident import Resident
from shipproto.sender import Sender
from shipproto.status import decode_status, decode_verification
from shipproto.structure import Structure
from tests.fuzz import coded
from tests.fuzz.records import framed, records
from tests.support import naive
from tests.support.golden.book import Golden
from tests.support.link import Receiving, Sending, nonce, output_of
from tests.support.models import SMALL, build, contents
from tests.support.runs import without_numba
from tests.support.vectors import load, read

_LARGEST_SEED: Final = 4096
_TOKEN: Final = b"a token of some length"
_STRUCTURE: Final = build(SMALL)
_DATA: Final = contents(_STRUCTURE)
_TRANSFER: Final = b"0123456789abcdef"


@dataclass(frozen=True)
class Target:
    """One thing to fuzz."""

    fuzz_one: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def _inputs(kind: str, *prefixes: str) -> Iterator[bytes]:
    for which in ("accept", "reject"):
        for name, vector in load(which):
            if vector["kind"] == kind and (not prefixes or name.startswith(prefixes)):
                data = read(vector["input"])
                if len(data) <= _LARGEST_SEED:
                    yield data


# --- bytes -------------------------------------------------------------------------------------------------------


def prelude(data: bytes) -> None:
    """28 bytes of a prelude, with a check that fits, and the sequence number that is due."""
    raw = data[:28].ljust(28, b"\0")
    due = int.from_bytes(data[28:29], "big")
    try:
        found = decode_prelude(raw + naive.crc32c(raw).to_bytes(4, "big"), due)
    except ProtocolError:
        return
    assert found.header_length <= MAX_HEADER
    assert found.payload_length <= MAX_PAYLOAD
    assert found.sequence == due


def connection(data: bytes) -> None:
    """Raw bytes to either side of a connection, with and without a token; the first byte says which and how cut."""
    if not data:
        return
    mode, data = data[0], data[1:]
    chunks = {number: bytearray(100) for number in range(3)}

    def landing(message: Data | Coded, size: int) -> memoryview | None:
        return memoryview(chunks[message.chunk])[:size] if message.chunk in chunks and size <= 100 else None

    side = Connection(
        initiator=bool(mode & 1),
        nonce=nonce(1),
        agent="here",
        token=_TOKEN if mode & 2 else None,
        landing=landing,
    )
    step = (mode >> 2) or len(data) + 1
    try:
        for at in range(0, len(data), step):
            side.receive(data[at : at + step])
            for _ in side.events():
                pass
    except ProtocolError as error:
        _stays_failed(side, error)
    assert len(output_of(side)) <= 10_000 + 100 * len(data)


def _stays_failed(side: Connection, error: ProtocolError) -> None:
    repeated = None
    try:
        side.receive(b"\0")
    except ProtocolError as again:
        repeated = again
    assert repeated is error, "an error was forgotten"


def header(data: bytes) -> None:
    """A header; the first byte is its type."""
    if not data:
        return
    kind, raw = data[0], data[1 : 1 + MAX_HEADER]
    try:
        message = decode_header(kind, raw)
    except ProtocolError:
        return
    assert type(message) is BY_TYPE[kind]
    encoded = encode_header(message)
    assert decode_header(kind, encoded) == message
    assert len(encoded) <= len(raw)
    if len(encoded) == len(raw):
        assert encoded == raw


def structure(data: bytes) -> None:
    """An encoded structure."""
    try:
        decoded = Structure.decode(data)
    except ProtocolError:
        return
    assert decoded.encoded == data
    assert len(decoded.identity()) <= 2 * len(data) + 64 * len(decoded)
    if decoded.total_bytes < 1 << 30:
        layout = Layout(decoded)
        assert layout.wire_bytes <= layout.size
        assert layout.size <= decoded.total_bytes + 64 * len(decoded) + 8192


def ranges(data: bytes) -> None:
    """Four bytes of a total, and a range list."""
    total = int.from_bytes(data[:4], "little")
    try:
        decoded = RangeSet.decode(data[4:], total)
    except ProtocolError:
        return
    assert decoded.encode() == data[4:]
    assert len(decoded) <= total


_BODIES: Final[tuple[Callable[[bytes], object], ...]] = (
    Resident.decode,
    decode_status,
    decode_verification,
    lambda body: read_abort(Abort(code="mismatch"), body),
)


def bodies(data: bytes) -> None:
    """The body of an ATTACH, a STATUS, a VERIFY or an ABORT; the first byte says which."""
    if not data:
        return
    assert len(data) <= MAX_STRUCTURE_BODY
    try:
        decoded = _BODIES[data[0] % len(_BODIES)](data[1:])
    except ProtocolError:
        return
    if isinstance(decoded, Resident):
        Resident.decode(decoded.encode())


# --- conversations -----------------------------------------------------------------------------------------------


def frames(data: bytes) -> None:
    """Frames whose checks are right, to an established acceptor."""
    side = Connection(initiator=False, nonce=nonce(1), agent="here")
    taken = 0
    try:
        for frame in framed(data):
            side.receive(frame)
            taken += len(frame)
            for event in side.events():
                assert isinstance(event, Established) or side.established
            # A NACK may ask for a whole message again, but not often.
            assert len(output_of(side)) <= 10_000 + 100 * taken
    except ProtocolError as error:
        _stays_failed(side, error)


def _receive(data: bytes, resident: Structure | None) -> None:
    side = Connection(initiator=False, nonce=nonce(1), agent="here")
    receiving = Receiving(resident=resident)
    try:
        for frame in framed(data):
            side.receive(frame)
            for event in side.events():
                receiving.on_event(side, event)
            while receiving.work:
                receiving.work.popleft()()
            output_of(side)
    except (ProtocolError, TransferError):
        pass
    current = receiving.current
    if current is not None:
        names = current.layout.structure
        rows = [naive.Tensor(spec.name, spec.dtype, spec.shape) for spec in names.specs()]
        assert current.digest == naive.version_digest(rows, current.content), "committed, and it is not what it says"


def receiver(data: bytes) -> None:
    """A sender's frames to a receiver; the first byte says whether it takes any structure."""
    if data:
        _receive(data[1:], _STRUCTURE if data[0] & 1 else None)


def sender(data: bytes) -> None:
    """A receiver's frames to a sender."""
    side = Connection(initiator=True, nonce=nonce(1), agent="here")
    sending = Sending(_STRUCTURE, _DATA, transfer=_TRANSFER)
    if not coded.feed_sender(side, sending, data):
        return
    machine: Sender = sending.sender
    if machine.committed is not None and machine.digest:
        assert machine.committed.digest == machine.digest


# --- codecs ------------------------------------------------------------------------------------------------------

_LARGEST_RUN: Final = 2048
_BASE: Final = np.cumsum(np.random.default_rng(1).integers(-2, 3, _LARGEST_RUN // 2)).astype(np.int16).tobytes()


def decoder(codec: Codec) -> Callable[[bytes], None]:
    """A byte that says whether there is a base, and where; two of the run's length; and the payload."""

    def fuzz_one(data: bytes) -> None:
        if len(data) < 3:
            return
        mode, size, payload = data[0], int.from_bytes(data[1:3], "little") % (_LARGEST_RUN + 1), data[3:]
        base = _BASE[:size] if codec.delta or mode & 1 else None
        results: list[bytes | None] = []
        for forced in (False, True):
            out = bytearray(_BASE[:size])
            with without_numba() if forced else contextlib.nullcontext():
                try:
                    codec.decode(payload, out if base is not None and mode & 2 else base, memoryview(out))
                except CodecError:
                    results.append(None)
                else:
                    results.append(bytes(out))
            assert len(out) == size
        assert results[0] == results[1], "numpy makes something else of it"
        if results[0] is not None:
            again = codec.encode(results[0], base, dtype=0, most=1 << 20)
            assert again is not None
            out = bytearray(size)
            codec.decode(again, base, memoryview(out))
            assert out == results[0]

    return fuzz_one


def _decoder_seeds(codec: Codec) -> list[bytes]:
    seeds = []
    for size in (0, 8, 64, 1000, _LARGEST_RUN):
        base = _BASE[:size]
        near = (np.frombuffer(base, dtype=np.int16) + np.arange(size // 2, dtype=np.int16) % 40 // 19).tobytes()
        for content in (base, near, bytes(size), _BASE[::-1][:size]):
            for mode in (0, 3):
                given = base if codec.delta or mode & 1 else None
                payload = codec.encode(content, given, dtype=1 + size % 4, most=1 << 20)
                if payload is not None:
                    seeds.append(bytes((mode,)) + size.to_bytes(2, "little") + payload)
    return seeds


# --- seeds -------------------------------------------------------------------------------------------------------


def _conversations(kind: str) -> list[bytes]:
    return [records(data) for data in _inputs(kind)]


def _header_seeds() -> list[bytes]:
    seeds = []
    for name, vector in load("accept"):
        if name.startswith(("message-", "handshake-", "ping-", "unknown-", "resent-")):
            seeds += [bytes((frame.kind,)) + frame.header for frame in naive.frames(read(vector["input"]))]
    for name, vector in load("reject"):
        if name.startswith("header-"):
            last = list(naive.frames(read(vector["input"])))[-1]
            if len(last.header) <= _LARGEST_SEED:
                seeds.append(bytes((last.kind,)) + last.header)
    return seeds


def _body_seeds() -> list[bytes]:
    kinds = ("resident", "status", "verification", "abort")
    return [bytes((number,)) + data for number, kind in enumerate(kinds) for data in _inputs(kind)]


def _receiver_seeds() -> list[bytes]:
    gold = Golden()
    unknown = naive.Stream(sequence=0).add("Hello", naive.hello(nonce(2))).add("Offer", gold.offer)
    seeds = [bytes((mode,)) + data for mode in (0, 1) for data in _conversations("receiver")]
    return [*seeds, b"\0" + records(bytes(unknown.data)), b"\1"]


def _prelude_seeds() -> list[bytes]:
    seeds = []
    for data in _inputs("connection", "message-", "handshake-"):
        seeds += [data[frame.start :][:28] + bytes((frame.sequence,)) for frame in _cut(data)]
    return seeds


def _cut(data: bytes) -> list[naive.Frame]:
    try:
        return list(naive.frames(data))
    except (AssertionError, struct.error):
        return []


TARGETS: Final = {
    "prelude": Target(prelude, _prelude_seeds),
    "connection": Target(
        connection, lambda: [bytes((mode,)) + data for mode in (0, 3, 13) for data in _inputs("connection")]
    ),
    "header": Target(header, _header_seeds),
    "structure": Target(structure, lambda: list(_inputs("structure"))),
    "ranges": Target(ranges, lambda: [(100).to_bytes(4, "little") + data for data in _inputs("ranges")]),
    "bodies": Target(bodies, _body_seeds),
    "frames": Target(frames, lambda: [records(data) for data in _inputs("connection") if _cut(data)]),
    "receiver": Target(receiver, _receiver_seeds),
    "sender": Target(sender, lambda: _conversations("sender")),
    "coded-receiver": Target(coded.receiver, coded.receiver_seeds),
    "coded-sender": Target(coded.sender, coded.sender_seeds),
} | {f"codec-{codec.name}": Target(decoder(codec), partial(_decoder_seeds, codec)) for codec in CODECS}
