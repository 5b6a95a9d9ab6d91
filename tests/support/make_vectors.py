"""Writes protocol/vectors: ``python -m tests.support.make_vectors``. Byte for byte the same every time.

Everything in them comes from tests.support.naive, which shares no code with shipproto.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgpack

from tests.support import naive
from tests.support.models import SMALL, content_of, floats
from tests.support.naive import LEAF, MORE, Stream, Tensor, encode_ranges, encode_structure, pack
from tests.support.vectors import DIRECTORY, Vector, as_json, spell

INITIATOR: Final = bytes(range(32))
ACCEPTOR: Final = bytes(range(100, 132))
TRANSFER: Final = b"0123456789abcdef"
DIGEST: Final = bytes(range(16))
TOKEN: Final = b"a token of some length"
THEIRS: Final = naive.hello(INITIATOR, "theirs")
OURS: Final = naive.hello(ACCEPTOR, "ours")
T: Final = {"transfer": TRANSFER}


class Book:
    """Vectors by path."""

    def __init__(self) -> None:
        self.files: dict[str, Vector] = {}

    def accept(self, name: str, what: str, **fields: Any) -> None:
        """A vector that must be accepted, with what is to be found."""
        self._add(f"accept/{name}", {"what": what, **fields})

    def reject(self, name: str, what: str, error: str, **fields: Any) -> None:
        """A vector that must be refused with this error."""
        self._add(f"reject/{name}", {"what": what, "error": error, **fields})

    def _add(self, path: str, vector: Vector) -> None:
        assert path not in self.files, path
        self.files[path] = vector


# --- short forms -------------------------------------------------------------------------------------------------


def acceptor(data: bytes | bytearray, **more: Any) -> Vector:
    """A connection vector for the accepting side."""
    return _side("acceptor", ACCEPTOR, data, **more)


def initiator(data: bytes | bytearray, **more: Any) -> Vector:
    """A connection vector for the connecting side, whose peer is the acceptor."""
    return _side("initiator", INITIATOR, data, **more)


def _side(role: str, nonce: bytes, data: bytes | bytearray, **more: Any) -> Vector:
    token = {"token": more.pop("token").hex()} if "token" in more else {}
    agent = "ours" if role == "acceptor" else "theirs"
    return {
        "kind": "connection", "role": role, "agent": agent, "nonce": nonce.hex(), **token, **more,
        "input": spell(bytes(data)),
    }  # fmt: skip


def greeted() -> Stream:
    """The initiator's stream up to where an acceptor without a token is established."""
    return Stream().add("Hello", THEIRS)


def established(peer: Mapping[str, Any] = THEIRS) -> dict[str, Any]:
    """The event of a handshake that is done."""
    return {"event": "established", "peer": as_json(dict(peer))}


def message(name: str, fields: Mapping[str, Any], body: bytes = b"") -> dict[str, Any]:
    """The event of a message."""
    return {"event": "message", "type": name, "fields": as_json(dict(fields)), "body": spell(body)}


def hello_of_ours() -> Stream:
    """What the acceptor sends first."""
    return Stream().add("Hello", OURS)


def answers(stream: Stream | None = None) -> list[Any]:
    """What the acceptor has sent in all; by default its HELLO."""
    return spell(bytes((stream or hello_of_ours()).data))


# --- accept ------------------------------------------------------------------------------------------------------

OFFER: Final = {
    "label": "step-1200", "metadata": {"run": "a7", "note": "naïve"}, "model": "minilm", "nbytes": 90_868_736,
    "structure": DIGEST, "tensors": 103, **T,
}  # fmt: skip
MESSAGES: Final[Sequence[tuple[str, dict[str, Any], bytes]]] = (
    ("Offer", OFFER, b""),
    ("Offer", {"model": "m", "nbytes": 0, "resumed": True, "structure": DIGEST, "tensors": 0, **T}, b""),
    ("StructureWanted", T, b""),
    ("StructureIs", T, b"any body"),
    ("Want", {"structure": DIGEST, **T}, encode_ranges([(0, 3), (7, 8)])),
    ("Progress", {"held": 4_294_967_295, "stage": "receiving", **T}, b""),
    ("Finish", {"digest": DIGEST, "label": "v:1@x+y-z_.0", **T}, DIGEST * 3),
    ("Staged", {"processes": 2, "stage_seconds": 0.125, **T}, b""),
    ("Staged", {"processes": 0, **T}, b""),
    ("Commit", T, b""),
    ("Committed", {"digest": DIGEST, "label": "v1", "pause_seconds": 0.0015, "stale": ["811"], "swapped": 3, **T}, b""),
    ("Committed", {"already": True, "digest": DIGEST, "label": "v1", **T}, b""),
    ("Committed", {"digest": DIGEST, "label": "v1", "pause_seconds": 0.0, "swapped": 1, **T}, b""),
    ("Abort", {"code": "mismatch", "message": "2 tensors differ", "tensor": "a.b", **T}, msgpack.packb(["a", "b"])),
    ("Abort", {"code": "from-a-later-release"}, b""),
    ("StatusRequest", {}, b""),
    ("StatusRequest", {"model": "minilm"}, b""),
    ("StatusIs", {}, b"a status"),
    ("VerifyRequest", {"model": "minilm"}, b""),
    ("VerifyIs", {}, b"a verification"),
    ("Attach", {"digest": DIGEST, "label": "v1", "mode": "copy", "model": "minilm", "pinned": True}, b"a resident"),
    ("Attach", {"mode": "auto", "model": "minilm"}, b""),
    ("Attached", {"digest": DIGEST, "generation": (1 << 63) - 1, "label": "v1", "slot": 15}, b""),
    (
        "Images",
        {"slots": [{"size": 4096, "slot": 0}, {"size": 1 << 44, "slot": 1, "writable": True}]},
        b"",
    ),
    ("Fill", {"generation": 1, "slot": 0}, b""),
    ("Filled", {"generation": 1, "slot": 0}, b""),
    ("Arriving", {"generation": 2, "slot": 1, **T}, encode_ranges([(5, 9)])),
    ("Stage", {"digest": DIGEST, "generation": 2, "label": "v1", "slot": 1, **T}, b""),
    ("StageReady", {"error": "no room", "generation": 2, **T}, b""),
    ("StageReady", {"generation": 2, "stage_seconds": 1e9, **T}, b""),
    ("Swap", {"generation": 2, "timeout": 5.0, **T}, b""),
    ("Swapped", {"copy_seconds": 0.25, "generation": 2, "pause_seconds": 0.5, **T}, b""),
    ("Swapped", {"error": "out of memory", "fenced": True, "generation": 2, **T}, b""),
    ("Unstage", {"generation": 2, **T}, b""),
    ("Release", {"generation": 2, "slot": 1}, b""),
    ("Evicted", {"reason": "did not release an image"}, b""),
    ("DigestRequest", {"request": 7}, b""),
    ("DigestIs", {"digest": DIGEST, "label": "v1", "request": 7}, b""),
    ("DigestIs", {"error": "no", "request": 7}, b""),
    ("Detach", {}, b""),
)  # fmt: skip


def accept_messages(book: Book) -> None:
    """One frame of every message."""
    seen: dict[str, int] = {}
    for name, fields, body in MESSAGES:
        seen[name] = seen.get(name, 0) + 1
        file = f"message-{name.lower()}" + (f"-{seen[name]}" if seen[name] > 1 else "")
        book.accept(
            file,
            f"{name}, alone in its frame",
            **acceptor(greeted().add(name, fields, body).data),
            events=[established(), message(name, fields, body)],
            output=answers(),
        )


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
        **acceptor(greeted().raw(19, pack(want), b"\1" + body[1:], payload_crc=naive.crc32c(body)).add("Want", want, body).data),
        events=[established(), message("Want", want, body)],
        output=nack,
    )  # fmt: skip


STRUCTURES: Final[Mapping[str, tuple[str, Sequence[Tensor]]]] = {
    "structure-empty": ("no tensors at all: one page, no chunks", ()),
    "structure-small": ("a tied pair, a scalar, an empty tensor, odd sizes, four dtypes", SMALL),
    "structure-one-empty": ("a single tensor without elements: no chunks", [floats("x", 0)]),
    "structure-dtypes": (
        "one tensor of every dtype, in the order of their numbers whatever their names",
        [Tensor(f"t{99 - at:02}", dtype, (3,)) for at, dtype in enumerate(naive.ITEMSIZE)],
    ),
    "structure-leaf-boundary": (
        "one byte less than a leaf, exactly one, one more",
        [Tensor(name, "uint8", (size,)) for name, size in (("a", LEAF - 1), ("b", LEAF), ("c", LEAF + 1))],
    ),
    "structure-packing": (
        "small tensors that fill a chunk to the last byte, then one more, then an empty one",
        [Tensor("a", "uint8", (LEAF // 2,)), Tensor("b", "uint8", (LEAF // 2,)), Tensor("c", "uint8", (65,)),
         Tensor("d", "uint8", (0,)), Tensor("e", "uint8", (LEAF - 129,)), Tensor("f", "uint8", (1, 1))],
    ),
    "structure-unicode": (
        "names sort by code point, which is the order of UTF-8 and not that of UTF-16",
        [floats("\U0001f600", 2), floats("ﬀ", 2), floats("é", 2), floats("z", 2), floats("Z", 2), floats(" ", 1)],
    ),
    "structure-ties": (
        "two groups; the first name of each is the one that holds the bytes",
        [floats("b", 4), floats("a", 4, tied_to="b"), floats("c", 4, tied_to="b"), floats("y", 2), floats("x", 2, tied_to="y")],
    ),
    "structure-huge": (
        "32 dimensions, and a product that would overflow if the last were not 0",
        [floats("x", *(1,) * 32), Tensor("y", "uint8", (1 << 42,) * 31 + (0,))],
    ),
    "structure-large-tied": (
        "a tied pair of more than one leaf",
        [Tensor("in", "float16", (300, 1024)), Tensor("out", "float16", (300, 1024), tied_to="in")],
    ),
}  # fmt: skip


def accept_structures(book: Book) -> None:
    """Structures with everything that follows from them."""
    for name, (what, tensors) in STRUCTURES.items():
        picture = naive.picture(tensors)
        first = naive.roots(tensors)
        rows = sorted(tensors, key=lambda tensor: tensor.name.encode())
        data = {tensor.name: content_of(first[tensor.name], tensor.nbytes) for tensor in rows}
        encoded = encode_structure(tensors)
        book.accept(
            name,
            what,
            kind="structure",
            input=spell(encoded),
            tensors=[
                {"name": row.name, "dtype": row.dtype, "shape": list(row.shape), "offset": picture.offsets[row.name]}
                | ({"tied_to": first[row.name]} if first[row.name] != row.name else {})
                for row in rows
            ],
            chunks=[[start, size] for start, size, _ in picture.chunks],
            image_size=picture.size,
            digest=naive.xxhash.xxh3_128_digest(encoded).hex(),
            version_digest=naive.version_digest(tensors, data).hex(),
        )


def accept_bodies(book: Book) -> None:
    """Range lists, and the bodies of ATTACH, STATUS, VERIFY and ABORT."""
    for name, what, ranges, total in (
        ("none", "nothing", [], 0),
        ("all", "everything", [(0, 1 << 25)], 1 << 25),
        ("one", "the last one", [(9, 10)], 10),
        ("some", "ranges that do not touch", [(0, 1), (2, 3), (100, 4000)], 4096),
    ):
        book.accept(
            f"ranges-{name}", what, kind="ranges", total=total, input=spell(encode_ranges(ranges)),
            ranges=[list(pair) for pair in ranges],
        )  # fmt: skip
    transient = [Tensor("position_ids", "int64", (1, 512))]
    resident = pack({"structure": encode_structure(SMALL), "transient": encode_structure(transient)})
    book.accept(
        "resident", "the body of ATTACH", kind="resident", input=spell(resident),
        structure=sorted(tensor.name for tensor in SMALL), transient=["position_ids"],
    )  # fmt: skip
    process = {"pid": 811, "state": "serving", "mode": "copy", "label": "v1", "digest": DIGEST.hex(),
               "attached_seconds": 12.5, "pinned": False}  # fmt: skip
    transfer = {"transfer_id": TRANSFER.hex(), "peer": "10.0.0.1:5", "stage": "receiving", "label": "v2", "bytes_held": 1,
                "bytes_total": 2, "connected": True}  # fmt: skip
    model = {"name": "minilm", "label": "v1", "digest": DIGEST.hex(), "tensors": 7, "bytes": 3000, "image_bytes": 8192,
             "committed_at": 0.0, "processes": [process], "transfer": transfer}  # fmt: skip
    status = {"agent": "shipd", "pid": 1, "uptime_seconds": 1.5, "memory_used": 8192, "memory_limit": 1 << 40,
              "models": [model]}  # fmt: skip
    book.accept("status", "the body of STATUS", kind="status", input=spell(msgpack.packb(status)), value=status)
    book.accept(
        "status-later-release", "fields of a later release are ignored", kind="status",
        input=spell(msgpack.packb({**status, "moon": [1, 2]})), value=status,
    )  # fmt: skip
    verification = {"model": "minilm", "label": "v1", "digest": DIGEST.hex(), "processes": [
        {"pid": 811, "label": "v1", "digest": DIGEST.hex(), "matches": True, "error": ""}]}  # fmt: skip
    book.accept(
        "verification", "the body of VERIFY", kind="verification", input=spell(msgpack.packb(verification)),
        value=verification,
    )  # fmt: skip
    book.accept(
        "abort-details", "what ABORT lists", kind="abort", code="mismatch",
        input=spell(msgpack.packb(["missing a", "unexpected b"])), means="mismatch", details=["missing a", "unexpected b"],
    )  # fmt: skip
    book.accept(
        "abort-unknown-code", "a code of a later release reads as internal", kind="abort", code="eclipse", input=[],
        means="internal", details=[],
    )  # fmt: skip


# --- conversations -----------------------------------------------------------------------------------------------


class Golden:
    """One push of SMALL, from both ends."""

    def __init__(self, rows: Sequence[Tensor] = SMALL) -> None:
        self.rows = sorted(rows, key=lambda row: row.name.encode())
        self.body = encode_structure(rows)
        self.structure = naive.xxhash.xxh3_128_digest(self.body)
        self.picture = naive.picture(rows)
        first = naive.roots(rows)
        self.data = {row.name: content_of(first[row.name], row.nbytes) for row in self.rows}
        self.digest = naive.version_digest(rows, self.data)
        self.nbytes = sum(row.nbytes for row in self.rows if first[row.name] == row.name)
        image = bytearray(self.picture.size)
        for row in self.rows:
            start = self.picture.offsets[row.name]
            image[start : start + row.nbytes] = self.data[row.name]
        self.chunks = [bytes(image[start : start + size]) for start, size, _ in self.picture.chunks]
        self.digests = b"".join(naive.tensor_digest(self.data[row.name]) for row in self.rows)
        self.offer = {
            "label": "v1", "model": "m", "nbytes": self.nbytes, "structure": self.structure, "tensors": len(rows), **T
        }  # fmt: skip
        self.want = {"structure": self.structure, **T}
        self.all = encode_ranges([(0, len(self.chunks))])
        self.finish = {"digest": self.digest, "label": "v1", **T}
        self.staged = {"processes": 1, "stage_seconds": 0.25, **T}
        self.committed = {"digest": self.digest, "label": "v1", "swapped": 1, **T}

    def sent(self) -> Stream:
        """The sender's side up to FINISH."""
        stream = greeted().add("Offer", self.offer)
        for number, chunk in enumerate(self.chunks):
            stream.add("Data", {"chunk": number}, chunk)
        return stream.add("Finish", self.finish, self.digests)

    def heard(self) -> Stream:
        """The receiver's side up to COMMITTED."""
        return (
            hello_of_ours().add("Want", self.want, self.all).add("Staged", self.staged).add("Committed", self.committed)
        )

    def receiving(self, stream: Stream, *, resident: Sequence[Tensor] | None = SMALL, **more: Any) -> Vector:
        """A vector for the receiving side."""
        structure = {"structure": spell(encode_structure(resident))} if resident is not None else {}
        return {**acceptor(stream.data), "kind": "receiver", **structure, **more}

    def sending(self, stream: Stream, **more: Any) -> Vector:
        """A vector for the sending side."""
        return {
            **initiator(stream.data), "kind": "sender", "structure": spell(self.body), "transfer": TRANSFER.hex(),
            "model": "m", "label": "v1", **more,
        }  # fmt: skip


def said(name: str, fields: Mapping[str, Any], body: bytes = b"") -> dict[str, Any]:
    """A message in a conversation."""
    return {"type": name, "fields": as_json(dict(fields)), "body": spell(body)}


def accept_conversations(book: Book) -> None:
    """Whole pushes."""
    gold = Golden()
    want = said("Want", gold.want, gold.all)
    staged, committed = said("Staged", gold.staged), said("Committed", gold.committed)
    done = {"state": "COMMITTED", "digest": gold.digest.hex()}
    commit = lambda: gold.sent().add("Commit", T)  # noqa: E731
    book.accept(
        "push-received", "a push whose structure the receiver knows", **gold.receiving(commit()),
        messages=[want, staged, committed], **done,
    )  # fmt: skip
    unknown = greeted().add("Offer", gold.offer).add("StructureIs", T, gold.body)
    for number, chunk in enumerate(gold.chunks):
        unknown.add("Data", {"chunk": number}, chunk)
    unknown.add("Finish", gold.finish, gold.digests).add("Commit", T)
    book.accept(
        "push-received-unknown-structure", "the receiver takes any structure and asks for it",
        **gold.receiving(unknown, resident=None), messages=[said("StructureWanted", T), want, staged, committed], **done,
    )  # fmt: skip
    backwards = greeted().add("Offer", gold.offer).add("Finish", gold.finish, gold.digests)
    for number in reversed(range(len(gold.chunks))):
        backwards.add("Data", {"chunk": number}, gold.chunks[number]).add(
            "Data", {"chunk": number}, gold.chunks[number]
        )
    book.accept(
        "push-received-backwards", "FINISH first, then the chunks, last one first and each of them twice",
        **gold.receiving(backwards.add("Commit", T)), messages=[want, staged, committed], **done,
    )  # fmt: skip
    padded = [*SMALL, Tensor("position_ids", "int64", (1, 4))]
    apart = [Tensor(row.name, row.dtype, row.shape) for row in SMALL]
    for name, what, offered in (("tied", "offers apart what the receiver ties", apart),):
        other = Golden(offered)
        stream = greeted().add("Offer", other.offer).add("StructureIs", T, other.body)
        for number, chunk in enumerate(gold.chunks):
            stream.add("Data", {"chunk": number}, chunk)
        stream.add("Finish", gold.finish, gold.digests).add("Commit", T)
        book.accept(
            f"push-received-{name}", f"the sender {what}: the receiver's structure rules", **gold.receiving(stream),
            messages=[said("StructureWanted", T), said("StructureIs", T, gold.body), want, staged, committed], **done,
        )  # fmt: skip
    bad = greeted().add("Offer", gold.offer).add("Data", {"chunk": 0}, bytes(len(gold.chunks[0])))
    for number, chunk in enumerate(gold.chunks[1:], 1):
        bad.add("Data", {"chunk": number}, chunk)
    bad.add("Finish", gold.finish, gold.digests)
    first = encode_ranges([(0, 1)])
    bad.add("Data", {"chunk": 0}, gold.chunks[0]).add("Finish", gold.finish, gold.digests).add("Commit", T)
    book.accept(
        "push-received-other-digests", "a chunk that is intact by CRC but not by digest is asked for again",
        **gold.receiving(bad), messages=[want, said("Want", gold.want, first), staged, committed], **done,
    )  # fmt: skip
    data = [said("Data", {"chunk": number}, chunk) for number, chunk in enumerate(gold.chunks)]
    finish = said("Finish", gold.finish, gold.digests)
    offer, please = said("Offer", gold.offer), said("Commit", T)
    book.accept(
        "push-sent", "a push, from the sending side", **gold.sending(gold.heard()),
        messages=[offer, *data, finish, please], state="COMMITTED",
    )  # fmt: skip
    asked = hello_of_ours().add("StructureWanted", T)
    asked.add("Want", gold.want, gold.all).add("Staged", gold.staged).add("Committed", gold.committed)
    book.accept(
        "push-sent-unknown-structure", "the receiver asks for the structure", **gold.sending(asked),
        messages=[offer, said("StructureIs", T, gold.body), *data, finish, please], state="COMMITTED",
    )  # fmt: skip
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
        "push-sent-nack", "the first chunk arrived damaged: it goes again, FINISH does not",
        **gold.sending(again.add("Staged", gold.staged).add("Committed", gold.committed)),
        messages=[offer, *data, finish, data[0], please], state="COMMITTED",
    )  # fmt: skip
    held = hello_of_ours().add("Want", gold.want, b"").add("Committed", {**gold.committed, "already": True})
    book.accept(
        "push-sent-held", "the receiver holds everything: only digests travel", **gold.sending(held),
        messages=[offer, finish], state="COMMITTED",
    )  # fmt: skip
    lost = hello_of_ours().add("Committed", gold.committed)
    book.accept(
        "push-sent-lost-answer", "COMMITTED at once: the transfer had come that far on another connection",
        **gold.sending(lost), messages=[offer], state="COMMITTED",
    )  # fmt: skip


# --- reject ------------------------------------------------------------------------------------------------------


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
        "foreign-banner-first", "a server that greets first", "ForeignPeer", **initiator(b"220 mail.example ESMTP\r\n"),
        events=[], output=answers(greeted()),
    )  # fmt: skip

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
        "frame-sequence-first", "a first frame that is not number 0", "BadPrelude",
        **acceptor(Stream(sequence=1).add("Hello", THEIRS).data), events=[], output=[],
    )  # fmt: skip
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
        "frame-nack-twice", "a NACK that names a frame twice", "UnexpectedMessage", **acceptor(twice.data),
        events=[established()], output=answers(hello_of_ours().add("Ping").add("Ping")),
    )  # fmt: skip
    stubborn = greeted().add("Ping", {"reply": True})
    pongs = hello_of_ours().add("Ping")
    for at in range(1, 6):
        stubborn.add("Nack", {"sequences": [at]})
        if at < 5:
            pongs.add("Ping")
    book.reject(
        "frame-nack-forever", "the same message asked for a fifth time", "LimitExceeded", **acceptor(stubborn.data),
        events=[established()], output=answers(pongs),
    )  # fmt: skip


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
    body("announced-without-more", "a size announced without the flag", bad,
         greeted().add("StatusIs", {"body_id": 1, "body_size": LEAF + 1}, whole))  # fmt: skip
    body("id-without-more", "a body's number without the flag", bad, greeted().add("StatusIs", {"body_id": 1}, b"x"))
    body("id-zero", "a body without a number", bad, greeted().add("StatusIs", {"body_size": LEAF + 1}, whole, MORE))
    body("announced-too-small", "a size that the first payload reaches already", bad, announced(LEAF))
    body("first-piece-short", "a first piece that is not a full payload", bad,
         greeted().add("StatusIs", {"body_id": 1, "body_size": LEAF + 1}, whole[1:], MORE))  # fmt: skip
    body("first-piece-empty", "a first piece without bytes", bad,
         greeted().add("StatusIs", {"body_id": 1, "body_size": LEAF + 1}, b"", MORE))  # fmt: skip
    body("beyond-limit", "more than 4 MiB of STATUS announced", "LimitExceeded", announced(4 * 1024 * 1024 + 1))
    body("beyond-everything", "2^63 - 1 bytes announced", "LimitExceeded", announced((1 << 63) - 1))
    body("want-beyond-limit", "a WANT of more than 65536 ranges", "LimitExceeded",
         greeted().add("Want", {"body_id": 1, "body_size": LEAF + 8, "structure": DIGEST, **T}, whole, MORE))  # fmt: skip
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
    body("piece-with-flag", "a piece with the flag that more follows", bad,
         announced(LEAF + 100).add("Body", {"body_id": 1, "offset": LEAF}, bytes(100), MORE))  # fmt: skip
    body("announced-twice", "two bodies of the same number", bad, announced(LEAF + 1, 7, announced(LEAF + 1, 7)))
    many = greeted()
    for number in range(1, 6):
        announced(LEAF + 1, number, many)
    body("too-many", "five bodies at once", "LimitExceeded", many)
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
            f"handshake-{name}", what, error, **acceptor(stream.data, **more), events=[],
            output=spell(bytes(output.data)) if output is not None else [],
        )  # fmt: skip

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
    first(
        "capabilities",
        "33 capabilities",
        "MalformedMessage",
        Stream().add("Hello", {**THEIRS, "capabilities": ["x"] * 33}),
    )
    first("critical", "a critical field", "MalformedMessage", Stream().add("Hello", {"!quantum": 1, **THEIRS}))
    book.reject(
        "handshake-hello-twice", "a second HELLO", "UnexpectedMessage",
        **acceptor(greeted().add("Hello", THEIRS).data), events=[established()], output=answers(),
    )  # fmt: skip
    book.reject(
        "handshake-auth-unasked", "a proof that nobody asked for", "UnexpectedMessage",
        **acceptor(greeted().add("Auth", {"proof": bytes(32)}).data), events=[established()], output=answers(),
    )  # fmt: skip
    wants = {**OURS, "auth": True}
    asked = Stream().add("Hello", wants)
    wrong = Stream().add("Hello", wants).add("Abort", {"code": "auth", "message": "the token is wrong"})
    for name, what, proof in (
        ("wrong", "a proof of another token", naive.proof(TOKEN + b"?", "initiator", THEIRS, wants)),
        ("role", "the acceptor's own proof sent back to it", naive.proof(TOKEN, "acceptor", THEIRS, wants)),
        ("replayed", "a proof from another connection", naive.proof(TOKEN, "initiator", THEIRS, {**wants, "nonce": bytes(32)})),
        ("stripped", "a proof over HELLOs without capabilities that were sent", naive.proof(TOKEN, "initiator", {**THEIRS, "capabilities": ["x"]}, wants)),
        ("zero", "a proof of zeros", bytes(32)),
    ):  # fmt: skip
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
            f"handshake-{name}", what, error, **initiator(stream.data, **more), events=[],
            output=answers(output or greeted()),
        )  # fmt: skip

    second("token-missing", "the acceptor asks for a token and there is none", "AuthFailed", asked)
    second(
        "token-unasked", "a token was given and the acceptor asks for none", "AuthFailed", hello_of_ours(), token=TOKEN
    )
    proved = greeted().add("Auth", {"proof": naive.proof(TOKEN, "initiator", THEIRS, wants)})
    mirrored = Stream().add("Hello", wants).add("Auth", {"proof": naive.proof(TOKEN, "initiator", THEIRS, wants)})
    second("acceptor-mirrors", "an acceptor that sends back our proof", "AuthFailed", mirrored, proved, token=TOKEN)
    second("acceptor-refuses", "the acceptor says that the token is wrong", "AuthFailed", wrong, proved, token=TOKEN)
    second("acceptor-version", "the acceptor says that the version is wrong", "VersionMismatch",
           Stream().add("Abort", {"code": "version", "message": "update"}))  # fmt: skip
    second("acceptor-older", "the acceptor speaks only later versions", "VersionMismatch",
           Stream().add("Hello", {**OURS, "version_max": 7, "version_min": 7}))  # fmt: skip
    second(
        "acceptor-busy",
        "an ABORT of another kind in the middle",
        "UnexpectedMessage",
        Stream().add("Abort", {"code": "busy"}),
    )
    second("acceptor-ping", "PING instead of HELLO", "UnexpectedMessage", Stream().add("Ping"))


def reject_headers(book: Book) -> None:
    """Headers that pass their CRC and are not what their type promises."""

    def header(
        name: str, what: str, kind: str, raw: bytes | Mapping[str, Any], error: str = "MalformedMessage"
    ) -> None:
        stream = greeted().add(kind, raw)
        book.reject(f"header-{name}", what, error, **acceptor(stream.data), events=[established()], output=answers())

    transfer = msgpack.packb("transfer") + msgpack.packb(TRANSFER)
    commit = b"\x81" + transfer
    header("empty", "no header at all", "Commit", b"")
    header("array", "an array", "Commit", msgpack.packb([TRANSFER]))
    header("nil", "nil", "Commit", b"\xc0")
    header("cut", "a header cut in the middle", "Commit", commit[:-1])
    header("trailing", "a byte after the map", "Commit", commit + b"\xc0")
    header("never-used", "the byte that msgpack never uses", "Commit", b"\x82\xa1a\xc1" + transfer)
    header("count-too-large", "a map of four billion entries", "Commit", b"\xdf\xff\xff\xff\xff" + transfer)
    header("map-16", "a map header longer than needed", "Commit", b"\xde\x00\x01" + transfer)
    header("map-16-empty", "the same, of an empty map", "Detach", b"\xde\x00\x00")
    header(
        "map-32-unknown",
        "the same, with a field that nobody knows",
        "Commit",
        b"\xdf\x00\x00\x00\x02\xa1a\x01" + transfer,
    )
    header("key-str8", "a key longer than needed", "Commit", b"\x81\xd9\x08transfer" + msgpack.packb(TRANSFER))
    header("key-str8-unknown", "the same, of a field that nobody knows", "Commit", b"\x82\xd9\x01a\x01" + transfer)
    header("bin-16", "bytes longer than needed", "Commit", b"\x81\xa8transfer\xc5\x00\x10" + TRANSFER)
    header("int-longer", "a number longer than needed", "DigestRequest", b"\x81\xa7request\xcc\x07")
    header("int-signed", "a number as a signed one", "DigestRequest", b"\x81\xa7request\xd0\x07")
    header("int-as-float", "a float where a number is due", "DigestRequest", {"request": 7.0})
    header("int-as-bool", "true where a number is due", "DigestRequest", {"request": True})
    header("int-as-str", "a text where a number is due", "DigestRequest", {"request": "7"})
    header("int-negative", "a negative number", "DigestRequest", {"request": -1})
    header("int-beyond-u32", "a number of 33 bits", "DigestRequest", {"request": 1 << 32})
    header("int-beyond-u63", "a number of 64 bits", "Unstage", {"generation": 1 << 63, **T})
    header("float-32", "a float of 32 bits", "Staged",
           b"\x83\xa9processes\x01\xadstage_seconds\xca\x3e\x00\x00\x00" + transfer)  # fmt: skip
    header("float-as-int", "a whole number where a float is due", "Staged", {"processes": 1, "stage_seconds": 1, **T})
    header(
        "float-nan", "a duration that is not a number", "Staged", {"processes": 1, "stage_seconds": float("nan"), **T}
    )
    header("float-infinite", "an infinite duration", "Staged", {"processes": 1, "stage_seconds": float("inf"), **T})
    header("float-negative", "a negative duration", "Staged", {"processes": 1, "stage_seconds": -0.5, **T})
    header("float-default", "a duration of 0 spelled out", "Staged", {"processes": 1, "stage_seconds": 0.0, **T})
    header("float-minus-zero", "a duration of -0", "Staged", {"processes": 1, "stage_seconds": -0.0, **T})
    header("default-false", "a default spelled out", "Ping", {"reply": False})
    header("default-empty", "an empty text spelled out", "StatusRequest", {"model": ""})
    header(
        "default-nil", "a nil spelled out", "Committed", {"digest": DIGEST, "label": "v1", "pause_seconds": None, **T}
    )
    header("bool-as-int", "1 where true is due", "Ping", {"reply": 1})
    header("bytes-as-str", "a text where bytes are due", "Commit", {"transfer": "0123456789abcdef"})
    header("str-as-bytes", "bytes where a text is due", "VerifyRequest", {"model": b"minilm"})
    header("missing", "a required field is missing", "Commit", {})
    header("nil-required", "nil for a required field", "Commit", {"transfer": None})
    header("key-twice", "a key twice", "Commit", b"\x82" + transfer * 2)
    header("key-twice-unknown", "a key that nobody knows, twice", "Commit", b"\x83\xa1a\x01\xa1a\x02" + transfer)
    header("keys-unsorted", "keys out of order", "Fill", b"\x82\xa4slot\x00\xaageneration\x01")
    header(
        "keys-unsorted-unknown", "a field that nobody knows, out of order", "Commit", b"\x82" + transfer + b"\xa1a\x01"
    )
    header("key-number", "a key that is a number", "Commit", b"\x82\x01\x02" + transfer)
    header("key-bytes", "a key that is bytes", "Commit", b"\x82\xc4\x01a\x02" + transfer)
    header("key-not-utf8", "a key that is not UTF-8", "Commit", b"\x82\xa1\xff\x01" + transfer)
    header("critical", "a critical field that nobody knows", "Commit", {"!sign": b"", **T})
    header("ext", "an extension type", "Commit", b"\x82\xa1a\xd4\x05\x00" + transfer)
    header("ext-empty", "an extension type without bytes", "Commit", b"\x82\xa1a\xc7\x00\x05" + transfer)
    header("ext-timestamp", "a timestamp", "Commit", b"\x82\xa1a\xd6\xff\x00\x00\x00\x00" + transfer)
    header("not-utf8", "a text that is not UTF-8", "VerifyRequest", b"\x81\xa5model\xa1\xff")
    header("surrogate", "half a surrogate pair", "VerifyRequest", b"\x81\xa5model\xa3\xed\xa0\x80")
    header("not-utf8-unknown", "the same in a field that nobody knows", "Commit", b"\x82\xa1a\xa1\xff" + transfer)
    header(
        "deep",
        "17 arrays in one another, in a field that nobody knows",
        "Commit",
        b"\x82\xa1a" + b"\x91" * 16 + b"\x90" + transfer,
    )
    header("deep-maps", "maps in maps, 17 deep", "Commit", b"\x82\xa1a" + b"\x81\x01" * 16 + b"\x80" + transfer)
    header("very-deep", "16000 arrays in one another", "Commit", b"\x82\xa1a" + b"\x91" * 16000 + b"\xc0" + transfer)
    header(
        "digest-short",
        "a digest of 15 bytes",
        "Stage",
        {"digest": bytes(15), "generation": 1, "label": "v", "slot": 0, **T},
    )
    header("transfer-long", "a transfer of 17 bytes", "Commit", {"transfer": bytes(17)})
    header("transfer-empty", "a transfer of no bytes", "Commit", {"transfer": b""})
    header("abort-transfer", "an optional transfer of 3 bytes", "Abort", {"code": "busy", "transfer": b"abc"})
    header(
        "attach-digest", "an optional digest of 15 bytes", "Attach", {"digest": bytes(15), "mode": "copy", "model": "m"}
    )
    header("digestis-digest", "another one, of 1 byte", "DigestIs", {"digest": b"x", "request": 1})
    header("label-empty", "an empty label", "Finish", {"digest": DIGEST, "label": "", **T})
    header("label-long", "a label of 129 characters", "Finish", {"digest": DIGEST, "label": "x" * 129, **T})
    for name, label in (
        ("slash", "a/b"), ("dot", ".hidden"), ("dotdot", ".."), ("space", "a b"), ("newline", "a\n"), ("nul", "a\0"),
        ("dash", "-rf"), ("unicode", "ä"), ("escape", "\x1b[31m"), ("digit-unicode", "٣"),
    ):  # fmt: skip
        header(f"label-{name}", f"a label that is {label!r}", "VerifyRequest", {"model": label})
    header("label-optional", "an optional label with a newline", "StatusRequest", {"model": "\n"})
    header("nack-none", "a NACK for nothing", "Nack", {"sequences": []})
    header("nack-many", "a NACK for 257 frames", "Nack", {"sequences": list(range(257))})
    header("nack-large", "a NACK for frame 2^63", "Nack", {"sequences": [1 << 63]})
    header(
        "metadata-many", "33 entries of metadata", "Offer", {**OFFER, "metadata": {f"k{at:02}": "" for at in range(33)}}
    )
    header("metadata-long", "metadata of 257 characters", "Offer", {**OFFER, "metadata": {"k": "x" * 257}})
    header("metadata-number", "metadata that is a number", "Offer", {**OFFER, "metadata": {"k": 1}})
    header("metadata-nested", "metadata in metadata", "Offer", {**OFFER, "metadata": {"k": {}}})
    packed = pack({**OFFER, "metadata": {"k": "1", "l": "2"}})
    header("metadata-key-twice", "metadata with a key twice", "Offer", packed.replace(b"\xa1l", b"\xa1k"))
    header("offer-bytes", "more bytes than a version may have", "Offer", {**OFFER, "nbytes": (1 << 44) + 1})
    header("offer-tensors", "more tensors than a version may have", "Offer", {**OFFER, "tensors": (1 << 20) + 1})
    header("staged-processes", "65 processes", "Staged", {"processes": 65, **T})
    header(
        "committed-stale",
        "65 stale processes",
        "Committed",
        {"digest": DIGEST, "label": "v1", "stale": ["1"] * 65, **T},
    )
    header("slot", "slot 16", "Fill", {"generation": 1, "slot": 16})
    header("images-many", "17 images", "Images", {"slots": [{"size": 1, "slot": 0}] * 17})
    header("images-size", "an image of no bytes", "Images", {"slots": [{"size": 0, "slot": 0}]})
    header(
        "images-size-large", "an image of more than 16 TiB", "Images", {"slots": [{"size": (1 << 44) + 1, "slot": 0}]}
    )
    header(
        "images-order", "fields of an image out of order", "Images", b"\x81\xa5slots\x91\x82\xa4slot\x00\xa4size\x01"
    )
    header(
        "images-default",
        "a default of an image spelled out",
        "Images",
        {"slots": [{"size": 1, "slot": 0, "writable": False}]},
    )
    header(
        "images-unknown", "a field of an image that nobody knows", "Images", {"slots": [{"a": 1, "size": 1, "slot": 0}]}
    )
    header("text-long", "a message of 2049 characters", "Evicted", {"reason": "x" * 2049})
    header("word-long", "a word of 65 characters", "Progress", {"held": 0, "stage": "x" * 65, **T})
    header("tensor-long", "a tensor's name of 513 characters", "Abort", {"code": "x", "tensor": "x" * 513})
    header("timeout-long", "a timeout of more than 1e9 seconds", "Swap", {"generation": 1, "timeout": 1.1e9, **T})


def reject_structures(book: Book) -> None:
    """Structures that do not describe a model."""
    good = {
        "dims": (4).to_bytes(8, "little") * 2, "dtypes": b"\x02\x02", "names": ["a", "b"], "ndims": b"\x01\x01", "ties": b"",
    }  # fmt: skip

    def structure(name: str, what: str, raw: bytes | Mapping[str, Any], error: str = "MalformedMessage") -> None:
        body = raw if isinstance(raw, bytes) else pack({**good, **raw})
        book.reject(f"structure-{name}", what, error, kind="structure", input=spell(body))

    def dims(*sizes: int) -> bytes:
        return b"".join(size.to_bytes(8, "little") for size in sizes)

    limit = "LimitExceeded"
    structure("empty", "no bytes", b"")
    structure("not-msgpack", "not msgpack", b"\xc1")
    structure("array", "an array", msgpack.packb([b"", b"", [], b"", b""]))
    structure(
        "missing-column", "a column is missing", pack({key: value for key, value in good.items() if key != "ties"})
    )
    structure("unknown-column", "a column that nobody knows", {"strides": b""})
    structure("unsorted-columns", "columns out of order", msgpack.packb(dict(reversed(good.items()))))
    structure("trailing", "a byte after the map", pack(good) + b"\0")
    structure("cut", "cut in the middle", pack(good)[:-1])
    structure(
        "non-minimal", "a length longer than needed", pack(good).replace(b"\xc4\x02\x02\x02", b"\xc5\x00\x02\x02\x02")
    )
    structure("duplicate", "a name twice", {"names": ["a", "a"]})
    structure("unsorted", "names out of order", {"names": ["b", "a"]})
    structure("name-empty", "an empty name", {"names": ["", "b"]}, limit)
    structure("name-long", "a name of 513 characters", {"names": ["a" * 513, "b"]})
    structure("name-newline", "a name with a newline", {"names": ["a\n", "b"]})
    structure("name-nul", "a name with a NUL", {"names": ["a\0", "b"]})
    structure("name-escape", "a name with an escape sequence", {"names": ["a\x1b[2J", "b"]})
    structure("name-c1", "a name with a C1 control character", {"names": ["a\x9b", "b"]})
    structure("name-line-separator", "a name with a line separator", {"names": ["a\u2028", "b"]})
    structure("name-right-to-left", "a name that turns the line round", {"names": ["a\u202e", "b"]})
    structure("name-not-utf8", "a name that is not UTF-8", pack(good).replace(b"\xa1a", b"\xa1\xff"))
    structure("name-number", "a name that is a number", {"names": [1, "b"]})
    structure("names-fewer", "fewer names than dtypes", {"names": ["a"]})
    structure("ndims-fewer", "fewer ndims than names", {"ndims": b"\x02"})
    structure("dtypes-more", "more dtypes than names", {"dtypes": b"\x02\x02\x02"})
    structure("dtype-unknown", "a dtype that nobody has", {"dtypes": b"\x02\x63"})
    structure("dtype-zero", "dtype 0", {"dtypes": b"\x02\x00"})
    structure("dims-more", "more dims than ndims say", {"dims": dims(4, 4, 4)})
    structure("dims-fewer", "fewer dims than ndims say", {"dims": dims(4)})
    structure("dims-ragged", "dims that are no multiple of 8 bytes", {"dims": dims(4, 4)[:-1]})
    structure("dims-negative", "a dimension of -1", {"dims": dims(4, (1 << 64) - 1)}, limit)
    structure("dims-large", "a dimension of 2^42 + 1", {"dims": dims(4, (1 << 42) + 1)}, limit)
    structure("dims-2-63", "a dimension of 2^63", {"dims": dims(4, 1 << 63)}, limit)
    structure("dims-impossible", "more dims than 32 for every tensor", {"dims": dims(*[1] * 65)})
    structure("ndims-33", "33 dimensions", {"ndims": b"\x01\x21", "dims": dims(*[1] * 34)}, limit)
    structure("tensor-large", "a tensor of more than 4 TiB", {"dims": dims(4, 1 << 41)}, limit)
    structure(
        "tensor-overflow",
        "a product that is 0 modulo 2^64",
        {"ndims": b"\x01\x03", "dims": dims(4, 1 << 32, 1 << 16, 1 << 16)},
        limit,
    )
    structure("tensor-overflow-small", "a product that is 4 modulo 2^64",
              {"dtypes": b"\x02\x17", "ndims": b"\x01\x02", "dims": dims(4, 0x3FFFFFFFFFF, 0x3FFFFFFFFFF)}, limit)  # fmt: skip
    structure(
        "tensor-infinite", "a product beyond any float", {"ndims": b"\x01\x20", "dims": dims(4, *[1 << 42] * 32)}, limit
    )
    names = [f"t{at}" for at in range(5)]
    total = {"names": names, "dtypes": b"\x17" * 5, "ndims": b"\x01" * 5, "dims": dims(*[1 << 42] * 5)}
    structure("total-large", "five tensors of 4 TiB", total, limit)

    def ties(*pairs: tuple[int, int], **more: Any) -> Mapping[str, Any]:
        return {"ties": encode_ranges(pairs), **more}

    three = {"names": ["a", "b", "c"], "dtypes": b"\x02" * 3, "ndims": b"\x01" * 3, "dims": dims(4, 4, 4)}
    structure("tie-ragged", "ties that are no pairs", {"ties": bytes(4)})
    structure("tie-self", "a tensor tied to itself", ties((1, 1)))
    structure("tie-forward", "a tensor tied to a later one", ties((0, 1)))
    structure("tie-cycle", "two tensors tied to each other", ties((0, 1), (1, 0)))
    structure("tie-chain", "a tensor tied to one that is itself tied", ties((1, 0), (2, 1), **three))
    structure("tie-outside", "a tie to a tensor that does not exist", ties((1, 7)))
    structure("tie-from-outside", "a tie of a tensor that does not exist", ties((7, 0)))
    structure("tie-largest", "a tie of tensor 2^32 - 1", ties((0xFFFFFFFF, 0)))
    structure("tie-twice", "a tensor tied twice", ties((1, 0), (1, 0)))
    structure("tie-unsorted", "ties out of order", ties((2, 0), (1, 0), **three))
    structure("tie-dtype", "a tie between different dtypes", ties((1, 0), dtypes=b"\x02\x11"))
    structure("tie-shape", "a tie between different shapes", ties((1, 0), dims=dims(4, 5)))
    structure(
        "tie-ndims",
        "a tie between different numbers of dimensions",
        ties((1, 0), ndims=b"\x01\x02", dims=dims(4, 2, 2)),
    )


def reject_other_bodies(book: Book) -> None:
    """Range lists, and the bodies of ATTACH, STATUS, VERIFY and ABORT."""

    def ranges(name: str, what: str, body: bytes, total: int = 100, error: str = "MalformedMessage") -> None:
        book.reject(f"ranges-{name}", what, error, kind="ranges", total=total, input=spell(body))

    ranges("ragged", "not a multiple of 8 bytes", bytes(7))
    ranges("half", "half a pair", encode_ranges([(1, 2)]) + bytes(4))
    ranges("empty-range", "an empty range", encode_ranges([(5, 5)]))
    ranges("backwards", "a range that ends before it begins", encode_ranges([(5, 4)]))
    ranges("unsorted", "ranges out of order", encode_ranges([(5, 6), (1, 2)]))
    ranges("overlapping", "ranges that overlap", encode_ranges([(1, 5), (4, 6)]))
    ranges("touching", "ranges that touch: they are one", encode_ranges([(1, 5), (5, 6)]))
    ranges("outside", "a range that ends outside", encode_ranges([(99, 101)]))
    ranges("far-outside", "a range at the end of u32", encode_ranges([(0xFFFFFFFE, 0xFFFFFFFF)]))
    ranges("of-nothing", "a range where there is nothing", encode_ranges([(0, 1)]), 0)
    many = encode_ranges((2 * at, 2 * at + 1) for at in range(65537))
    ranges("too-many", "65537 ranges", b"\0" * len(many), 1 << 20, "LimitExceeded")

    def body(kind: str, name: str, what: str, raw: bytes, error: str = "MalformedMessage", **more: Any) -> None:
        book.reject(f"{kind}-{name}", what, error, kind=kind, input=spell(raw), **more)

    small = encode_structure(SMALL)
    resident = {"structure": small, "transient": encode_structure([])}
    body("resident", "empty", "no bytes", b"")
    body("resident", "trailing", "a byte after it", pack(resident) + b"\xc0")
    body("resident", "missing", "no list of transient tensors", pack({"structure": small}))
    body("resident", "broken", "a structure that is none", pack({**resident, "structure": small[:-1]}))
    body("resident", "broken-transient", "transient tensors that are none", pack({**resident, "transient": b""}))
    status = {"agent": "x", "memory_limit": 1, "memory_used": 1, "pid": 1, "uptime_seconds": 1.0}
    body("status", "empty", "no bytes", b"")
    body("status", "cut", "cut in the middle", pack(status)[:-1])
    body("status", "pid", "a process number that is a text", pack({**status, "pid": "1"}))
    body("status", "models", "models that are no list", pack({**status, "models": {}}))
    body("status", "deep", "arrays in one another", b"\x81\xa1a" + b"\x91" * 100_000)
    body("verification", "missing", "no digest", pack({"label": "v1", "model": "m"}))
    body("verification", "not-msgpack", "not msgpack", b"\xc1")
    body("abort", "details-number", "details that are numbers", msgpack.packb([1, 2]), code="mismatch")
    body("abort", "details-map", "details that are a map", msgpack.packb({"a": "b"}), code="mismatch")
    body("abort", "details-trailing", "a byte after the details", msgpack.packb(["a"]) + b"\0", code="mismatch")


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
    receiver("data-before-structure", "DATA while the structure is awaited", unexpected,
             offered().add("Data", {"chunk": 0}, chunk), resident=None)  # fmt: skip
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
    receiver("finish-before-structure", "FINISH while the structure is awaited", unexpected,
             offered().add("Finish", gold.finish, gold.digests), resident=None)  # fmt: skip
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
    receiver("structure-figures", "a structure with other figures than the offer", bad,
             greeted().add("Offer", lies).add("StructureIs", T, gold.body), resident=None)  # fmt: skip
    receiver("want", "WANT to a receiver", unexpected, offered().add("Want", gold.want, gold.all))
    receiver("staged", "STAGED to a receiver", unexpected, offered().add("Staged", gold.staged))
    receiver("committed", "COMMITTED to a receiver", unexpected, offered().add("Committed", gold.committed))
    receiver("abort-details", "an ABORT whose details are none", bad,
             offered().add("Abort", {"code": "tensor-changed", **T}, b"\xc1"))  # fmt: skip
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
    sender("want-other-structure", "WANT of another structure after everything was sent", bad,
           wanted().add("Want", {"structure": DIGEST, **T}, gold.all))  # fmt: skip
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
    sender("committed-other", "another digest committed than was sent", "TransferError",
           wanted().add("Staged", gold.staged).add("Committed", {**gold.committed, "digest": DIGEST}))  # fmt: skip
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


# --- writing -----------------------------------------------------------------------------------------------------


def make() -> dict[str, str]:
    """Every file: path below protocol/vectors, and text."""
    book = Book()
    for chapter in (
        accept_messages, accept_connections, accept_structures, accept_bodies, accept_conversations, reject_frames,
        reject_bodies, reject_handshakes, reject_headers, reject_structures, reject_other_bodies, reject_conversations,
    ):  # fmt: skip
        chapter(book)
    return {
        f"{path}.json": json.dumps(vector, indent=1, ensure_ascii=False) + "\n" for path, vector in book.files.items()
    }


def write(directory: Path = DIRECTORY) -> int:
    """Write them all; returns how many."""
    files = make()
    for which in ("accept", "reject"):
        shutil.rmtree(directory / which, ignore_errors=True)
        (directory / which).mkdir(parents=True)
    for path, text in files.items():
        (directory / path).write_text(text, encoding="utf-8")
    return len(files)


if __name__ == "__main__":
    print(f"{write()} vectors in {DIRECTORY}")
