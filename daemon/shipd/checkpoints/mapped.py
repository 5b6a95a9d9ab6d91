"""Tensors that lie in a mapped file as they travel, whatever its format: views of it, and checks before each read.

What is mapped is page cache: it counts as the file's and not as the process's own memory. A file can only be
read while nobody shortens it; see ``OpenFile.require_whole`` for what is and what cannot be done about that.
"""

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from operator import add
from typing import Protocol

from shipd.checkpoints.extents import Extent
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.source import MAX_READ, check_range, join, pick
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError
from shipproto.structure import Structure


class Content(Protocol):
    """The bytes of one tensor that does not lie in its file as it travels."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), as they travel; of memory that is not used again. On any thread."""
        ...


class MappedFile:
    """A ``Source`` over a mapped file. Takes ownership of ``file`` once it is constructed.

    starts  where each row's bytes begin in the file
    others  rows whose bytes are not there, or are there in another order; what ``starts`` says of them is not used
    """

    def __init__(
        self, file: OpenFile, structure: Structure, starts: list[int], others: Mapping[int, Content] | None = None
    ) -> None:
        self.origin = file.path
        self.structure = structure
        self._file = file
        self._starts = starts
        self._sizes: list[int] = structure.nbytes.tolist()
        self._others = others or {}
        self._map = map_whole(file)
        # More read-ahead: half as fast again where the file is not in the page cache yet.
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._bytes = memoryview(self._map)

    def read(self, row: int, start: int, stop: int) -> memoryview:
        """See ``Source.read``; a view of the mapped file wherever the bytes are in it."""
        if not 0 <= start <= stop <= self._sizes[row] or stop - start > MAX_READ:
            check_range(self.structure, row, self._sizes[row], start, stop)
        at = self._starts[row]
        self._file.require(self.structure.names[row], at + start, at + stop)
        if row in self._others:
            return self._others[row].read(start, stop)
        return self._bytes[at + start : at + stop]

    def read_packed(self, rows: Sequence[int], gaps: list[int] | None) -> memoryview:
        """See ``Source.read_packed``; a view of the mapped file where the tensors lie side by side in it."""
        if self._others and not self._others.keys().isdisjoint(rows):
            return join((self.read(row, 0, self._sizes[row]) for row in rows), gaps)
        starts = pick(self._starts, rows)
        stops = list(map(add, starts, pick(self._sizes, rows)))
        self._file.require_each(self.structure.names[rows[0]], starts, stops)
        if gaps is None and starts[1:] == stops[:-1]:
            return self._bytes[starts[0] : stops[-1]]
        return join(map(self._bytes.__getitem__, map(slice, starts, stops)), gaps)

    def extent(self, row: int) -> Extent | None:
        """See ``InFiles``."""
        if row in self._others or not self._file.local:
            # What is still being fetched has holes, which nobody who reads the descriptor itself could wait for.
            return None
        return Extent(self._file.descriptor, self._starts[row])

    def lends(self, content: memoryview) -> bool:
        """See ``Source.lends``."""
        return content.obj is self._map

    def changed(self) -> str | None:
        """See ``Source.changed``; by the file's size and time of change."""
        return self._file.changed()

    def close(self) -> None:
        """See ``Source.close``."""
        self._bytes.release()
        self._others = {}
        with contextlib.suppress(BufferError):  # While views are in use; the mapping goes with the last.
            self._map.close()
        self._file.close()


def map_whole(file: OpenFile) -> mmap.mmap:
    """The whole of ``file``, mapped for reading. Raises CheckpointError."""
    try:
        return mmap.mmap(file.descriptor, file.size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{quoted(file.path)} cannot be mapped into memory: {error}") from error
