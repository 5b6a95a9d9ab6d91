"""Tables of LEND: where in lent files the pieces of chunks lie, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tests.support import naive
from tests.support.golden.book import Book, Golden, T, greeted
from tests.support.models import SMALL
from tests.support.naive import LEAF, Tensor, encode_structure
from tests.support.vectors import spell

NONE: Final = 255

ROWS: Final = (
    Tensor("empty", "uint8", (0,)),
    Tensor("large", "uint8", (2 * LEAF + 100,)),
    Tensor("one", "uint8", (100,)),
    Tensor("tied", "uint8", (2 * LEAF + 100,), tied_to="large"),
    Tensor("two", "uint8", (7,)),
)

Places = Mapping[str, tuple[int, int]]
"""File and offset by the name of a tensor."""


def table(rows: Sequence[Tensor], places: Places) -> bytes:
    """The body of LEND."""
    names = sorted((row.name for row in rows), key=str.encode)
    entries = [places.get(name, (NONE, 0)) for name in names]
    return bytes(file for file, _ in entries) + b"".join(offset.to_bytes(8, "little") for _, offset in entries)


def pieces(rows: Sequence[Tensor], places: Places) -> list[Any]:
    """For each lent chunk its number and, for each tensor in it, file, offset there, place in the chunk, and size."""
    picture, sizes = naive.picture(rows), {row.name: row.nbytes for row in rows}
    found = []
    for number, (start, size, names) in enumerate(picture.chunks):
        filled = [name for name in names if sizes[name]]
        if not all(name in places for name in filled):
            continue
        parts = []
        for name in filled:
            first = max(start, picture.offsets[name])
            stop = min(start + size, picture.offsets[name] + sizes[name])
            file, offset = places[name]
            parts.append([file, offset + first - picture.offsets[name], first - start, stop - first])
        found.append([number, parts])
    return found


def accept_lending(book: Book) -> None:
    """Tables and what follows from them."""
    for name, what, places in (
        ("nothing", "no tensor lies in a file", {}),
        ("all", "everything in one file, in another order than in the image",
         {"large": (0, 4096), "two": (0, 8), "one": (0, 15)}),
        ("several", "in two of three files", {"large": (2, 1 << 40), "one": (0, 1), "two": (0, 101)}),
        ("half", "one of the tensors that share a chunk is in no file", {"large": (0, 0), "one": (1, 77)}),
        ("far", "the farthest place there is", {"large": (127, 1 << 62)}),
    ):  # fmt: skip
        sizes = {row.name: row.nbytes for row in ROWS}
        ends = [0] * 128
        for tensor, (file, offset) in places.items():
            ends[file] = max(ends[file], offset + sizes[tensor])
        book.accept(
            f"lent-{name}",
            what,
            kind="lent",
            structure=spell(encode_structure(ROWS)),
            files=128,
            input=spell(table(ROWS, places)),
            chunks=pieces(ROWS, places),
            ends=ends,
        )


def reject_lending(book: Book) -> None:
    """Tables that say nothing, and LEND where nobody asked for bytes."""
    good = table(ROWS, {"large": (1, 1000)})

    def lent(name: str, what: str, body: bytes) -> None:
        structure = spell(encode_structure(ROWS))
        book.reject(
            f"lent-{name}", what, "MalformedMessage", kind="lent", structure=structure, files=2, input=spell(body)
        )

    lent("empty", "a table of nothing", b"")
    lent("short", "a table that is a byte too short", good[:-1])
    lent("long", "a table that is an entry too long", good + bytes(9))
    lent("file", "a file that is none of those that came", table(ROWS, {"large": (2, 0)}))
    lent("file-254", "file 254 of two", table(ROWS, {"one": (254, 0)}))
    lent("offset", "a place beyond 2^62", table(ROWS, {"one": (0, (1 << 62) + 1)}))
    lent("offset-negative", "a place that would be -1", table(ROWS, {"one": (0, (1 << 64) - 1)}))
    lent("offset-of-nothing", "a place of a tensor that is in no file", table(ROWS, {"one": (NONE, 5)}))

    gold = Golden()
    offered = lambda: greeted().add("Offer", gold.offer)  # noqa: E731
    fields = {"files": 1, **T}
    body, bad = table(SMALL, {}), "MalformedMessage"
    for name, what, error, stream, more in (
        ("short", "LEND with a table that is too short", bad, offered().add("Lend", fields, body[:-1]), {}),
        ("early", "LEND while the structure is awaited", "UnexpectedMessage", offered().add("Lend", fields, body),
         {"resident": None}),
        ("late", "LEND after everything is verified", "UnexpectedMessage", gold.sent().add("Lend", fields, body), {}),
        ("no-files", "LEND of no file", bad, offered().add("Lend", {**fields, "files": 0}, body), {}),
        ("many-files", "LEND of 129 files", bad, offered().add("Lend", {**fields, "files": 129}, body), {}),
    ):  # fmt: skip
        book.reject(f"receiver-lend-{name}", what, error, **gold.receiving(stream, **more))
