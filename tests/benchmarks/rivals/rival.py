"""What every rival is, and what several of them need: finding the changed words, and zstd of level 1.

Level 1 is what all of those who compress say they use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from shipproto.frame import Buffer

Words = npt.NDArray[np.uint16]
Matrix = tuple[int, int]
"""Rows and columns of a tensor; one of a single dimension has rows of one element, as those who send rows have it."""

_BLOCK: Final = 1 << 16
"""Words that are compared at once: so many that the flags are still in the cache when they are looked through."""


@dataclass(frozen=True)
class Rival:
    """A way to send a version.

    name     in the tables
    delta    whether both sides need the version before
    encode   content, base and the tensors that both consist of (in order, nothing between them) to a payload
    apply    payload, memory that has the base (or anything, where ``delta`` is not set) and the tensors: it then has
             the content
    """

    name: str
    delta: bool
    encode: Callable[[Buffer, Buffer, Sequence[Matrix]], bytes]
    apply: Callable[[Buffer, memoryview, Sequence[Matrix]], None]


def words(buffer: Buffer) -> Words:
    """The bytes as bit patterns of bfloat16."""
    return np.frombuffer(buffer, dtype="<u2")


def changed(content: Words, base: Words) -> npt.NDArray[np.int64]:
    """Where the two differ, ascending."""
    found = [
        np.flatnonzero(content[at : at + _BLOCK] != base[at : at + _BLOCK]) + at for at in range(0, len(base), _BLOCK)
    ]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def squeeze(content: Buffer) -> bytes:
    """zstd, level 1."""
    frame: bytes = zstandard.ZstdCompressor(level=1).compress(content)
    return frame


def unsqueeze(frame: Buffer) -> bytes:
    """What squeeze was given."""
    content: bytes = zstandard.ZstdDecompressor().decompress(frame)
    return content
