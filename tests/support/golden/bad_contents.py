"""Structures and other bodies that describe nothing, to be refused."""

from collections.abc import Mapping
from typing import Any

import msgpack

from tests.support import naive
from tests.support.golden.book import Book
from tests.support.models import SMALL, floats
from tests.support.naive import encode_ranges, encode_structure, pack
from tests.support.vectors import spell


def reject_structures(book: Book) -> None:
    """Structures that do not describe a model."""
    good = {
        "dims": (4).to_bytes(8, "little") * 2,
        "dtypes": b"\x02\x02",
        "names": ["a", "b"],
        "ndims": b"\x01\x01",
        "ties": b"",
    }

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
    structure(
        "tensor-overflow-small",
        "a product that is 4 modulo 2^64",
        {"dtypes": b"\x02\x17", "ndims": b"\x01\x02", "dims": dims(4, 0x3FFFFFFFFFF, 0x3FFFFFFFFFF)},
        limit,
    )
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

    small, other = encode_structure(SMALL), encode_structure([floats("other", 3)])
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
    described = {"model": "m", "structure": small, "structure_digest": naive.digest(small)}
    body("description", "empty", "no bytes", b"")
    body("description", "model", "no model", pack({"structure": small}))
    body("description", "cast", "a text for whether to cast", pack({"cast": "yes", "model": "m"}))
    body("description", "processes", "a process without its number", pack({"model": "m", "processes": [{}]}))
    body("description", "broken", "a structure that is none", pack({**described, "structure": small[:-1]}))
    body("description", "broken-transient", "transient tensors that are none", pack({**described, "transient": b"x"}))
    body("description", "digest", "another digest than the structure has", pack({**described, "structure": other}))
    left_out = {key: value for key, value in described.items() if key != "structure"}
    body("description", "left-out", "a structure left out that was not asked about", pack(left_out))
    body(
        "description",
        "other-left-out",
        "a structure left out, and the asker has another",
        pack(left_out),
        structure=spell(other),
    )
    body("abort", "details-number", "details that are numbers", msgpack.packb([1, 2]), code="mismatch")
    body("abort", "details-map", "details that are a map", msgpack.packb({"a": "b"}), code="mismatch")
    body("abort", "details-trailing", "a byte after the details", msgpack.packb(["a"]) + b"\0", code="mismatch")
