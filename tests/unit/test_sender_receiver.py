"""shipproto.sender and shipproto.receiver by the book.

A new connection in every state is in test_transfer_reconnects, what damage costs in test_transfer_damage, what is
allowed when in test_transfer_rules, and random conversations are in tests/property.
"""

import tracemalloc

import pytest

from shipproto.connection import Connection, MessageArrived
from shipproto.digests import digest_image
from shipproto.errors import AbortCode, LocalError, MalformedMessage, TransferError
from shipproto.layout import Layout
from shipproto.messages import Committed, Offer, Staged, StructureIs
from shipproto.outcomes import ChunkHeld, CommitRequested, ReadyToVerify, StructureArrived
from shipproto.receiver import Receiver
from shipproto.states import ReceiverState, SenderState
from shipproto.steps import DigestChunk
from tests.support import naive
from tests.support.link import Fault, Receiving, Sending, check_committed, feed, handshaken, output_of, simple_push
from tests.support.models import SMALL, build, contents, floats, leaves_of, make_image
from tests.support.naive import Tensor
from tests.support.pair import APART, PADDED, TRANSFER, Pair, make_sender


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


# --- by the book -------------------------------------------------------------------------------------------------


def test_a_push() -> None:
    pair = Pair()
    assert pair.states == (SenderState.OFFERED, ReceiverState.OFFERED)
    assert pair.there.attended
    assert pair.sender.stage == "receiving", "it is told that somebody is there"
    offer = pair.there.offer
    assert (offer.label, offer.model, offer.transfer, offer.resumed) == ("v1", "m", TRANSFER, False)
    assert (offer.tensors, offer.nbytes) == (len(SMALL), pair.structure.total_bytes)
    pair.there.accept(pair.layout, memoryview(pair.image))
    assert pair.flow() == ["Want"]
    assert pair.states == (SenderState.SENDING, ReceiverState.RECEIVING)
    pair.send_all()
    assert [type(outcome) for outcome in pair.outcomes] == [ChunkHeld] * pair.layout.chunks + [ReadyToVerify]
    assert pair.sender.next_step() is None
    assert pair.states == (SenderState.FINISHING, ReceiverState.VERIFYING)
    assert len(pair.there.held) == pair.sender.held == pair.layout.chunks
    assert pair.there.verify() == ()
    assert pair.there.verified(())
    assert pair.states == (SenderState.FINISHING, ReceiverState.STAGING)
    pair.there.report("staging")
    pair.there.staged(2, 0.25)
    assert pair.flow() == ["Progress", "Staged"]
    assert pair.sender.stage == "staging"
    assert pair.sender.staged == Staged(processes=2, stage_seconds=0.25, transfer=TRANSFER)
    pair.sender.commit()
    pair.flow()
    assert pair.states == (SenderState.COMMITTING, ReceiverState.COMMITTING)
    assert isinstance(pair.outcomes[-1], CommitRequested)
    pair.finish()
    assert pair.sender.ended
    assert pair.there.ended
    assert pair.there.digests.version_digest() == pair.sender.digest
    assert bytes(pair.image) == bytes(make_image(pair.layout, pair.data))
    assert pair.sender.next_step() is None


def test_the_structure_is_sent_only_when_it_is_asked_for() -> None:
    pair = Pair()
    pair.there.want_structure()
    assert pair.states == (SenderState.OFFERED, ReceiverState.STRUCTURE)
    assert pair.flow() == ["StructureWanted", "StructureIs"]
    (arrived,) = pair.outcomes
    assert isinstance(arrived, StructureArrived)
    assert arrived.encoded == pair.structure.encoded
    assert pair.states == (SenderState.OFFERED, ReceiverState.OFFERED)
    pair.accept()
    pair.finish_from_anywhere()


@pytest.mark.parametrize(
    ("offered", "resident", "skipped"),
    [
        (PADDED, SMALL, ["position_ids"]),
        (APART, SMALL, []),
        (SMALL, APART, []),
        (tuple(row for row in SMALL if row.name != "head.weight"), SMALL, []),
        (tuple(row for row in APART if row.name != "embed.weight"), SMALL, []),
    ],
)
def test_the_receivers_structure_rules(offered, resident, skipped: list[str]) -> None:
    pair = Pair(offered, resident=resident)
    pair.data.setdefault("head.weight", pair.data.get("embed.weight", b""))
    pair.data.setdefault("embed.weight", pair.data["head.weight"])
    pair.data["head.weight"] = pair.data["embed.weight"]
    pair.there.want_structure()
    pair.flow()
    pair.there.accept(pair.layout, memoryview(pair.image))
    assert pair.flow() == ["StructureIs", "Want"]
    assert pair.sender.layout.structure.encoded == pair.structure.encoded
    assert pair.sender.skipped == skipped
    pair.finish_from_anywhere()


def test_tensors_that_the_receiver_ties_must_be_equal() -> None:
    sender = make_sender(APART)
    sender._adopt(build(SMALL))
    names = sender.offered.names
    assert [(names[left], names[right]) for left, right in sender.equal_rows] == [("embed.weight", "head.weight")]
    sender._adopt(sender.offered)
    assert sender.equal_rows == []


@pytest.mark.parametrize("wanted", [[floats("new", 1)], [floats("steps", 1)], [Tensor("steps", "int64", (2,))]])
def test_the_receiver_cannot_want_what_was_not_offered(wanted) -> None:
    sender = make_sender()
    layout = sender.layout
    with pytest.raises(MalformedMessage, match=r"wants tensor '(new|steps)'"):
        sender._adopt(build(wanted))
    assert sender.layout is layout


def test_a_structure_of_terabytes_is_refused_before_it_is_laid_out() -> None:
    """Found here: a hundred bytes from a receiver made the sender lay out 33 million chunks before it looked."""
    sender = make_sender()
    sender.connected(handshaken()[0])
    huge = build([Tensor(f"t{at}", "uint8", (1 << 42,)) for at in range(4)]).encoded
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage, match="not offered"):
            sender.receive(MessageArrived(StructureIs(transfer=TRANSFER), huge))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_label_can_be_made_of_the_digest() -> None:
    pair = Pair(label=None)
    assert pair.there.offer.label == ""
    pair.to(ReceiverState.STAGED)
    label = "d-" + pair.sender.digest.hex()[:8]
    assert pair.sender.label == pair.there.label == label
    pair.connect()
    pair.finish_from_anywhere()
    assert pair.there.outcome is not None
    assert pair.there.outcome.label == label


def test_nothing_to_send() -> None:
    for rows in ((), (floats("x", 0),)):
        structure = build(rows)
        sender = make_sender(rows)
        left, right = handshaken()
        sender.connected(left)
        (offer,) = feed(right, output_of(left)).events
        assert isinstance(offer, MessageArrived)
        assert isinstance(offer.message, Offer)
        receiver = Receiver(offer.message)
        receiver.connected(right, offer.message)
        receiver.accept(Layout(structure), memoryview(bytearray(4096)))
        for event in feed(left, output_of(right)).events:
            sender.receive(event)
        assert sender.next_step() is None
        (finish,) = feed(right, output_of(left)).events
        assert [type(outcome) for outcome in receiver.receive(right, finish)] == [ReadyToVerify]
        assert receiver.verify() == ()


# --- the label is known already ----------------------------------------------------------------------------------


def test_only_digests_travel_where_the_version_may_be_held() -> None:
    pair = Pair()
    current = digest_image(pair.layout, memoryview(make_image(pair.layout, pair.data)))
    pair.there.compare(current)
    assert pair.flow() == ["Want"]
    steps = []
    while (step := pair.sender.next_step()) is not None:
        steps.append(type(step))
        pair.sender.digest_chunk(step.chunk, pair.content(step.chunk))
    assert steps == [DigestChunk] * pair.layout.chunks
    assert pair.flow() == ["Finish"]
    assert pair.there.verify() == ()
    assert pair.there.verified(())
    already = Committed(already=True, digest=pair.there.digest, label="v1", transfer=TRANSFER)
    pair.there.committed(already)
    assert pair.flow() == ["Committed"]
    assert pair.sender.committed == already


def test_another_content_under_the_same_label() -> None:
    pair = Pair()
    before = digest_image(pair.layout, memoryview(make_image(pair.layout, contents(pair.structure, version=1))))
    pair.there.compare(before)
    pair.flow()
    pair.send_all()
    differing = pair.there.verify()
    names = [pair.structure.names[row] for row in differing]
    assert names == [row.name for row in sorted(SMALL, key=lambda row: row.name) if row.nbytes]
    with pytest.raises(TransferError, match=r"'embed\.weight'") as caught:
        pair.there.verified(differing)
    assert caught.value.code is AbortCode.INTEGRITY
    assert caught.value.tensor == "embed.weight"
    assert caught.value.details == tuple(names)


def test_data_that_was_not_wanted_goes_nowhere() -> None:
    pair = Pair()
    pair.there.compare(digest_image(pair.layout, memoryview(make_image(pair.layout, pair.data))))
    pair.flow()
    pair.left.send_data(0, pair.content(0))
    pair.flow()
    assert pair.outcomes == []
    assert not any(pair.image)


# --- both directions ---------------------------------------------------------------------------------------------


def test_two_pushes_in_opposite_directions_on_one_connection() -> None:
    ends = handshaken()
    structure = build(SMALL)
    sending = [
        Sending(structure, contents(structure, version), transfer=bytes((version,)) * 16, label=f"v{version}")
        for version in (1, 2)
    ]
    receiving = [Receiving(resident=structure), Receiving(resident=structure)]
    for side in (0, 1):
        sending[side].sender.connected(ends[side])
    for _ in range(500):
        for side in (0, 1):
            while sending[side].step():
                pass
            while receiving[side].work:
                receiving[side].work.popleft()()
            other = ends[1 - side]
            data = output_of(ends[side])
            for frame in naive.frames(data):
                other.receive(data[frame.start : frame.start + frame.size])
                for event in other.events():
                    sending[1 - side].on_event(event)
                    receiving[1 - side].on_event(other, event)
    for side in (0, 1):
        assert sending[side].sender.state is SenderState.COMMITTED, sending[side].sender.error
        current = receiving[1 - side].current
        assert current is not None
        assert current.label == f"v{side + 1}"
        assert current.content == contents(structure, side + 1)


@pytest.mark.parametrize("sender_side", [0, 1])
def test_either_end_may_be_the_sender(sender_side: int) -> None:
    push = simple_push(SMALL, sender_side=sender_side, token=b"sixteen or more bytes")
    push.run()
    check_committed(push, leaf=512)
    assert push.links == 1


# --- cost --------------------------------------------------------------------------------------------------------


def test_an_offer_costs_nothing_before_it_is_accepted() -> None:
    offer = Offer(model="m", nbytes=1 << 44, structure=bytes(16), tensors=1 << 20, transfer=TRANSFER)
    right = handshaken()[1]
    tracemalloc.start()
    try:
        Receiver(offer).connected(right, offer)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_push_by_chunks_of_the_real_size() -> None:
    with leaves_of(512 * 1024):
        push = simple_push([*SMALL, Tensor("large", "uint8", (1_200_000,))], faults=[Fault(0, 3, "payload", 5)])
        sender = push.run()
        check_committed(push)
        assert push.frames_resent == 1
        assert push.data_frames == sender.layout.chunks + 1 == 5


def test_an_offer_before_the_handshake_is_done() -> None:
    with pytest.raises(LocalError, match="handshake"):
        make_sender().connected(Connection(initiator=True, nonce=bytes(32), agent="x"))
