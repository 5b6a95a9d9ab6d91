"""Files that a sender has lent to a receiver on its host: chunks are read from them by both sides.

Read and not mapped: a file that is cut meanwhile ends a read early, and a mapping would end the process. And what is
read passes through one buffer, while every page of a mapping that is touched counts as the process's.
"""

import os
from collections.abc import Sequence
from typing import Final

from shipproto.lent import Lent
from shipproto.limits import LEAF_SIZE

_MOST_PIECES: Final = 1024
"""IOV_MAX of Linux."""

_ZEROS: Final = bytes(LEAF_SIZE)


class CutShort(Exception):
    """A file ends before the tensors that it is said to hold."""


class LentFiles:
    """Open descriptors, which stay their owner's, and the table of what lies in them. On any number of threads."""

    def __init__(self, lent: Lent, descriptors: Sequence[int]) -> None:
        self.lent = lent
        self.descriptors = tuple(descriptors)

    def read(self, chunk: int, into: memoryview) -> None:
        """Read a chunk that is lent into memory of its size, with zeros between its tensors.

        Raises CutShort, and OSError where the file cannot be read.
        """
        layout = self.lent.layout
        if chunk >= layout.large_chunks and layout.packed_gaps(chunk) is not None:
            into[:] = _ZEROS[: len(into)]
        for file, offset, places in self.lent.reads(chunk):
            at = offset
            for first in range(0, len(places), _MOST_PIECES):
                at += _read(self.descriptors[file], [into[place] for place in places[first : first + _MOST_PIECES]], at)


def _read(descriptor: int, pieces: list[memoryview], offset: int) -> int:
    """Fill all of ``pieces`` from ``offset`` on; how many bytes that are."""
    wanted = sum(map(len, pieces))
    done = os.preadv(descriptor, pieces, offset)
    while done < wanted:
        # The end of the file, a signal, or a file system that gives less at a time.
        before, rest = done, []
        for piece in pieces:
            rest.append(piece[before:])
            before = max(0, before - len(piece))
        rest = [piece for piece in rest if len(piece)]
        count = os.preadv(descriptor, rest, offset + done)
        if not count:
            raise CutShort
        done += count
    return done
