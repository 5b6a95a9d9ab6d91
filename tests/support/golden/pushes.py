"""Whole pushes, from either end: some to be accepted, some to be refused."""

from collections.abc import Callable
from typing import Any

from tests.support.golden.book import (
    DIGEST,
    Book,
    Golden,
    T,
    greeted,
    hello_of_ours,
    said,
)
from tests.support.models import SMALL, floats
from tests.support.naive import Stream, Tensor, encode_ranges, encode_structure


def accept_conversations(book: Book) -> None:
    """Whole pushes."""
    gold = Golden()
    want = said("Want", gold.want, gold.all)
    staged, committed = said("Staged", gold.staged), said("Committed", gold.committed)
    done = {"state": "COMMITTED", "digest": gold.digest.hex()}
    commit = lambda: gold.sent().add("Commit", T)  # noqa: E731
    book.accept(
        "push-received",
        "a push whose structure the receiver knows",
        **gold.receiving(commit()),
        messages=[want, staged, committed],
        **done,
    )
    unknown = greeted().add("Offer", gold.offer).add("StructureIs", T, gold.body)
    for number, chunk in enumerate(gold.chunks):
        unknown.add("Data", {"chunk": number}, chunk)
    unknown.add("Finish", gold.finish, gold.digests).add("Commit", T)
    book.accept(
        "push-received-unknown-structure",
        "the receiver takes any structure and asks for it",
        **gold.receiving(unknown, resident=None),
        messages=[said("StructureWanted", T), want, staged, committed],
        **done,
    )
    backwards = greeted().add("Offer", gold.offer).add("Finish", gold.finish, gold.digests)
    for number in reversed(range(len(gold.chunks))):
        backwards.add("Data", {"chunk": number}, gold.chunks[number]).add(
            "Data", {"chunk": number}, gold.chunks[number]
        )
    book.accept(
        "push-received-backwards",
        "FINISH first, then the chunks, last one first and each of them twice",
        **gold.receiving(backwards.add("Commit", T)),
        messages=[want, staged, committed],
        **done,
    )
    padded = [*SMALL, Tensor("position_ids", "int64", (1, 4))]
    apart = [Tensor(row.name, row.dtype, row.shape) for row in SMALL]
    for name, what, offered in (("tied", "offers apart what the receiver ties", apart),):
        other = Golden(offered)
        stream = greeted().add("Offer", other.offer).add("StructureIs", T, other.body)
        for number, chunk in enumerate(gold.chunks):
            stream.add("Data", {"chunk": number}, chunk)
        stream.add("Finish", gold.finish, gold.digests).add("Commit", T)
        book.accept(
            f"push-received-{name}",
            f"the sender {what}: the receiver's structure rules",
            **gold.receiving(stream),
            messages=[said("StructureWanted", T), said("StructureIs", T, gold.body), want, staged, committed],
            **done,
        )
    bad = greeted().add("Offer", gold.offer).add("Data", {"chunk": 0}, bytes(len(gold.chunks[0])))
    for number, chunk in enumerate(gold.chunks[1:], 1):
        bad.add("Data", {"chunk": number}, chunk)
    bad.add("Finish", gold.finish, gold.digests)
    first = encode_ranges([(0, 1)])
    bad.add("Data", {"chunk": 0}, gold.chunks[0]).add("Finish", gold.finish, gold.digests).add("Commit", T)
    book.accept(
        "push-received-other-digests",
        "a chunk that is intact by CRC but not by digest is asked for again",
        **gold.receiving(bad),
        messages=[want, said("Want", gold.want, first), staged, committed],
        **done,
    )
    data = [said("Data", {"chunk": number}, chunk) for number, chunk in enumerate(gold.chunks)]
    finish = said("Finish", gold.finish, gold.digests)
    offer, please = said("Offer", gold.offer), said("Commit", T)
    book.accept(
        "push-sent",
        "a push, from the sending side",
        **gold.sending(gold.heard()),
        messages=[offer, *data, finish, please],
        state="COMMITTED",
    )
    asked = hello_of_ours().add("StructureWanted", T)
    asked.add("Want", gold.want, gold.all).add("Staged", gold.staged).add("Committed", gold.committed)
    book.accept(
        "push-sent-unknown-structure",
        "the receiver asks for the structure",
        **gold.sending(asked),
        messages=[offer, said("StructureIs", T, gold.body), *data, finish, please],
        state="COMMITTED",
    )
    wide = Golden(padded)
    adapted = hello_of_ours().add("StructureWanted", T).add("Progress", {"held": 0, "stage": "matching", **T})
    adapted.add("Want", gold.want, gold.all).add("StructureIs", T, gold.body)
    adapted.add("Staged", gold.staged).add("Committed", gold.committed)
    book.accept(
        "push-sent-adapted",
        "the receiver leaves out a tensor; its structure was damaged, so that WANT overtakes it",
        **wide.sending(adapted),
        messages=[said("Offer", wide.offer), said("StructureIs", T, wide.body), *data, finish, please],
        state="COMMITTED",
    )
    again = hello_of_ours().add("Want", gold.want, gold.all).add("Nack", {"sequences": [2]})
    book.accept(
        "push-sent-nack",
        "the first chunk arrived damaged: it goes again, FINISH does not",
        **gold.sending(again.add("Staged", gold.staged).add("Committed", gold.committed)),
        messages=[offer, *data, finish, data[0], please],
        state="COMMITTED",
    )
    held = hello_of_ours().add("Want", gold.want, b"").add("Committed", {**gold.committed, "already": True})
    book.accept(
        "push-sent-held",
        "the receiver holds everything: only digests travel",
        **gold.sending(held),
        messages=[offer, finish],
        state="COMMITTED",
    )
    lost = hello_of_ours().add("Committed", gold.committed)
    book.accept(
        "push-sent-lost-answer",
        "COMMITTED at once: the transfer had come that far on another connection",
        **gold.sending(lost),
        messages=[offer],
        state="COMMITTED",
    )


def reject_conversations(book: Book) -> None:
    """Well-formed messages that the state of a transfer does not allow."""
    gold = Golden()
    chunk = gold.chunks[0]

    def receiver(name: str, what: str, error: str, stream: Stream, **more: Any) -> None:
        book.reject(f"receiver-{name}", what, error, **gold.receiving(stream, **more))

    offered: Callable[[], Stream] = lambda: greeted().add("Offer", gold.offer)  # noqa: E731
    bad, unexpected = "MalformedMessage", "UnexpectedMessage"
    last = len(gold.chunks)
    receiver("chunk-outside", "a chunk that does not exist", bad, offered().add("Data", {"chunk": last}, chunk))
    receiver("chunk-largest", "chunk 2^32 - 1", bad, offered().add("Data", {"chunk": 0xFFFFFFFF}, chunk))
    receiver("chunk-short", "a chunk that is one byte short", bad, offered().add("Data", {"chunk": 0}, chunk[:-1]))
    receiver("chunk-long", "a chunk that is one byte too long", bad, offered().add("Data", {"chunk": 0}, chunk + b"\0"))
    receiver(
        "data-before-structure",
        "DATA while the structure is awaited",
        unexpected,
        offered().add("Data", {"chunk": 0}, chunk),
        resident=None,
    )
    receiver("finish-digests-fewer", "a digest too few", bad, offered().add("Finish", gold.finish, gold.digests[:-16]))
    receiver(
        "finish-digests-ragged", "a digest cut short", bad, offered().add("Finish", gold.finish, gold.digests[:-1])
    )
    receiver(
        "finish-digests-more", "a digest too many", bad, offered().add("Finish", gold.finish, gold.digests + bytes(16))
    )
    receiver(
        "finish-label",
        "another label than was offered",
        bad,
        offered().add("Finish", {**gold.finish, "label": "v2"}, gold.digests),
    )
    receiver(
        "finish-twice",
        "FINISH after everything is verified",
        unexpected,
        gold.sent().add("Finish", gold.finish, gold.digests),
    )
    receiver(
        "finish-before-structure",
        "FINISH while the structure is awaited",
        unexpected,
        offered().add("Finish", gold.finish, gold.digests),
        resident=None,
    )
    receiver("commit-early", "COMMIT before anything is staged", unexpected, offered().add("Commit", T))
    receiver(
        "structure-unasked",
        "a structure that was not asked for",
        unexpected,
        offered().add("StructureIs", T, gold.body),
    )
    other = encode_structure([floats("other", 3)])
    receiver(
        "structure-other",
        "another structure than was offered",
        bad,
        offered().add("StructureIs", T, other),
        resident=None,
    )
    lies = {**gold.offer, "nbytes": gold.nbytes + 1}
    receiver(
        "structure-figures",
        "a structure with other figures than the offer",
        "TransferError",
        greeted().add("Offer", lies).add("StructureIs", T, gold.body),
        resident=None,
    )
    receiver("want", "WANT to a receiver", unexpected, offered().add("Want", gold.want, gold.all))
    receiver("staged", "STAGED to a receiver", unexpected, offered().add("Staged", gold.staged))
    receiver("committed", "COMMITTED to a receiver", unexpected, offered().add("Committed", gold.committed))
    receiver(
        "abort-details",
        "an ABORT whose details are none",
        bad,
        offered().add("Abort", {"code": "tensor-changed", **T}, b"\xc1"),
    )
    receiver(
        "offer-other",
        "the same transfer with another model",
        "TransferError",
        offered().add("Offer", {**gold.offer, "model": "n"}),
    )
    receiver(
        "offer-relabelled",
        "the same transfer with another label",
        "TransferError",
        offered().add("Offer", {**gold.offer, "label": "v2"}),
    )

    def sender(name: str, what: str, error: str, stream: Stream) -> None:
        book.reject(f"sender-{name}", what, error, **gold.sending(stream))

    hello, wanted = hello_of_ours, lambda: hello_of_ours().add("Want", gold.want, gold.all)
    sender(
        "want-outside",
        "WANT for chunks that do not exist",
        bad,
        hello().add("Want", gold.want, encode_ranges([(0, last + 1)])),
    )
    sender(
        "want-unsorted",
        "WANT with ranges out of order",
        bad,
        hello().add("Want", gold.want, encode_ranges([(1, 1), (0, 1)])),
    )
    sender(
        "want-other-structure",
        "WANT of another structure after everything was sent",
        bad,
        wanted().add("Want", {"structure": DIGEST, **T}, gold.all),
    )
    rounds = hello()
    for _ in range(4):
        rounds.add("Want", gold.want, gold.all)
    sender("want-forever", "the whole of it asked for again and again", "TransferError", rounds)
    sender(
        "structure-not-offered",
        "a structure with a tensor that was not offered",
        bad,
        hello().add("StructureIs", T, other),
    )
    reshaped = encode_structure([floats("steps", 2)])
    sender(
        "structure-reshaped",
        "a structure with another shape than was offered",
        bad,
        hello().add("StructureIs", T, reshaped),
    )
    sender("structure-late", "another structure after WANT", unexpected, wanted().add("StructureIs", T, other))
    sender(
        "structure-twice",
        "the structure asked for twice",
        unexpected,
        hello().add("StructureWanted", T).add("StructureWanted", T),
    )
    sender(
        "structure-wanted-late",
        "the structure asked for after everything was sent",
        unexpected,
        wanted().add("StructureWanted", T),
    )
    sender("offer", "OFFER to a sender", unexpected, hello().add("Offer", gold.offer))
    sender("finish", "FINISH to a sender", unexpected, hello().add("Finish", gold.finish, gold.digests))
    sender(
        "committed-other",
        "another digest committed than was sent",
        "TransferError",
        wanted().add("Staged", gold.staged).add("Committed", {**gold.committed, "digest": DIGEST}),
    )
    sender("aborted", "ABORT", "TransferError", wanted().add("Abort", {"code": "mismatch", "message": "no", **T}))
    sender(
        "abort-details",
        "an ABORT whose details are none",
        bad,
        wanted().add("Abort", {"code": "mismatch", **T}, b"\xc1"),
    )
    broken = wanted()
    number = 2
    for attempt in range(5):
        broken.add("Nack", {"sequences": [number]})
        number = 2 + last + 1 + attempt
    sender("damaged-forever", "the same chunk damaged for the fifth time", "TransferError", broken)
