"""Where in open files the bytes of a version lie: what LEND says, and which chunks can be read from there.

The body of LEND has one entry for each name of the ruling structure, in its order, as two columns:

    files    u8   which of the descriptors that came with it, from 0; NOT_LENT where the tensor is in none of them
    offsets  u64  where its bytes begin in that file, little-endian; 0 where it is in none

A tensor's bytes lie there one after the other as they travel. A chunk is lent where every tensor that it carries bytes
of is; the others travel as DATA.
"""

from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shipproto.errors import MalformedMessage
from shipproto.frame import Buffer
from shipproto.layout import Layout
from shipproto.rangeset import RangeSet

NOT_LENT: Final = 0xFF

ENTRY: Final = 9
"""Bytes of the body for each name."""

_LAST_OFFSET: Final = 1 << 62
"""Beyond any file, and far enough from where sums would overflow."""


class Read(NamedTuple):
    """One stretch of a file, and the places in the chunk that it fills one after the other."""

    file: int
    offset: int
    places: list[slice]


class Lent:
    """A table of ``layout``'s tensors.

    files    u8[n], by row of the structure: the number of the file, or NOT_LENT
    offsets  i64[n], where in it the tensor begins
    """

    def __init__(self, layout: Layout, files: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> None:
        self.layout = layout
        self.files = files
        self.offsets = offsets
        rows = layout.leaf_rows()[: layout.large_chunks]
        begins = layout.chunk_starts[: layout.large_chunks] - layout.offsets[rows]
        # Of each chunk of a large tensor; plain lists, as they are looked at one by one.
        self._large_files: list[int] = files[rows].tolist()
        self._large_offsets: list[int] = (offsets[rows] + begins).tolist()

    @classmethod
    def decode(cls, body: Buffer, layout: Layout, files: int) -> "Lent":
        """The table that came with so many descriptors. Raises MalformedMessage."""
        check_table(len(body), layout)
        count = len(layout.structure)
        numbers = np.frombuffer(body, dtype=np.uint8, count=count)
        offsets = np.frombuffer(body, dtype="<u8", offset=count)
        if np.any((numbers >= files) & (numbers != NOT_LENT)):
            raise MalformedMessage(f"LEND names a file that is none of its {files}")
        if np.any(offsets > _LAST_OFFSET):
            raise MalformedMessage("LEND has a tensor begin where no file can reach")
        if np.any(offsets[numbers == NOT_LENT]):
            raise MalformedMessage("LEND has a place for a tensor that is in no file")
        return cls(layout, numbers, offsets.astype(np.int64))

    def encode(self) -> bytes:
        """The body."""
        return self.files.tobytes() + self.offsets.astype("<u8").tobytes()

    @cached_property
    def chunks(self) -> list[int]:
        """The chunks that are lent, in the order in which they lie in the files."""
        layout = self.layout
        usable = (self.files != NOT_LENT) | (layout.structure.nbytes == 0)
        lent = np.flatnonzero(usable[layout.leaf_rows()[: layout.large_chunks]]).tolist()
        lent += [
            chunk for chunk in range(layout.large_chunks, layout.chunks) if usable[layout.chunk_tensors(chunk)].all()
        ]
        places = list(zip(self._large_files, self._large_offsets, strict=True))
        for chunk in lent:
            if chunk >= layout.large_chunks:
                first = self.reads(chunk)[0]
                places += [(NOT_LENT, 0)] * (chunk - len(places))
                places.append((first.file, first.offset))
        return sorted(lent, key=places.__getitem__)

    def runs(self, most: int, among: RangeSet | None = None) -> list[range]:
        """The chunks that are lent, or those of them that are ``among`` these, in runs of at most ``most`` that follow
        each other, in their order; those of large tensors apart from the packed ones."""
        chunks = self.chunks if among is None else [chunk for chunk in self.chunks if chunk in among]
        return runs(chunks, most, self.layout.large_chunks)

    def ends(self, files: int) -> list[int]:
        """For each of so many files the end of the last tensor in it: what its size must reach."""
        ends = [0] * files
        stops = self.offsets + self.layout.structure.nbytes
        for file in np.unique(self.files[self.files != NOT_LENT]).tolist():
            ends[file] = int(stops[self.files == file].max())
        return ends

    def reads(self, chunk: int) -> list[Read]:
        """What has to be read for a chunk that is lent, in as few stretches as there are; nothing for its gaps."""
        layout = self.layout
        size = layout.chunk(chunk)[1]
        if chunk < layout.large_chunks:
            return [Read(self._large_files[chunk], self._large_offsets[chunk], [slice(0, size)])]
        rows = layout.chunk_tensors(chunk)
        files: list[int] = self.files[rows].tolist()
        offsets: list[int] = self.offsets[rows].tolist()
        places = layout.packed_places(chunk)
        reads: list[Read] = []
        end = (NOT_LENT, 0)
        for file, offset, place in zip(files, offsets, places, strict=True):
            if place.start == place.stop:
                continue
            if (file, offset) == end:
                reads[-1].places.append(place)
            else:
                reads.append(Read(file, offset, [place]))
            end = (file, offset + place.stop - place.start)
        return reads


def check_table(size: int, layout: Layout) -> None:
    """Raises MalformedMessage where the table of a LEND has another size than the structure asks for."""
    if size != len(layout.structure) * ENTRY:
        raise MalformedMessage(f"LEND of {size} bytes for {len(layout.structure)} names")


def runs(chunks: list[int], most: int, large_chunks: int) -> list[range]:
    """``chunks``, in their order, as runs of at most ``most`` that follow each other, those of large tensors apart from
    the packed ones."""
    found: list[range] = []
    for _, members in groupby(enumerate(chunks), key=lambda pair: (pair[1] - pair[0], pair[1] < large_chunks)):
        run = list(map(itemgetter(1), members))
        found += [range(run[at], run[min(at + most, len(run)) - 1] + 1) for at in range(0, len(run), most)]
    return found
