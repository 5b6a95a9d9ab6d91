"""Pushes of a part of a model, from either end: some to be accepted, some to be refused."""

from collections.abc import Sequence
from typing import Any, Final

from tests.support.golden.book import DIGEST, OURS, Book, Golden, T, acceptor, greeted, initiator, said
from tests.support.models import floats
from tests.support.naive import Stream, Tensor, encode_structure
from tests.support.vectors import Vector, spell

WHOLE: Final = Golden()
ROWS: Final = (floats("embed.weight", 40, 8), floats("layer.0.weight", 24, 24))
"""What is sent: of the pair that SMALL ties, only one."""
PART: Final = Golden(ROWS)
CHANGED: Final = ["embed.weight", "head.weight", "layer.0.weight"]
OFFER: Final = {**PART.offer, "partial": True}
LIVE: Final = {"live": WHOLE.digest}


def _greeting() -> Stream:
    """The stream of an acceptor that takes parts."""
    return Stream().add("Hello", {**OURS, "capabilities": ["partial"]})


def _offered(rows: Sequence[Tensor] = ROWS, **fields: Any) -> Stream:
    part = Golden(rows)
    return greeted().add("Offer", {**part.offer, "partial": True, **fields}).add("StructureIs", T, part.body)


def _receiving(stream: Stream, base: Sequence[str] | None = ()) -> Vector:
    given = {} if base is None else {"base": list(base)}
    return {**acceptor(stream.data), "kind": "receiver", "structure": spell(WHOLE.body), **given}


def _sending(stream: Stream) -> Vector:
    return {
        **initiator(stream.data), "kind": "sender", "structure": spell(PART.body), "transfer": T["transfer"].hex(),
        "model": "m", "label": "v1", "partial": True,
    }  # fmt: skip


def _said_data() -> list[dict[str, Any]]:
    return [said("Data", {"chunk": number}, chunk) for number, chunk in enumerate(PART.chunks)]


def accept_parts(book: Book) -> None:
    """A part of a version over the current one."""
    stream = _offered()
    for number, chunk in enumerate(PART.chunks):
        stream.add("Data", {"chunk": number}, chunk)
    stream.add("Finish", PART.finish, PART.digests).add("Commit", T)
    asked = [said("StructureWanted", T), said("Want", PART.want, PART.all)]
    committed = {**PART.committed, **LIVE}
    book.accept(
        "push-received-part",
        "a part; what it leaves out is the base's, and one name of a tied pair sets both",
        **_receiving(stream, CHANGED),
        messages=[*asked, said("Staged", PART.staged), said("Committed", committed)],
        state="COMMITTED",
        digest=WHOLE.digest.hex(),
    )
    same = _offered(label="v0").add("Finish", {**PART.finish, "label": "v0"}, PART.digests)
    already = {"already": True, "digest": PART.digest, "label": "v0", **LIVE, **T}
    book.accept(
        "push-received-part-already",
        "a part of the current version, under its label: nothing of it is needed",
        **_receiving(same),
        messages=[said("StructureWanted", T), said("Want", PART.want), said("Committed", already)],
        state="COMMITTED",
    )
    offer, finish = said("Offer", OFFER), said("Finish", PART.finish, PART.digests)
    heard = _greeting().add("StructureWanted", T).add("Want", PART.want, PART.all)
    book.accept(
        "push-sent-part",
        "a part, from the sending side",
        **_sending(heard.add("Staged", PART.staged).add("Committed", committed)),
        messages=[offer, said("StructureIs", T, PART.body), *_said_data(), finish, said("Commit", T)],
        state="COMMITTED",
    )
    held = _greeting().add("Want", PART.want, b"").add("Committed", {**committed, "already": True})
    book.accept(
        "push-sent-part-already",
        "the receiver has the part already",
        **_sending(held),
        messages=[offer, finish],
        state="COMMITTED",
    )


def reject_parts(book: Book) -> None:
    """Parts that cannot be, and answers to one that are none."""

    def receiver(name: str, what: str, stream: Stream, base: Sequence[str] | None = CHANGED) -> None:
        book.reject(f"receiver-part-{name}", what, "TransferError", **_receiving(stream, base))

    def sender(name: str, what: str, error: str, stream: Stream) -> None:
        book.reject(f"sender-part-{name}", what, error, **_sending(stream))

    receiver("nothing-to-keep", "a part for a model without a version", _offered(), None)
    receiver("unexpected", "a part with a tensor that the model lacks", _offered([*ROWS, floats("other", 3)]))
    receiver("shape", "a part with another shape than the model has", _offered([floats("layer.0.weight", 24, 23)]))
    receiver("dtype", "a part with another dtype", _offered([Tensor("layer.0.weight", "int32", (24, 24))]))
    receiver("empty", "a part of no tensors", _offered([]))
    receiver("of-a-whole", "the same transfer, as a part", greeted().add("Offer", PART.offer).add("Offer", OFFER))
    apart = [floats("embed.weight", 40, 8), floats("head.weight", 40, 8)]
    stream, both = _offered(apart), Golden(apart)
    for number, chunk in enumerate(both.chunks):
        stream.add("Data", {"chunk": number}, chunk)
    receiver(
        "ties", "other bytes for each of two names that the model ties", stream.add("Finish", both.finish, both.digests)
    )

    wanted = _greeting().add("Want", PART.want, PART.all).add("Staged", PART.staged)
    sender(
        "as-a-whole", "a part committed as if it were a whole", "TransferError", wanted.add("Committed", PART.committed)
    )
    other = _greeting().add("StructureIs", T, encode_structure(ROWS[:1]))
    sender("structure", "another structure for a part", "UnexpectedMessage", other)
    sender(
        "old-receiver",
        "a receiver that does not say that it takes parts is offered none",
        "TransferError",
        Stream().add("Hello", {**OURS, "capabilities": ["describe"]}),
    )
    digest = _greeting().add("Want", PART.want, PART.all).add("Staged", PART.staged)
    sender(
        "digest",
        "another digest than was sent, although that of what is live is given",
        "TransferError",
        digest.add("Committed", {**PART.committed, "digest": DIGEST, **LIVE}),
    )
