"""The connection's parser: however the bytes are cut, the same comes out; whatever they are, nothing else is raised."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shipproto.connection import Connection
from shipproto.errors import ProtocolError
from shipproto.headers import decode_header, encode_header
from shipproto.messages import BY_TYPE, Coded, Data
from tests.property.strategies import examples, mutate, mutations
from tests.support import naive
from tests.support.golden.messages import MESSAGES
from tests.support.link import feed, nonce, output_of
from tests.support.naive import Stream
from tests.support.vectors import describe_event

CHUNKS = {number: 10 + 97 * number for number in range(5)}


def fresh() -> Connection:
    def landing(message: Data | Coded, size: int) -> memoryview | None:
        # New memory for every one: a chunk that comes twice must not change the first.
        size = CHUNKS[message.chunk] if isinstance(message, Data) and message.chunk in CHUNKS else size
        return memoryview(bytearray(size)) if message.chunk in CHUNKS else None

    return Connection(initiator=False, nonce=nonce(1), agent="here", landing=landing)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A handshake and a few frames, some of them damaged in header or payload."""
    stream = Stream().add("Hello", naive.hello(nonce(2)))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    for _ in range(draw(st.integers(0, 8))):
        if rng.random() < 0.4:
            chunk = rng.randrange(len(CHUNKS) + 1)
            name, fields, body = "Data", {"chunk": chunk}, rng.randbytes(CHUNKS.get(chunk, 30))
        else:
            name, fields, body = rng.choice([*MESSAGES, ("Ping", {}, b""), ("Ping", {"reply": True}, b"")])
        header = naive.pack(fields)
        lies = {}
        if rng.random() < 0.2:
            lies["payload_crc"] = rng.getrandbits(32)
        if rng.random() < 0.2:
            lies["header_crc"] = rng.getrandbits(32)
        stream.raw(naive.TYPES[name], header, body, **lies)
    return bytes(stream.data)


def whole(data: bytes) -> tuple[list, str, bytes, int]:
    connection = fresh()
    fed = feed(connection, data)
    return [describe_event(event) for event in fed.events], repr(fed.error), fed.output, connection.bytes_received


def in_pieces(data: bytes, cuts: list[int]) -> tuple[list, str, bytes, int]:
    connection = fresh()
    events: list = []
    output = b""
    error = None
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, stop in pairwise(bounds):
        try:
            connection.receive(data[start:stop])
        except ProtocolError as caught:
            error = caught
        events += [describe_event(event) for event in connection.events()]
        output += output_of(connection)
        if error is not None:
            break
    return events, repr(error), output, connection.bytes_received


@examples(200)
@given(streams(), st.lists(st.integers(0, 1 << 16), max_size=30))
def test_cuts_do_not_matter(data: bytes, cuts: list[int]) -> None:
    assert in_pieces(data, cuts) == whole(data)


@examples(200)
@given(streams(), mutations, st.lists(st.integers(0, 1 << 16), max_size=10))
def test_cuts_do_not_matter_in_broken_streams(data: bytes, changes: list, cuts: list[int]) -> None:
    data = mutate(data, changes)
    first, second = whole(data), in_pieces(data, cuts)
    # How many bytes had been read when it was noticed is the one thing that may differ.
    assert first[:3] == second[:3]


@examples(300)
@given(streams(), mutations)
def test_a_chunk_is_intact_or_not_at_all(data: bytes, changes: list) -> None:
    """Whatever is done to the stream: a chunk that arrives is one that was sent."""
    sent = {
        (frame.fields["chunk"], frame.payload) for frame in naive.frames(data) if frame.name == "Data"
    }  # fmt: skip
    for event in whole(mutate(data, changes))[0]:
        if event["event"] == "chunk":
            content = b"".join(
                bytes.fromhex(piece) if isinstance(piece, str) else bytes.fromhex(piece[0]) * piece[1]
                for piece in event["content"]
            )
            assert (event["chunk"], content) in sent


@examples(400)
@given(st.sampled_from(MESSAGES), mutations)
def test_an_accepted_header_is_canonical(message: tuple, changes: list) -> None:
    name, fields, _ = message
    raw = mutate(naive.pack(fields), changes)
    try:
        decoded = decode_header(naive.TYPES[name], raw)
    except ProtocolError:
        return
    assert type(decoded) is BY_TYPE[naive.TYPES[name]]
    again = encode_header(decoded)
    if again != raw:
        # Then it had fields that are not known, and nothing else was different.
        pairs = naive.unpack(raw)
        known = {key: value for key, value in pairs.items() if key in decoded.__struct_fields__}
        assert naive.pack(known) == again
        assert not any(key.startswith("!") for key in pairs)


@examples(300)
@given(st.binary(max_size=300))
def test_any_bytes_at_all(data: bytes) -> None:
    assert whole(data)[0] == []
    assert in_pieces(data, list(range(0, 300, 7)))[:3] == whole(data)[:3]
