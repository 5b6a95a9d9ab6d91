"""Coded runs when connections come and go while they arrive and are decoded, and on lanes."""

import pytest

from shipproto.connection import ChunksRefused, Connection, MessageArrived, RunDamaged
from shipproto.errors import AbortCode, LocalError, TransferError
from shipproto.messages import Abort, Join
from shipproto.outcomes import ChunkHeld, RunToDecode
from shipproto.receiver import Receiver
from shipproto.states import ReceiverState, SenderState
from shipproto.steps import SendChunk
from tests.support.coded_pair import CodedPair
from tests.support.coding import DIFF
from tests.support.link import handshaken, output_of
from tests.support.models import leaves_of
from tests.support.pair import TRANSFER


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


# --- connections that come and go --------------------------------------------------------------------------------


def test_what_is_being_decoded_is_not_asked_for_again() -> None:
    pair = CodedPair()
    chunks = pair.take()
    pair.send(chunks)
    pair.flow()
    run = pair.arrived()
    pair.connect()
    assert pair.sender.next_chunks(1).start == chunks.stop
    pair.connect()
    assert pair.decode(run) == [ChunkHeld(chunk) for chunk in chunks]
    pair.send_all()
    pair.finish_from_anywhere()


def test_what_did_not_decode_after_its_connection_was_lost_is_asked_for_at_the_end() -> None:
    """There is no NACK for a frame of another connection, and the sender was not asked for its chunks on this one."""
    pair = CodedPair()
    chunks = pair.take()
    pair.send(chunks)
    pair.flow()
    run = pair.arrived()
    pair.connect()
    pair.there.undecodable(run)
    assert pair.flow() == []
    while isinstance(step := pair.sender.next_step(), SendChunk):
        pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
    assert pair.flow() == ["Data"] * (pair.layout.chunks - len(chunks)) + ["Finish", "Want"]
    assert pair.there.state is ReceiverState.RECEIVING
    assert not pair.there.finishing
    assert pair.sender.codecs == {}
    pair.send_all()
    pair.finish_from_anywhere()


def test_the_last_run_may_fail_after_finish_on_another_connection() -> None:
    pair = CodedPair()
    chunks = pair.take()
    pair.send(chunks)
    pair.flow()
    run = pair.arrived()
    pair.connect()
    pair.send_all()
    assert pair.sender.state is SenderState.FINISHING
    pair.there.undecodable(run)
    assert pair.flow() == ["Want"]
    pair.send_all()
    pair.finish_from_anywhere()


def test_on_the_next_connection_nothing_coded_is_asked_for_any_more() -> None:
    pair = CodedPair()
    pair.send(pair.take())
    pair.flow()
    pair.there.undecodable(pair.arrived())
    pair.connect()
    assert pair.sender.codecs == {}
    assert pair.sender.base == b""
    assert pair.sender.raw_only(5)
    pair.finish_from_anywhere()


def test_a_run_that_had_arrived_when_its_connection_was_replaced() -> None:
    pair = CodedPair()
    chunks = pair.take()
    pair.send(chunks)
    old = pair.right
    old.receive(output_of(pair.left))
    (event,) = old.events()
    pair.connect()
    assert pair.there.receive(old, event) == []
    assert pair.take() == chunks, "it is asked for again"
    pair.sender.sent(chunks)
    pair.connect()
    pair.finish_from_anywhere()


@pytest.mark.parametrize("how", ["decoded", "undecodable"])
def test_the_transfer_ends_while_a_run_is_being_decoded(how: str) -> None:
    pair = CodedPair()
    pair.send(pair.take())
    pair.flow()
    run = pair.arrived()
    pair.there.receive(pair.right, MessageArrived(Abort(code="interrupted", transfer=TRANSFER), b""))
    assert pair.there.decoding == 1, "the image is not to be given back yet"
    with pytest.raises(LocalError, match="1 runs being decoded"):
        pair.there.forget()
    if how == "decoded":
        assert pair.decode(run) == []
    else:
        pair.there.undecodable(run)
        assert not pair.right.has_output
    assert pair.there.decoding == 0
    assert len(pair.there.held) == 0
    pair.there.forget()
    assert pair.there.decoding == 0


def test_what_arrives_after_the_end_is_nobodys() -> None:
    pair = CodedPair()
    chunks = pair.take()
    pair.send(chunks)
    pair.left.send_data(5, pair.content(5))
    pair.right.receive(output_of(pair.left))
    events = list(pair.right.events())
    damaged = RunDamaged(chunks, 9)
    pair.there.abort(TransferError(AbortCode.STALLED, "too slow"))
    for _ in range(2):
        for event in (*events, damaged):
            assert pair.there.receive(pair.right, event) == []
        if pair.there.layout is not None:
            pair.there.forget()
    assert pair.there.chunks_damaged == 2
    assert pair.there.held == Receiver(pair.there.offer).held
    assert pair.there.layout is None


# --- lanes -------------------------------------------------------------------------------------------------------


def lane(pair: CodedPair) -> tuple[Connection, Connection]:
    """A lane that has joined."""
    left, right = handshaken()
    pair.sender.join(left, 1)
    right.receive(output_of(left))
    (join,) = right.events()
    assert isinstance(join, MessageArrived)
    assert isinstance(join.message, Join)
    pair.there.joined(right, join.message)
    left.receive(output_of(right))
    assert [pair.sender.receive_on_lane(event) for event in left.events()] == [True]
    assert pair.there.lanes == 1
    return left, right


def test_a_run_on_a_lane() -> None:
    pair = CodedPair()
    left, right = lane(pair)
    runs = []
    for number in range(3):
        chunks = pair.take()
        left.send_coded(chunks, DIFF, b"odd" if number else pair.payload(chunks))
        pair.sender.sent(chunks)
        right.receive(output_of(left))
        (event,) = right.events()
        pair.there.take_on_thread(right, event)
        (run,) = pair.there.receive(right, event)
        assert isinstance(run, RunToDecode)
        runs.append(run)
    assert len(pair.decode(runs[0])) == len(runs[0].chunks)
    pair.there.undecodable(runs[1])
    assert not right.has_output, "its thread may sleep until something arrives"
    assert not pair.sender.receive_on_lane(ChunksRefused(tuple(runs[0].chunks[:1])))
    assert not pair.sender.receive_on_lane(RunDamaged(range(3), 7)), "nothing that a sender would hear"
    pair.there.parted(right)
    assert pair.there.lanes == 0
    pair.there.undecodable(runs[2])
    assert not right.has_output, "nobody reads that any more"
    pair.send_all()
    pair.finish_from_anywhere()


def test_a_run_that_a_lane_brought_and_did_not_hand_on() -> None:
    pair = CodedPair()
    left, right = lane(pair)
    chunks = pair.take()
    left.send_coded(chunks, DIFF, pair.payload(chunks))
    right.receive(output_of(left))
    (event,) = right.events()
    pair.there.take_on_thread(right, event)
    pair.there.parted(right)
    assert pair.there.receive(right, event) == []
    pair.connect()
    assert pair.take() == chunks
    pair.connect()
    pair.finish_from_anywhere()
