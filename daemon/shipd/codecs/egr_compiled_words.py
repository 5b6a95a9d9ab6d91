"""EGR's compiled loops over the words of a run: what changed, and putting it there. For egr_compiled alone.

64 words are looked at at a time, as masks: which of them differ, which are of a class. Ranks are counts of bits, so
that nothing is done for a word that did not change, and what is done for one that did hardly ever branches.

Nothing checks bounds: runs and bases are of one length, and what is written to has room for all that is asked for.
Places are unsigned, because numba makes a negative one count from the end, at the price of a comparison; whatever is
computed is cut to its width at once, because numba computes in 64 bits otherwise, and no vectors come of it.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shipd.codecs.compiled import kernel
from shipd.codecs.compiled_lanes import LANES, Integer, array, count, equal, lowest, unequal
from shipd.codecs.egr_format import CLASSES, PLACES, Words

_BLOCK: Final = 2048
"""Words whose classes are found at once: all that is kept for them stays in a core's first cache."""

_BLOCK_MASKS: Final = _BLOCK // LANES
_NO_CLASS: Final = 255
"""Fills up the last lanes of a run."""

_NEVER: Final = 1 << 62
"""Words of a class until its next change, where there is none."""

_Bytes = npt.NDArray[np.uint8]
_Values = npt.NDArray[np.uint32]
_Masks = npt.NDArray[np.uint64]
_Longs = npt.NDArray[np.int64]

_U16: Final = array(types.uint16)
_U32: Final = array(types.uint32)
_I64: Final = array(types.int64)
_U8_OUT: Final = array(types.uint8, written=True)
_U16_OUT: Final = array(types.uint16, written=True)
_U32_OUT: Final = array(types.uint32, written=True)


@kernel()
def _classify(base: Words, start: Integer, words: Integer, shift: Integer, top: Integer, into: _Bytes) -> None:
    """The classes of ``words`` words from ``start`` on, filled up to whole masks with _NO_CLASS."""
    lowest_exponent: Integer = np.uint16(top - min(top, CLASSES - 1))
    # Wraps around where the highest class lies above it.
    offset = np.uint16(CLASSES - 1 - np.int64(top))
    for at in range(words):
        exponent = np.uint16(np.uint16(base[start + at] & np.uint16(0x7FFF)) >> shift)
        exponent = min(max(exponent, lowest_exponent), top)
        into[at] = np.uint8(np.uint16(exponent + offset))
    for at in range(words, (words + np.uint64(LANES - 1)) // np.uint64(LANES) * np.uint64(LANES)):
        into[at] = np.uint8(_NO_CLASS)


@kernel()
def _differences(content: Words, base: Words, start: Integer, words: Integer, into: _Masks) -> Integer:
    """A mask for every 64 of ``words`` words from ``start`` on; and all of them in one."""
    whole = words // np.uint64(LANES)
    some = np.uint64(0)
    for mask in range(whole):
        into[mask] = unequal(content, base, start + mask * np.uint64(LANES))
        some |= into[mask]
    if whole * np.uint64(LANES) < words:
        last = np.uint64(0)
        for at in range(whole * np.uint64(LANES), words):
            differs = np.uint64(content[start + at] != base[start + at])
            last |= differs << (at & np.uint64(LANES - 1))
        into[whole] = last
        some |= last
    return some


@kernel()
def _ones(masks: _Masks, of: Integer) -> Integer:
    """Bits that are set in the first ``of`` masks."""
    total = np.uint64(0)
    for mask in range(of):
        total += count(masks[mask])
    return total


@kernel()
def _ranks(classes: _Bytes, masks: Integer, number: Integer, into: Words, row: Integer) -> Integer:
    """How many words of a class lie before each mask, from ``row`` of ``into`` on; and in all of them."""
    total = np.uint64(0)
    for mask in range(masks):
        into[row + mask] = np.uint16(total)
        total += count(equal(classes, mask * np.uint64(LANES), number))
    return total


@kernel()
def _key(word: Integer) -> Integer:
    """See shipd.codecs.words."""
    return np.uint16(
        word ^ np.uint16(np.uint16(np.uint16(word >> np.uint16(15)) * np.uint16(0x7FFF)) + np.uint16(0x8000))
    )


@kernel()
def _zigzag(new: Integer, old: Integer) -> Integer:
    difference = np.int16(np.uint16(_key(new) - _key(old)))
    return np.uint16(np.uint16(difference << np.int16(1)) ^ np.uint16(difference >> np.int16(15)))


@kernel()
def _unzigzag(code: Integer, old: Integer) -> Integer:
    sign = np.uint16(np.uint16(0) - np.uint16(code & np.uint16(1)))
    key = np.uint16(_key(old) + np.uint16(np.uint16(code >> np.uint16(1)) ^ sign))
    # All ones where the key says that the sign is set, else the sign alone.
    negative = np.uint16(np.uint16(~key) >> np.uint16(15))
    return np.uint16(key ^ np.uint16(np.uint16(negative * np.uint16(0x7FFF)) + np.uint16(0x8000)))


@kernel(types.int64(_U16, _U16, types.uint16, types.uint16, types.int64, _U8_OUT, _U32_OUT, _U16_OUT))
def scan_words(
    content: Words,
    base: Words,
    shift: Integer,
    top: Integer,
    most: Integer,
    into_classes: _Bytes,
    into_gaps: _Values,
    into_codes: Words,
) -> Integer:
    """What changed, from left to right: class, gap and code. How many changes; -1 where they are more than ``most``."""
    one, lanes, block, words = np.uint64(1), np.uint64(LANES), np.uint64(_BLOCK), np.uint64(len(base))
    classes = np.empty(_BLOCK, dtype=np.uint8)
    masks = np.empty(_BLOCK_MASKS, dtype=np.uint64)
    ranks = np.empty(CLASSES * _BLOCK_MASKS, dtype=np.uint16)
    totals = np.zeros(CLASSES, dtype=np.uint64)
    touched = np.empty(_BLOCK_MASKS, dtype=np.uint64)
    changed_at = np.empty(_BLOCK, dtype=np.uint64)
    # Words of each class since its last change, less those before the block that follows.
    since = np.zeros(CLASSES, dtype=np.uint64)
    found = np.uint64(0)
    for start in range(np.uint64(0), words, block):
        here = min(block, words - start)
        here_masks = (here + lanes - one) // lanes
        _classify(base, start, here, shift, top, classes)
        some = _differences(content, base, start, here, masks)
        left = here
        totals[:] = np.uint64(0)
        # Nearly all words are in a few of the highest classes.
        for number in range(CLASSES - 1, -1, -1):
            total = _ranks(classes, here_masks, np.uint8(number), ranks, np.uint64(number * _BLOCK_MASKS))
            totals[number] = total
            left -= total
            if left == np.uint64(0):
                break
        if some != np.uint64(0):
            if np.int64(found + here) > most and np.int64(found + _ones(masks, here_masks)) > most:
                return -1
            # A list without a branch for each, because nothing could foretell them.
            listed = np.uint64(0)
            for mask in range(here_masks):
                touched[listed] = mask
                listed += np.uint64(masks[mask] != np.uint64(0))
            places = np.uint64(0)
            for entry in range(listed):
                mask = touched[entry]
                differing = masks[mask]
                while differing != np.uint64(0):
                    changed_at[places] = mask * lanes + lowest(differing)
                    differing &= differing - one
                    places += one
            for entry in range(places):
                at = changed_at[entry]
                mask = at // lanes
                number_at = classes[at]
                below = equal(classes, mask * lanes, number_at) & ((one << (at % lanes)) - one)
                rank = np.uint64(ranks[np.uint64(number_at) * np.uint64(_BLOCK_MASKS) + mask]) + count(below)
                into_classes[found] = number_at
                into_gaps[found] = np.uint32(since[number_at] + rank)
                into_codes[found] = _zigzag(content[start + at], base[start + at])
                since[number_at] = np.uint64(0) - rank - one
                found += one
        for number in range(CLASSES):
            since[number] += totals[number]
    return np.int64(found)


@kernel()
def _select(mask: Integer, rank: Integer) -> Integer:
    """The place of the set bit that has ``rank`` set bits below it.

    S. Vigna, "Broadword implementation of rank/select queries", WEA 2008: sums of bits for all eight bytes at once.
    """
    every_byte, high_bits = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    sums = mask - ((mask >> np.uint64(1)) & np.uint64(0x5555555555555555))
    sums = (sums & np.uint64(0x3333333333333333)) + ((sums >> np.uint64(2)) & np.uint64(0x3333333333333333))
    sums = ((sums + (sums >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)) * every_byte
    # The bytes at whose ends no more than ``rank`` bits have been set.
    passed = count((((rank * every_byte) | high_bits) - sums) & high_bits) * np.uint64(8)
    within = rank - (((sums << np.uint64(8)) >> passed) & np.uint64(0xFF))
    byte = (mask >> passed) & np.uint64(0xFF)
    return passed + np.uint64(PLACES[within, byte])


@kernel()
def _mask_of(ranks: Words, row: Integer, rank: Integer) -> Integer:
    """The last mask that no more than ``rank`` words of a class lie before."""
    reached = np.uint16(0)
    for mask in range(np.uint64(_BLOCK_MASKS)):
        reached = np.uint16(reached + np.uint16(ranks[row + mask] <= rank))
    return np.uint64(reached) - np.uint64(1)


@kernel(types.boolean(_U16_OUT, types.uint16, types.uint16, _I64, _U32, _U16))
def apply_changes(run: Words, shift: Integer, top: Integer, starts: _Longs, gaps: _Values, codes: Words) -> bool:
    """Turn the base into the content, in place; whether all changes had their place."""
    one, lanes, block, words = np.uint64(1), np.uint64(LANES), np.uint64(_BLOCK), np.uint64(len(run))
    never = np.uint64(_NEVER)
    classes = np.empty(_BLOCK, dtype=np.uint8)
    # Above every rank where a block is shorter than the search.
    ranks = np.empty(CLASSES * _BLOCK_MASKS, dtype=np.uint16)
    totals = np.empty(CLASSES, dtype=np.uint64)
    hit_ranks = np.empty(_BLOCK, dtype=np.uint64)
    hit_classes = np.empty(_BLOCK, dtype=np.uint64)
    hits = np.empty(_BLOCK, dtype=np.uint64)
    upcoming = np.empty(CLASSES, dtype=np.uint64)
    # Words of each class that lie before its next change, from the block that follows on.
    due = np.empty(CLASSES, dtype=np.uint64)
    for number in range(CLASSES):
        upcoming[number] = np.uint64(starts[number])
        due[number] = np.uint64(gaps[starts[number]]) if starts[number] < starts[number + 1] else never
    for start in range(np.uint64(0), words, block):
        here = min(block, words - start)
        here_masks = (here + lanes - one) // lanes
        # Of the whole block, before anything in it is written.
        _classify(run, start, here, shift, top, classes)
        if here < block:
            ranks[:] = np.uint16(0xFFFF)
        for number in range(CLASSES):
            if due[number] != never:
                row = np.uint64(number * _BLOCK_MASKS)
                totals[number] = _ranks(classes, here_masks, np.uint8(number), ranks, row)
        listed = np.uint64(0)
        for number in range(CLASSES):
            if due[number] == never:
                continue
            rank, total, entry, end = due[number], totals[number], upcoming[number], np.uint64(starts[number + 1])
            while rank < total:
                hit_ranks[listed] = rank
                hit_classes[listed] = np.uint64(number)
                hits[listed] = entry
                listed += one
                entry += one
                rank = rank + one + np.uint64(gaps[entry]) if entry < end else never
            upcoming[number] = entry
            due[number] = rank - total if rank != never else never
        for hit in range(listed):
            number_at, rank = hit_classes[hit], hit_ranks[hit]
            row = number_at * np.uint64(_BLOCK_MASKS)
            mask = _mask_of(ranks, row, np.uint16(rank))
            members = equal(classes, mask * lanes, np.uint8(number_at))
            at = start + mask * lanes + _select(members, rank - np.uint64(ranks[row + mask]))
            run[at] = _unzigzag(codes[hits[hit]], run[at])
    left = 0
    for number in range(CLASSES):
        left += due[number] != never
    return left == 0
