"""EGR's payload, and what its two engines have in common: the head, the table of classes, the arithmetic of sizes.

Exponent-grouped Rice: SPEC.md, annex A, is normative. A word of the base belongs to a class by its exponent. For each
class there is a list of gaps, one for each changed word: how many unchanged words of the class lie before it. How far
a word changed has a sign and a magnitude; of the magnitudes there is no list, one, or two. All lists are Rice-coded
(R. F. Rice, "Some practical universal noiseless coding techniques", JPL 79-22, 1979), each with its own parameter.

An engine scans, plans, packs, unpacks and applies: with numpy, or with compiled loops. Both give the same bytes.
"""

import itertools
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from shipd.codecs.bits import Reader, check_padding, number_size, put_number
from shipd.codecs.codec import CodecError

CLASSES: Final = 24
"""Half of the weights of a class change half as often as those one exponent below: further down are next to none."""

SHIFTS: Final = (7, 10)
"""How far right the exponent lies in a bfloat16 and in a float16."""

MOST_GAP_BITS: Final = 23
MOST_MAGNITUDE_BITS: Final = 15
"""Largest Rice parameters: of gaps, which are below 2**23 in a run, and of magnitudes, below 2**15."""

ESCAPE: Final = 31
"""A quotient from here on stands in the escapes: no code is ever longer than 55 bits and 32 of these."""

NONE, ALL, SOME = 0, 1, 2
"""Kinds of magnitudes: all are one; a list of them; a list of where they are not, and one of those."""

COLUMNS: Final = 6
COUNT, GAP_BITS, KIND, FIRST_BITS, RARE, SECOND_BITS = range(COLUMNS)
"""Columns of a table, one row for each class:

    COUNT        changed words
    GAP_BITS     parameter of the gaps' list
    KIND         NONE, ALL or SOME
    FIRST_BITS   parameter of the magnitudes' list (ALL), or of that of their places (SOME)
    RARE         magnitudes above one (SOME)
    SECOND_BITS  parameter of the list of those (SOME)
"""

PLACES: Final = np.array(
    [([place for place in range(8) if byte >> place & 1] + [0] * 8)[rank] for rank in range(8) for byte in range(256)],
    dtype=np.uint8,
).reshape(8, 256)
"""For each rank and byte the place of the set bit that has so many below it."""

ONES: Final = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
"""How many bits of each byte are set."""

Table = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint16]


class Frame(NamedTuple):
    """How words are put into classes: ``shift`` to their exponent, and the exponent of the highest class."""

    shift: int
    top: int


@dataclass(frozen=True, slots=True)
class Changes:
    """The changed words of a run, by class and in each class from left to right.

    starts  i64[CLASSES + 1], where each class begins
    gaps    u32[n], unchanged words of the class before each
    codes   u16[n], zigzag of how far the key went, never 0
    """

    starts: npt.NDArray[np.int64]
    gaps: npt.NDArray[np.uint32]
    codes: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Lists:
    """Changes on their way into a payload.

    table         i64[CLASSES, COLUMNS]
    values        u32[v], all lists one after the other
    codes         u16[n], as in Changes
    unary_bits    of all quotients
    escapes       quotients that do not stand among them
    """

    table: Table
    values: npt.NDArray[np.uint32]
    codes: npt.NDArray[np.uint16]
    unary_bits: int
    escapes: int


class Parts(NamedTuple):
    """A payload without its head; bytes."""

    unary: memoryview
    low: memoryview
    signs: memoryview
    escapes: memoryview


class Engine(Protocol):
    """One way to do the heavy part. Words are contiguous and aligned; a payload's bytes are not believed."""

    def scan(self, content: Words, base: Words, frame: Frame, most: int) -> Changes | None:
        """What changed; None where that is more than ``most`` words."""

    def plan(self, changes: Changes) -> Lists:
        """The lists of ``changes``, each with the parameter that costs least."""

    def pack(self, lists: Lists) -> bytes:
        """The parts of the payload, one after the other."""

    def unpack(self, table: Table, parts: Parts, words: int) -> Changes:
        """The changes that a payload for ``words`` words says. Raises CodecError."""

    def apply(self, changes: Changes, base: Words, out: Words, frame: Frame) -> bool:
        """Write the content into ``out``, which may be ``base``; whether all changes had their place."""


def lists_of(table: Table) -> list[tuple[int, int]]:
    """(values, parameter) of every list, in the payload's order."""
    lists = []
    for count, gap_bits, kind, first_bits, rare, second_bits in table.tolist():
        if not count:
            continue
        lists.append((count, gap_bits))
        if kind == ALL:
            lists.append((count, first_bits))
        elif kind == SOME:
            lists += ((rare, first_bits), (rare, second_bits))
    return lists


def low_bits(table: Table) -> int:
    """Bits of the low part: what Rice coding leaves of every value as it is."""
    return sum(count * width for count, width in lists_of(table))


def changed(table: Table) -> int:
    """Changed words."""
    return int(table[:, COUNT].sum())


def parameters(total: int, count: int, most: int) -> range:
    """The Rice parameters worth trying for ``count`` values that add up to ``total``; the best is nearly always there.

    For geometrically distributed values the best is half a bit below the logarithm of their mean. A few large values
    among small ones raise the mean and are better escaped.
    """
    length = (total // count).bit_length()
    return range(max(0, length - 3), min(length, most) + 1)


def some_head_bits(rare: int) -> int:
    """Bits that the kind SOME takes in the head, to be weighed against the eight of ALL."""
    return 16 + 8 * number_size(rare)


def head(frame: Frame, lists: Lists) -> bytes:
    """The head of the payload of ``lists``."""
    table = lists.table.tolist()
    present = sum(1 << number for number, row in enumerate(table) if row[COUNT])
    into = bytearray((frame.shift, frame.top)) + present.to_bytes(3, "little")
    for count, gap_bits, kind, first_bits, rare, second_bits in table:
        if not count:
            continue
        put_number(into, count)
        into.append(gap_bits | (kind << 5))
        if kind == SOME:
            put_number(into, rare)
            into += bytes((first_bits, second_bits))
        elif kind == ALL:
            into.append(first_bits)
    put_number(into, -(-lists.unary_bits // 8))
    return bytes(into)


def size(lists: Lists) -> int:
    """Bytes of all parts; the head comes on top."""
    signs = -(-changed(lists.table) // 8)
    return -(-lists.unary_bits // 8) + -(-low_bits(lists.table) // 8) + signs + 4 * lists.escapes


def read(payload: memoryview, words: int) -> tuple[Frame, Table, Parts]:
    """Take a payload for ``words`` words apart. Raises CodecError.

    All sizes then agree with each other and with the payload's, so that nothing of a size that the payload only claims
    is ever allocated; what the parts say is not looked at.
    """
    reader = Reader(payload)
    shift, top = reader.byte(), reader.byte()
    if shift not in SHIFTS or top > 0x7FFF >> shift:
        raise CodecError(f"no word has its exponent {top} at bit {shift}")
    present = reader.byte() | reader.byte() << 8 | reader.byte() << 16
    table: Table = np.zeros((CLASSES, COLUMNS), dtype=np.int64)
    left = words
    for number in range(CLASSES):
        if present >> number & 1:
            table[number] = _row(reader, left)
            left -= int(table[number, COUNT])
    unary = reader.number(len(payload))
    values = sum(count for count, _ in lists_of(table))
    if values > 8 * unary:
        raise CodecError(f"{unary} bytes cannot have {values} values")
    low, signs = low_bits(table), changed(table)
    rest = reader.rest()
    sizes = (unary, -(-low // 8), -(-signs // 8))
    escapes = len(rest) - sum(sizes)
    if escapes < 0 or escapes % 4:
        raise CodecError(f"{len(rest)} bytes of parts where {sum(sizes)} and escapes are due")
    cuts = (0, sizes[0], sizes[0] + sizes[1], sum(sizes), len(rest))
    parts = Parts(*(rest[start:end] for start, end in itertools.pairwise(cuts)))
    check_padding(parts.low, low)
    check_padding(parts.signs, signs)
    return Frame(shift, top), table, parts


def _row(reader: Reader, words: int) -> tuple[int, int, int, int, int, int]:
    count = reader.number(words)
    how = reader.byte()
    gap_bits, kind = how & 0x1F, how >> 5
    if not count or gap_bits > MOST_GAP_BITS or kind > SOME:
        raise CodecError("a class is described in a way that means nothing")
    first_bits = rare = second_bits = 0
    if kind == ALL:
        first_bits = _width(reader, MOST_MAGNITUDE_BITS)
    elif kind == SOME:
        rare = reader.number(count)
        first_bits, second_bits = _width(reader, MOST_GAP_BITS), _width(reader, MOST_MAGNITUDE_BITS)
        if not rare:
            raise CodecError("a class says that some of its magnitudes are above one, and none is")
    return count, gap_bits, kind, first_bits, rare, second_bits


def _width(reader: Reader, most: int) -> int:
    width = reader.byte()
    if width > most:
        raise CodecError(f"a Rice parameter of {width}, where at most {most} makes sense")
    return width
