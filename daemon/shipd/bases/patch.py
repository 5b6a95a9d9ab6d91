"""The way from a chunk back to an older one: where words differ, and what they were.

A patch is bytes, in memory only. As many as the chunk has are the older chunk itself. Fewer are a sparse patch:

    u32[BLOCKS - 1]   how many of the positions lie before the second, third and fourth block of 65,536 words
    u16[k]            positions in their blocks, ascending
    u16[k]            the older words

so a changed word costs four bytes. Words are of 16 bits, which is what most weights have; the order of their bytes is
the host's. What is changed is found by comparing 64 bits at a time, a fifth faster than 16 where changes are few: 0.13
s/GB at 0.5 %, beside 0.05 of a memcpy (measured on an AMD EPYC, in chunks of 512 KiB).
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shipproto.limits import LEAF_SIZE

_BLOCK: Final = 1 << 16
"""Words that 16 bits can number."""

_STARTS: Final = np.arange(_BLOCK, LEAF_SIZE // 2, _BLOCK)
"""First word of each block of a chunk but the first."""

_HEAD: Final = 4 * len(_STARTS)

SPAN: Final = 8
"""Bytes compared at a time: chunks are rounded up to them."""


def make_patch(newer: npt.NDArray[np.uint8], older: npt.NDArray[np.uint8], size: int) -> bytes | None:
    """What turns ``newer`` into ``older``: a patch, or None where they are the same.

    newer, older   u8[k], a chunk of ``size`` bytes at an address that is a multiple of SPAN, and zeros up to the next
    """
    words = newer.view(np.uint64)
    differs = words != older.view(np.uint64)
    places = np.flatnonzero(differs)
    if not len(places):
        return None
    # By their words of 16 bits, four in each; comparing first makes flatnonzero twice as fast.
    lanes = np.flatnonzero((words[places] ^ older.view(np.uint64)[places]).view(np.uint16) != 0)
    if _HEAD + 4 * len(lanes) >= size:
        return older[:size].tobytes()
    positions = (places[lanes >> 2] << 2) | (lanes & 3)
    before = np.searchsorted(positions, _STARTS).astype(np.uint32)
    # astype keeps the low 16 bits, which are the position in its block.
    parts = (before, positions.astype(np.uint16), older.view(np.uint16)[positions])
    return b"".join(part.tobytes() for part in parts)


def apply_patch(patch: bytes, content: npt.NDArray[np.uint8]) -> None:
    """Turn ``content``, u8[size], from the newer chunk into the older one."""
    if len(patch) == len(content):
        np.copyto(content, np.frombuffer(patch, dtype=np.uint8))
        return
    before = np.frombuffer(patch, dtype=np.uint32, count=len(_STARTS))
    low, words = np.frombuffer(patch, dtype=np.uint16, offset=_HEAD).reshape(2, -1)
    positions = low.astype(np.intp)
    for count in before.tolist():
        positions[count:] += _BLOCK
    # The last byte of an odd chunk is half a word.
    whole = len(content) // 2
    if int(positions[-1]) == whole:
        content[-1] = words[-1:].view(np.uint8)[0]
        positions, words = positions[:-1], words[:-1]
    content[: 2 * whole].view(np.uint16)[positions] = words
