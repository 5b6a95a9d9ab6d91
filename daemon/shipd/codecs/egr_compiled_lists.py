"""EGR's compiled loops over lists and bits: from changes to payloads and back. For egr_compiled alone.

Nothing checks bounds but where it says so. What is read are bit strings with a word of zeros to spare, whose sizes
egr_format.read has made agree with the table; what is written has room for the table's counts.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shipd.codecs.compiled import kernel
from shipd.codecs.compiled_lanes import Integer, array, lowest
from shipd.codecs.egr_format import (
    ALL,
    CLASSES,
    COUNT,
    ESCAPE,
    FIRST_BITS,
    GAP_BITS,
    KIND,
    MOST_GAP_BITS,
    MOST_MAGNITUDE_BITS,
    NONE,
    RARE,
    SECOND_BITS,
    SOME,
    Table,
    Words,
)

UNARY, ESCAPES, GAPS, LARGE = range(1, 5)
"""What can be wrong."""

_Bytes = npt.NDArray[np.uint8]
_Values = npt.NDArray[np.uint32]
_Masks = npt.NDArray[np.uint64]
_Longs = npt.NDArray[np.int64]

_U8: Final = array(types.uint8)
_U16: Final = array(types.uint16)
_U32: Final = array(types.uint32)
_U64: Final = array(types.uint64)
_I64: Final = array(types.int64)
_TABLE: Final = array(types.int64, 2)
_U16_OUT: Final = array(types.uint16, written=True)
_U32_OUT: Final = array(types.uint32, written=True)
_U64_OUT: Final = array(types.uint64, written=True)
_I64_OUT: Final = array(types.int64, written=True)
_TABLE_OUT: Final = array(types.int64, 2, written=True)
_PAIR: Final = types.UniTuple(types.int64, 2)  # type: ignore[no-untyped-call] # numba has no annotations


@kernel(types.void(_U8, _U32, _U16, _I64_OUT, _U32_OUT, _U16_OUT))
def sort_by_class(
    classes: _Bytes, gaps: _Values, codes: Words, starts: _Longs, into_gaps: _Values, into_codes: Words
) -> None:
    """Changes from left to right as changes by class; ``starts`` is of zeros before."""
    for at in range(np.uint64(len(classes))):
        starts[np.uint64(classes[at]) + np.uint64(1)] += 1
    following = np.empty(CLASSES, dtype=np.uint64)
    for number in range(np.uint64(CLASSES)):
        following[number] = np.uint64(starts[number])
        starts[number + np.uint64(1)] += starts[number]
    for at in range(np.uint64(len(classes))):
        to = following[classes[at]]
        following[classes[at]] = to + np.uint64(1)
        into_gaps[to] = gaps[at]
        into_codes[to] = codes[at]


@kernel()
def _quotient_bits(values: _Values, first: Integer, end: Integer, width: Integer) -> tuple[Integer, Integer]:
    """Bits of a list's quotients, and how many escapes it has."""
    bits, escapes = np.int64(end - first), np.int64(0)
    for at in range(first, end):
        quotient = np.uint32(values[at] >> width)
        bits += np.int64(min(quotient, np.uint32(ESCAPE)))
        escapes += np.int64(quotient >= np.uint32(ESCAPE))
    return bits, escapes


@kernel()
def _best(values: _Values, first: Integer, end: Integer, most: Integer) -> tuple[Integer, Integer]:
    """The best parameter for a list, and all its bits; see egr_format.parameters."""
    total = np.int64(0)
    for at in range(first, end):
        total += np.int64(values[at])
    length, mean = 0, total // np.int64(end - first)
    while mean:
        length += 1
        mean >>= 1
    best, least = 0, -1
    for width in range(max(0, length - 3), min(length, most) + 1):
        bits, escapes = _quotient_bits(values, first, end, np.uint32(width))
        bits += np.int64(end - first) * width + 32 * escapes
        if least < 0 or bits < least:
            best, least = width, bits
    return best, least


@kernel()
def _some_head_bits(rare: Integer) -> Integer:
    """See egr_format."""
    size = 1
    while rare > 0x7F:
        rare >>= 7
        size += 1
    return 16 + 8 * size


@kernel()
def _magnitude_lists(codes: Words, first: Integer, end: Integer, values: _Values, at: Integer, row: _Longs) -> Integer:
    """Append the lists of the magnitudes of a class to ``values``, and describe them in ``row``; where they end."""
    places = at + (end - first)
    rare = np.uint64(0)
    for change in range(end - first):
        magnitude = np.uint16(codes[first + change] - np.uint16(1)) >> np.uint16(1)
        values[at + change] = np.uint32(magnitude)
        rare += np.uint64(magnitude != 0)
    if rare == np.uint64(0):
        row[KIND] = NONE
        return at
    above = places + rare
    listed, passed = np.uint64(0), np.uint64(0)
    for change in range(end - first):
        magnitude_at = values[at + change]
        if magnitude_at != np.uint32(0):
            values[places + listed] = np.uint32(change - passed)
            values[above + listed] = np.uint32(magnitude_at - np.uint32(1))
            listed += np.uint64(1)
            passed = change + np.uint64(1)
    all_width, all_bits = _best(values, at, places, MOST_MAGNITUDE_BITS)
    place_width, place_bits = _best(values, places, above, MOST_GAP_BITS)
    rare_width, rare_bits = _best(values, above, above + rare, MOST_MAGNITUDE_BITS)
    if all_bits + 8 <= place_bits + rare_bits + _some_head_bits(np.int64(rare)):
        row[KIND], row[FIRST_BITS] = ALL, all_width
        return places
    row[KIND], row[FIRST_BITS], row[RARE], row[SECOND_BITS] = SOME, place_width, np.int64(rare), rare_width
    for moved in range(rare + rare):
        values[at + moved] = values[places + moved]
    return at + rare + rare


@kernel(types.int64(_I64, _U32, _U16, _TABLE_OUT, _U32_OUT))
def make_lists(starts: _Longs, gaps: _Values, codes: Words, table: Table, values: _Values) -> Integer:
    """Fill in ``table`` and ``values``, which has room for four times the gaps; how many values there are."""
    end = np.uint64(0)
    for number in range(CLASSES):
        first, last = np.uint64(starts[number]), np.uint64(starts[number + 1])
        if first == last:
            continue
        for change in range(last - first):
            values[end + change] = gaps[first + change]
        row = table[number]
        row[COUNT] = np.int64(last - first)
        row[GAP_BITS], _ = _best(values, end, end + (last - first), MOST_GAP_BITS)
        end = _magnitude_lists(codes, first, last, values, end + (last - first), row)
    return np.int64(end)


@kernel(_PAIR(_U32, _TABLE))
def quotient_sizes(values: _Values, lists: Table) -> tuple[Integer, Integer]:
    """Bits of the quotients of all lists, and how many escapes they have."""
    bits, escapes, at = 0, 0, np.uint64(0)
    for number in range(len(lists)):
        end = at + np.uint64(lists[number, 0])
        more_bits, more_escapes = _quotient_bits(values, at, end, np.uint32(lists[number, 1]))
        bits += more_bits
        escapes += more_escapes
        at = end
    return bits, escapes


@kernel()
def _put(into: _Masks, bit: Integer, value: Integer) -> None:
    """Or ``value`` into a bit string from ``bit`` on; it has a word to spare behind its end."""
    word, shift = bit // np.uint64(64), bit % np.uint64(64)
    into[word] |= value << shift
    # In two steps: a shift by 64 is none.
    into[word + np.uint64(1)] |= (value >> np.uint64(1)) >> (np.uint64(63) - shift)


@kernel()
def _take(part: _Masks, bit: Integer) -> Integer:
    """64 bits of a bit string from ``bit`` on; it has a word to spare behind its end."""
    word, shift = bit // np.uint64(64), bit % np.uint64(64)
    return (part[word] >> shift) | ((part[word + np.uint64(1)] << np.uint64(1)) << (np.uint64(63) - shift))


@kernel(types.void(_U32, _TABLE, _U16, _U64_OUT, _U64_OUT, _U64_OUT, _U32_OUT))
def write_parts(
    values: _Values, lists: Table, codes: Words, unary: _Masks, low: _Masks, signs: _Masks, escapes: _Values
) -> None:
    """Write the parts of a payload, each of zeros before and as long as it must be, with a word to spare."""
    one, most = np.uint64(1), np.uint64(ESCAPE)
    at, unary_bit, low_bit, escaped = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for number in range(len(lists)):
        end, width = at + np.uint64(lists[number, 0]), np.uint64(lists[number, 1])
        rest = (one << width) - one
        while at < end:
            value = np.uint64(values[at])
            quotient = value >> width
            if quotient >= most:
                escapes[escaped] = np.uint32(quotient)
                escaped += one
                quotient = most
            unary_bit += quotient
            unary[unary_bit // np.uint64(64)] |= one << (unary_bit % np.uint64(64))
            unary_bit += one
            _put(low, low_bit, value & rest)
            low_bit += width
            at += one
    for change in range(np.uint64(len(codes))):
        signs[change // np.uint64(64)] |= np.uint64(codes[change] & np.uint16(1)) << (change % np.uint64(64))


@kernel(types.int64(_U64, types.uint64, _U64, _U32, _TABLE, _U32_OUT))
def read_values(
    unary: _Masks, unary_bits: Integer, low: _Masks, escapes: _Values, lists: Table, values: _Values
) -> Integer:
    """Read all lists. 0, or what is wrong."""
    one, most = np.uint64(1), np.uint64(ESCAPE)
    at, unary_bit, low_bit, escaped = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for number in range(len(lists)):
        end, width = at + np.uint64(lists[number, 0]), np.uint64(lists[number, 1])
        rest = (one << width) - one
        while at < end:
            # Behind the end there are zeros, which are more than any value has.
            quotient = lowest(_take(unary, unary_bit))
            unary_bit += quotient + one
            if quotient > most or unary_bit > unary_bits:
                return UNARY
            if quotient == most:
                if escaped == np.uint64(len(escapes)) or escapes[escaped] < np.uint32(ESCAPE):
                    return ESCAPES
                quotient = np.uint64(escapes[escaped])
                escaped += one
            value = (quotient << width) | (_take(low, low_bit) & rest)
            if value >> np.uint64(32) != np.uint64(0):
                return LARGE
            values[at] = np.uint32(value)
            low_bit += width
            at += one
    if escaped != np.uint64(len(escapes)):
        return ESCAPES
    # Nothing follows the last value in its byte, which is the last one.
    if unary_bits - unary_bit >= np.uint64(8) or (unary_bit < unary_bits and _take(unary, unary_bit) != np.uint64(0)):
        return UNARY
    return 0


@kernel()
def _put_signs(codes: Words, changes: Integer, signs: _Masks) -> Integer:
    """Codes of magnitudes less one and signs; 0, or what is wrong."""
    for change in range(changes):
        sign = (signs[change // np.uint64(64)] >> (change % np.uint64(64))) & np.uint64(1)
        code = np.uint16(np.uint64(codes[change]) * np.uint64(2) + np.uint64(2) - sign)
        # 32768 up, which wraps around to no change, is said as 32768 down.
        if code == 0:
            return LARGE
        codes[change] = code
    return 0


@kernel(types.int64(_TABLE, _U32, _U64, types.uint64, _U32_OUT, _U16_OUT))
def read_changes(table: Table, values: _Values, signs: _Masks, words: Integer, gaps: _Values, codes: Words) -> Integer:
    """Gaps and codes of the values of all lists; 0, or what is wrong."""
    one, at, first, passed = np.uint64(1), np.uint64(0), np.uint64(0), np.uint64(0)
    for number in range(CLASSES):
        changes, rare = np.uint64(table[number, COUNT]), np.uint64(table[number, RARE])
        for change in range(changes):
            gaps[first + change] = values[at + change]
            passed += np.uint64(values[at + change]) + one
        if passed > words:
            return GAPS
        at += changes
        for change in range(changes):
            codes[first + change] = np.uint16(0)
        if table[number, KIND] == ALL:
            for change in range(changes):
                if values[at + change] > np.uint32(0x7FFF):
                    return LARGE
                codes[first + change] = np.uint16(values[at + change])
            at += changes
        elif table[number, KIND] == SOME:
            place = np.uint64(0)
            for listed in range(rare):
                place += np.uint64(values[at + listed])
                magnitude = np.uint64(values[at + rare + listed]) + one
                if place >= changes or magnitude > np.uint64(0x7FFF):
                    return LARGE
                codes[first + place] = np.uint16(magnitude)
                place += one
            at += rare + rare
        first += changes
    return _put_signs(codes, first, signs)
