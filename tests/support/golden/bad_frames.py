"""Preludes, foreign peers, bodies in pieces and handshakes, to be refused."""

from typing import Any

from tests.support import naive
from tests.support.golden.book import (
    DIGEST,
    OFFER,
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
)
from tests.support.models import content_of
from tests.support.naive import LEAF, MORE, Stream, pack
from tests.support.vectors import spell


def reject_frames(book: Book) -> None:
    """Preludes, peers that speak something else, and the rules between prelude and header."""
    foreign = {
        "http": ("an HTTP request", b"GET / HTTP/1.1\r\nHost: gpu-01:7447\r\nUser-Agent: curl/8.5.0\r\n\r\n"),
        "tls": ("a TLS ClientHello", bytes.fromhex("16030100f1010000ed0303") + content_of("tls", 230)),
        "ssh": ("an SSH banner", b"SSH-2.0-OpenSSH_9.6\r\n"),
        "http2": ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        "pickle": ("a pickle", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."),
        "garbage": ("random bytes", content_of("garbage", 200)),
        "four-bytes": ("four bytes are enough to see it", b"SHPX"),
    }
    for name, (what, data) in foreign.items():
        book.reject(f"foreign-{name}", what, "ForeignPeer", **acceptor(data), events=[], output=[])
    book.reject(
        "foreign-banner-first",
        "a server that greets first",
        "ForeignPeer",
        **initiator(b"220 mail.example ESMTP\r\n"),
        events=[],
        output=answers(greeted()),
    )

    def frame(name: str, what: str, error: str, stream: Stream, **more: Any) -> None:
        book.reject(
            f"frame-{name}", what, error, **acceptor(stream.data, **more), events=[established()], output=answers()
        )

    ping = pack({})
    frame("magic", "another magic in the second frame", "BadPrelude", _with_magic(greeted(), b"SHPE"))
    frame("magic-lower", "the magic in lower case", "BadPrelude", _with_magic(greeted(), b"shpd"))
    frame("prelude-crc", "a prelude whose CRC is wrong", "BadPrelude", greeted().raw(5, ping, prelude_crc=0x12345678))
    frame("prelude-crc-zero", "a CRC of 0", "BadPrelude", greeted().raw(5, ping, prelude_crc=0))
    frame("sequence-skipped", "a sequence number left out", "BadPrelude", greeted().raw(5, ping, sequence=2))
    frame("sequence-repeated", "a sequence number used twice", "BadPrelude", greeted().raw(5, ping, sequence=0))
    frame(
        "sequence-largest", "the largest sequence number", "BadPrelude", greeted().raw(5, ping, sequence=(1 << 64) - 1)
    )
    book.reject(
        "frame-sequence-first",
        "a first frame that is not number 0",
        "BadPrelude",
        **acceptor(Stream(sequence=1).add("Hello", THEIRS).data),
        events=[],
        output=[],
    )
    big = greeted().raw(5, ping, header_length=16 * 1024 + 1)
    frame("header-too-long", "a header of 16385 bytes announced", "LimitExceeded", big)
    frame(
        "payload-too-long",
        "a payload of 524289 bytes announced",
        "LimitExceeded",
        greeted().raw(20, ping, payload_length=LEAF + 1),
    )
    frame(
        "payload-largest",
        "a payload of 4 GiB announced",
        "LimitExceeded",
        greeted().raw(20, ping, payload_length=0xFFFFFFFF),
    )
    frame("type-unknown", "a type that nobody has", "MalformedMessage", greeted().raw(99, ping))
    frame("type-zero", "type 0", "MalformedMessage", greeted().raw(0, ping))
    frame("type-largest", "type 255", "MalformedMessage", greeted().raw(255, ping))
    for bit in range(1, 8):
        frame(
            f"flag-{bit}",
            f"flag {1 << bit:#04x}, which nobody knows",
            "MalformedMessage",
            greeted().raw(5, ping, flags=1 << bit),
        )
    frame("payload-on-ping", "a message that has no body, with one", "LimitExceeded", greeted().add("Ping", {}, b"x"))
    frame("payload-on-commit", "COMMIT with a body", "LimitExceeded", greeted().add("Commit", T, bytes(100)))
    frame(
        "nack-unsent",
        "a NACK for a frame that was never sent",
        "UnexpectedMessage",
        greeted().add("Nack", {"sequences": [17]}),
    )
    frame(
        "nack-next",
        "a NACK for the frame that comes next",
        "UnexpectedMessage",
        greeted().add("Nack", {"sequences": [1]}),
    )
    twice = greeted().add("Ping", {"reply": True}).add("Nack", {"sequences": [1, 1]})
    book.reject(
        "frame-nack-twice",
        "a NACK that names a frame twice",
        "UnexpectedMessage",
        **acceptor(twice.data),
        events=[established()],
        output=answers(hello_of_ours().add("Ping").add("Ping")),
    )
    stubborn = greeted().add("Ping", {"reply": True})
    pongs = hello_of_ours().add("Ping")
    for at in range(1, 6):
        stubborn.add("Nack", {"sequences": [at]})
        if at < 5:
            pongs.add("Ping")
    book.reject(
        "frame-nack-forever",
        "the same message asked for a fifth time",
        "LimitExceeded",
        **acceptor(stubborn.data),
        events=[established()],
        output=answers(pongs),
    )


def _with_magic(stream: Stream, magic: bytes) -> Stream:
    stream.data += naive.prelude(5, b"\x80", b"", 1, magic=magic) + b"\x80"
    return stream


def reject_bodies(book: Book) -> None:
    """Bodies in pieces that do not fit together, and DATA that nobody asked for."""
    whole = bytes(LEAF)

    def body(name: str, what: str, error: str, stream: Stream, **more: Any) -> None:
        book.reject(
            f"body-{name}", what, error, **acceptor(stream.data, **more), events=[established()], output=answers()
        )

    def announced(size: int, body_id: int = 1, stream: Stream | None = None) -> Stream:
        return (stream or greeted()).add("StatusIs", {"body_id": body_id, "body_size": size}, whole, MORE)

    bad = "MalformedMessage"
    body(
        "more-without-announcement",
        "the flag that more follows, and nothing announced",
        bad,
        greeted().add("StatusIs", {}, b"x", MORE),
    )
    body(
        "more-on-ping",
        "the flag that more follows on a message without body",
        bad,
        greeted().add("Ping", {}, b"", MORE),
    )
    body(
        "announced-without-more",
        "a size announced without the flag",
        bad,
        greeted().add("StatusIs", {"body_id": 1, "body_size": LEAF + 1}, whole),
    )
    body("id-without-more", "a body's number without the flag", bad, greeted().add("StatusIs", {"body_id": 1}, b"x"))
    body("id-zero", "a body without a number", bad, greeted().add("StatusIs", {"body_size": LEAF + 1}, whole, MORE))
    body("announced-too-small", "a size that the first payload reaches already", bad, announced(LEAF))
    body(
        "first-piece-short",
        "a first piece that is not a full payload",
        bad,
        greeted().add("StatusIs", {"body_id": 1, "body_size": LEAF + 1}, whole[1:], MORE),
    )
    body(
        "first-piece-empty",
        "a first piece without bytes",
        bad,
        greeted().add("StatusIs", {"body_id": 1, "body_size": LEAF + 1}, b"", MORE),
    )
    body("beyond-limit", "more than 4 MiB of STATUS announced", "LimitExceeded", announced(4 * 1024 * 1024 + 1))
    body("beyond-everything", "2^63 - 1 bytes announced", "LimitExceeded", announced((1 << 63) - 1))
    body(
        "want-beyond-limit",
        "a WANT of more than 65536 ranges",
        "LimitExceeded",
        greeted().add("Want", {"body_id": 1, "body_size": LEAF + 8, "structure": DIGEST, **T}, whole, MORE),
    )
    for name, what, offset, size in (
        ("piece-at-zero", "a piece in place of the first", 0, LEAF),
        ("piece-misaligned", "a piece that does not begin where one can", LEAF + 1, 99),
        ("piece-beyond", "a piece beyond the end", 2 * LEAF, 1),
        ("piece-too-long", "a last piece that is too long", LEAF, 101),
        ("piece-too-short", "a last piece that is too short", LEAF, 99),
        ("piece-far-away", "a piece at the largest offset there is", (1 << 63) - LEAF, 1),
    ):
        body(name, what, bad, announced(LEAF + 100).add("Body", {"body_id": 1, "offset": offset}, bytes(size)))
    body("piece-empty", "a piece without bytes", bad, announced(LEAF + 100).add("Body", {"body_id": 1, "offset": LEAF}))
    body(
        "piece-with-flag",
        "a piece with the flag that more follows",
        bad,
        announced(LEAF + 100).add("Body", {"body_id": 1, "offset": LEAF}, bytes(100), MORE),
    )
    body("announced-twice", "two bodies of the same number", bad, announced(LEAF + 1, 7, announced(LEAF + 1, 7)))
    many = greeted()
    transfer = {"transfer": bytes(16)}
    kinds: dict[str, dict[str, Any]] = {
        "StatusIs": {},
        "VerifyIs": {},
        "StructureIs": transfer,
        "Finish": {"digest": bytes(16), "label": "v", **transfer},
        "Attach": {"mode": "copy", "model": "m"},
    }
    for number, (kind, fields) in enumerate(kinds.items(), start=1):
        many.add(kind, {**fields, "body_id": number, "body_size": LEAF + 1}, bytes(LEAF), MORE)
    body("too-many", "five bodies at once", "LimitExceeded", many)
    body(
        "two-of-one-type",
        "a body announced while another of its type is under way",
        "LimitExceeded",
        announced(LEAF + 1, 2, announced(LEAF + 1, 1)),
    )
    body(
        "data-unasked",
        "DATA where nothing was asked for",
        "UnexpectedMessage",
        greeted().add("Data", {"chunk": 0}, b"x"),
    )
    body("data-empty", "DATA without bytes", bad, greeted().add("Data", {"chunk": 0}), asked={"0": 1})
    body(
        "data-flag",
        "DATA with the flag that more follows",
        bad,
        greeted().add("Data", {"chunk": 0}, b"x", MORE),
        asked={"0": 1},
    )


def reject_handshakes(book: Book) -> None:
    """The first exchange."""

    def first(name: str, what: str, error: str, stream: Stream, output: Stream | None = None, **more: Any) -> None:
        book.reject(
            f"handshake-{name}",
            what,
            error,
            **acceptor(stream.data, **more),
            events=[],
            output=spell(bytes(output.data)) if output is not None else [],
        )

    first("payload", "a HELLO with a payload", "UnexpectedMessage", Stream().add("Hello", THEIRS, b"x"))
    first("flag", "a HELLO with a flag", "UnexpectedMessage", Stream().add("Hello", THEIRS, b"", MORE))
    first("offer", "OFFER instead of HELLO", "UnexpectedMessage", Stream().add("Offer", OFFER))
    first("status", "STATUS instead of HELLO", "UnexpectedMessage", Stream().add("StatusRequest"))
    first(
        "data",
        "DATA instead of HELLO, without bytes",
        "UnexpectedMessage",
        Stream().add("Data", {"chunk": 0}),
        asked={"0": 0},
    )
    first("auth", "a proof instead of HELLO", "UnexpectedMessage", Stream().add("Auth", {"proof": bytes(32)}))
    first("abort", "ABORT instead of HELLO", "UnexpectedMessage", Stream().add("Abort", {"code": "auth"}))
    first("damaged", "a HELLO that is damaged", "BadPrelude", Stream().raw(1, pack(THEIRS), header_crc=0))
    first(
        "damaged-payload",
        "a HELLO whose payload is damaged",
        "BadPrelude",
        Stream().raw(1, pack(THEIRS), payload_crc=1),
    )
    too_old = {**THEIRS, "version_max": 3, "version_min": 2}
    says = "theirs speaks protocol 2 to 3, this side 1: update this side"
    goodbye = hello_of_ours().add("Abort", {"code": "version", "message": says})
    first("newer", "a peer that speaks only later versions", "VersionMismatch", Stream().add("Hello", too_old), goodbye)
    first(
        "versions-crossed",
        "versions from 2 to 1",
        "MalformedMessage",
        Stream().add("Hello", {**THEIRS, "version_min": 2}),
    )
    first("version-zero", "version 0", "MalformedMessage", Stream().add("Hello", {**THEIRS, "version_min": 0}))
    first(
        "nonce-short", "a nonce of 31 bytes", "MalformedMessage", Stream().add("Hello", {**THEIRS, "nonce": bytes(31)})
    )
    first(
        "agent-long",
        "a name of 65 characters",
        "MalformedMessage",
        Stream().add("Hello", {**THEIRS, "agent": "x" * 65}),
    )
    for name, what, environment in (
        ("many", "17 entries in an environment", {f"k{at:02}": "" for at in range(17)}),
        ("long", "an entry of 65 characters in an environment", {"torch": "x" * 65}),
        ("newline", "a newline in an environment", {"torch": "2\n"}),
        ("number", "a number in an environment", {"torch": 2}),
        ("default", "an empty environment spelled out", {}),
    ):
        hello = Stream().add("Hello", {**THEIRS, "environment": environment})
        first(f"environment-{name}", what, "MalformedMessage", hello)
    first(
        "capabilities",
        "33 capabilities",
        "MalformedMessage",
        Stream().add("Hello", {**THEIRS, "capabilities": ["x"] * 33}),
    )
    first("critical", "a critical field", "MalformedMessage", Stream().add("Hello", {"!quantum": 1, **THEIRS}))
    book.reject(
        "handshake-hello-twice",
        "a second HELLO",
        "UnexpectedMessage",
        **acceptor(greeted().add("Hello", THEIRS).data),
        events=[established()],
        output=answers(),
    )
    book.reject(
        "handshake-auth-unasked",
        "a proof that nobody asked for",
        "UnexpectedMessage",
        **acceptor(greeted().add("Auth", {"proof": bytes(32)}).data),
        events=[established()],
        output=answers(),
    )
    wants = {**OURS, "auth": True}
    asked = Stream().add("Hello", wants)
    wrong = Stream().add("Hello", wants).add("Abort", {"code": "auth", "message": "the token is wrong"})
    for name, what, proof in (
        ("wrong", "a proof of another token", naive.proof(TOKEN + b"?", "initiator", THEIRS, wants)),
        ("role", "the acceptor's own proof sent back to it", naive.proof(TOKEN, "acceptor", THEIRS, wants)),
        (
            "replayed",
            "a proof from another connection",
            naive.proof(TOKEN, "initiator", THEIRS, {**wants, "nonce": bytes(32)}),
        ),
        (
            "stripped",
            "a proof over HELLOs without capabilities that were sent",
            naive.proof(TOKEN, "initiator", {**THEIRS, "capabilities": ["x"]}, wants),
        ),
        ("zero", "a proof of zeros", bytes(32)),
    ):
        first(f"proof-{name}", what, "AuthFailed", greeted().add("Auth", {"proof": proof}), wrong, token=TOKEN)
    first(
        "proof-short",
        "a proof of 31 bytes",
        "MalformedMessage",
        greeted().add("Auth", {"proof": bytes(31)}),
        asked,
        token=TOKEN,
    )
    first(
        "proof-skipped",
        "OFFER where a proof is due",
        "UnexpectedMessage",
        greeted().add("Offer", OFFER),
        asked,
        token=TOKEN,
    )
    first(
        "proof-hello-again",
        "HELLO where a proof is due",
        "UnexpectedMessage",
        greeted().add("Hello", THEIRS),
        asked,
        token=TOKEN,
    )

    def second(name: str, what: str, error: str, stream: Stream, output: Stream | None = None, **more: Any) -> None:
        book.reject(
            f"handshake-{name}",
            what,
            error,
            **initiator(stream.data, **more),
            events=[],
            output=answers(output or greeted()),
        )

    second("token-missing", "the acceptor asks for a token and there is none", "AuthFailed", asked)
    second(
        "token-unasked", "a token was given and the acceptor asks for none", "AuthFailed", hello_of_ours(), token=TOKEN
    )
    proved = greeted().add("Auth", {"proof": naive.proof(TOKEN, "initiator", THEIRS, wants)})
    mirrored = Stream().add("Hello", wants).add("Auth", {"proof": naive.proof(TOKEN, "initiator", THEIRS, wants)})
    second("acceptor-mirrors", "an acceptor that sends back our proof", "AuthFailed", mirrored, proved, token=TOKEN)
    second("acceptor-refuses", "the acceptor says that the token is wrong", "AuthFailed", wrong, proved, token=TOKEN)
    second(
        "acceptor-version",
        "the acceptor says that the version is wrong",
        "VersionMismatch",
        Stream().add("Abort", {"code": "version", "message": "update"}),
    )
    second(
        "acceptor-older",
        "the acceptor speaks only later versions",
        "VersionMismatch",
        Stream().add("Hello", {**OURS, "version_max": 7, "version_min": 7}),
    )
    second(
        "acceptor-busy",
        "an ABORT of another kind in the middle",
        "UnexpectedMessage",
        Stream().add("Abort", {"code": "busy"}),
    )
    second("acceptor-ping", "PING instead of HELLO", "UnexpectedMessage", Stream().add("Ping"))
