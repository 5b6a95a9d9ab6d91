"""What the chapters of golden vectors are written with: the book, names, nonces, short forms, one push, one codec."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tests.support import naive, naive_codecs
from tests.support.models import SMALL, content_of
from tests.support.naive import Stream, Tensor, encode_ranges, encode_structure
from tests.support.vectors import Vector, as_json, spell

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


class CodecPages:
    """Where a codec's vectors go; the second decoder must agree with each."""

    def __init__(self, book: Book, codec: int, name: str) -> None:
        self._book, self._codec, self._name = book, codec, name

    def accept(self, name: str, what: str, payload: bytes, content: bytes, base: bytes | None = None) -> None:
        """A payload that stands for ``content``."""
        assert naive_codecs.decode(self._codec, payload, base, len(content)) == content, name
        fields = self._fields(payload, base, len(content))
        self._book.accept(f"codec-{self._name}-{name}", what, **fields, content=spell(content))

    def reject(self, name: str, what: str, payload: bytes, size: int, base: bytes | None = None) -> None:
        """A payload that a decoder must refuse for a run of ``size`` bytes."""
        assert naive_codecs.outcome(self._codec, payload, base, size) is None, name
        self._book.reject(f"codec-{self._name}-{name}", what, "CodecError", **self._fields(payload, base, size))

    def _fields(self, payload: bytes, base: bytes | None, size: int) -> Vector:
        given = {} if base is None else {"base": spell(base)}
        return {"kind": "codec", "codec": self._codec, "size": size, **given, "input": spell(payload)}


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


OFFER: Final = {
    "label": "step-1200", "metadata": {"run": "a7", "note": "naïve"}, "model": "minilm", "nbytes": 90_868_736,
    "structure": DIGEST, "tensors": 103, **T,
}  # fmt: skip


class Golden:
    """One push of SMALL, from both ends."""

    def __init__(self, rows: Sequence[Tensor] = SMALL) -> None:
        self.rows = sorted(rows, key=lambda row: row.name.encode())
        self.body = encode_structure(rows)
        self.structure = naive.digest(self.body)
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
