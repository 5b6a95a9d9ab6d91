"""Coded runs, moved by hand: through a connection, and into a receiver's books.

Lanes and broken connections are in test_coded_reconnects, who agrees on what in test_agreement, and random
conversations in tests/property/test_coded_conversations.
"""

import pytest

from shipproto.connection import ChunksRefused, Connection, RunArrived, RunDamaged
from shipproto.errors import LocalError, MalformedMessage
from shipproto.messages import SAME, Coded, Join
from shipproto.outcomes import ChunkHeld, ReadyToVerify, RunToDecode
from shipproto.states import SenderState
from tests.support import naive
from tests.support.coded_pair import CodedPair
from tests.support.coding import DIFF, PLAIN, Undecodable
from tests.support.link import feed, handshaken, output_of
from tests.support.models import leaves_of
from tests.support.pair import TRANSFER


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


def acceptor() -> tuple[Connection, Connection]:
    """Two connections, of which the right takes any run."""
    return handshaken(landing=lambda message, size: memoryview(bytearray(size)))


# --- a connection ------------------------------------------------------------------------------------------------


def test_a_run_that_is_refused_takes_all_of_its_chunks_along() -> None:
    left, right = acceptor()
    left.send_coded(range(5, 9), 7, b"payload")
    left.send_data(1, memoryview(b"x"))
    left.send_coded(range(2, 3), SAME, b"")
    fed = feed(right, output_of(left))
    first, _, second = fed.events
    assert first == RunArrived(range(5, 9), 7, memoryview(b"payload"), 1)
    assert second == RunArrived(range(2, 3), SAME, memoryview(b""), 3)
    assert fed.output == b""
    right.nack(1)
    right.nack(3)
    assert right.has_output
    nacks = output_of(right)
    assert [frame.fields["sequences"] for frame in naive.frames(nacks)] == [[1], [3]]
    assert feed(left, nacks).events == [ChunksRefused((5, 6, 7, 8)), ChunksRefused((2,))]
    assert left.frames_resent == 2


@pytest.mark.parametrize("sequence", [1, 3, -1])
def test_a_frame_is_asked_for_once(sequence: int) -> None:
    left, right = acceptor()
    left.send_coded(range(5, 9), 7, b"payload")
    left.send_coded(range(9, 10), 7, b"payload")
    feed(right, output_of(left))
    right.nack(1)
    with pytest.raises(LocalError, match=f"frame {sequence} "):
        right.nack(sequence)


def test_a_damaged_run() -> None:
    left, right = acceptor()
    left.send_coded(range(5, 9), 7, b"payload")
    raw = bytearray(output_of(left))
    raw[-1] ^= 1
    fed = feed(right, bytes(raw))
    assert fed.events == [RunDamaged(range(5, 9), 1)]
    assert feed(left, fed.output).events == [ChunksRefused((5, 6, 7, 8))]


@pytest.mark.parametrize(
    ("chunks", "codec", "payload"),
    [
        (range(0), 7, b"x"),
        (range(3, 3), SAME, b""),
        (range(0, 4, 2), 7, b"x"),
        (range(2), 7, b""),
        (range(2), SAME, b"x"),
    ],
)
def test_runs_that_cannot_be_sent(chunks: range, codec: int, payload: bytes) -> None:
    left, _ = acceptor()
    with pytest.raises(LocalError, match="no coded run"):
        left.send_coded(chunks, codec, payload)
    assert not left.has_output


def test_a_run_whose_memory_is_taken_back() -> None:
    left, right = acceptor()
    left.send_coded(range(5, 9), 7, b"payload")
    data = output_of(left)
    right.receive(data[:-2])
    right.withdraw()
    fed = feed(right, data[-2:])
    assert fed.events == []
    assert fed.output == b""


# --- by the book -------------------------------------------------------------------------------------------------


def test_a_push_of_runs() -> None:
    pair = CodedPair()
    assert pair.sender.waiting == pair.layout.chunks
    while chunks := pair.take():
        pair.send(chunks)
        assert pair.flow() == ["Coded"]
        assert pair.there.decoding == 1
        held = pair.decode(pair.arrived())
        assert held == [ChunkHeld(chunk) for chunk in chunks]
        assert pair.is_after(chunks)
    assert pair.there.decoding == 0
    pair.send_all()
    assert pair.outcomes == [ReadyToVerify()]
    assert pair.there.verify() == ()
    assert pair.there.verified(())
    assert pair.there.digests.version_digest() == pair.sender.digest
    assert pair.there.payload_bytes > 0


def test_finish_may_come_while_runs_are_being_decoded() -> None:
    pair = CodedPair()
    runs = []
    while chunks := pair.take():
        pair.send(chunks)
        pair.flow()
        runs.append(pair.arrived())
    assert pair.sender.next_step() is None
    assert pair.sender.state is SenderState.FINISHING
    pair.flow()
    assert pair.outcomes == []
    *first, last = runs
    for run in reversed(first):
        assert ReadyToVerify() not in pair.decode(run)
    assert pair.decode(last)[-1] == ReadyToVerify()


def test_digests_that_are_known_are_not_made_again() -> None:
    """Of a run that equals the base they are the base's; others a thread may have made as it decoded."""
    pair = CodedPair()
    chunks = pair.take()
    pair.send(chunks)
    pair.flow()
    run = pair.arrived()
    pair.there.digests.adopt(run.chunks, pair.held)
    pair.decode(run)
    for chunk in chunks:
        assert pair.there.digests.chunk_digest(chunk) == pair.held.chunk_digest(chunk)
        assert pair.there.digests.chunk_digest(chunk) != pair.sender.digests.chunk_digest(chunk)


def test_progress_is_told_of_whatever_arrives_in_runs() -> None:
    pair = CodedPair()
    pair.send(pair.take(1))
    pair.flow()
    pair.decode(pair.arrived())
    assert pair.flow() == []
    rest = pair.take(100)
    pair.send(rest)
    pair.flow()
    pair.decode(pair.arrived())
    while chunks := pair.take(100):
        pair.send(chunks)
        pair.flow()
        pair.decode(pair.arrived())
    assert pair.flow() == ["Progress"]
    assert pair.sender.held == pair.layout.chunks


def test_chunks_that_came_back_travel_as_they_are() -> None:
    pair = CodedPair()
    chunks = pair.take(4)
    assert list(chunks) == [0, 1, 2, 3]
    pair.sender.sent(chunks)
    pair.sender.receive(ChunksRefused((1, 2)))
    assert [pair.sender.raw_only(chunk) for chunk in chunks] == [False, True, True, False]
    pair.sender._outgoing.wanted.add(0, 4)
    assert list(pair.sender.next_chunks(4)) == [0]
    assert list(pair.sender.next_chunks(4)) == [1, 2]
    assert list(pair.sender.next_chunks(1)) == [3]
    assert pair.sender.chunks_resent == {1: 1, 2: 1}


def test_a_codec_that_was_not_asked_for_is_not_sent() -> None:
    pair = CodedPair()
    with pytest.raises(LocalError, match="codec 9"):
        pair.sender.send_run(pair.take(), 9, b"x")


# --- runs that are of no use -------------------------------------------------------------------------------------


def test_a_run_that_does_not_decode() -> None:
    pair = CodedPair()
    chunks = pair.take()
    gaps = pair.layout.gaps(range(pair.layout.chunks))
    assert gaps, "there is something between chunks"
    pair.sender.send_run(chunks, DIFF, b"odd")
    pair.flow()
    run = pair.arrived()
    with pytest.raises(Undecodable):
        pair.decode(run)
    pair.there.digests.record(chunks.start, pair.content(chunks.start))
    pair.there.undecodable(run)
    assert not pair.there.digests.knows(chunks.start), "what was made of it is forgotten"
    assert pair.there.decoding == 0
    assert pair.there.runs_undecodable == 1
    assert pair.flow() == ["Nack"]
    assert all(pair.sender.raw_only(chunk) for chunk in chunks)
    pair.send_all()
    pair.finish_from_anywhere()


def test_what_a_run_left_between_chunks_is_zeros_again() -> None:
    pair = CodedPair()
    while chunks := pair.take(100):
        pair.send(chunks)
    pair.flow()
    runs = [outcome for outcome in pair.outcomes if isinstance(outcome, RunToDecode)]
    assert any(pair.layout.gaps(run.chunks) for run in runs)
    for run in runs:
        start, end = pair.layout.span(run.chunks)
        pair.image[start:end] = b"\x5a" * (end - start)
        pair.there.undecodable(run)
    pair.flow()
    pair.send_all()
    pair.finish_from_anywhere()
    assert pair.image == bytes(pair.after)


def test_a_run_over_a_chunk_that_arrives_elsewhere_comes_again() -> None:
    pair = CodedPair()
    chunks = pair.take(4)
    lane, lane_right = handshaken()
    pair.there.joined(lane_right, Join(lane=1, transfer=TRANSFER))
    lane.receive(output_of(lane_right))
    lane.send_data(2, pair.content(2))
    data = output_of(lane)
    lane_right.receive(data[:100])
    pair.send(chunks)
    assert pair.flow() == ["Coded", "Nack"]
    assert pair.outcomes == []
    assert pair.there.decoding == 0
    lane_right.receive(data[100:])
    for event in lane_right.events():
        pair.there.take_on_thread(lane_right, event)
        assert pair.there.receive(lane_right, event) == [ChunkHeld(2)]
    pair.send_all()
    pair.finish_from_anywhere()


def test_a_run_that_is_held_already_is_thrown_away() -> None:
    pair = CodedPair()
    chunks = pair.take()
    for _ in range(2):
        pair.left.send_coded(chunks, DIFF, pair.payload(chunks))
    pair.sender.sent(chunks)
    assert pair.flow() == ["Coded", "Coded"]
    pair.decode(pair.arrived())
    assert pair.outcomes == []
    pair.left.send_coded(chunks, PLAIN, b"x")
    assert pair.flow() == ["Coded"]
    assert pair.is_after(chunks)
    pair.send_all()
    pair.finish_from_anywhere()


def test_nothing_lands_where_a_run_is_being_decoded() -> None:
    pair = CodedPair()
    chunks = pair.take()
    pair.send(chunks)
    pair.flow()
    run = pair.arrived()
    pair.left.send_data(chunks[1], memoryview(bytes(len(pair.content(chunks[1])))))
    pair.flow()
    assert pair.outcomes == []
    pair.decode(run)
    assert pair.is_after(chunks)


def test_what_is_decoded_twice_is_a_bug_here() -> None:
    pair = CodedPair()
    pair.send(pair.take())
    pair.flow()
    run = pair.arrived()
    pair.decode(run)
    for again in (pair.there.decoded, pair.there.undecodable):
        with pytest.raises(LocalError, match="no such run"):
            again(run)


def test_runs_are_checked_before_memory_is_taken() -> None:
    pair = CodedPair()
    land = pair.right.landing
    assert land is not None
    for chunk, chunks in ((pair.layout.chunks, 1), (0, pair.layout.chunks + 1), (0xFFFFFFFF, 0xFFFFFFFF)):
        with pytest.raises(MalformedMessage, match="chunks"):
            land(Coded(chunk=chunk, chunks=chunks, codec=PLAIN), 1)
    with pytest.raises(MalformedMessage, match="codec 9 was not asked for"):
        land(Coded(chunk=0, chunks=1, codec=9), 1)
    stranger, _ = handshaken()
    assert pair.there._reception._land(stranger, Coded(chunk=0, chunks=1, codec=9), 1) is None
