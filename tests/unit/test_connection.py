"""shipproto.connection: two of them, or one and the naive implementation, on whole, split and byte-by-byte input."""

import gc
import random
import tracemalloc

import pytest

from shipproto.connection import (
    ChunkArrived,
    ChunkDamaged,
    ChunksRefused,
    Connection,
    Established,
    MessageArrived,
)
from shipproto.errors import (
    AuthFailed,
    BadPrelude,
    ForeignPeer,
    LimitExceeded,
    LocalError,
    MalformedMessage,
    UnexpectedMessage,
)
from shipproto.limits import MAX_CHUNK_ATTEMPTS, MAX_PAYLOAD, RETAINED_CONTROL_FRAMES
from shipproto.messages import Body, Commit, Data, Evicted, Hello, Nack, Ping, StatusIs, StructureIs
from tests.support import naive
from tests.support.link import CHOPS, Chop, feed, handshaken, nonce, output_of
from tests.support.naive import Stream

TRANSFER = bytes(16)
COMMIT = Commit(transfer=TRANSFER)


def acceptor(**options) -> Connection:
    """An established acceptor that expects frame 1 and whose HELLO has been taken."""
    connection = Connection(initiator=False, nonce=nonce(1), agent="here", **options)
    feed(connection, bytes(greeted().data))
    return connection


def greeted() -> Stream:
    return Stream().add("Hello", naive.hello(nonce(2), "there"))


def after_hello() -> Stream:
    return Stream(sequence=1)


class Landing:
    """Memory for chunks; records what was asked."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.memory = {chunk: bytearray(b"\xee" * size) for chunk, size in sizes.items()}
        self.asked: list[tuple[int, int]] = []

    def __call__(self, chunk: int, size: int) -> memoryview | None:
        self.asked.append((chunk, size))
        if chunk not in self.memory:
            return None
        return memoryview(self.memory[chunk])


# --- the handshake -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chop", CHOPS)
@pytest.mark.parametrize("token", [None, b"sixteen or more bytes"])
def test_two_of_them_greet_each_other(chop: Chop, token: bytes | None) -> None:
    left = Connection(initiator=True, nonce=nonce(1), agent="left", token=token)
    right = Connection(initiator=False, nonce=nonce(2), agent="right", token=token)
    assert not left.established
    assert not right.has_output
    with pytest.raises(LocalError, match="handshake is not done"):
        _ = left.peer
    with pytest.raises(LocalError, match="before the handshake is done"):
        left.send(COMMIT)
    events: dict[str, list] = {"left": [], "right": []}
    on_its_way = output_of(left)
    while on_its_way:
        fed = feed(right, on_its_way, chop=chop)
        back = feed(left, fed.output, chop=chop)
        events["right"] += fed.events
        events["left"] += back.events
        on_its_way = back.output
    for side, name, other in ((left, "left", "right"), (right, "right", "left")):
        assert side.established
        (established,) = events[name]
        assert isinstance(established, Established)
        assert established.peer == side.peer
        assert side.peer.agent == other


def test_handshaken_helper() -> None:
    for token in (None, b"token"):
        left, right = handshaken(token=token)
        left.send(Ping(reply=True))
        (pong,) = naive.frames(feed(right, output_of(left)).output)
        assert (pong.name, pong.fields) == ("Ping", {})


def test_last_words_are_ready_when_the_handshake_fails() -> None:
    right = Connection(initiator=False, nonce=nonce(1), agent="right", token=b"one")
    theirs = naive.hello(nonce(2))
    fed = feed(right, Stream().add("Hello", theirs).add("Auth", {"proof": bytes(32)}).data)
    assert isinstance(fed.error, AuthFailed)
    assert [frame.name for frame in naive.frames(fed.output)] == ["Hello", "Abort"]
    assert not right.established


def test_no_landing_before_the_handshake_is_done() -> None:
    """Found here: an empty DATA frame from anybody reached ``landing``, and came out as ChunkArrived."""
    landing = Landing({0: 0})
    connection = Connection(initiator=False, nonce=nonce(1), agent="x", token=b"secret", landing=landing)
    fed = feed(connection, Stream().add("Data", {"chunk": 0}).data)
    assert isinstance(fed.error, UnexpectedMessage)
    assert fed.events == []
    assert landing.asked == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_too_little_to_tell(size: int) -> None:
    connection = Connection(initiator=False, nonce=nonce(1), agent="x")
    assert feed(connection, b"GET /"[:size]).error is None
    assert isinstance(feed(connection, b"GET /"[size:], chop="bytes").error, ForeignPeer)


def test_a_foreign_peer_is_quoted() -> None:
    for chop in CHOPS:
        connection = Connection(initiator=True, nonce=nonce(1), agent="x")
        error = feed(connection, b"HTTP/1.1 400 Bad Request\r\n\r\n" * 50, chop=chop).error
        assert isinstance(error, ForeignPeer)
        assert error.opening.startswith(b"HTTP")
        assert len(error.opening) <= 96


# --- receiving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chop", CHOPS)
def test_a_conversation(chop: Chop) -> None:
    content = random.Random(1).randbytes(3000)
    landing = Landing({5: 3000, 6: 1})
    connection = acceptor(landing=landing)
    stream = after_hello()
    stream.add("Commit", {"transfer": TRANSFER}).add("Data", {"chunk": 5}, content).add("Ping")
    stream.add("Data", {"chunk": 6}, b"x").add("StatusIs", {}, b"body").add("Data", {"chunk": 9}, b"unwanted")
    fed = feed(connection, bytes(stream.data), chop=chop, seed=3)
    assert fed.error is None
    commit, first, second, status = fed.events
    assert isinstance(commit, MessageArrived)
    assert commit.message == COMMIT
    assert isinstance(first, ChunkArrived)
    assert (first.chunk, bytes(first.content)) == (5, content)
    assert first.content.obj is landing.memory[5], "received in place"
    assert isinstance(second, ChunkArrived)
    assert second.chunk == 6
    assert isinstance(status, MessageArrived)
    assert bytes(status.body) == b"body"
    assert landing.asked == [(5, 3000), (6, 1), (9, 8)]
    assert fed.output == b""
    assert connection.bytes_received == len(greeted().data) + len(stream.data)


@pytest.mark.parametrize("chop", CHOPS)
def test_get_buffer_is_never_empty_and_asks_for_the_rest(chop: Chop) -> None:
    landing = Landing({0: 70_000})
    connection = acceptor(landing=landing)
    stream = after_hello().add("Data", {"chunk": 0}, bytes(70_000)).add("Evicted", {"reason": "x" * 2000}).add("Ping")
    data = bytes(stream.data)
    rng = random.Random(5)
    at = 0
    while at < len(data):
        view = connection.get_buffer()
        assert len(view) >= 1
        if landing.asked and not landing.memory[0][0]:
            landing.memory[0][0] = 1
            assert len(view) > 69_000, "the whole rest of the frame"
        count = min(len(view), len(data) - at, {"whole": 1 << 30, "split": rng.randrange(1, 400), "bytes": 1}[chop])
        view[:count] = data[at : at + count]
        connection.buffer_updated(count)
        at += count
    (arrived, evicted) = connection.events()
    assert isinstance(arrived, ChunkArrived)
    assert isinstance(evicted, MessageArrived)
    assert isinstance(evicted.message, Evicted)


def test_small_frames_arrive_several_at_a_time() -> None:
    connection = acceptor()
    stream = after_hello()
    for _ in range(50):
        stream.add("Ping", {"reply": True})
    data = bytes(stream.data)
    calls = at = 0
    while at < len(data):
        view = connection.get_buffer()
        count = min(len(view), len(data) - at)
        view[:count] = data[at : at + count]
        connection.buffer_updated(count)
        at += count
        calls += 1
    assert calls < 40
    assert [frame.name for frame in naive.frames(output_of(connection))] == ["Ping"] * 50


@pytest.mark.parametrize("chop", CHOPS)
@pytest.mark.parametrize("part", ["header", "payload"])
def test_damage_costs_one_frame(chop: Chop, part: str) -> None:
    content = random.Random(2).randbytes(500)
    landing = Landing({3: 500, 4: 4})
    connection = acceptor(landing=landing)
    header = naive.pack({"chunk": 3})
    stream = after_hello()
    if part == "payload":
        stream.raw(20, header, content[:-1] + bytes((content[-1] ^ 0x80,)), payload_crc=naive.crc32c(content))
    else:
        stream.raw(20, header[:-1] + b"\x09", content, header_crc=naive.crc32c(header))
    stream.add("Data", {"chunk": 4}, b"next")
    fed = feed(connection, bytes(stream.data), chop=chop)
    damaged, arrived = fed.events
    assert damaged == ChunkDamaged(3 if part == "payload" else None, 1)
    assert isinstance(arrived, ChunkArrived)
    (nack,) = naive.frames(fed.output)
    assert (nack.name, nack.fields) == ("Nack", {"sequences": [1]})
    if part == "header":
        assert landing.asked == [(4, 4)], "a damaged header is not believed"
        assert landing.memory[3] == b"\xee" * 500
    assert feed(connection, stream.data[:0] + Stream(sequence=3).add("Data", {"chunk": 3}, content).data).error is None
    assert landing.memory[3] == content


def test_a_chunk_that_is_not_wanted_is_not_checked() -> None:
    connection = acceptor(landing=Landing({}))
    stream = (
        after_hello().raw(20, naive.pack({"chunk": 3}), bytes(100), payload_crc=7).add("Commit", {"transfer": TRANSFER})
    )
    fed = feed(connection, bytes(stream.data))
    assert [type(event) for event in fed.events] == [MessageArrived]
    assert fed.output == b""


def test_landing_that_raises_ends_the_connection() -> None:
    def landing(chunk: int, size: int) -> memoryview | None:
        raise MalformedMessage(f"chunk {chunk}, {size} bytes")

    connection = acceptor(landing=landing)
    fed = feed(connection, after_hello().add("Data", {"chunk": 3}, b"12345").data)
    assert str(fed.error) == "chunk 3, 5 bytes"


def test_landing_that_returns_memory_of_another_size_is_a_bug_here() -> None:
    """Found here: the memory was kept, and the next bytes went into it."""
    memory = bytearray(4)
    connection = acceptor(landing=lambda chunk, size: memoryview(memory))
    with pytest.raises(LocalError, match="another size"):
        feed(connection, after_hello().add("Data", {"chunk": 3}, b"12345").data)
    connection.get_buffer()[:1] = b"x"
    assert memory == bytes(4)


@pytest.mark.parametrize("arrived", [0, 1, 60, 99])
def test_withdrawn_memory_is_not_written_any_more(arrived: int) -> None:
    """Found here: after an abort, or when the sender had come back on another connection, the rest of a chunk under way
    still landed in the image, which by then could belong to another version."""
    landing = Landing({0: 100, 1: 4})
    connection = acceptor(landing=landing)
    stream = after_hello().add("Data", {"chunk": 0}, b"\x11" * 100).add("Data", {"chunk": 1}, b"next").data
    head = 32 + len(naive.pack({"chunk": 0}))
    assert feed(connection, stream[: head + arrived]).error is None
    before = bytes(landing.memory[0])
    assert before == b"\x11" * arrived + b"\xee" * (100 - arrived)
    connection.withdraw()
    connection.withdraw()
    fed = feed(connection, stream[head + arrived :])
    assert fed.error is None
    assert landing.memory[0] == before
    (event,) = fed.events
    assert isinstance(event, ChunkArrived)
    assert event.chunk == 1, "the withdrawn chunk says nothing, damaged or not"
    assert fed.output == b""


def test_withdrawing_where_nothing_is_under_way() -> None:
    connection = acceptor(landing=Landing({}))
    connection.withdraw()
    part = after_hello().add("StatusIs", {}, bytes(100)).data
    feed(connection, part[:-10])
    connection.withdraw()
    (event,) = feed(connection, part[-10:]).events
    assert isinstance(event, MessageArrived)
    assert bytes(event.body) == bytes(100)


# --- after an error ----------------------------------------------------------------------------------------------


def test_after_an_error_nothing_is_believed() -> None:
    landing = Landing({0: 100})
    connection = acceptor(landing=landing)
    stream = after_hello().add("Commit", {"transfer": TRANSFER}).raw(5, b"\x80", prelude_crc=1)
    stream.add("Commit", {"transfer": TRANSFER}).add("Data", {"chunk": 0}, bytes(100))
    fed = feed(connection, bytes(stream.data))
    assert isinstance(fed.error, BadPrelude)
    assert len(fed.events) == 1, "what came before stands"
    for data in (bytes(stream.data), bytes(greeted().data), b"", b"x"):
        if data:
            again = feed(connection, data)
            assert again.error is fed.error
            assert again.events == []
    with pytest.raises(BadPrelude):
        connection.buffer_updated(0)
    assert landing.asked == []
    assert len(connection.get_buffer()) >= 1


def test_events_before_the_error_are_not_lost() -> None:
    connection = acceptor()
    stream = after_hello().add("Ping", {"reply": True}).add("Detach").raw(99, b"\x80")
    for piece in (bytes(stream.data),):
        with pytest.raises(MalformedMessage):
            connection.receive(piece)
    assert [type(event) for event in connection.events()] == [MessageArrived]
    assert [type(event) for event in connection.events()] == []


# --- bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 2 * MAX_PAYLOAD, 2 * MAX_PAYLOAD + 7]
)
def test_bodies_of_any_size(size: int) -> None:
    left, right = handshaken()
    body = random.Random(size).randbytes(size)
    left.send(StatusIs(), body)
    left.send(Ping())
    output = output_of(left)
    expected = Stream(sequence=1).message("StatusIs", {}, body).add("Ping")
    assert output == bytes(expected.data)
    for form in ("whole", "split"):
        _, right = handshaken()
        (event,) = feed(right, output, chop=form).events
        assert isinstance(event, MessageArrived)
        assert isinstance(event.message, StatusIs)
        assert bytes(event.body) == body


def test_a_body_beyond_its_limit_is_not_sent() -> None:
    left, _ = handshaken()
    with pytest.raises(LimitExceeded):
        left.send(StatusIs(), bytes(StatusIs.MAX_BODY + 1))
    assert not left.has_output


def test_what_cannot_be_framed_costs_no_sequence_number() -> None:
    """Found here: the number was used up, and the peer saw a gap in the next frame."""
    left, right = handshaken()
    with pytest.raises(LimitExceeded):
        left.send(Nack(sequences=tuple(range(1 << 62, (1 << 62) + 2000))))
    with pytest.raises(LimitExceeded):
        left.send_data(0, memoryview(bytes(MAX_PAYLOAD + 1)))
    left.send(COMMIT)
    (event,) = feed(right, output_of(left)).events
    assert isinstance(event, MessageArrived)


def test_announcing_much_costs_little() -> None:
    """Found here: a frame of a hundred bytes had 128 MiB allocated and zeroed, four times over."""
    stream = after_hello()
    for number in range(1, 5):
        announced = {"body_id": number, "body_size": 128 * 1024 * 1024, "mode": "copy", "model": "m"}
        stream.add("Attach", announced, bytes(MAX_PAYLOAD), naive.MORE)
    data = bytes(stream.data)
    connection = acceptor()
    gc.collect()
    tracemalloc.start()
    try:
        assert feed(connection, data).error is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * len(data)


def test_what_a_side_has_no_use_for_is_refused_before_its_body_arrives() -> None:
    connection = acceptor()
    connection.accepts = (Nack, Ping, Body, Commit)
    fed = feed(connection, after_hello().add("Commit", {"transfer": TRANSFER}).add("Ping", {"reply": True}).data)
    assert [type(event) for event in fed.events] == [MessageArrived]
    assert fed.error is None
    announced = {"body_id": 1, "body_size": 128 * 1024 * 1024, "mode": "copy", "model": "m"}
    data = Stream(sequence=3).add("Attach", announced, bytes(MAX_PAYLOAD), naive.MORE).data
    error = feed(connection, data[: 32 + len(naive.pack(announced))]).error
    assert isinstance(error, UnexpectedMessage)
    assert "Attach is not for this side" in str(error)


def test_two_bodies_at_once_and_pieces_in_any_order() -> None:
    first, second = b"\1" * (2 * MAX_PAYLOAD + 5), b"\2" * (MAX_PAYLOAD + 1)
    stream = after_hello()
    stream.add("StatusIs", {"body_id": 1, "body_size": len(first)}, first[:MAX_PAYLOAD], naive.MORE)
    stream.add("VerifyIs", {"body_id": 2, "body_size": len(second)}, second[:MAX_PAYLOAD], naive.MORE)
    stream.add("Body", {"body_id": 1, "offset": 2 * MAX_PAYLOAD}, first[2 * MAX_PAYLOAD :])
    stream.add("Body", {"body_id": 2, "offset": MAX_PAYLOAD}, second[MAX_PAYLOAD:])
    stream.add("Body", {"body_id": 1, "offset": MAX_PAYLOAD}, first[MAX_PAYLOAD : 2 * MAX_PAYLOAD])
    stream.add("StatusIs", {"body_id": 1, "body_size": len(second)}, second[:MAX_PAYLOAD], naive.MORE)
    stream.add("Body", {"body_id": 1, "offset": MAX_PAYLOAD}, second[MAX_PAYLOAD:])
    fed = feed(acceptor(), bytes(stream.data))
    assert fed.error is None
    assert [bytes(event.body) for event in fed.events] == [second, first, second]  # type: ignore[union-attr]


# --- NACK: what this side has to send again ----------------------------------------------------------------------


def nack(*sequences: int, sequence: int = 1) -> bytes:
    return bytes(Stream(sequence=sequence).add("Nack", {"sequences": list(sequences)}).data)


def test_a_refused_message_goes_again() -> None:
    connection = acceptor()
    connection.send(COMMIT)
    connection.send(StatusIs(), b"body")
    output_of(connection)
    fed = feed(connection, nack(1, 2))
    assert fed.error is None
    assert fed.events == []
    again = list(naive.frames(fed.output))
    assert [(frame.name, frame.sequence, frame.payload) for frame in again] == [
        ("Commit", 3, b""),
        ("StatusIs", 4, b"body"),
    ]
    assert connection.frames_resent == 2
    assert isinstance(feed(connection, nack(1, sequence=2)).error, UnexpectedMessage)


def test_refused_chunks_are_the_callers_to_send_again() -> None:
    connection = acceptor()
    for chunk in (7, 8, 9):
        connection.send_data(chunk, memoryview(b"content"))
    output_of(connection)
    fed = feed(connection, nack(3, 1))
    assert fed.events == [ChunksRefused((9, 7))]
    assert fed.output == b""
    assert connection.frames_resent == 2
    connection.send_data(9, memoryview(b"content"))
    output_of(connection)
    assert feed(connection, nack(4, 2, sequence=2)).events == [ChunksRefused((9, 8))]
    assert isinstance(feed(connection, nack(2, sequence=3)).error, UnexpectedMessage)


def test_a_head_that_was_refused_takes_its_pieces_along() -> None:
    """The peer has dropped the pieces; it may have refused some of them, too."""
    left, right = handshaken()
    body = random.Random(9).randbytes(2 * MAX_PAYLOAD + 9)
    left.send(StatusIs(), body)
    left.send(COMMIT)
    frames = list(naive.frames(output := output_of(left)))
    assert [frame.name for frame in frames] == ["StatusIs", "Body", "Body", "Commit"]
    damaged = bytearray(output)
    damaged[frames[0].start + frames[0].size - 1] ^= 1
    damaged[frames[2].start + frames[2].size - 1] ^= 1
    fed = feed(right, bytes(damaged))
    assert [type(event.message) for event in fed.events] == [Commit]  # type: ignore[union-attr]
    assert [frame.fields["sequences"] for frame in naive.frames(fed.output)] == [[1], [3]]
    # Found by the lossy link: the second NACK is for a piece that has been sent again already.
    again = feed(left, fed.output)
    assert again.error is None
    assert [(frame.name, frame.sequence) for frame in naive.frames(again.output)] == [
        ("StatusIs", 5), ("Body", 6), ("Body", 7)
    ]  # fmt: skip
    (event,) = feed(right, again.output).events
    assert isinstance(event, MessageArrived)
    assert bytes(event.body) == body
    assert isinstance(feed(left, nack(3, sequence=3)).error, UnexpectedMessage), "such a NACK comes once"


def test_only_its_own_pieces_go_with_a_head() -> None:
    left, right = handshaken()
    first, second = (random.Random(seed).randbytes(MAX_PAYLOAD + 9) for seed in (1, 2))
    left.send(StatusIs(), first)
    left.send(StatusIs(), second)
    damaged = bytearray(output_of(left))
    damaged[100] ^= 1
    fed = feed(right, bytes(damaged))
    assert [bytes(event.body) for event in fed.events] == [second]  # type: ignore[union-attr]
    again = feed(left, fed.output)
    assert [(frame.name, frame.sequence) for frame in naive.frames(again.output)] == [("StatusIs", 5), ("Body", 6)]
    (event,) = feed(right, again.output).events
    assert bytes(event.body) == first  # type: ignore[union-attr]


def test_a_piece_that_was_refused_goes_alone() -> None:
    left, right = handshaken()
    body = random.Random(9).randbytes(2 * MAX_PAYLOAD + 9)
    left.send(StatusIs(), body)
    frames = list(naive.frames(output := output_of(left)))
    damaged = bytearray(output)
    damaged[frames[1].start + 400] ^= 1
    fed = feed(right, bytes(damaged))
    assert fed.events == []
    again = feed(left, fed.output)
    assert [(frame.name, frame.sequence) for frame in naive.frames(again.output)] == [("Body", 4)]
    (event,) = feed(right, again.output).events
    assert bytes(event.body) == body  # type: ignore[union-attr]


def test_a_message_that_keeps_arriving_damaged_ends_the_connection() -> None:
    """Found here: it was sent for ever."""
    connection = acceptor()
    connection.send(COMMIT)
    output_of(connection)
    for attempt in range(1, MAX_CHUNK_ATTEMPTS):
        fed = feed(connection, nack(attempt, sequence=attempt))
        assert [frame.sequence for frame in naive.frames(fed.output)] == [attempt + 1]
    fed = feed(connection, nack(MAX_CHUNK_ATTEMPTS, sequence=MAX_CHUNK_ATTEMPTS))
    assert isinstance(fed.error, LimitExceeded)
    assert "Commit" in str(fed.error)
    assert fed.output == b""


def test_one_nack_cannot_have_a_body_sent_hundreds_of_times() -> None:
    """Found here: sequence numbers can be foretold, so one NACK of 2 KB could ask for a body 256 times over."""
    connection = acceptor()
    pieces = 4
    connection.send(StatusIs(), bytes(pieces * MAX_PAYLOAD))
    output_of(connection)
    guessed = tuple(1 + at * pieces for at in range(200))
    fed = feed(connection, nack(*guessed))
    assert isinstance(fed.error, LimitExceeded)
    assert len(list(naive.frames(fed.output))) <= MAX_CHUNK_ATTEMPTS * pieces


def test_frames_that_were_sent_long_ago_are_forgotten() -> None:
    connection = acceptor()
    for _ in range(RETAINED_CONTROL_FRAMES + 1):
        connection.send(COMMIT)
    output_of(connection)
    assert isinstance(feed(connection, nack(1)).error, UnexpectedMessage)


@pytest.mark.parametrize("far", [1, 17, (1 << 63) - 1])
def test_a_nack_for_what_was_never_sent(far: int) -> None:
    assert isinstance(feed(acceptor(), nack(far)).error, UnexpectedMessage)


def test_a_damaged_nack_is_refused_and_comes_again() -> None:
    left, right = handshaken()
    left.send(COMMIT)
    raw = bytearray(output_of(left))
    raw[-1] ^= 1
    first = bytearray(feed(right, bytes(raw)).output)
    first[-1] ^= 1
    second = feed(left, bytes(first)).output
    third = feed(right, second).output
    (event,) = feed(right, feed(left, third).output).events
    assert isinstance(event, MessageArrived)
    assert event.message == COMMIT


# --- sending -----------------------------------------------------------------------------------------------------


def test_content_is_not_copied() -> None:
    left, _ = handshaken()
    content = memoryview(bytearray(1000))
    left.send_data(1, content)
    head, payload = left.take_output()
    assert payload is content
    assert bytes(head) == naive.prelude(20, naive.pack({"chunk": 1}), bytes(1000), 1) + naive.pack({"chunk": 1})
    assert not left.has_output
    assert left.take_output() == []


def test_every_message_type_is_what_its_number_says() -> None:
    left, right = handshaken()
    left.send(StructureIs(transfer=TRANSFER), b"body")
    (event,) = feed(right, output_of(left)).events
    assert event == MessageArrived(StructureIs(transfer=TRANSFER), memoryview(b"body"))
    for message in (
        Hello(nonce=nonce(1), version_max=1, version_min=1),
        Body(body_id=1, offset=MAX_PAYLOAD),
        Data(chunk=0),
    ):
        left, right = handshaken()
        left.send(message)
        assert feed(right, output_of(left)).error is not None
