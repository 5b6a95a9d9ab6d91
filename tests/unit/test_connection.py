"""shipproto.connection: two of them, or one and the naive implementation, on whole, split and byte-by-byte input."""

import random

import pytest

from shipproto.connection import ChunkArrived, ChunkDamaged, Connection, Established, MessageArrived
from shipproto.errors import AuthFailed, BadPrelude, ForeignPeer, LocalError, MalformedMessage, UnexpectedMessage
from shipproto.limits import MAX_PAYLOAD
from shipproto.messages import Body, Coded, Data, Evicted, Hello, Ping, StructureIs
from tests.support import naive
from tests.support.acceptor import COMMIT, TRANSFER, acceptor, after_hello, greeted
from tests.support.link import CHOPS, Chop, feed, handshaken, nonce, output_of
from tests.support.naive import Stream


class Landing:
    """Memory for chunks; records what was asked."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.memory = {chunk: bytearray(b"\xee" * size) for chunk, size in sizes.items()}
        self.asked: list[tuple[int, int]] = []

    def __call__(self, message: Data | Coded, size: int) -> memoryview | None:
        self.asked.append((message.chunk, size))
        if message.chunk not in self.memory:
            return None
        return memoryview(self.memory[message.chunk])


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


@pytest.mark.parametrize("chop", ["whole", "split", "bytes"])
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
    def landing(message: Data | Coded, size: int) -> memoryview | None:
        raise MalformedMessage(f"chunk {message.chunk}, {size} bytes")

    connection = acceptor(landing=landing)
    fed = feed(connection, after_hello().add("Data", {"chunk": 3}, b"12345").data)
    assert str(fed.error) == "chunk 3, 5 bytes"


def test_landing_that_returns_memory_of_another_size_is_a_bug_here() -> None:
    """Found here: the memory was kept, and the next bytes went into it."""
    memory = bytearray(4)
    connection = acceptor(landing=lambda message, size: memoryview(memory))
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
