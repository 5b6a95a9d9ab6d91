"""EGR's engine of compiled loops. Importing this imports numba and compiles: shipd.codecs.compiled does it, once.

The loops are in egr_compiled_words and egr_compiled_lists. What they rely on is made sure of here: that arrays are as
long as they go.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs.codec import CodecError
from shipd.codecs.egr_compiled_lists import (
    ESCAPES,
    GAPS,
    LARGE,
    UNARY,
    make_lists,
    quotient_sizes,
    read_changes,
    read_values,
    sort_by_class,
    write_parts,
)
from shipd.codecs.egr_compiled_words import apply_changes, scan_words
from shipd.codecs.egr_format import (
    CLASSES,
    COLUMNS,
    COUNT,
    Changes,
    Frame,
    Lists,
    Parts,
    Table,
    Words,
    changed,
    lists_of,
    low_bits,
)

_MESSAGES: Final = {
    UNARY: "the unary part has more or fewer values than are due, or one that is too large",
    ESCAPES: "not as many escapes as the unary part announces, or one that none was needed for",
    GAPS: "gaps that add up to more words than there are",
    LARGE: "a value that cannot be",
}

_Values = npt.NDArray[np.uint32]


def scan(content: Words, base: Words, frame: Frame, most: int) -> Changes | None:
    """See Engine."""
    room = min(most, len(base))
    classes: npt.NDArray[np.uint8] = np.empty(room, dtype=np.uint8)
    gaps: _Values = np.empty(room, dtype=np.uint32)
    codes: Words = np.empty(room, dtype=np.uint16)
    found = scan_words(content, base, frame.shift, frame.top, room, classes, gaps, codes)
    if found < 0:
        return None
    starts: npt.NDArray[np.int64] = np.zeros(CLASSES + 1, dtype=np.int64)
    changes = Changes(starts, np.empty(found, dtype=np.uint32), np.empty(found, dtype=np.uint16))
    sort_by_class(classes[:found], gaps[:found], codes[:found], starts, changes.gaps, changes.codes)
    return changes


def plan(changes: Changes) -> Lists:
    """See Engine."""
    table: Table = np.zeros((CLASSES, COLUMNS), dtype=np.int64)
    # For each change its gap, its magnitude, and of that, where it is above one, the place and the rest.
    values: _Values = np.empty(4 * len(changes.gaps), dtype=np.uint32)
    values = values[: make_lists(changes.starts, changes.gaps, changes.codes, table, values)]
    return Lists(table, values, changes.codes, *quotient_sizes(values, _lists(table)))


def pack(lists: Lists) -> bytes:
    """See Engine."""
    sizes = (lists.unary_bits, low_bits(lists.table), changed(lists.table))
    unary, low, signs = (np.zeros(bits // 64 + 2, dtype=np.uint64) for bits in sizes)
    escapes: _Values = np.empty(lists.escapes, dtype=np.uint32)
    write_parts(lists.values, _lists(lists.table), lists.codes, unary, low, signs, escapes)
    parts = (part.view(np.uint8)[: -(-bits // 8)].data for part, bits in zip((unary, low, signs), sizes, strict=True))
    return b"".join((*parts, escapes.data))


def unpack(table: Table, parts: Parts, words: int) -> Changes:
    """See Engine."""
    lists, total = _lists(table), changed(table)
    unary, low, signs = map(_padded, parts[:3])
    # A copy, because it need not be aligned where it lies.
    escapes: _Values = np.frombuffer(bytes(parts.escapes), dtype=np.uint32)
    values: _Values = np.empty(int(lists[:, 0].sum()), dtype=np.uint32)
    _check(read_values(unary, 8 * len(parts.unary), low, escapes, lists, values))
    gaps: _Values = np.empty(total, dtype=np.uint32)
    codes: Words = np.empty(total, dtype=np.uint16)
    _check(read_changes(table, values, signs, words, gaps, codes))
    starts: npt.NDArray[np.int64] = np.zeros(CLASSES + 1, dtype=np.int64)
    np.cumsum(table[:, COUNT], out=starts[1:])
    return Changes(starts, gaps, codes)


def apply(changes: Changes, base: Words, out: Words, frame: Frame) -> bool:
    """See Engine."""
    if base.ctypes.data != out.ctypes.data:
        np.copyto(out, base)
    return apply_changes(out, frame.shift, frame.top, changes.starts, changes.gaps, changes.codes)


def warm_up() -> None:
    """Go through everything once: what has a signature is compiled by now, what calls it is not."""
    base: Words = np.arange(0x3C00, 0x4000, dtype=np.uint16)
    content = base ^ np.uint16(1)
    frame = Frame(7, 0x7F)
    changes = scan(content, base, frame, len(base))
    assert changes is not None
    lists = plan(changes)
    pack(lists)
    apply(changes, base, base, frame)


def _lists(table: Table) -> npt.NDArray[np.int64]:
    return np.array(lists_of(table), dtype=np.int64).reshape(-1, 2)


def _padded(part: memoryview) -> npt.NDArray[np.uint64]:
    """A bit string as whole words, with at least one of zeros to spare."""
    words: npt.NDArray[np.uint64] = np.zeros(len(part) // 8 + 2, dtype=np.uint64)
    words.view(np.uint8)[: len(part)] = part
    return words


def _check(wrong: int) -> None:
    if wrong:
        raise CodecError(_MESSAGES[wrong])
