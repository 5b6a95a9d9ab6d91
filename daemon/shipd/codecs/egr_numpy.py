"""EGR's engine for where nothing can be compiled: numpy alone, egr_compiled's bytes at an eighth of its speed.

It counts as that one does, in masks of 64 bits. numpy is only fast where it is given much at a time, so a block is
large, every step is one for all classes, and the arrays of a block are used again: to touch new memory costs more than
all the counting.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs.bits import put_fields, put_unary, take_fields, take_unary
from shipd.codecs.codec import CodecError
from shipd.codecs.egr_format import (
    ALL,
    CLASSES,
    COLUMNS,
    COUNT,
    ESCAPE,
    KIND,
    MOST_GAP_BITS,
    MOST_MAGNITUDE_BITS,
    ONES,
    PLACES,
    SHIFTS,
    SOME,
    Changes,
    Frame,
    Lists,
    Parts,
    Table,
    Words,
    lists_of,
    parameters,
    some_head_bits,
)
from shipd.codecs.words import unzigzag, zigzag

_BLOCK: Final = 1 << 16
"""Words looked at at once: with fewer of them what a call of numpy costs weighs more."""

_LANES: Final = 64
_NO_CLASS: Final = 255
_NUMBERS: Final = np.arange(CLASSES, dtype=np.uint8)[:, None]
_STRIDE: Final = 1 << 32
"""More than any rank: what is added to ranks class by class, so that one search can be made in those of all."""

_Values = npt.NDArray[np.uint32]
_Longs = npt.NDArray[np.int64]


class _Ranks:
    """Counts the words of each class in one block after another. Its arrays are used again, and made once.

    members  u64[CLASSES, masks], for each class which of every 64 words are of it
    upto     i64[CLASSES, masks], how many words of the class there are up to the end of each mask
    """

    def __init__(self, words: int) -> None:
        block = -(-min(words, _BLOCK) // _LANES) * _LANES
        self.classes = np.empty(block, dtype=np.uint8)
        self.members: npt.NDArray[np.uint64] = np.empty((CLASSES, 0), dtype=np.uint64)
        self.upto: _Longs = np.empty((CLASSES, 0), dtype=np.int64)
        self._shifted: Words = np.empty(block, dtype=np.uint16)
        self._equal = np.empty((CLASSES, block), dtype=np.bool_)

    def look(self, words: Words, frame: Frame) -> None:
        """Go on to the next block."""
        size = len(words)
        masks = -(-size // _LANES)
        classes = self.classes[:size]
        shifted = np.right_shift(words, np.uint16(frame.shift), out=self._shifted[:size])
        # What is above a byte is a bfloat16's sign.
        np.copyto(classes, shifted, casting="unsafe")
        if frame.shift > SHIFTS[0]:
            classes &= np.uint8(0x7FFF >> frame.shift)
        np.clip(classes, np.uint8(max(frame.top - CLASSES + 1, 0)), np.uint8(frame.top), out=classes)
        # Wraps around where the highest class lies above its exponent.
        classes += np.uint8((CLASSES - 1 - frame.top) & 0xFF)
        self.classes[size : masks * _LANES] = _NO_CLASS
        equal = np.equal(self.classes[: masks * _LANES], _NUMBERS, out=self._equal[:, : masks * _LANES])
        self.members = np.packbits(equal, axis=1, bitorder="little").view(np.uint64)
        self.upto = np.cumsum(_ones(self.members), axis=1, dtype=np.int64)

    def of(self, places: _Longs) -> tuple[npt.NDArray[np.uint8], _Longs]:
        """The classes of the words at ``places`` of the block, and how many of the same lie before each."""
        classes = self.classes[places]
        at = classes * np.intp(self.members.shape[1]) + places // _LANES
        # Itself and all that follow are shifted out: it is counted from above, where the shift is by 63 at most.
        following = _ones(self.members.reshape(-1)[at] >> (places % _LANES).astype(np.uint64))
        return classes, self.upto.reshape(-1)[at] - following

    def places(self, classes: _Longs, ranks: _Longs) -> _Longs:
        """Where in the block the words are that have so many of their class before them."""
        rows = self.upto + np.arange(CLASSES)[:, None] * _STRIDE
        at = rows.reshape(-1).searchsorted(ranks + classes * _STRIDE, side="right")
        members = self.members.reshape(-1)[at]
        within = ranks - (self.upto.reshape(-1)[at] - _ones(members))
        octets = members[:, None].view(np.uint8)
        ends = np.cumsum(_ones(octets), axis=1, dtype=np.uint8)
        octet = (ends <= within[:, None]).sum(axis=1)
        rows_at = np.arange(len(at))
        within -= ends[rows_at, octet] - _ones(octets[rows_at, octet])
        place: _Longs = at % self.members.shape[1] * _LANES + octet * 8 + PLACES[within, octets[rows_at, octet]]
        return place


def scan(content: Words, base: Words, frame: Frame, most: int) -> Changes | None:
    """See Engine."""
    counted = _Ranks(len(base))
    reached: _Longs = np.zeros(CLASSES, dtype=np.int64)
    places, classes, ranks = [], [], []
    total = 0
    for start in range(0, len(base), _BLOCK):
        old = base[start : start + _BLOCK]
        counted.look(old, frame)
        here = np.flatnonzero(content[start : start + _BLOCK] != old)
        total += len(here)
        if total > most:
            return None
        of, rank = counted.of(here)
        places.append((here + start).astype(np.uint32))
        classes.append(of)
        ranks.append((rank + reached[of]).astype(np.uint32))
        reached += counted.upto[:, -1]
    of = np.concatenate((np.empty(0, dtype=np.uint8), *classes))
    starts: _Longs = np.zeros(CLASSES + 1, dtype=np.int64)
    np.cumsum(np.bincount(of, minlength=CLASSES), out=starts[1:])
    by_class = np.argsort(of, kind="stable")
    place = np.concatenate((np.empty(0, dtype=np.uint32), *places))[by_class]
    all_ranks: _Values = np.concatenate((np.empty(0, dtype=np.uint32), *ranks))[by_class]
    gaps: _Values = all_ranks.copy()
    # Wraps around where a class begins, and is not used there.
    gaps[1:] -= all_ranks[:-1] + np.uint32(1)
    first = starts[:-1][np.diff(starts) > 0]
    gaps[first] = all_ranks[first]
    return Changes(starts, gaps, zigzag(content[place], base[place]))


def _ones(masks: npt.NDArray[np.uint64] | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """How many bits are set in each."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(masks)
    # numpy 1 does not count.
    octets = ONES[np.ascontiguousarray(masks).view(np.uint8).reshape(*masks.shape, -1)]
    ones: npt.NDArray[np.uint8] = octets.sum(axis=-1, dtype=np.uint8)
    return ones


def plan(changes: Changes) -> Lists:
    """See Engine."""
    table: Table = np.zeros((CLASSES, COLUMNS), dtype=np.int64)
    values: list[_Values] = []
    bits = escapes = 0
    for number in range(CLASSES):
        span = slice(int(changes.starts[number]), int(changes.starts[number + 1]))
        gaps = changes.gaps[span]
        if not len(gaps):
            continue
        magnitudes = ((changes.codes[span] - np.uint16(1)) >> np.uint16(1)).astype(np.uint32)
        row = table[number]
        row[COUNT] = len(gaps)
        kind, lists, widths = _magnitude_lists(magnitudes)
        gap_bits, _ = _best(gaps, MOST_GAP_BITS)
        row[1:] = gap_bits, kind, widths[0], len(lists[0]) if kind == SOME else 0, widths[1]
        for part, width in zip((gaps, *lists), (gap_bits, *widths), strict=False):
            quotients = part >> np.uint32(width)
            bits += int(np.minimum(quotients, ESCAPE).sum(dtype=np.int64)) + len(part)
            escapes += int(np.count_nonzero(quotients >= ESCAPE))
            values.append(part)
    return Lists(table, np.concatenate((np.empty(0, dtype=np.uint32), *values)), changes.codes, bits, escapes)


def _magnitude_lists(magnitudes: _Values) -> tuple[int, tuple[_Values, ...], tuple[int, int]]:
    """Of the magnitudes less one of a class: their kind, its lists, and the parameters of those."""
    above = np.flatnonzero(magnitudes)
    if not len(above):
        return 0, (), (0, 0)
    width, cost = _best(magnitudes, MOST_MAGNITUDE_BITS)
    places = (np.diff(above, prepend=-1) - 1).astype(np.uint32)
    rare = magnitudes[above] - np.uint32(1)
    place_width, place_cost = _best(places, MOST_GAP_BITS)
    rare_width, rare_cost = _best(rare, MOST_MAGNITUDE_BITS)
    if cost + 8 <= place_cost + rare_cost + some_head_bits(len(above)):
        return ALL, (magnitudes,), (width, 0)
    return SOME, (places, rare), (place_width, rare_width)


def _best(values: _Values, most: int) -> tuple[int, int]:
    """The best parameter for ``values`` and the bits that they then take."""
    best, least = 0, -1
    for width in parameters(int(values.sum(dtype=np.int64)), len(values), most):
        quotients = values >> np.uint32(width)
        bits = int(np.minimum(quotients, ESCAPE).sum(dtype=np.int64)) + len(values) * (width + 1)
        bits += 32 * int(np.count_nonzero(quotients >= ESCAPE))
        if least < 0 or bits < least:
            best, least = width, bits
    return best, least


def pack(lists: Lists) -> bytes:
    """See Engine."""
    quotients, low = [], []
    at = 0
    for count, width in lists_of(lists.table):
        part = lists.values[at : at + count]
        at += count
        quotients.append(part >> np.uint32(width))
        low.append(put_fields(part, width))
    whole = np.concatenate((np.empty(0, dtype=np.uint32), *quotients))
    unary = put_unary(np.minimum(whole, ESCAPE).astype(np.uint8))
    fields = np.packbits(np.concatenate((np.empty(0, dtype=np.uint8), *low)), bitorder="little")
    signs = np.packbits((lists.codes & np.uint16(1)).astype(np.uint8), bitorder="little")
    escaped = whole[whole >= ESCAPE].astype("<u4")
    return b"".join((unary.data, fields.data, signs.data, escaped.data))


def unpack(table: Table, parts: Parts, words: int) -> Changes:
    """See Engine."""
    lists = lists_of(table)
    unary, low = (np.frombuffer(part, dtype=np.uint8) for part in parts[:2])
    quotients = take_unary(unary, sum(count for count, _ in lists), ESCAPE)
    if 4 * np.count_nonzero(quotients == ESCAPE) != len(parts.escapes):
        raise CodecError("not as many escapes as the unary part announces")
    escapes = np.frombuffer(parts.escapes, dtype="<u4")
    if len(escapes) and escapes.min() < ESCAPE:
        raise CodecError("an escape that none was needed for")
    read = _read_lists(lists, quotients, escapes, low)
    starts: _Longs = np.zeros(CLASSES + 1, dtype=np.int64)
    np.cumsum(table[:, COUNT], out=starts[1:])
    total = int(starts[-1])
    gaps: _Values = np.empty(total, dtype=np.uint32)
    magnitudes: npt.NDArray[np.uint16] = np.zeros(total, dtype=np.uint16)
    for number in np.flatnonzero(table[:, COUNT]).tolist():
        span = slice(int(starts[number]), int(starts[number + 1]))
        part = next(read)
        words -= int(part.sum()) + len(part)
        if words < 0:
            raise CodecError("gaps that add up to more words than there are")
        gaps[span] = part
        if table[number, KIND] == ALL:
            magnitudes[span] = _magnitudes(next(read))
        elif table[number, KIND] == SOME:
            places = np.cumsum(next(read) + 1) - 1
            if places[-1] >= table[number, COUNT]:
                raise CodecError("a magnitude for a change that there is not")
            magnitudes[span][places] = _magnitudes(next(read) + 1)
    sign = np.unpackbits(np.frombuffer(parts.signs, dtype=np.uint8), count=total, bitorder="little")
    if np.any((magnitudes == 0x7FFF) & (sign == 0)):
        raise CodecError("a change of 32768 up, which is said as one down")
    return Changes(starts, gaps, magnitudes * np.uint16(2) + (np.uint16(2) - sign))


def _read_lists(
    lists: list[tuple[int, int]], quotients: npt.NDArray[np.uint8], escapes: _Values, low: npt.NDArray[np.uint8]
) -> Iterator[_Longs]:
    """The values of one list after the other, each below _STRIDE."""
    bit = at = 0
    for count, width in lists:
        values: _Longs = quotients[at : at + count].astype(np.int64)
        escaped = np.flatnonzero(values == ESCAPE)
        values[escaped] = escapes[: len(escaped)]
        values <<= width
        # From the byte in which the list's first field begins.
        bits = np.unpackbits(low[bit // 8 : -(-(bit + count * width) // 8)], bitorder="little")
        values |= take_fields(bits[bit % 8 : bit % 8 + count * width], count, width)
        if values.max() >= _STRIDE:
            # Nothing that a run can have, and sums of it would not fit.
            raise CodecError("a value that cannot be")
        yield values
        bit, at, escapes = bit + count * width, at + count, escapes[len(escaped) :]


def _magnitudes(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    if values.max() > 0x7FFF:
        raise CodecError("a change of more than 32768")
    return values.astype(np.uint16)


def apply(changes: Changes, base: Words, out: Words, frame: Frame) -> bool:
    """See Engine."""
    counted = _Ranks(len(base))
    # How many words of its class lie before each change, from the start of the run, and the class on top of that.
    keys = np.cumsum(changes.gaps, dtype=np.int64)
    for number in np.flatnonzero(np.diff(changes.starts)).tolist():
        first, end = int(changes.starts[number]), int(changes.starts[number + 1])
        before = int(keys[first]) - int(changes.gaps[first])
        keys[first:end] += np.arange(number * _STRIDE - before, number * _STRIDE - before + end - first)
    reached = np.arange(CLASSES) * _STRIDE
    done = changes.starts[:-1]
    for start in range(0, len(base), _BLOCK):
        old, new = base[start : start + _BLOCK], out[start : start + _BLOCK]
        counted.look(old, frame)
        until = reached + counted.upto[:, -1]
        last = keys.searchsorted(until)
        # From done to last of every class, one after the other.
        due = last - done
        of = np.repeat(np.arange(CLASSES), due)
        which = np.arange(len(of)) + np.repeat(last - np.cumsum(due), due)
        # Nothing of the block has been written before this, and it may be the base's own memory.
        if new.ctypes.data != old.ctypes.data:
            np.copyto(new, old)
        if len(which):
            at = counted.places(of, keys[which] - reached[of])
            new[at] = unzigzag(changes.codes[which], old[at])
        reached, done = until, last
    return bool((done == changes.starts[1:]).all())
