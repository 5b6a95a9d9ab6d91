"""Bases, codecs and coded runs: what is agreed on, what travels, and what is refused.

Of codecs only SAME is used, which has no payload, and number 255, of which nothing ever decodes.
"""

from collections.abc import Sequence
from typing import Any, Final

from tests.support import naive
from tests.support.golden.book import (
    DIGEST,
    Book,
    Golden,
    T,
    acceptor,
    answers,
    established,
    greeted,
    hello_of_ours,
    message,
    said,
)
from tests.support.models import SMALL, content_of
from tests.support.naive import LEAF, MORE, Stream, Tensor, encode_ranges, pack
from tests.support.vectors import Vector, spell

ROWS: Final = (*SMALL, Tensor("large", "uint8", (2 * LEAF + 100,)))
"""Chunks 0 to 2 are of the large tensor, chunk 3 has the small ones."""
CHANGED: Final = ("steps",)
"""What is another in the base: so chunk 3 is."""
SAME: Final = 1
NEVER: Final = 255
CODECS: Final = {str(SAME): 0, str(NEVER): 7}


class Based(Golden):
    """A push of ROWS to a receiver that has the version before."""

    def __init__(self, rows: Sequence[Tensor] = ROWS) -> None:
        super().__init__(rows)
        first = naive.roots(rows)
        self.before = {row.name: content_of(first[row.name], row.nbytes, int(row.name in CHANGED)) for row in self.rows}
        self.base = naive.version_digest(rows, self.before)
        self.held = b"".join(naive.chunk_digests(self.rows, self.before))
        self.both = {**self.want, "base": self.base, "codecs": [SAME, NEVER], "speeds": [0, 7]}
        self.one = {**self.want, "codecs": [NEVER], "speeds": [7]}

    def offered(self, **more: Any) -> Stream:
        """The sender's side up to OFFER."""
        return greeted().add("Offer", {**self.offer, **more})

    def rest(self, stream: Stream, *chunks: int) -> Stream:
        """These chunks as DATA, FINISH and COMMIT."""
        for chunk in chunks:
            stream.add("Data", {"chunk": chunk}, self.chunks[chunk])
        return stream.add("Finish", self.finish, self.digests).add("Commit", T)

    def based(self, stream: Stream, *, base: Sequence[str] = CHANGED, **more: Any) -> Vector:
        """A vector for a receiver that has the version before, and codecs."""
        return self.receiving(stream, resident=self.rows, base=list(base), codecs=CODECS, **more)

    def run(self, first: int, stop: int, codec: int = SAME) -> dict[str, int]:
        """The header of CODED."""
        return {"chunk": first, "chunks": stop - first, "codec": codec}


def accept_coded(book: Book) -> None:
    """Coded runs as they arrive, and whole pushes with them."""
    book.accept(
        "coded",
        "two runs: one that is the same as the base's, and one of a codec that is nothing to the connection",
        **acceptor(
            greeted()
            .add("Coded", {"chunk": 7, "chunks": 1000, "codec": SAME})
            .add("Coded", {"chunk": 0xFFFFFFFF, "chunks": 0xFFFFFFFF, "codec": NEVER}, b"payload")
            .data,
            asked={"7": 96},
        ),
        events=[
            established(),
            {"event": "run", "chunks": [7, 1007], "codec": SAME, "payload": []},
            {"event": "run", "chunks": [0xFFFFFFFF, 0x1FFFFFFFE], "codec": NEVER, "payload": spell(b"payload")},
        ],
        output=answers(),
    )
    header = pack({"chunk": 7, "chunks": 2, "codec": NEVER})
    book.accept(
        "damaged-coded-payload",
        "one bit of a coded run flipped: asked for again, and the stream goes on",
        **acceptor(
            greeted().raw(29, header, b"pazload", payload_crc=naive.crc32c(b"payload")).add("Commit", T).data,
            asked={"7": 96},
        ),
        events=[established(), {"event": "run-damaged", "chunks": [7, 9], "sequence": 1}, message("Commit", T)],
        output=answers(hello_of_ours().add("Nack", {"sequences": [1]})),
    )
    _accept_received(book)
    _accept_sent(book)


def _accept_received(book: Book) -> None:
    gold, small = Based(), Based(SMALL)
    small_end = [said("Staged", small.staged), said("Committed", small.committed)]
    done = {"state": "COMMITTED", "digest": gold.digest.hex()}
    want = said("Want", gold.both, encode_ranges([(0, 4)]))
    staged, committed = said("Staged", gold.staged), said("Committed", gold.committed)
    shared = gold.offered(bases=[DIGEST, gold.base])
    book.accept(
        "push-received-same",
        "the receiver has one of the bases: three chunks come as a run without payload, the fourth as it is",
        **gold.based(gold.rest(shared.add("Coded", gold.run(0, 3)), 3)),
        messages=[want, staged, committed],
        **done,
    )
    told = gold.offered(bases=[DIGEST], incremental=True).add("Coded", gold.run(1, 3))
    book.accept(
        "push-received-told",
        "the receiver has no base that was offered, and tells the digests of what it has: SAME, and no deltas",
        **gold.based(gold.rest(told.add("Coded", gold.run(0, 1)), 3)),
        messages=[said("Held", T, gold.held), want, staged, committed],
        **done,
    )
    book.accept(
        "push-received-other-base",
        "the receiver has no base that was offered, and is not asked what it has",
        **small.based(small.rest(small.offered(bases=[DIGEST]), 0)),
        messages=[said("Want", small.one, encode_ranges([(0, 1)])), *small_end],
        state="COMMITTED",
        digest=small.digest.hex(),
    )
    nack = gold.offered(bases=[gold.base]).add("Coded", gold.run(3, 4, NEVER), b"what is this")
    book.accept(
        "push-received-undecodable",
        "a run that is intact and does not decode is asked for again like a damaged one",
        **gold.based(gold.rest(nack.add("Coded", gold.run(0, 3)), 3)),
        messages=[want, said("Nack", {"sequences": [2]}), staged, committed],
        **done,
    )
    overlap = gold.offered(bases=[gold.base]).add("Data", {"chunk": 2}, gold.chunks[2]).add("Coded", gold.run(0, 3))
    overlap.add("Coded", gold.run(0, 2)).add("Coded", gold.run(0, 1)).add("Coded", gold.run(0, 3))
    book.accept(
        "push-received-overlapping",
        "a run of which one chunk is held already is asked for again; one of which all are is thrown away",
        **gold.based(gold.rest(overlap, 3)),
        messages=[want, said("Nack", {"sequences": [3]}), staged, committed],
        **done,
    )
    wrong = gold.offered(bases=[gold.base]).add("Coded", gold.run(0, 4)).add("Finish", gold.finish, gold.digests)
    again = said("Want", gold.want, encode_ranges([(3, 4)]))
    book.accept(
        "push-received-other-base-bytes",
        "a run that decodes to what it should not is found by its digests, and nothing coded is asked for any more",
        **gold.based(gold.rest(wrong, 3)),
        messages=[want, again, staged, committed],
        **done,
    )
    book.accept(
        "push-received-no-base",
        "the receiver's version is laid out by another structure: it is no base, and codecs without one remain",
        **small.receiving(
            small.rest(small.offered(bases=[DIGEST], incremental=True).add("StructureIs", T, small.body), 0),
            resident=None,
            codecs=CODECS,
        ),
        messages=[
            said("StructureWanted", T),
            said("Want", small.one, encode_ranges([(0, 1)])),
            *small_end,
        ],
        state="COMMITTED",
        digest=small.digest.hex(),
    )


def _accept_sent(book: Book) -> None:
    gold = Based()
    shared = {**gold.offer, "bases": [gold.base]}
    answer = lambda want: hello_of_ours().add("Want", want, encode_ranges([(0, 4)]))  # noqa: E731
    end = lambda stream: stream.add("Staged", gold.staged).add("Committed", gold.committed)  # noqa: E731
    coded = [said("Coded", gold.run(0, 3)), said("Data", {"chunk": 3}, gold.chunks[3])]
    last = [said("Finish", gold.finish, gold.digests), said("Commit", T)]
    only = {**gold.want, "base": gold.base, "codecs": [SAME], "speeds": [0]}
    book.accept(
        "push-sent-same",
        "the receiver has the base: what is unchanged travels as a run without payload",
        **gold.sending(end(answer(only)), bases=[list(CHANGED)]),
        messages=[said("Offer", shared), *coded, *last],
        state="COMMITTED",
    )
    book.accept(
        "push-sent-told",
        "the receiver tells the digests of a base that the sender does not have",
        **gold.sending(
            end(hello_of_ours().add("Held", T, gold.held).add("Want", only, encode_ranges([(0, 4)]))), incremental=True
        ),
        messages=[said("Offer", {**gold.offer, "incremental": True}), *coded, *last],
        state="COMMITTED",
    )
    small = Based(SMALL)
    data = said("Data", {"chunk": 0}, small.chunks[0])
    finish = said("Finish", small.finish, small.digests)
    wanted = {**small.want, "base": small.base, "codecs": [SAME], "speeds": [0]}
    everything = encode_ranges([(0, 1)])
    book.accept(
        "push-sent-told-late",
        "HELD was damaged and comes when everything has been sent, and once more",
        **small.sending(
            hello_of_ours()
            .add("Want", wanted, everything)
            .add("Held", T, small.held)
            .add("Held", T, small.held)
            .add("Staged", small.staged)
            .add("Committed", small.committed),
            incremental=True,
        ),
        messages=[said("Offer", {**small.offer, "incremental": True}), data, finish, said("Commit", T)],
        state="COMMITTED",
    )
    book.accept(
        "push-sent-old-receiver",
        "a receiver that knows nothing of bases",
        **small.sending(small.heard(), bases=[list(CHANGED), []], incremental=True),
        messages=[
            said("Offer", {**small.offer, "bases": [small.base, small.digest], "incremental": True}),
            data,
            finish,
            said("Commit", T),
        ],
        state="COMMITTED",
    )
    nack = hello_of_ours().add("Want", {**wanted, "base": small.digest}, everything).add("Nack", {"sequences": [2]})
    book.accept(
        "push-sent-coded-nack",
        "a run that arrived damaged, or did not decode, travels again as it is",
        **small.sending(nack.add("Staged", small.staged).add("Committed", small.committed), bases=[[]]),
        messages=[
            said("Offer", {**small.offer, "bases": [small.digest]}),
            said("Coded", small.run(0, 1)),
            finish,
            data,
            said("Commit", T),
        ],
        state="COMMITTED",
    )
    twice = hello_of_ours().add("Want", {**wanted, "base": small.digest}, everything)
    twice.add("Want", {**wanted, "base": small.digest}, everything)
    book.accept(
        "push-sent-coded-again",
        "what is asked for again after FINISH travels as it is, whatever WANT says",
        **small.sending(twice.add("Staged", small.staged).add("Committed", small.committed), bases=[[]]),
        messages=[
            said("Offer", {**small.offer, "bases": [small.digest]}),
            said("Coded", small.run(0, 1)),
            finish,
            data,
            finish,
            said("Commit", T),
        ],
        state="COMMITTED",
    )


def reject_coded(book: Book) -> None:
    """Coded runs that cannot be, and answers about bases that are none."""
    bad, unexpected, beyond = "MalformedMessage", "UnexpectedMessage", "LimitExceeded"
    asked = {"7": 96}

    def frame(name: str, what: str, error: str, stream: Stream, **more: Any) -> None:
        book.reject(
            f"coded-{name}", what, error, **acceptor(stream.data, **more), events=[established()], output=answers()
        )

    run = {"chunk": 7, "chunks": 1, "codec": NEVER}
    frame("empty", "a run of a codec other than SAME without a payload", bad, greeted().add("Coded", run), asked=asked)
    same = {**run, "codec": SAME}
    frame("same-payload", "SAME with a payload", bad, greeted().add("Coded", same, b"x"), asked=asked)
    frame("flag", "a run with a flag", bad, greeted().add("Coded", run, b"x", MORE), asked=asked)
    frame("unasked", "a run before anything was asked for", unexpected, greeted().add("Coded", same))
    long = greeted().add("Held", {"body_id": 1, "body_size": (1 << 24) + 1, **T}, bytes(LEAF), MORE)
    frame("held-beyond-limit", "a HELD of more than 16 MiB", beyond, long)

    gold = Based()

    def receiver(name: str, what: str, error: str, stream: Stream, **more: Any) -> None:
        book.reject(f"receiver-coded-{name}", what, error, **gold.based(stream, **more))

    offered = lambda: gold.offered(bases=[gold.base])  # noqa: E731
    receiver("outside", "a run that ends beyond the last chunk", bad, offered().add("Coded", gold.run(3, 5)))
    most = {"chunk": 0xFFFFFFFF, "chunks": 0xFFFFFFFF, "codec": SAME}
    receiver("largest", "a run of 2^32 - 1 chunks from the last possible one on", bad, offered().add("Coded", most))
    receiver("codec", "a codec that was not asked for", bad, offered().add("Coded", gold.run(0, 1, 2), b"x"))
    receiver("no-base", "SAME where there is no base", bad, gold.offered().add("Coded", gold.run(0, 1)))
    receiver("held", "HELD to a receiver", unexpected, offered().add("Held", T, gold.held))
    again = offered().add("Coded", gold.run(0, 4)).add("Finish", gold.finish, gold.digests)
    receiver("again", "a run where chunks were asked for as they are", bad, again.add("Coded", gold.run(3, 4)))
    wide = Golden([Tensor("wide", "uint8", (33 * LEAF,))])
    book.reject(
        "receiver-coded-long",
        "a run that decodes to more than 16 MiB",
        beyond,
        **wide.receiving(
            greeted().add("Offer", wide.offer).add("Coded", gold.run(0, 33, NEVER), b"x"),
            resident=wide.rows,
            codecs=CODECS,
        ),
    )
    book.reject(
        "receiver-coded-never",
        "a run to a receiver that has named no codec",
        bad,
        **gold.receiving(offered().add("Coded", gold.run(0, 1)), resident=gold.rows),
    )
    small = Based(SMALL)

    def sender(name: str, what: str, error: str, stream: Stream, **more: Any) -> None:
        book.reject(f"sender-{name}", what, error, **small.sending(stream, **more))

    want = {**small.want, "base": DIGEST, "codecs": [SAME], "speeds": [0]}
    everything = encode_ranges([(0, 1)])
    sender(
        "base-unknown",
        "WANT with a base that was not offered",
        bad,
        hello_of_ours().add("Want", want, everything),
        bases=[[]],
    )
    sender("held-unasked", "HELD to a sender that has not asked", unexpected, hello_of_ours().add("Held", T, DIGEST))
    sender(
        "held-short",
        "HELD without the last chunk's digest",
        bad,
        hello_of_ours().add("Held", T, small.held[:-16] + bytes(15)).add("Want", want, everything),
        incremental=True,
    )
    sender(
        "held-long-late",
        "HELD with a digest too many, after WANT",
        bad,
        hello_of_ours().add("Want", want, everything).add("Held", T, small.held + bytes(16)),
        incremental=True,
    )
    sender("coded", "CODED to a sender", unexpected, hello_of_ours().add("Coded", same))
