"""shipproto.connection: bodies, in one frame and in pieces, and what they may cost."""

import gc
import random
import tracemalloc

import pytest

from shipproto.connection import Event, MessageArrived
from shipproto.errors import LimitExceeded, UnexpectedMessage
from shipproto.limits import MAX_PAYLOAD
from shipproto.messages import Body, Commit, Message, Nack, Ping, StatusIs
from tests.support import naive
from tests.support.acceptor import COMMIT, TRANSFER, acceptor, after_hello
from tests.support.link import feed, handshaken, output_of
from tests.support.naive import Stream


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
    """Found here: a frame of a hundred bytes had 128 MiB allocated and zeroed."""
    announced = {"body_id": 1, "body_size": 128 * 1024 * 1024, "mode": "copy", "model": "m"}
    stream = after_hello().add("Attach", announced, bytes(MAX_PAYLOAD), naive.MORE)
    announced = {"body_id": 2, "body_size": 64 * 1024 * 1024, "transfer": TRANSFER}
    stream.add("StructureIs", announced, bytes(MAX_PAYLOAD), naive.MORE)
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


def _announce(stream: Stream, number: int, size: int) -> Stream:
    announced = {"body_id": number, "body_size": size, "transfer": TRANSFER}
    return stream.add("StructureIs", announced, bytes(MAX_PAYLOAD), naive.MORE)


def test_two_bodies_of_one_type_at_once_are_refused() -> None:
    error = feed(
        acceptor(), bytes(_announce(_announce(after_hello(), 1, MAX_PAYLOAD + 1), 2, MAX_PAYLOAD + 1).data)
    ).error
    assert isinstance(error, LimitExceeded)
    assert "StructureIs" in str(error)


def test_a_body_that_nobody_waits_for_takes_no_memory() -> None:
    """Found here: whoever had the token could have 64 MiB collected, four times over, without an offer."""
    connection = acceptor()
    asked: list[tuple[str, int]] = []

    def awaited(message: Message, size: int) -> bool:
        asked.append((type(message).__name__, size))
        return False

    connection.awaited = awaited
    size = 40 * MAX_PAYLOAD
    stream = _announce(after_hello(), 1, size)
    for offset in range(MAX_PAYLOAD, size, MAX_PAYLOAD):
        stream.add("Body", {"body_id": 1, "offset": offset}, bytes(MAX_PAYLOAD))
    data = bytes(stream.add("Commit", {"transfer": TRANSFER}).data)
    tracemalloc.start()
    try:
        events: list[Event] = []
        for at in range(0, len(data), MAX_PAYLOAD):
            connection.receive(memoryview(data)[at : at + MAX_PAYLOAD])
            events += connection.events()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert asked == [("StructureIs", size)]
    (event,) = events
    assert isinstance(event, MessageArrived)
    assert event.message == COMMIT
    assert peak < 4 * MAX_PAYLOAD
