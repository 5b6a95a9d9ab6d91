"""Where in their files tensors lie, of sources that are files: for whoever can read the files itself.

A row has an extent where its bytes lie in one file one after the other, as they travel.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol, runtime_checkable

from shipd.checkpoints.opened import OpenFile

_MAPS: Final = Path("/proc/self/maps")


class Extent(NamedTuple):
    """An open descriptor, which stays the source's, and where in its file the bytes of a tensor begin."""

    descriptor: int
    offset: int


@runtime_checkable
class InFiles(Protocol):
    """A ``Source`` of which tensors lie in files."""

    def extent(self, row: int) -> Extent | None:
        """Where the bytes of the tensor in ``row`` lie; None where they are not in a file, or not as they travel."""
        ...


class MappedRanges:
    """Where in this process ``file`` is mapped, as the kernel says. Nothing where it does not (macOS)."""

    def __init__(self, file: OpenFile) -> None:
        self._ranges: list[tuple[int, int, int]] = []
        if not _MAPS.exists():
            return
        status = os.fstat(file.descriptor)
        wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)
        for line in _MAPS.read_text(errors="replace").splitlines():
            addresses, _access, offset, device, inode = line.split(maxsplit=5)[:5]
            if (device, inode) == wanted:
                start, _, end = addresses.partition("-")
                self._ranges.append((int(start, 16), int(end, 16), int(offset, 16)))

    def offset(self, address: int, size: int) -> int | None:
        """Where in the file ``size`` bytes of memory come from; None where they are not all of one mapping of it."""
        for start, end, offset in self._ranges:
            if start <= address and address + size <= end:
                return address - start + offset
        return None


def extents(source: object, rows: Sequence[int]) -> list[Extent | None]:
    """The extent of each of these rows; of a source that is in no files, None for all."""
    if isinstance(source, InFiles):
        return list(map(source.extent, rows))
    return [None] * len(rows)
