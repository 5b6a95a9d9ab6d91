"""shipproto.connection: NACK, and what this side then has to send again."""

import random

import pytest

from shipproto.connection import ChunksRefused, MessageArrived
from shipproto.errors import LimitExceeded, UnexpectedMessage
from shipproto.limits import MAX_CHUNK_ATTEMPTS, MAX_PAYLOAD, RETAINED_CONTROL_FRAMES
from shipproto.messages import Commit, StatusIs
from tests.support import naive
from tests.support.acceptor import COMMIT, acceptor
from tests.support.link import feed, handshaken, output_of
from tests.support.naive import Stream


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
