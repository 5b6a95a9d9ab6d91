"""Golden vectors: their file format (protocol/vectors/README.md) and how shipproto and the codecs are run on one."""

import contextlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from shipd.codecs.codec import CodecError
from shipd.codecs.registry import BY_NUMBER
from shipproto.aborts import read_abort
from shipproto.connection import (
    ChunkArrived,
    ChunkDamaged,
    ChunksRefused,
    Connection,
    Established,
    Event,
    MessageArrived,
    RunArrived,
    RunDamaged,
)
from shipproto.description import decode_description
from shipproto.digests import digest_image
from shipproto.errors import ProtocolError, TransferError
from shipproto.layout import Layout
from shipproto.lent import Lent
from shipproto.messages import Abort, Coded, Data, Message
from shipproto.rangeset import RangeSet
from shipproto.resident import Resident
from shipproto.status import decode_status, decode_verification
from shipproto.structure import Structure
from tests.support import naive
from tests.support.link import Chop, Installed, Receiving, Sending, output_of, pieces
from tests.support.models import contents, make_image, read_image

DIRECTORY: Final = Path(__file__).resolve().parents[2] / "protocol" / "vectors"

Vector = dict[str, Any]


# --- the file format ---------------------------------------------------------------------------------------------


def spell(data: bytes) -> list[Any]:
    """``data`` as a list of hexadecimal strings; a long run of one byte as [byte, times]."""
    spelt: list[Any] = []
    at = plain = 0
    while at < len(data):
        end = at
        while end < len(data) and data[end] == data[at]:
            end += 1
        if end - at >= 1024:
            if plain < at:
                spelt.append(data[plain:at].hex())
            spelt.append([data[at : at + 1].hex(), end - at])
            plain = end
        at = end
    if plain < len(data):
        spelt.append(data[plain:].hex())
    return spelt


def read(spelt: Iterable[Any]) -> bytes:
    """The bytes that ``spell`` wrote down."""
    return b"".join(
        bytes.fromhex(piece) if isinstance(piece, str) else bytes.fromhex(piece[0]) * piece[1] for piece in spelt
    )


def as_json(value: Any) -> Any:
    """Bytes as {"hex": …}, tuples as lists, the rest as it is."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"hex": bytes(value).hex()}
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, msgspec.Struct):
        return said(value)
    return value


def said(message: msgspec.Struct) -> dict[str, Any]:
    """The fields of a message that differ from their defaults."""
    fields = {}
    for info in msgspec.structs.fields(message):
        value = getattr(message, info.name)
        default = info.default
        if info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()
        if default is msgspec.NODEFAULT or value != default:
            fields[info.name] = as_json(value)
    return fields


def describe_event(event: Event) -> dict[str, Any]:
    """An event as the vectors write it."""
    if isinstance(event, Established):
        return {"event": "established", "peer": said(event.peer)}
    if isinstance(event, MessageArrived):
        return describe_message(event.message, bytes(event.body))
    if isinstance(event, ChunkArrived):
        return {"event": "chunk", "chunk": event.chunk, "content": spell(bytes(event.content))}
    if isinstance(event, ChunkDamaged):
        return {"event": "damaged", "chunk": event.chunk, "sequence": event.sequence}
    if isinstance(event, RunArrived):
        chunks = [event.chunks.start, event.chunks.stop]
        return {"event": "run", "chunks": chunks, "codec": event.codec, "payload": spell(bytes(event.payload))}
    if isinstance(event, RunDamaged):
        chunks = [event.chunks.start, event.chunks.stop]
        return {"event": "run-damaged", "chunks": chunks, "sequence": event.sequence}
    assert isinstance(event, ChunksRefused)
    return {"event": "refused", "chunks": list(event.chunks)}


def describe_message(message: Message, body: bytes) -> dict[str, Any]:
    """A message as the vectors write it. How its body was cut is not said."""
    fields = {name: value for name, value in said(message).items() if name not in ("body_id", "body_size")}
    return {"event": "message", "type": type(message).__name__, "fields": fields, "body": spell(body)}


def load(which: str) -> Iterator[tuple[str, Vector]]:
    """Name and content of every vector in accept/ or reject/."""
    for path in sorted((DIRECTORY / which).glob("*.json")):
        yield path.stem, json.loads(path.read_text())


# --- running this implementation on a vector ---------------------------------------------------------------------


@dataclass
class Result:
    """What an implementation made of a vector: exactly the fields that an accept vector expects."""

    found: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


def run(vector: Vector, chop: Chop = "whole", seed: int = 0) -> Result:
    """Run one vector. ProtocolError, TransferError and CodecError are results; anything else is raised."""
    result = Result()
    try:
        _KINDS[vector["kind"]](vector, result.found, chop, random.Random(seed))
    except (ProtocolError, TransferError, CodecError) as error:
        result.error = error
    return result


def make_connection(vector: Vector) -> Connection:
    """The side under test."""
    asked = {int(chunk): memoryview(bytearray(size)) for chunk, size in vector.get("asked", {}).items()}

    def landing(message: Data | Coded, size: int) -> memoryview | None:
        if isinstance(message, Coded):
            return memoryview(bytearray(size))
        return asked.get(message.chunk)

    return Connection(
        initiator=vector["role"] == "initiator",
        nonce=bytes.fromhex(vector["nonce"]),
        agent=vector["agent"],
        token=bytes.fromhex(vector["token"]) if "token" in vector else None,
        capabilities=vector.get("capabilities", ()),
        environment=vector.get("environment"),
        landing=landing if asked else None,
    )


def _connection(vector: Vector, found: dict[str, Any], chop: Chop, rng: random.Random) -> None:
    connection = make_connection(vector)
    found["events"] = []
    output = bytearray(output_of(connection))
    try:
        for piece in pieces(read(vector["input"]), chop, rng):
            try:
                connection.receive(piece)
            finally:
                found["events"] += [describe_event(event) for event in connection.events()]
                output += output_of(connection)
    finally:
        found["output"] = spell(bytes(output))


def _receiver(vector: Vector, found: dict[str, Any], chop: Chop, rng: random.Random) -> None:
    """An acceptor that receives: it has the given structure (or takes any) and does everything at once."""
    resident = Structure.decode(read(vector["structure"])) if "structure" in vector else None
    receiving = Receiving(
        resident=resident, codecs={int(number): speed for number, speed in vector.get("codecs", {}).items()}
    )
    if "base" in vector:
        assert resident is not None
        receiving.current = _version(resident, vector["base"])
    connection = make_connection(vector)

    def act(event: Event) -> None:
        receiving.on_event(connection, event)
        while receiving.work:
            receiving.work.popleft()()

    _converse(connection, vector, found, chop, rng, act)
    (receiver,) = receiving.receivers.values()
    found["state"] = receiver.state.name
    if receiver.error is not None:
        raise receiver.error
    if receiving.commits:
        assert receiving.current is not None
        found["digest"] = receiving.current.digest.hex()
        expected = contents(receiving.current.layout.structure)
        assert receiving.current.content == expected


def _sender(vector: Vector, found: dict[str, Any], chop: Chop, rng: random.Random) -> None:
    """An initiator that sends: the given structure with the contents of the vectors' rule; it commits when staged."""
    structure = Structure.decode(read(vector["structure"]))
    sending = Sending(
        structure,
        contents(structure),
        transfer=bytes.fromhex(vector["transfer"]),
        model=vector["model"],
        label=vector.get("label"),
        bases={
            version.digest: version.content
            for version in (_version(structure, base) for base in vector.get("bases", ()))
        },
        incremental=vector.get("incremental", False),
        partial=vector.get("partial", False),
        longest=32,
    )
    connection = make_connection(vector)

    def act(event: Event) -> None:
        if isinstance(event, Established):
            sending.sender.connected(connection)
        else:
            sending.sender.receive(event)
        while not sending.sender.ended and sending.step():
            pass

    _converse(connection, vector, found, chop, rng, act)
    found["state"] = sending.sender.state.name
    if sending.sender.error is not None:
        raise sending.sender.error


def _version(structure: Structure, changed: Iterable[str]) -> Installed:
    """A version before the one that the vector is about: these tensors are others in it."""
    data, other = contents(structure), contents(structure, 1)
    content = {name: (other if name in changed else data)[name] for name in structure.names}
    layout = Layout(structure)
    image = make_image(layout, content)
    digests = digest_image(layout, memoryview(image))
    return Installed("v0", digests.version_digest(), layout, image, digests, content)


def _converse(
    connection: Connection, vector: Vector, found: dict[str, Any], chop: Chop, rng: random.Random, act: Any
) -> None:
    output = bytearray(output_of(connection))
    stream = read(vector["input"])
    # The other side is not there to wait for an answer: its next frame comes when this side has dealt with the last.
    for frame in naive.frames(stream):
        for piece in pieces(stream[frame.start : frame.start + frame.size], chop, rng):
            connection.receive(piece)
            for event in connection.events():
                act(event)
            output += output_of(connection)
    found["messages"] = list(_messages(bytes(output)))


def _messages(stream: bytes) -> Iterator[dict[str, Any]]:
    """What was said, PROGRESS left out: when it comes is the implementation's business."""
    for frame in naive.frames(stream):
        if frame.name not in ("Progress", "Hello", "Auth"):
            fields = {key: value for key, value in frame.fields.items() if key not in ("body_id", "body_size")}
            yield {"type": frame.name, "fields": as_json(fields), "body": spell(frame.payload)}


def _structure(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    body = read(vector["input"])
    structure = Structure.decode(body)
    assert structure.encoded == body
    layout = Layout(structure)
    data = contents(structure)
    image = make_image(layout, data)
    assert read_image(layout, image) == data
    found["tensors"] = [
        {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "offset": int(layout.offsets[row])}
        | ({"tied_to": spec.tied_to} if spec.tied_to is not None else {})
        for row, spec in enumerate(structure.specs())
    ]
    found["chunks"] = [[start, size] for start, size in map(layout.chunk, range(layout.chunks))]
    found["image_size"] = layout.size
    found["digest"] = structure.digest.hex()
    found["version_digest"] = digest_image(layout, memoryview(image)).version_digest().hex()


def _lent(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    layout = Layout(Structure.decode(read(vector["structure"])))
    lent = Lent.decode(read(vector["input"]), layout, vector["files"])
    found["ends"] = lent.ends(vector["files"])
    found["chunks"] = []
    for chunk in sorted(lent.chunks):
        parts = []
        for file, offset, places in lent.reads(chunk):
            at = offset
            for place in places:
                parts.append([file, at, place.start, place.stop - place.start])
                at += place.stop - place.start
        found["chunks"].append([chunk, parts])


def _ranges(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    body = read(vector["input"])
    decoded = RangeSet.decode(body, vector["total"])
    assert decoded.encode() == body
    found["ranges"] = [list(pair) for pair in decoded.ranges()]


def _resident(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    resident = Resident.decode(read(vector["input"]))
    found["structure"] = list(resident.structure.names)
    found["transient"] = list(resident.transient.names)


def _status(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    found["value"] = said(decode_status(read(vector["input"])))


def _verification(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    found["value"] = said(decode_verification(read(vector["input"])))


def _description(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    """As one reads it who has the structure of the vector, if it has one."""
    known = Structure.decode(read(vector["structure"])) if "structure" in vector else None
    description = decode_description(read(vector["input"]))
    resident = description.resident(known)
    found["value"] = said(description)
    found["resident"] = None if resident is None else list(resident.names)
    found["transient"] = list(description.transients().names)


def _abort(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    error = read_abort(Abort(code=vector["code"]), read(vector["input"]))
    found["means"] = str(error.code)
    found["details"] = list(error.details)


def _codec(vector: Vector, found: dict[str, Any], _chop: Chop, _rng: random.Random) -> None:
    """With compiled loops and with numpy alone, beside the base and in a copy of it."""
    # Only here, because it compiles.
    from tests.support.runs import decoded, without_numba

    codec, payload, size = BY_NUMBER[vector["codec"]], read(vector["input"]), vector["size"]
    base = read(vector["base"]) if "base" in vector else None
    contents, refusals = set(), []
    for compiled, in_place in itertools.product((True, False), repeat=2):
        with contextlib.nullcontext() if compiled else without_numba():
            try:
                contents.add(decoded(codec, payload, base, size, in_place=in_place))
            except CodecError as error:
                refusals.append(error)
    assert len(contents) + bool(refusals) == 1, "read in one way and refused, or read as another run, in another"
    if refusals:
        raise refusals[0]
    found["content"] = spell(contents.pop())


_KINDS: Final = {
    "connection": _connection,
    "receiver": _receiver,
    "sender": _sender,
    "structure": _structure,
    "lent": _lent,
    "ranges": _ranges,
    "resident": _resident,
    "status": _status,
    "verification": _verification,
    "description": _description,
    "abort": _abort,
    "codec": _codec,
}
