"""shipproto.sender and shipproto.receiver when frames, memory or tensors are not what they should be."""

import pytest

from shipproto.connection import ChunksRefused, MessageArrived
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.limits import MAX_CHUNK_ATTEMPTS, MAX_VERIFY_ROUNDS
from shipproto.messages import (
    Finish,
    Want,
)
from shipproto.outcomes import ReadyToVerify
from shipproto.rangeset import RangeSet
from shipproto.states import ReceiverState, SenderState
from shipproto.steps import SendChunk
from tests.support.link import Fault, check_committed, output_of, simple_push
from tests.support.models import SMALL, build, leaves_of
from tests.support.naive import Tensor
from tests.support.pair import PADDED, TRANSFER, Pair, make_sender


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["payload", "header"])
def test_one_flipped_bit_means_one_frame_resent(part: str) -> None:
    rows = SMALL
    for at in range(2, 2 + Layout(build(rows)).chunks):
        push = simple_push(rows, faults=[Fault(0, at, part, 77)], seed=at)  # type: ignore[arg-type]
        sender = push.run()
        check_committed(push, leaf=512)
        assert push.links == 1
        assert push.frames_resent == 1
        assert push.data_frames == sender.layout.chunks + 1
        assert sum(sender.chunks_resent.values()) == 1
        (receiver,) = push.receiving.receivers.values()
        assert receiver.chunks_damaged == 1


def test_a_chunk_that_is_damaged_every_time() -> None:
    pair = Pair()
    pair.accept()
    damaged = 0

    def send_over_a_broken_path() -> None:
        nonlocal damaged
        while (step := pair.sender.next_step()) is not None:
            pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
            data = bytearray(output_of(pair.left))
            if step.chunk == 1:
                data[-1] ^= 1
                damaged += 1
            if step.chunk == 1 and damaged == 3:
                pair.connect()
            else:
                pair._to_receiver(bytes(data))
                pair.flow()

    with pytest.raises(TransferError, match=rf"chunk 1 .* arrived damaged {MAX_CHUNK_ATTEMPTS} times") as caught:
        send_over_a_broken_path()
    assert caught.value.code is AbortCode.INTEGRITY
    assert caught.value.tensor == pair.layout.chunk_names(1)[0]
    assert damaged == MAX_CHUNK_ATTEMPTS + 1, "the one that was lost with its connection does not count"


def test_many_names_are_not_all_listed() -> None:
    rows = [Tensor(f"t{at}", "uint8", (1,)) for at in range(5)]
    sender = make_sender(rows)
    for _ in range(MAX_CHUNK_ATTEMPTS - 1):
        sender.receive(ChunksRefused((0,)))
    with pytest.raises(TransferError, match=r"\('t0', 't1', 't2' and 2 more\)"):
        sender.receive(ChunksRefused((0,)))


def test_refused_chunks_after_the_end_are_nobodys_business() -> None:
    """Found here: after COMMITTED, a peer could still make the push fail."""
    pair = Pair()
    pair.to(ReceiverState.COMMITTED)
    for _ in range(MAX_CHUNK_ATTEMPTS + 1):
        pair.sender.receive(ChunksRefused((0,)))
    assert pair.sender.state is SenderState.COMMITTED
    assert pair.sender.next_step() is None


def test_tensors_with_other_digests_are_asked_for_again() -> None:
    pair = Pair()
    pair.to(ReceiverState.VERIFYING)
    row = pair.structure.index["layer.0.weight"]
    first, stop = pair.layout.tensor_chunks(row)
    assert stop - first == 5
    assert not pair.there.verified((row,))
    assert pair.there.state is ReceiverState.RECEIVING
    pair.outcomes.clear()
    pair.flow()
    assert pair.sender.state is SenderState.SENDING
    assert pair.sender.held == pair.layout.chunks - 5
    pair.send_all()
    assert [outcome.chunk for outcome in pair.outcomes[:-1]] == list(range(first, stop))
    pair.finish_from_anywhere()


def test_tensors_are_asked_for_on_the_next_connection_where_there_is_none() -> None:
    pair = Pair()
    pair.to(ReceiverState.VERIFYING)
    pair.there.disconnected(pair.right)
    assert not pair.there.verified((pair.structure.index["steps"],))
    pair.connect()
    assert pair.sender.state is SenderState.SENDING
    assert pair.sender.held == pair.layout.chunks - 1
    pair.finish_from_anywhere()


def test_tensors_are_asked_for_on_a_connection_that_was_opened_while_verifying() -> None:
    """Nothing was to be received when it was opened; now there is."""
    pair = Pair(PADDED, resident=SMALL)
    pair.to(ReceiverState.VERIFYING)
    pair.connect()
    assert not pair.there.verified((pair.structure.index["steps"],))
    pair.flow()
    pair.finish_from_anywhere()


def test_tensors_with_other_digests_again_and_again() -> None:
    pair = Pair()
    pair.to(ReceiverState.VERIFYING)
    for _ in range(MAX_VERIFY_ROUNDS - 1):
        assert not pair.there.verified((0, 5))
        pair.flow()
        pair.send_all()
    with pytest.raises(TransferError, match="digests of 2 tensors differ") as caught:
        pair.there.verified((0, 5))
    assert caught.value.tensor == "embed.weight"
    assert caught.value.details == ("embed.weight", pair.structure.names[5])


def test_a_receiver_that_is_never_content() -> None:
    """Found here: a sender would have sent the whole model again for as long as it was asked to."""
    pair = Pair()
    pair.accept()
    want = Want(structure=pair.structure.digest, transfer=TRANSFER)
    again = MessageArrived(want, RangeSet([(0, pair.layout.chunks)]).encode())

    def send_everything() -> None:
        while (step := pair.sender.next_step()) is not None:
            pair.sender.send_chunk(step.chunk, pair.content(step.chunk))

    send_everything()
    for _ in range(MAX_VERIFY_ROUNDS - 1):
        pair.sender.receive(again)
        send_everything()
    with pytest.raises(TransferError, match="other digests 3 times") as caught:
        pair.sender.receive(again)
    assert caught.value.code is AbortCode.INTEGRITY


def test_a_version_digest_that_is_not_that_of_the_tensors() -> None:
    pair = Pair()
    pair.accept()
    while isinstance(step := pair.sender.next_step(), SendChunk):
        pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
        if step.chunk == pair.layout.chunks - 1:
            break
    digests = pair.sender.digests.tensor_digests().tobytes()
    pair.flow()
    finish = Finish(digest=bytes(16), label="v1", transfer=TRANSFER)
    assert pair.there.receive(pair.right, MessageArrived(finish, digests)) == [ReadyToVerify()]
    with pytest.raises(TransferError, match="version digest"):
        pair.there.verify()


def test_a_digest_that_differs_is_found_in_its_tensor() -> None:
    pair = Pair()
    pair.accept()
    while isinstance(step := pair.sender.next_step(), SendChunk):
        content = bytearray(pair.content(step.chunk))
        if step.chunk == 3:
            # The sender's memory was digested, and then went bad before its CRC was computed.
            pair.sender.digest_chunk(3, memoryview(content))
            content[0] ^= 1
            pair.left.send_data(3, memoryview(content))
            pair.sender.sent(range(3, 4))
        else:
            pair.sender.send_chunk(step.chunk, memoryview(content))
    pair.flow()
    row = int(pair.layout.chunk_tensors(3)[0])
    assert row in pair.there.verify()


# --- a tensor that changes ---------------------------------------------------------------------------------------


def test_a_tensor_that_changes_between_two_readings() -> None:
    pair = Pair()
    pair.to(ReceiverState.VERIFYING)
    assert not pair.there.verified((pair.structure.index["steps"],))
    pair.flow()
    pair.data["steps"] = bytes(8)
    with pytest.raises(TransferError, match="'steps' changed") as caught:
        pair.send_all()
    assert (caught.value.code, caught.value.tensor) == (AbortCode.TENSOR_CHANGED, "steps")
