"""Structures with everything that follows from them, and other bodies, to be accepted."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgpack

from tests.support import naive
from tests.support.golden.book import DIGEST, TRANSFER, Book
from tests.support.models import SMALL, content_of, floats
from tests.support.naive import LEAF, Tensor, encode_ranges, encode_structure, pack
from tests.support.vectors import as_json, spell

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
        [
            Tensor("a", "uint8", (LEAF // 2,)),
            Tensor("b", "uint8", (LEAF // 2,)),
            Tensor("c", "uint8", (65,)),
            Tensor("d", "uint8", (0,)),
            Tensor("e", "uint8", (LEAF - 129,)),
            Tensor("f", "uint8", (1, 1)),
        ],
    ),
    "structure-unicode": (
        "names sort by code point, which is the order of UTF-8 and not that of UTF-16",
        [floats("\U0001f600", 2), floats("ﬀ", 2), floats("é", 2), floats("z", 2), floats("Z", 2), floats(" ", 1)],
    ),
    "structure-ties": (
        "two groups; the first name of each is the one that holds the bytes",
        [
            floats("b", 4),
            floats("a", 4, tied_to="b"),
            floats("c", 4, tied_to="b"),
            floats("y", 2),
            floats("x", 2, tied_to="y"),
        ],
    ),
    "structure-huge": (
        "32 dimensions, and a product that would overflow if the last were not 0",
        [floats("x", *(1,) * 32), Tensor("y", "uint8", (1 << 42,) * 31 + (0,))],
    ),
    "structure-large-tied": (
        "a tied pair of more than one leaf",
        [Tensor("in", "float16", (300, 1024)), Tensor("out", "float16", (300, 1024), tied_to="in")],
    ),
}


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
            digest=naive.digest(encoded).hex(),
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
            f"ranges-{name}",
            what,
            kind="ranges",
            total=total,
            input=spell(encode_ranges(ranges)),
            ranges=[list(pair) for pair in ranges],
        )
    transient = [Tensor("position_ids", "int64", (1, 512))]
    resident = pack({"structure": encode_structure(SMALL), "transient": encode_structure(transient)})
    book.accept(
        "resident",
        "the body of ATTACH",
        kind="resident",
        input=spell(resident),
        structure=sorted(tensor.name for tensor in SMALL),
        transient=["position_ids"],
    )
    process = {
        "pid": 811,
        "state": "serving",
        "mode": "copy",
        "label": "v1",
        "digest": DIGEST.hex(),
        "attached_seconds": 12.5,
        "pinned": True,
        "model_class": "encoder.Encoder",
        "environment": {"python": "3.12.3", "torch": "2.10.0"},
    }
    transfer = {
        "transfer_id": TRANSFER.hex(),
        "peer": "10.0.0.1:5",
        "stage": "receiving",
        "label": "v2",
        "bytes_held": 1,
        "bytes_total": 2,
        "connected": False,
    }
    model = {
        "name": "minilm",
        "label": "v1",
        "digest": DIGEST.hex(),
        "tensors": 7,
        "bytes": 3000,
        "image_bytes": 8192,
        "committed_at": 1.75e9,
        "metadata": {"run": "a7"},
        "processes": [process],
        "transfer": transfer,
        "failed": {
            "transfer_id": TRANSFER.hex(),
            "peer": "10.0.0.1:4",
            "reason": "stalled",
            "label": "v0",
            "at": 1.5e9,
        },
    }
    status = {
        "agent": "shipd",
        "pid": 1,
        "uptime_seconds": 1.5,
        "memory_used": 8192,
        "memory_limit": 1 << 40,
        "models": [model],
    }
    book.accept("status", "the body of STATUS", kind="status", input=spell(msgpack.packb(status)), value=status)
    least = {"agent": "", "pid": 0, "uptime_seconds": 0.0, "memory_used": 0, "memory_limit": 0}
    defaults: dict[str, Any] = {"models": [{"name": "m", "label": "", "processes": [], "transfer": None}]}
    book.accept(
        "status-defaults",
        "defaults mean the same whether they are spelled out or not",
        kind="status",
        input=spell(msgpack.packb({**least, **defaults})),
        value={**least, "models": [{"name": "m"}]},
    )
    book.accept(
        "status-later-release",
        "fields of a later release are ignored",
        kind="status",
        input=spell(msgpack.packb({**status, "moon": [1, 2]})),
        value=status,
    )
    verification = {
        "model": "minilm",
        "label": "v1",
        "digest": DIGEST.hex(),
        "processes": [{"pid": 811, "label": "v1", "digest": DIGEST.hex(), "matches": True, "error": "none"}],
    }
    book.accept(
        "verification",
        "the body of VERIFY",
        kind="verification",
        input=spell(msgpack.packb(verification)),
        value=verification,
    )
    _accept_descriptions(book)
    book.accept(
        "abort-details",
        "what ABORT lists",
        kind="abort",
        code="mismatch",
        input=spell(msgpack.packb(["missing a", "unexpected b"])),
        means="mismatch",
        details=["missing a", "unexpected b"],
    )
    book.accept(
        "abort-unknown-code",
        "a code of a later release reads as internal",
        kind="abort",
        code="eclipse",
        input=[],
        means="internal",
        details=[],
    )


def _accept_descriptions(book: Book) -> None:
    small = encode_structure(SMALL)
    names = sorted(tensor.name for tensor in SMALL)
    extra = encode_structure([Tensor("position_ids", "int64", (1, 512))])
    served = {
        "model": "minilm",
        "structure_digest": naive.digest(small),
        "transient": extra,
        "version": True,
        "label": "v1",
        "digest": DIGEST,
        "policy": "partial",
        "cast": False,
        "limit": 1 << 30,
        "memory_limit": 1 << 40,
        "memory_used": 8192,
        "environment": {"platform": "linux-x86_64", "python": "3.12.3", "shipd": "0.1.0", "torch": "2.10.0"},
        "processes": [
            {
                "pid": 811,
                "mode": "copy",
                "model_class": "encoder.Encoder",
                "environment": {"cuda": "12.8", "python": "3.12.3", "torch": "2.10.0"},
            }
        ],
    }
    whole = {**served, "structure": small}
    book.accept(
        "description",
        "the body of DESCRIPTION_IS",
        kind="description",
        input=spell(msgpack.packb(whole)),
        value=as_json(whole),
        resident=names,
        transient=["position_ids"],
    )
    book.accept(
        "description-known",
        "the structure is left out, because the asker has it",
        kind="description",
        structure=spell(small),
        input=spell(msgpack.packb(served)),
        value=as_json(served),
        resident=names,
        transient=["position_ids"],
    )
    book.accept(
        "description-unknown",
        "nothing is known of the model yet; fields of a later release are ignored",
        kind="description",
        input=spell(msgpack.packb({"model": "minilm", "cast": None, "moon": [1, 2]})),
        value={"model": "minilm"},
        resident=None,
        transient=[],
    )
