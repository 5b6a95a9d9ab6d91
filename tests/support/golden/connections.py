"""Handshakes, bodies in pieces and damage that costs one frame, to be accepted."""

from typing import Any

from tests.support import naive
from tests.support.golden.book import (
    DIGEST,
    OURS,
    THEIRS,
    TOKEN,
    Book,
    T,
    acceptor,
    answers,
    established,
    greeted,
    hello_of_ours,
    initiator,
    message,
)
from tests.support.models import content_of
from tests.support.naive import LEAF, MORE, Stream, encode_ranges, pack
from tests.support.vectors import spell


def accept_connections(book: Book) -> None:
    """Handshakes, bodies in pieces, damage that costs one frame."""
    book.accept(
        "handshake-acceptor", "HELLO, no token", **acceptor(greeted().data), events=[established()], output=answers()
    )
    book.accept(
        "handshake-initiator",
        "the acceptor's HELLO, no token",
        **initiator(hello_of_ours().data),
        events=[established(OURS)],
        output=answers(greeted()),
    )
    newer = {**THEIRS, "capabilities": ["relay", "delta"], "version_max": 9, "zone": [1, {"a": None}]}
    peer = {key: value for key, value in newer.items() if key != "zone"}
    book.accept(
        "handshake-later-release",
        "a HELLO that speaks versions 1 to 9 and has a field that version 1 does not know",
        **acceptor(Stream().add("Hello", newer).data),
        events=[established(peer)],
        output=answers(),
    )
    _accept_environments(book)
    wants = {**OURS, "auth": True}
    for file, what, theirs in (
        ("", "", THEIRS),
        ("-later-release", "; the proofs cover the HELLOs as they were sent, the unknown field included", newer),
    ):
        first = naive.proof(TOKEN, "initiator", theirs, wants)
        second = naive.proof(TOKEN, "acceptor", theirs, wants)
        seen = {key: value for key, value in theirs.items() if key != "zone"}
        book.accept(
            f"handshake-token-acceptor{file}",
            f"both sides prove that they know the token{what}",
            **acceptor(Stream().add("Hello", theirs).add("Auth", {"proof": first}).data, token=TOKEN),
            events=[established(seen)],
            output=answers(Stream().add("Hello", wants).add("Auth", {"proof": second})),
        )
    both = Stream().add("Hello", wants).add("Auth", {"proof": naive.proof(TOKEN, "acceptor", THEIRS, wants)})
    proof = naive.proof(TOKEN, "initiator", THEIRS, wants)
    book.accept(
        "handshake-token-initiator",
        "the acceptor asks for a proof and gives its own",
        **initiator(both.data, token=TOKEN),
        events=[established(wants)],
        output=answers(greeted().add("Auth", {"proof": proof})),
    )
    book.accept(
        "ping-answered",
        "a PING that asks for an answer, and one that does not",
        **acceptor(greeted().add("Ping", {"reply": True}).add("Ping").data),
        events=[established()],
        output=answers(hello_of_ours().add("Ping")),
    )
    book.accept(
        "unknown-optional-fields",
        "fields that version 1 does not know are ignored, whatever is in them",
        **acceptor(greeted().add("Commit", {**T, "a": {"deep": [[[1.5]]]}, "transfes": 1, "z": None}).data),
        events=[established(), message("Commit", T)],
        output=answers(),
    )
    whole, last = b"\x5a" * LEAF, b"\xa5" * 100
    book.accept(
        "body-in-pieces",
        "a body of two full payloads and a rest, another message in between, the last two pieces exchanged",
        **acceptor(
            greeted()
            .add("StatusIs", {"body_id": 9, "body_size": 2 * LEAF + 100}, whole, MORE)
            .add("Commit", T)
            .add("Body", {"body_id": 9, "offset": 2 * LEAF}, last)
            .add("Body", {"body_id": 9, "offset": LEAF}, whole)
            .data
        ),
        events=[established(), message("Commit", T), message("StatusIs", {}, whole * 2 + last)],
        output=answers(),
    )
    book.accept(
        "body-unannounced",
        "a piece of a body that nobody announced: its message was damaged and comes again with every piece",
        **acceptor(greeted().add("Body", {"body_id": 3, "offset": LEAF}, b"x").add("Commit", T).data),
        events=[established(), message("Commit", T)],
        output=answers(),
    )
    book.accept(
        "payload-largest",
        "a payload of exactly 524288 bytes",
        **acceptor(greeted().add("StructureIs", T, bytes(LEAF)).data),
        events=[established(), message("StructureIs", T, bytes(LEAF))],
        output=answers(),
    )
    book.accept(
        "resent-on-nack",
        "the peer asks for our PONG again: same frame, next sequence number",
        **acceptor(greeted().add("Ping", {"reply": True}).add("Nack", {"sequences": [1]}).data),
        events=[established()],
        output=answers(hello_of_ours().add("Ping").add("Ping")),
    )
    _accept_data(book)


def _accept_environments(book: Book) -> None:
    """What the sides say of what they are able to and run on."""
    runs_on = {"cuda": "12.8", "platform": "linux-x86_64", "python": "3.12.3", "shipd": "0.1.0", "torch": "2.10.0"}
    says: dict[str, Any] = {"capabilities": ["describe"], "environment": runs_on}
    theirs = {**THEIRS, "environment": {"zone": "a", "python": "3.11.9"}}
    book.accept(
        "handshake-environment-acceptor",
        "both sides say what they run on; the pairs are in any order, and keys that nobody knows are taken as they are",
        **acceptor(Stream().add("Hello", theirs).data, **says),
        events=[established(theirs)],
        output=answers(Stream().add("Hello", {**OURS, **says})),
    )
    book.accept(
        "handshake-environment-initiator",
        "the acceptor says what it is able to and runs on",
        **initiator(Stream().add("Hello", {**OURS, **says}).data, environment=runs_on),
        events=[established({**OURS, **says})],
        output=answers(Stream().add("Hello", {**THEIRS, "environment": runs_on})),
    )
    wants = {**OURS, "auth": True, "capabilities": ["describe"]}
    first = naive.proof(TOKEN, "initiator", THEIRS, wants)
    second = naive.proof(TOKEN, "acceptor", THEIRS, wants)
    book.accept(
        "handshake-environment-token",
        "an acceptor that asks for a proof does not say what it runs on",
        **acceptor(Stream().add("Hello", THEIRS).add("Auth", {"proof": first}).data, token=TOKEN, **says),
        events=[established()],
        output=answers(Stream().add("Hello", wants).add("Auth", {"proof": second})),
    )


def _accept_data(book: Book) -> None:
    content = content_of("chunk", 96)
    chunk = {"event": "chunk", "chunk": 7, "content": spell(content)}
    asked = {"7": 96, "300": 1}
    book.accept(
        "data",
        "two chunks that were asked for",
        **acceptor(greeted().add("Data", {"chunk": 7}, content).add("Data", {"chunk": 300}, b"!").data, asked=asked),
        events=[established(), chunk, {"event": "chunk", "chunk": 300, "content": spell(b"!")}],
        output=answers(),
    )
    book.accept(
        "data-not-wanted",
        "a chunk that is held already: received into nothing, not even checked",
        **acceptor(greeted().raw(20, pack({"chunk": 8}), content, payload_crc=1).add("Commit", T).data, asked=asked),
        events=[established(), message("Commit", T)],
        output=answers(),
    )
    nack = answers(hello_of_ours().add("Nack", {"sequences": [1]}))
    damaged = {"event": "damaged", "chunk": 7, "sequence": 1}
    spoilt = bytes((content[0] ^ 1,)) + content[1:]
    frame = greeted().raw(20, pack({"chunk": 7}), spoilt, payload_crc=naive.crc32c(content))
    book.accept(
        "damaged-data-payload",
        "one bit of a chunk flipped: asked for again, and the stream goes on",
        **acceptor(frame.add("Data", {"chunk": 7}, content).data, asked=asked),
        events=[established(), damaged, chunk],
        output=nack,
    )
    header = pack({"chunk": 7})
    lost = {"event": "damaged", "chunk": None, "sequence": 1}
    for file, what, spoilt_header, kind in (
        ("damaged-header", "one bit of a header flipped: which chunk it was is not known", b"\x00" + header[1:], 20),
        ("damaged-header-garbage", "a header of which nothing is left", b"\xff" * len(header), 20),
        ("damaged-header-other-type", "a damaged header of a type that nobody knows", b"\xc1" * len(header), 99),
    ):
        book.accept(
            file,
            what,
            **acceptor(
                greeted()
                .raw(kind, spoilt_header, content, header_crc=naive.crc32c(header))
                .add("Data", {"chunk": 7}, content)
                .data,
                asked=asked,
            ),
            events=[established(), lost, chunk],
            output=nack,
        )
    body = encode_ranges([(0, 2)])
    want = {"structure": DIGEST, **T}
    book.accept(
        "damaged-message-payload",
        "one bit of WANT's body flipped: asked for again, no event",
        **acceptor(
            greeted().raw(19, pack(want), b"\1" + body[1:], payload_crc=naive.crc32c(body)).add("Want", want, body).data
        ),
        events=[established(), message("Want", want, body)],
        output=nack,
    )
