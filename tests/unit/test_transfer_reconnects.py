"""shipproto.sender and shipproto.receiver on a new connection, in every state."""

import msgspec
import pytest

from shipproto.aborts import send_abort
from shipproto.connection import ChunkArrived, ChunkDamaged, Established, MessageArrived
from shipproto.errors import AbortCode, LocalError, TransferError
from shipproto.messages import Abort, Committed, Want
from shipproto.outcomes import ChunkHeld, StructureArrived, TransferAborted
from shipproto.rangeset import RangeSet
from shipproto.states import ReceiverState, SenderState
from shipproto.steps import DigestChunk, SendChunk
from tests.support import naive
from tests.support.link import feed, handshaken, output_of
from tests.support.models import SMALL, leaves_of
from tests.support.pair import PADDED, TRANSFER, Pair

BY_THE_BOOK = [state for state in ReceiverState if state not in (ReceiverState.STRUCTURE, ReceiverState.ABORTED)]


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("state", BY_THE_BOOK)
def test_the_sender_connects_again(state: ReceiverState, noticed: bool) -> None:
    pair = Pair()
    pair.to(state)
    if pair.sender.ended:
        # The answer was lost: so the sender never saw it.
        pair.sender.state, pair.sender.committed = SenderState.COMMITTING, None
    if noticed:
        pair.there.disconnected(pair.right)
        assert not pair.there.attended
    pair.connect()
    assert pair.there.attended
    if state is ReceiverState.OFFERED:
        pair.accept()
    pair.finish_from_anywhere()


@pytest.mark.parametrize("state", BY_THE_BOOK)
def test_the_receiver_goes_on_while_nobody_is_connected(state: ReceiverState) -> None:
    pair = Pair()
    pair.to(state)
    if state is ReceiverState.COMMITTED:
        pair.sender.state = SenderState.COMMITTING
    pair.there.disconnected(pair.right)
    there = pair.there
    if state is ReceiverState.OFFERED:
        there.accept(pair.layout, memoryview(pair.image))
    elif state is ReceiverState.VERIFYING:
        assert there.verified(there.verify())
        there.staged(1, 0.5)
    elif state is ReceiverState.STAGING:
        there.report("staging")
        there.staged(1, 0.5)
    elif state is ReceiverState.COMMITTING:
        there.committed(Committed(digest=there.digest, label=there.label, transfer=TRANSFER))
    pair.connect()
    pair.finish_from_anywhere()


def test_what_the_receiver_decides_while_nobody_is_connected() -> None:
    pair = Pair()
    pair.there.disconnected(pair.right)
    pair.there.want_structure()
    pair.connect()
    assert isinstance(pair.outcomes[-1], StructureArrived)
    pair.there.disconnected(pair.right)
    pair.there.abort(TransferError(AbortCode.MISMATCH, "no"))
    pair.connect()
    assert pair.sender.state is SenderState.ABORTED


def test_the_rest_is_digested_after_a_new_connection() -> None:
    """Some chunks were read before the connection broke; in the end the receiver turns out to hold everything."""
    pair = Pair()
    pair.accept()
    for _ in range(2):
        step = pair.sender.next_step()
        assert step is not None
        pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
    pair.sender.connected(handshaken()[0])
    pair.sender.receive(MessageArrived(Want(structure=pair.structure.digest, transfer=TRANSFER), b""))
    steps = []
    while (step := pair.sender.next_step()) is not None:
        steps.append(step)
        pair.sender.digest_chunk(step.chunk, pair.content(step.chunk))
    assert steps == [DigestChunk(chunk) for chunk in range(2, pair.layout.chunks)]


def test_the_structure_is_asked_for_again() -> None:
    pair = Pair()
    pair.there.want_structure()
    output_of(pair.right)
    pair.connect()
    assert isinstance(pair.outcomes[-1], StructureArrived)
    pair.accept()
    pair.finish_from_anywhere()


def test_the_structure_that_rules_is_told_again() -> None:
    """Found here: the receiver's structure was sent once. If that connection broke, the sender waited for ever."""
    pair = Pair(PADDED, resident=SMALL)
    pair.there.accept(pair.layout, memoryview(pair.image))
    output_of(pair.right)
    pair.connect()
    assert pair.sender.state is SenderState.SENDING
    pair.finish_from_anywhere()


def test_the_structure_that_rules_told_again_costs_no_digests() -> None:
    pair = Pair(PADDED, resident=SMALL)
    pair.accept()
    pair.send_all()
    layout = pair.sender.layout
    pair.connect()
    assert pair.sender.layout is layout
    assert pair.sender.digests.complete
    pair.finish_from_anywhere()


def test_only_what_is_missing_travels_again() -> None:
    pair = Pair()
    pair.accept()
    sent = 0
    for _ in range(pair.layout.chunks // 2):
        step = pair.sender.next_step()
        assert isinstance(step, SendChunk)
        pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
        sent += 1
    pair.flow()
    assert len(pair.there.held) == sent
    pair.connect()
    pair.send_all()
    assert list(pair.left._outbox._chunks_of.values()) == list(range(sent, pair.layout.chunks))
    pair.finish_from_anywhere()


def test_finish_may_be_said_on_two_connections() -> None:
    """Found by the lossy link: with the first FINISH remembered, the second came when everything was held already, and
    broke the connection."""
    pair = Pair()
    pair.accept()
    while (step := pair.sender.next_step()) is not None:
        pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
    for frame in naive.frames(output := output_of(pair.left)):
        data = bytearray(output[frame.start : frame.start + frame.size])
        # The chunk that arrives damaged is asked for, but the connection breaks before that is heard.
        data[-1] ^= frame.name == "Data" and frame.fields["chunk"] == 1
        pair._to_receiver(bytes(data))
    assert pair.there.finishing
    assert pair.there.held.missing(pair.layout.chunks) == RangeSet([(1, 2)])
    assert pair.there.state is ReceiverState.RECEIVING
    pair.connect()
    pair.finish_from_anywhere()


def test_a_stale_connection_neither_lands_nor_speaks() -> None:
    """Found by the lossy link: a chunk half arrived on a connection that the daemon did not know to be dead was thrown
    away on the new one, and the push waited for it for ever."""
    pair = Pair()
    pair.accept()
    stale_left, stale_right = pair.left, pair.right
    step = pair.sender.next_step()
    assert isinstance(step, SendChunk)
    pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
    data = output_of(stale_left)
    feed(stale_right, data[:-10])
    pair.connect()
    assert pair.sender.state is SenderState.SENDING
    start, size = pair.layout.chunk(0)
    # The rest comes late, and damaged.
    pair.image[start : start + size] = b"\x77" * size
    fed = feed(stale_right, bytes(10))
    assert fed.events == []
    assert bytes(pair.image[start : start + size]) == b"\x77" * size
    # And so does a whole chunk, and an ABORT.
    stale_left.send_data(1, pair.content(1))
    send_abort(stale_left, TRANSFER, TransferError(AbortCode.INTERRUPTED, "gone"))
    for event in feed(stale_right, output_of(stale_left)).events:
        assert pair.there.receive(stale_right, event) == []
    assert len(pair.there.held) == 0
    pair.there.disconnected(stale_right)
    assert pair.there.attended
    pair.finish_from_anywhere()


def test_a_chunk_of_a_stale_connection_does_not_count_for_the_new_one() -> None:
    """Found here: the event of the old connection was taken for the arrival on the new one, in the middle of which the
    image was digested; what then arrived damaged stayed in the image, under a digest that was right."""
    pair = Pair()
    pair.accept()
    pair.sender.next_step()
    pair.sender.send_chunk(0, pair.content(0))
    old = pair.right
    old.receive(output_of(pair.left))
    (late,) = old.events()
    assert isinstance(late, ChunkArrived)
    pair.connect()
    pair.sender.next_step()
    pair.sender.send_chunk(0, pair.content(0))
    data = output_of(pair.left)
    pair.right.receive(data[:60])
    assert pair.there.receive(old, late) == []
    pair.right.receive(data[60:-1] + bytes((data[-1] ^ 1,)))
    (damaged,) = pair.right.events()
    assert damaged == ChunkDamaged(0, 2)
    assert pair.there.receive(pair.right, damaged) == []
    assert 0 not in pair.there.held
    pair.flow()
    pair.finish_from_anywhere()


@pytest.mark.parametrize("how", ["abort", "told"])
def test_nothing_lands_after_the_end(how: str) -> None:
    """Found here: the rest of a chunk under way landed in an image that was free for the next version already."""
    pair = Pair()
    pair.accept()
    pair.sender.next_step()
    pair.sender.send_chunk(0, pair.content(0))
    data = output_of(pair.left)
    feed(pair.right, data[:60])
    if how == "abort":
        pair.there.abort(TransferError(AbortCode.STALLED, "too slow"))
    else:
        pair.there.receive(pair.right, MessageArrived(Abort(code="interrupted", transfer=TRANSFER), b""))
    pair.image[:] = b"\x55" * len(pair.image)
    assert feed(pair.right, data[60:]).error is None
    pair.left.send_data(1, pair.content(1))
    assert feed(pair.right, output_of(pair.left)).events == []
    assert pair.image == b"\x55" * len(pair.image)


def test_a_chunk_arrives_once() -> None:
    pair = Pair()
    pair.accept()
    pair.sender.next_step()
    pair.sender.send_chunk(0, pair.content(0))
    (event,) = feed(pair.right, output_of(pair.left)).events
    assert pair.there.receive(pair.right, event) == [ChunkHeld(0)]
    assert pair.there.receive(pair.right, event) == []
    assert pair.there.receive(pair.right, Established(pair.right.peer)) == []
    pair.sender.receive(Established(pair.left.peer))
    pair.finish_from_anywhere()


def test_the_same_transfer_with_other_content_is_refused() -> None:
    pair = Pair()
    good = pair.there.offer
    for changed in ({"model": "n"}, {"structure": bytes(16)}, {"label": "v2"}):
        offer = msgspec.structs.replace(good, **changed)
        with pytest.raises(TransferError) as caught:
            pair.there.connected(handshaken()[1], offer)
        assert caught.value.code is AbortCode.PROTOCOL
        assert pair.there._reception.connection is pair.right, "the connection that it has stays"
    pair.accept()
    pair.finish_from_anywhere()


def test_an_ended_transfer_answers_with_its_end() -> None:
    pair = Pair()
    pair.to(ReceiverState.RECEIVING)
    pair.there.abort(TransferError(AbortCode.BUSY, "later", tensor="t", details=("a", "b")))
    pair.there.abort(TransferError(AbortCode.INTERNAL, "only the first counts"))
    output_of(pair.right)
    pair.connect()
    assert pair.sender.state is SenderState.ABORTED
    error = pair.sender.error
    assert error is not None
    assert (error.code, str(error), error.tensor, error.details) == (AbortCode.BUSY, "later", "t", ("a", "b"))
    with pytest.raises(LocalError, match="over"):
        pair.sender.connected(pair.left)


def test_a_receiver_that_was_told_of_the_end_says_so_again() -> None:
    pair = Pair()
    pair.to(ReceiverState.RECEIVING)
    pair.sender.abort(TransferError(AbortCode.TENSOR_CHANGED, "it moved", tensor="t"))
    pair.flow()
    (aborted,) = [outcome for outcome in pair.outcomes if isinstance(outcome, TransferAborted)]
    assert aborted.error.code is AbortCode.TENSOR_CHANGED
    assert pair.there.error is aborted.error
    left, right = handshaken()
    pair.there.connected(right, pair.there.offer)
    (abort,) = feed(left, output_of(right)).events
    assert isinstance(abort, MessageArrived)
    assert isinstance(abort.message, Abort)
    assert (abort.message.code, abort.message.tensor) == ("tensor-changed", "t")
