"""Rows and columns of the changes as differences, and their new values whole, through zstd level 1: PULSE.

For each tensor with changes, sorted by row and column: the difference to the row before; the column, as a difference
where the row is the same and whole where it is another; and the new bit patterns. Row differences take one byte each
where all of the tensor's fit, else four; columns two, else four.

Payload: zstd of, for each tensor, its number (u32), its number of changes (u32), the bytes of a row and of a column (u8
each), then rows, columns, values. Source: arXiv 2602.03839 ("Understanding and Exploiting Weight Update Sparsity for
Communication-Efficient Distributed RL") and the layout 3.1 that one-covenant/grail describes, which has names and
shapes as JSON besides.
"""

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shipproto.frame import Buffer
from tests.benchmarks.rivals.rival import Matrix, Rival, changed, squeeze, unsqueeze, words

_HEAD: Final = struct.Struct("<IIBB")
_WIDTHS: Final = {1: "<u1", 2: "<u2", 4: "<u4"}

Integers = npt.NDArray[np.int64]


def encode(content: Buffer, base: Buffer, tensors: Sequence[Matrix]) -> bytes:
    """Rows, columns and values of each tensor."""
    new = words(content)
    at = changed(new, words(base))
    ends = np.cumsum([rows * columns for rows, columns in tensors])
    bounds = np.searchsorted(at, ends)
    parts: list[bytes] = []
    first, start = 0, 0
    for number, (_, columns) in enumerate(tensors):
        last = int(bounds[number])
        if last > first:
            here = at[first:last]
            row, column = np.divmod(here - start, columns)
            rows, within = _differences(row, column)
            wide = 1 if rows.max() <= 0xFF else 4, 2 if within.max() <= 0xFFFF else 4
            parts.append(_HEAD.pack(number, last - first, *wide))
            parts += (each.astype(_WIDTHS[width]).tobytes() for each, width in zip((rows, within), wide, strict=True))
            parts.append(new[here].tobytes())
        first, start = last, int(ends[number])
    return squeeze(b"".join(parts))


def apply(payload: Buffer, target: memoryview, tensors: Sequence[Matrix]) -> None:
    """Write the values over what is there."""
    plain = unsqueeze(payload)
    made = words(target)
    starts = np.cumsum([0, *(rows * columns for rows, columns in tensors)])
    at = 0
    while at < len(plain):
        number, count, wide, broad = _HEAD.unpack_from(plain, at)
        at += _HEAD.size
        parts = []
        for width in (wide, broad, 2):
            parts.append(np.frombuffer(plain, dtype=_WIDTHS[width], count=count, offset=at))
            at += width * count
        rows, within, values = parts
        made[starts[number] + _positions(rows, within, tensors[number][1])] = values


def _differences(row: Integers, column: Integers) -> tuple[Integers, Integers]:
    rows = np.diff(row, prepend=0)
    same = rows == 0
    # The first stands for itself, also where it lies in row 0.
    same[:1] = False
    return rows, np.where(same, np.diff(column, prepend=0), column)


def _positions(rows: npt.NDArray[np.uint32], within: npt.NDArray[np.uint32], columns: int) -> Integers:
    row = np.cumsum(rows, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != 0]))
    summed = np.cumsum(within, dtype=np.int64)
    # What had been summed up before the row began.
    before = summed[starts] - within[starts]
    return row * columns + summed - np.repeat(before, np.diff(starts, append=len(rows)))


RIVAL: Final = Rival("PULSE's layout", delta=True, encode=encode, apply=apply)
