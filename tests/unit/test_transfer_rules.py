"""shipproto.sender and shipproto.receiver: what is allowed when, misuse, and how errors travel."""

import msgspec
import pytest

from shipproto.aborts import read_abort, send_abort
from shipproto.connection import ChunksRefused, MessageArrived
from shipproto.digests import digest_image
from shipproto.errors import AbortCode, LocalError, MalformedMessage, TransferError, UnexpectedMessage
from shipproto.headers import decode_header
from shipproto.limits import MAX_TEXT
from shipproto.messages import (
    Abort,
    Commit,
    Committed,
    Finish,
    Held,
    Lend,
    Message,
    Offer,
    Progress,
    Staged,
    StructureIs,
    StructureWanted,
    Want,
)
from shipproto.outcomes import StructureArrived, TransferAborted
from shipproto.rangeset import RangeSet
from shipproto.receiver import Receiver
from shipproto.states import ReceiverState, SenderState
from shipproto.steps import SendChunk
from shipproto.structure import Structure
from tests.support import naive
from tests.support.golden.messages import MESSAGES as GOLDEN
from tests.support.link import feed, handshaken, output_of, simple_push
from tests.support.models import SMALL, build, leaves_of, make_image
from tests.support.naive import Tensor
from tests.support.pair import OTHER, PADDED, TRANSFER, Pair, make_sender


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


# --- misuse, of the core by its caller ---------------------------------------------------------------------------


def test_misuse_of_the_sender() -> None:
    sender = make_sender()
    with pytest.raises(LocalError, match="no connection"):
        sender.send_chunk(0, memoryview(bytes(512)))
    with pytest.raises(LocalError, match="commit in state OFFERED"):
        sender.commit()
    sender.abort(TransferError(AbortCode.INTERRUPTED, "before it began"))
    assert sender.state is SenderState.ABORTED
    sender.abort(TransferError(AbortCode.INTERNAL, "only the first counts"))
    assert sender.error is not None
    assert sender.error.code is AbortCode.INTERRUPTED
    with pytest.raises(LocalError, match="over"):
        sender.connected(handshaken()[0])
    sender.receive(ChunksRefused((0,)))


@pytest.mark.parametrize(
    "options",
    [
        {"label": "no label"},
        {"label": "x" * 129},
        {"metadata": {"k": "v" * 257}},
        {"metadata": {f"{at}": "" for at in range(33)}},
        {"metadata": {f"{at:0256}": "v" * 256 for at in range(32)}},
        {"metadata": {"k": "\ud800"}},
    ],
)
def test_an_offer_that_could_not_be_sent_is_refused_at_once(options) -> None:
    """Found here: the peer refused it as malformed, on every connection again."""
    with pytest.raises(LocalError, match=r"not a valid message|at most"):
        make_sender(**options)


def test_a_label_that_could_not_be_sent() -> None:
    pair = Pair(label=None)
    pair.sender._make_label = lambda digest: "../../etc"
    pair.accept()
    with pytest.raises(LocalError, match="label"):
        pair.send_all()


def test_misuse_of_the_receiver() -> None:
    pair = Pair()
    there = pair.there
    with pytest.raises(LocalError, match="not accepted"):
        _ = there.digests
    with pytest.raises(LocalError, match="nothing to verify"):
        there.verify()
    with pytest.raises(LocalError, match="verified in state OFFERED"):
        there.verified(())
    with pytest.raises(LocalError, match="staged in state OFFERED"):
        there.staged(1, 0.0)
    with pytest.raises(LocalError, match="smaller than its layout"):
        there.accept(pair.layout, memoryview(bytearray(pair.layout.size - 1)))
    with pytest.raises(LocalError, match="not accepted"):
        _ = there._reception.books
    pair.accept()
    with pytest.raises(LocalError, match="accept in state RECEIVING"):
        there.accept(pair.layout, memoryview(pair.image))
    with pytest.raises(LocalError, match="want_structure in state RECEIVING"):
        there.want_structure()


def test_an_ended_transfer_is_not_revived_by_its_shell() -> None:
    """Found here: staged() of a transfer that had been aborted meanwhile made it STAGED again."""
    pair = Pair()
    pair.to(ReceiverState.STAGING)
    pair.sender.abort(TransferError(AbortCode.INTERRUPTED, "Ctrl-C"))
    pair.flow()
    assert pair.there.state is ReceiverState.ABORTED
    with pytest.raises(LocalError, match="staged in state ABORTED"):
        pair.there.staged(1, 0.0)
    with pytest.raises(LocalError, match="committed in state ABORTED"):
        pair.there.committed(Committed(digest=bytes(16), label="v1", transfer=TRANSFER))
    assert pair.there.state is ReceiverState.ABORTED


def test_reading_ahead_of_the_digests() -> None:
    """Found here: a step that was asked for before the last one was done ended in StopIteration."""
    pair = Pair()
    pair.there.compare(digest_image(pair.layout, memoryview(make_image(pair.layout, pair.data))))
    pair.flow()
    steps = [pair.sender.next_step() for _ in range(2 * pair.layout.chunks)]
    assert {step.chunk for step in steps if step is not None} == set(range(pair.layout.chunks))
    for chunk in range(pair.layout.chunks):
        pair.sender.digest_chunk(chunk, pair.content(chunk))
    assert pair.sender.next_step() is None
    assert pair.sender.state is SenderState.FINISHING


# --- what is allowed when ----------------------------------------------------------------------------------------

TO_SENDER: dict[SenderState, set[type[Message]]] = {
    SenderState.OFFERED: {StructureWanted, StructureIs, Held, Want, Staged, Committed, Progress, Abort},
    SenderState.SENDING: {StructureIs, Held, Progress, Abort},
    SenderState.FINISHING: {StructureIs, Held, Progress, Want, Staged, Committed, Abort},
    SenderState.STAGED: {StructureIs, Held, Progress, Abort},
    SenderState.COMMITTING: {StructureIs, Held, Progress, Committed, Abort},
}
TO_RECEIVER: dict[ReceiverState, set[type[Message]]] = {
    ReceiverState.OFFERED: {Abort},
    ReceiverState.STRUCTURE: {StructureIs, Abort},
    ReceiverState.RECEIVING: {Finish, Lend, Abort},
    ReceiverState.VERIFYING: {Abort},
    ReceiverState.STAGING: {Abort},
    ReceiverState.STAGED: {Commit, Abort},
    ReceiverState.COMMITTING: {Abort},
}
ONE_OF_EACH = {name: decode_header(naive.TYPES[name], naive.pack(fields)) for name, fields, _ in GOLDEN}
"""Their transfer is the one that is tested here, too."""


@pytest.mark.parametrize("state", SenderState)
def test_what_a_sender_may_be_told(state: SenderState) -> None:
    for name, message in ONE_OF_EACH.items():
        sender = make_sender()
        sender._connection = handshaken()[0]
        sender.state = state
        # What is allowed may still make no sense, and these do not always.
        refusal = ""
        try:
            sender.receive(MessageArrived(message, b""))
        except (MalformedMessage, UnexpectedMessage, TransferError) as error:
            refusal = str(error)
        allowed = state not in TO_SENDER or type(message) in TO_SENDER[state]
        assert refusal.startswith(f"{name} in state {state.name}") == (not allowed)
        if refusal or state not in TO_SENDER:
            assert sender.state is state, f"{name} was refused and has changed something"


@pytest.mark.parametrize("state", ReceiverState)
def test_what_a_receiver_may_be_told(state: ReceiverState) -> None:
    for name, message in ONE_OF_EACH.items():
        pair = Pair()
        pair.accept()
        pair.there.state = state
        refusal = ""
        try:
            outcomes = pair.there.receive(pair.right, MessageArrived(message, b""))
        except (MalformedMessage, UnexpectedMessage) as error:
            refusal = str(error)
            outcomes = []
        allowed = state not in TO_RECEIVER or type(message) in TO_RECEIVER[state]
        assert refusal.startswith(f"{name} in state {state.name}") == (not allowed)
        if refusal or state not in TO_RECEIVER:
            assert pair.there.state is state, f"{name} was refused and has changed something"
            assert outcomes == []


def test_messages_of_another_transfer_are_not_for_us() -> None:
    """Found here: the receiver took them, so that the late end of one transfer ended the next one."""
    pair = Pair()
    pair.accept()
    for name, fields, _ in GOLDEN:
        if "transfer" in fields:
            message = decode_header(naive.TYPES[name], naive.pack({**fields, "transfer": OTHER}))
            assert pair.there.receive(pair.right, MessageArrived(message, b"")) == []
            pair.sender.receive(MessageArrived(message, b""))
    pair.finish_from_anywhere()


def test_a_commit_is_never_interrupted() -> None:
    pair = Pair()
    pair.to(ReceiverState.COMMITTING)
    send_abort(pair.left, TRANSFER, TransferError(AbortCode.INTERRUPTED, "too late"))
    pair.flow()
    assert pair.there.state is ReceiverState.COMMITTING
    assert not any(isinstance(outcome, TransferAborted) for outcome in pair.outcomes)
    pair.finish_from_anywhere()


def test_a_broken_structure_is_asked_for_again_on_the_next_connection() -> None:
    """Found here: the state had moved on before the structure was looked at, and nobody ever asked again."""
    pair = Pair()
    pair.there.want_structure()
    wrong = Structure.build([]).encoded
    for body in (b"", b"\xc1", wrong, pair.structure.encoded[:-1]):
        with pytest.raises(MalformedMessage):
            pair.there.receive(pair.right, MessageArrived(StructureIs(transfer=TRANSFER), body))
        assert pair.there.state is ReceiverState.STRUCTURE
    pair.connect()
    assert isinstance(pair.outcomes[-1], StructureArrived)


def test_a_structure_that_is_not_what_the_offer_says() -> None:
    structure = build(SMALL)
    good = Offer(
        model="m",
        nbytes=structure.total_bytes,
        structure=structure.digest,
        tensors=len(SMALL),
        transfer=TRANSFER,
    )
    assert Receiver(good).decode_structure(structure.encoded).encoded == structure.encoded
    for changed, body, says in (
        ({"tensors": len(SMALL) + 1}, structure.encoded, "other figures"),
        ({"nbytes": 0}, structure.encoded, "other figures"),
        ({}, b"\xc1", "not valid: not a structure"),
        ({}, structure.encoded.replace(b"steps", b"st\nps"), "not valid: .* control character"),
    ):
        with pytest.raises(TransferError, match=says) as caught:
            Receiver(msgspec.structs.replace(good, **changed)).decode_structure(body)
        assert caught.value.code is AbortCode.PROTOCOL


def test_a_broken_abort_leaves_everything_as_it_was() -> None:
    """Found here: the receiver had ended without an error, and answered every new connection with "receiving"."""
    pair = Pair()
    pair.accept()
    with pytest.raises(MalformedMessage, match="Abort"):
        pair.there.receive(pair.right, MessageArrived(Abort(code="mismatch", transfer=TRANSFER), b"\xc1"))
    assert pair.there.state is ReceiverState.RECEIVING
    with pytest.raises(MalformedMessage, match="Abort"):
        pair.sender.receive(MessageArrived(Abort(code="mismatch", transfer=TRANSFER), b"\xc1"))
    assert pair.sender.state is SenderState.SENDING
    pair.finish_from_anywhere()


def test_an_abort_without_a_transfer_is_for_whoever_hears_it() -> None:
    pair = Pair()
    pair.sender.receive(MessageArrived(Abort(code="busy", message="no"), b""))
    assert pair.sender.state is SenderState.ABORTED


def test_another_structure_when_it_is_too_late() -> None:
    pair = Pair()
    pair.accept()
    for body in (b"", build(PADDED).encoded):
        with pytest.raises(UnexpectedMessage, match="another structure in state SENDING"):
            pair.sender.receive(MessageArrived(StructureIs(transfer=TRANSFER), body))
    pair.sender.receive(MessageArrived(StructureIs(transfer=TRANSFER), pair.structure.encoded))
    pair.finish_from_anywhere()


def test_the_structure_that_was_offered_may_be_said_back() -> None:
    sender = make_sender()
    sender.connected(handshaken()[0])
    layout = sender.layout
    sender.receive(MessageArrived(StructureIs(transfer=TRANSFER), sender.offered.encoded))
    assert sender.layout is layout
    assert sender.state is SenderState.OFFERED


def test_want_overtakes_the_structure() -> None:
    sender = make_sender(PADDED)
    sender.connected(handshaken()[0])
    resident, other = build(SMALL), build(SMALL[:2]).encoded
    want = MessageArrived(Want(structure=resident.digest, transfer=TRANSFER), RangeSet([(0, 1)]).encode())
    states = []
    for event in (want, *(MessageArrived(StructureIs(transfer=TRANSFER), body) for body in (other, resident.encoded))):
        assert sender.next_step() is None, "whatever is wanted, it is not known yet of what"
        sender.receive(event)
        states.append(sender.state)
    assert states == [SenderState.OFFERED, SenderState.OFFERED, SenderState.SENDING]
    assert sender.next_step() == SendChunk(0)


def test_the_receiver_may_return_to_what_was_offered() -> None:
    """Its daemon was restarted, and another process attached."""
    sender = make_sender(PADDED)
    sender.connected(handshaken()[0])
    sender.receive(MessageArrived(StructureIs(transfer=TRANSFER), build(SMALL).encoded))
    assert len(sender.layout.structure) == len(SMALL)
    sender.connected(handshaken()[0])
    sender.receive(MessageArrived(Want(structure=sender.offered.digest, transfer=TRANSFER), b""))
    assert len(sender.layout.structure) == len(PADDED)
    assert sender.state is SenderState.SENDING


def test_want_of_another_structure_after_everything_was_sent() -> None:
    """Found here: the layout changed under chunks that were on their way, and a NACK for one ended in IndexError."""
    pair = Pair(PADDED, resident=SMALL)
    pair.accept()
    while (step := pair.sender.next_step()) is not None:
        pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
    assert pair.sender.state is SenderState.FINISHING
    for digest in (pair.sender.offered.digest, bytes(16)):
        with pytest.raises(MalformedMessage, match="another structure"):
            pair.sender.receive(MessageArrived(Want(structure=digest, transfer=TRANSFER), b""))


def test_a_structure_is_sent_once_a_connection() -> None:
    """Found here: 64 MiB for every request of 60 bytes."""
    sender = make_sender()
    for _ in range(2):
        sender.connected(handshaken()[0])
        sender.receive(MessageArrived(StructureWanted(transfer=TRANSFER), b""))
        with pytest.raises(UnexpectedMessage, match="twice"):
            sender.receive(MessageArrived(StructureWanted(transfer=TRANSFER), b""))


def test_finish_that_does_not_fit() -> None:
    pair = Pair()
    pair.accept()
    digests = bytes(16 * len(SMALL))
    for body in (b"", digests[:-1], digests + bytes(16)):
        with pytest.raises(MalformedMessage, match="bytes of digests"):
            pair.there.receive(
                pair.right, MessageArrived(Finish(digest=bytes(16), label="v1", transfer=TRANSFER), body)
            )
    with pytest.raises(MalformedMessage, match="labelled 'v2' where 'v1'"):
        pair.there.receive(pair.right, MessageArrived(Finish(digest=bytes(16), label="v2", transfer=TRANSFER), digests))
    pair.finish_from_anywhere()


def test_another_digest_committed_than_was_sent() -> None:
    pair = Pair()
    pair.to(ReceiverState.COMMITTING)
    wrong = Committed(digest=bytes(16), label="v1", transfer=TRANSFER)
    with pytest.raises(TransferError, match=r"where .* was sent") as caught:
        pair.sender.receive(MessageArrived(wrong, b""))
    assert caught.value.code is AbortCode.INTEGRITY
    assert pair.sender.committed is None


def test_wants_that_cannot_be() -> None:
    pair = Pair()
    want = Want(structure=pair.structure.digest, transfer=TRANSFER)
    for body in (b"x", naive.encode_ranges([(0, pair.layout.chunks + 1)]), naive.encode_ranges([(1, 1)])):
        with pytest.raises(MalformedMessage):
            pair.sender.receive(MessageArrived(want, body))
        assert pair.sender.state is SenderState.OFFERED


# --- a daemon that was restarted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [AbortCode.SHUTTING_DOWN, AbortCode.UNKNOWN_MODEL])
def test_a_transfer_that_may_be_offered_again(code: AbortCode) -> None:
    pair = Pair()
    assert not pair.sender.revive()
    pair.accept()
    pair.there.abort(TransferError(code, "in a moment"))
    pair.flow()
    assert pair.sender.state is SenderState.ABORTED
    assert pair.sender.revive()
    # The restarted daemon remembers nothing.
    pair.receiver = None
    pair.connect()
    assert pair.there.offer.resumed
    pair.accept()
    pair.finish_from_anywhere()


def test_a_transfer_that_may_not() -> None:
    for code, accepted in ((AbortCode.MISMATCH, True), (AbortCode.SHUTTING_DOWN, False)):
        pair = Pair()
        if accepted:
            pair.accept()
        pair.there.abort(TransferError(code, "no"))
        pair.flow()
        assert not pair.sender.revive()
        assert pair.sender.state is SenderState.ABORTED


# --- progress ----------------------------------------------------------------------------------------------------


def test_progress_is_reported_now_and_then() -> None:
    rows = [Tensor("x", "uint8", (512 * 100,))]
    push = simple_push(rows)
    push.run()
    said = push.faults.counts[1]["Progress"]
    assert 100 // 32 <= said <= 100 // 32 + 3


def test_progress_never_goes_back_but_for_what_is_asked_for_again() -> None:
    pair = Pair()
    pair.accept()
    for held, seen in ((3, 3), (1, 3), (1 << 31, pair.layout.chunks)):
        pair.sender.receive(MessageArrived(Progress(held=held, stage="x", transfer=TRANSFER), b""))
        assert pair.sender.held == seen


# --- ABORT -------------------------------------------------------------------------------------------------------


def aborted(error: TransferError) -> TransferError:
    left, right = handshaken()
    send_abort(left, TRANSFER, error)
    (event,) = feed(right, output_of(left)).events
    assert isinstance(event, MessageArrived)
    assert isinstance(event.message, Abort)
    assert event.message.transfer == TRANSFER
    return read_abort(event.message, event.body)


@pytest.mark.parametrize("code", AbortCode)
def test_an_error_travels(code: AbortCode) -> None:
    error = aborted(TransferError(code, "what is wrong", tensor="a.b", details=("x", "y")))
    assert (error.code, str(error), error.tensor, error.details) == (code, "what is wrong", "a.b", ("x", "y"))


def test_an_error_that_is_too_long_is_cut() -> None:
    error = aborted(TransferError(AbortCode.MISMATCH, "ä" * 5000, tensor="ö" * 600))
    assert str(error) == "ä" * MAX_TEXT
    assert error.tensor == "ö" * 512


@pytest.mark.parametrize("sizes", [[5_000_000], [5_000_000, 1], [1, 5_000_000], [3_000_000] * 2, [100] * 100_000])
def test_details_that_are_too_long_lose_their_end(sizes: list[int]) -> None:
    """Found here: two details, the first of them too long by itself, were halved for ever."""
    details = tuple("z" * size for size in sizes)
    *kept, more = aborted(TransferError(AbortCode.MISMATCH, "many", details=details)).details
    assert more == "and more"
    assert tuple(kept) == details[: len(kept)]


def test_what_an_error_says_is_harmless_on_both_sides() -> None:
    evil = "a\x1b[2Jb\nc\u202ed\x9b"
    error = aborted(TransferError(AbortCode.MISMATCH, evil, tensor=evil, details=(evil,)))
    assert {str(error), error.tensor, *error.details} == {"a [2Jb c d "}
    abort = Abort(code="mismatch", message=evil, tensor=evil, transfer=TRANSFER)
    read = read_abort(abort, msgspec.msgpack.encode([evil]))
    assert {str(read), read.tensor, *read.details} == {"a [2Jb c d "}


def test_an_error_with_what_utf8_cannot_express() -> None:
    """File names may contain it: found here, as UnicodeEncodeError where an ABORT was due."""
    error = aborted(TransferError(AbortCode.INTERNAL, "a\udcffb", tensor="\ud800", details=("\udfff",)))
    assert (str(error), error.tensor, error.details) == ("a?b", "?", ("?",))


def test_many_details_travel_in_pieces() -> None:
    details = tuple(f"tensor {at} is missing" for at in range(40_000))
    assert aborted(TransferError(AbortCode.MISMATCH, "many", details=details)).details == details
