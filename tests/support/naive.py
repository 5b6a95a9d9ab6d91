"""A deliberately tiny second implementation of the protocol, from the words of DESIGN.md and SPEC.md alone.

Slow and obvious: it checks the fast one, makes the golden vectors, and plays the hostile peer. It shares no code with
shipproto; xxh3 and msgpack are libraries for both.
"""

import hashlib
import hmac
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgpack
import xxhash

LEAF = 512 * 1024
LINE = 64
PAGE = 4096
MORE = 1
ITEMSIZE = {
    "float64": (1, 8), "float32": (2, 4), "float16": (3, 2), "bfloat16": (4, 2), "float8_e4m3fn": (5, 1),
    "float8_e5m2": (6, 1), "float8_e4m3fnuz": (7, 1), "float8_e5m2fnuz": (8, 1), "float8_e8m0fnu": (9, 1),
    "int64": (16, 8), "int32": (17, 4), "int16": (18, 2), "int8": (19, 1), "uint64": (20, 8), "uint32": (21, 4),
    "uint16": (22, 2), "uint8": (23, 1), "bool": (24, 1), "complex128": (32, 16), "complex64": (33, 8),
    "complex32": (34, 4),
}  # fmt: skip
TYPES = {
    "Hello": 1, "Auth": 2, "Body": 3, "Nack": 4, "Ping": 5,
    "Offer": 16, "StructureWanted": 17, "StructureIs": 18, "Want": 19, "Data": 20, "Progress": 21, "Finish": 22,
    "Staged": 23, "Commit": 24, "Committed": 25, "Abort": 26, "Join": 27, "Joined": 28, "Coded": 29, "Held": 30,
    "Lend": 31,
    "StatusRequest": 32, "StatusIs": 33, "VerifyRequest": 34, "VerifyIs": 35, "Describe": 36, "DescriptionIs": 37,
    "Attach": 48, "Attached": 49, "Images": 50, "Fill": 51, "Filled": 52, "Arriving": 53, "Stage": 54,
    "StageReady": 55, "Swap": 56, "Swapped": 57, "Unstage": 58, "Release": 59, "Evicted": 60, "DigestRequest": 61,
    "DigestIs": 62, "Detach": 63, "LaidOut": 64,
}  # fmt: skip


# --- checksums and frames ----------------------------------------------------------------------------------------


def crc32c_bitwise(data: bytes) -> int:
    """CRC32C one bit at a time: reflected polynomial 0x82F63B78, all ones before and after."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


_TABLE = []
for _byte in range(256):
    _crc = _byte
    for _ in range(8):
        _crc = (_crc >> 1) ^ (0x82F63B78 if _crc & 1 else 0)
    _TABLE.append(_crc)


@lru_cache(maxsize=16)
def crc32c(data: bytes) -> int:
    """The same a byte at a time, and remembered: ``test_frame`` compares the two."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def unpack(header: bytes) -> dict[str, Any]:
    """The content of a header."""
    return msgpack.unpackb(header)


def pack(fields: Mapping[str, Any]) -> bytes:
    """A header: a msgpack map, keys ascending, shortest forms."""
    return msgpack.packb({key: fields[key] for key in sorted(fields)})


def prelude(
    kind: int, header: bytes, payload: bytes, sequence: int, flags: int = 0, *, magic: bytes = b"SHPD", **lies: int
) -> bytes:
    """32 bytes. ``lies``: header_length, payload_length, header_crc or payload_crc other than the true ones."""
    checked = (
        magic
        + bytes((kind, flags))
        + lies.get("header_length", len(header)).to_bytes(2, "big")
        + lies.get("payload_length", len(payload)).to_bytes(4, "big")
        + lies.get("header_crc", crc32c(header)).to_bytes(4, "big")
        + sequence.to_bytes(8, "big")
        + lies.get("payload_crc", crc32c(payload)).to_bytes(4, "big")
    )
    return checked + lies.get("prelude_crc", crc32c(checked)).to_bytes(4, "big")


@dataclass
class Stream:
    """One side's bytes, frame after frame, with sequence numbers that count by themselves."""

    data: bytearray = field(default_factory=bytearray)
    sequence: int = 0

    def add(
        self, name: str, fields: Mapping[str, Any] | bytes = b"\x80", payload: bytes = b"", flags: int = 0
    ) -> "Stream":
        """A frame; ``fields`` as a map, or a raw header."""
        header = fields if isinstance(fields, bytes) else pack(fields)
        return self.raw(TYPES[name], header, payload, flags)

    def raw(self, kind: int, header: bytes, payload: bytes = b"", flags: int = 0, **lies: int) -> "Stream":
        """A frame of any kind, with lies in its prelude."""
        sequence = lies.pop("sequence", self.sequence)
        self.data += prelude(kind, header, payload, sequence, flags, **lies) + header + payload  # type: ignore[arg-type]
        self.sequence += 1
        return self

    def message(self, name: str, fields: Mapping[str, Any], body: bytes, body_id: int = 1) -> "Stream":
        """A message whose body may need BODY frames."""
        if len(body) <= LEAF:
            return self.add(name, fields, body)
        self.add(name, {**fields, "body_id": body_id, "body_size": len(body)}, body[:LEAF], MORE)
        for offset in range(LEAF, len(body), LEAF):
            self.add("Body", {"body_id": body_id, "offset": offset}, body[offset : offset + LEAF])
        return self


@dataclass(frozen=True)
class Frame:
    """A frame cut out of a stream, unchecked."""

    kind: int
    flags: int
    sequence: int
    start: int
    header: bytes
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return 32 + len(self.header) + len(self.payload)

    @property
    def name(self) -> str:
        """The message's name."""
        return next((name for name, kind in TYPES.items() if kind == self.kind), f"type {self.kind}")

    @property
    def fields(self) -> dict[str, Any]:
        """The header's content."""
        return unpack(self.header)


def frames(stream: bytes) -> Iterator[Frame]:
    """The frames of an undamaged stream."""
    at = 0
    while at < len(stream):
        magic, kind, flags, header, payload, _, sequence = struct.unpack_from("!4sBBHIIQ", stream, at)
        assert magic == b"SHPD"
        body = at + 32 + header
        yield Frame(kind, flags, sequence, at, stream[at + 32 : body], stream[body : body + payload])
        at = body + payload


# --- the handshake -----------------------------------------------------------------------------------------------


def hello(nonce: bytes, agent: str = "naive", **fields: Any) -> dict[str, Any]:
    """The fields of a HELLO."""
    return {"agent": agent, "nonce": nonce, "version_max": 1, "version_min": 1, **fields}


def proof(token: bytes, role: str, initiator: Mapping[str, Any], acceptor: Mapping[str, Any]) -> bytes:
    """The proof of ``role``, "initiator" or "acceptor", for these two HELLOs."""
    label = {"initiator": b"shipd initiator\0", "acceptor": b"shipd acceptor\0\0"}[role]
    transcript = hashlib.sha256(pack(initiator)).digest() + hashlib.sha256(pack(acceptor)).digest()
    return hmac.new(token, label + transcript, "sha256").digest()


# --- structures --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """A row of a structure."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tied_to: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes, by multiplication."""
        size = ITEMSIZE[self.dtype][1]
        for dimension in self.shape:
            size *= dimension
        return size


def roots(tensors: Sequence[Tensor]) -> dict[str, str]:
    """For each name the first name of its tied group."""
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.tied_to or tensor.name, []).append(tensor.name)
    return {name: min(group) for group in groups.values() for name in group}


def encode_structure(tensors: Sequence[Tensor]) -> bytes:
    """The wire form."""
    rows = sorted(tensors, key=lambda tensor: tensor.name.encode())
    number = {tensor.name: at for at, tensor in enumerate(rows)}
    first = roots(rows)
    ties = [(number[name], number[root]) for name, root in first.items() if name != root]
    return pack(
        {
            "names": [tensor.name for tensor in rows],
            "dtypes": bytes(ITEMSIZE[tensor.dtype][0] for tensor in rows),
            "ndims": bytes(len(tensor.shape) for tensor in rows),
            "dims": b"".join(size.to_bytes(8, "little") for tensor in rows for size in tensor.shape),
            "ties": b"".join(a.to_bytes(4, "little") + b.to_bytes(4, "little") for a, b in sorted(ties)),
        }
    )


# --- layout ------------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """An image: where each tensor begins, which chunks there are, and how long it is."""

    offsets: dict[str, int]
    chunks: list[tuple[int, int, list[str]]]
    size: int


def picture(tensors: Sequence[Tensor], leaf: int = LEAF) -> Picture:
    """Row by row: large tensors by name, then small ones by dtype number and name, packed greedily."""
    first = roots(tensors)
    own = sorted((tensor for tensor in tensors if first[tensor.name] == tensor.name), key=lambda t: t.name.encode())
    large = [tensor for tensor in own if tensor.nbytes >= leaf]
    small = sorted((tensor for tensor in own if tensor.nbytes < leaf), key=lambda tensor: ITEMSIZE[tensor.dtype][0])
    at = 0
    offsets: dict[str, int] = {}
    chunks: list[tuple[int, int, list[str]]] = []
    for tensor in large:
        offsets[tensor.name] = at
        chunks += [
            (at + start, min(leaf, tensor.nbytes - start), [tensor.name]) for start in range(0, tensor.nbytes, leaf)
        ]
        at += -(-tensor.nbytes // LINE) * LINE
    packed: list[tuple[int, int, list[str]]] = []
    for tensor in small:
        offsets[tensor.name] = at
        end = at + tensor.nbytes
        if packed and end - packed[-1][0] <= leaf:
            start, _, names = packed[-1]
            packed[-1] = (start, end - start, [*names, tensor.name])
        else:
            packed.append((at, tensor.nbytes, [tensor.name]))
        at += -(-tensor.nbytes // LINE) * LINE
    # A chunk of nothing is none.
    chunks += [chunk for chunk in packed if chunk[1]]
    return Picture({name: offsets[root] for name, root in first.items()}, chunks, max(PAGE, -(-at // PAGE) * PAGE))


# --- digests -----------------------------------------------------------------------------------------------------


def digest(content: bytes) -> bytes:
    """xxh3-128."""
    return xxhash.xxh3_128_digest(content)


def tensor_digest(content: bytes, leaf: int = LEAF) -> bytes:
    """Of its bytes where they are one leaf, else of its leaves' digests."""
    if len(content) <= leaf:
        return digest(content)
    return digest(b"".join(digest(content[at : at + leaf]) for at in range(0, len(content), leaf)))


def version_digest(tensors: Iterable[Tensor], contents: Mapping[str, bytes], leaf: int = LEAF) -> bytes:
    """Over name, dtype, shape and tensor digest, sorted by name; every tensor for itself, tied or not."""
    rows = sorted(tensors, key=lambda tensor: tensor.name.encode())
    names = [tensor.name.encode() for tensor in rows]
    said = [len(rows).to_bytes(4, "little")]
    said += [len(name).to_bytes(4, "little") for name in names]
    said += names
    said += [bytes((ITEMSIZE[tensor.dtype][0],)) for tensor in rows]
    said += [bytes((len(tensor.shape),)) for tensor in rows]
    said += [size.to_bytes(8, "little") for tensor in rows for size in tensor.shape]
    said += [tensor_digest(contents[tensor.name], leaf) for tensor in rows]
    return digest(b"".join(said))


def chunk_digests(tensors: Sequence[Tensor], contents: Mapping[str, bytes], leaf: int = LEAF) -> list[bytes]:
    """Of a slice of a large tensor its digest; of a packed chunk that of its tensors' digests."""
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    drawn = picture(tensors, leaf)
    said = []
    for start, size, names in drawn.chunks:
        if sizes[names[0]] >= leaf:
            at = start - drawn.offsets[names[0]]
            said.append(digest(contents[names[0]][at : at + size]))
        else:
            said.append(digest(b"".join(digest(contents[name]) for name in names)))
    return said


# --- range sets --------------------------------------------------------------------------------------------------


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The half-open ranges of a set."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def encode_ranges(ranges: Iterable[tuple[int, int]]) -> bytes:
    """Pairs of little-endian u32."""
    return b"".join(struct.pack("<II", start, stop) for start, stop in ranges)
