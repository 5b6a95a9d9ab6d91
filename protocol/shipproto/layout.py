"""Where each tensor lies in an image and how the image is cut into chunks: derived, never transmitted.

Both sides compute the same layout from the same structure, so no offset from the wire is ever believed.

An image holds, in this order and each aligned to TENSOR_ALIGNMENT:

    large tensors (LEAF_SIZE bytes or more), by name: chunks of LEAF_SIZE, the last one shorter
    small tensors, by dtype and name: packed, as many whole ones a chunk as LEAF_SIZE holds

A chunk is a contiguous range of the image, at most LEAF_SIZE long, so it is one DATA frame. A leaf (the unit
of digests) is a chunk of a large tensor or a whole small tensor; small tensors never cost a frame each.
The bytes between packed tensors are zeros and travel with their chunk.
"""

from bisect import bisect_right
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shipproto.limits import LEAF_SIZE, PAGE_SIZE, TENSOR_ALIGNMENT
from shipproto.structure import Structure


class Layout:
    """The image and the chunks of one structure. Rows are the structure's; offsets and sizes are bytes.

    offsets        i64[n], start of each tensor in the image; tied tensors share one
    size           bytes of the image, whole pages, at least one
    leaf_size      LEAF_SIZE, as the layout was made with
    chunk_starts   i64[c], start of each chunk in the image
    chunk_sizes    i64[c], bytes of each chunk, 1 to LEAF_SIZE
    large, small   rows of the untied tensors, in the image's order
    large_chunks   chunks below this number are leaves of large tensors, those from it on are packed
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.leaf_size = LEAF_SIZE
        nbytes = structure.nbytes
        rows = np.flatnonzero(structure.primary == np.arange(len(structure)))
        is_large = nbytes[rows] >= LEAF_SIZE
        self.large: npt.NDArray[np.int64] = rows[is_large]
        small = rows[~is_large]
        self.small: npt.NDArray[np.int64] = small[np.lexsort((small, structure.dtypes[small]))]

        order = np.concatenate((self.large, self.small))
        spans = -(-nbytes[order] // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        ends = np.cumsum(spans)
        self.offsets: npt.NDArray[np.int64] = np.zeros(len(structure), dtype=np.int64)
        self.offsets[order] = ends - spans
        self.offsets = self.offsets[structure.primary]
        used = int(ends[-1]) if len(ends) else 0
        self.size = max(PAGE_SIZE, -(-used // PAGE_SIZE) * PAGE_SIZE)

        leaves = -(-nbytes[self.large] // LEAF_SIZE)
        self.large_chunks = int(leaves.sum())
        self._leaf_starts: npt.NDArray[np.int64] = np.zeros(len(self.large) + 1, dtype=np.int64)
        np.cumsum(leaves, out=self._leaf_starts[1:])
        within = np.arange(self.large_chunks) - np.repeat(self._leaf_starts[:-1], leaves)
        large_starts = np.repeat(self.offsets[self.large], leaves) + within * LEAF_SIZE
        large_sizes = np.minimum(np.repeat(nbytes[self.large], leaves) - within * LEAF_SIZE, LEAF_SIZE)

        self._pack_starts = self._pack()
        first = self._pack_starts[:-1]
        packed_starts = self.offsets[self.small[first]]
        last = self.small[self._pack_starts[1:] - 1]
        packed_sizes = self.offsets[last] + nbytes[last] - packed_starts
        self.chunk_starts: npt.NDArray[np.int64] = np.concatenate((large_starts, packed_starts))
        self.chunk_sizes: npt.NDArray[np.int64] = np.concatenate((large_sizes, packed_sizes))
        # Plain lists: indexing an array element by element is five times slower, once for every frame.
        self._starts: list[int] = self.chunk_starts.tolist()
        self._sizes: list[int] = self.chunk_sizes.tolist()
        self._packs: list[int] = self._pack_starts.tolist()

    @classmethod
    def of(cls, structure: Structure) -> "Layout":
        """The layout of ``structure``, made once for as long as the structure is there."""
        kept: Layout | None = vars(structure).get("_layout")
        if kept is None or kept.leaf_size != LEAF_SIZE:
            vars(structure)["_layout"] = kept = cls(structure)
        return kept

    def _pack(self) -> npt.NDArray[np.int64]:
        """Positions in ``small`` at which each packed chunk begins, and the end. Empty tensors cost nothing."""
        filled = int(np.count_nonzero(self.structure.nbytes[self.small]))
        if not filled:
            return np.zeros(1, dtype=np.int64)
        ends = self.offsets[self.small] + self.structure.nbytes[self.small]
        starts: list[int] = self.offsets[self.small].tolist()
        stops: list[int] = ends.tolist()
        bounds = [0]
        while bounds[-1] < len(stops):
            bounds.append(bisect_right(stops, starts[bounds[-1]] + LEAF_SIZE, bounds[-1]))
        # A run of empty tensors alone at an end would make a chunk of no bytes: its neighbour takes it in.
        sizes = [stops[stop - 1] - starts[begin] for begin, stop in pairwise(bounds)]
        kept = [0, *(bounds[at + 1] for at, size in enumerate(sizes) if size)]
        kept[-1] = len(self.small)
        return np.array(kept, dtype=np.int64)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self._starts)

    @cached_property
    def wire_bytes(self) -> int:
        """Payload bytes of a whole version: the tensors' bytes and the padding between small ones."""
        return int(self.chunk_sizes.sum())

    @property
    def leaves(self) -> int:
        """Number of leaves: one for each chunk of a large tensor, one for each small tensor."""
        return self.large_chunks + len(self.small)

    def chunk(self, number: int) -> tuple[int, int]:
        """Start and size of a chunk in the image."""
        return self._starts[number], self._sizes[number]

    def span(self, chunks: range) -> tuple[int, int]:
        """Start and end in the image of chunks that follow each other, with what lies between them."""
        last = chunks[-1]
        return self._starts[chunks[0]], self._starts[last] + self._sizes[last]

    def gaps(self, chunks: range) -> list[tuple[int, int]]:
        """Start and end of whatever lies between two of these chunks, which follow each other: zeros, of no tensor."""
        pairs = ((self._starts[chunk] + self._sizes[chunk], self._starts[chunk + 1]) for chunk in chunks[:-1])
        return [(end, start) for end, start in pairs if end < start]

    def run_leaves(self, chunks: range) -> tuple[int, int]:
        """First leaf and end of the leaves of chunks that follow each other."""
        first, last = chunks[0], chunks[-1]
        return (
            first if first < self.large_chunks else self.packed_leaves(first)[0],
            last + 1 if last < self.large_chunks else self.packed_leaves(last)[1],
        )

    def chunk_tensors(self, number: int) -> npt.NDArray[np.int64]:
        """Rows of the tensors that a chunk carries bytes of, in the image's order."""
        if number < self.large_chunks:
            at = int(np.searchsorted(self._leaf_starts, number, side="right")) - 1
            return self.large[at : at + 1]
        at = number - self.large_chunks
        return self.small[self._packs[at] : self._packs[at + 1]]

    def chunk_names(self, number: int) -> list[str]:
        """Names of the tensors that a chunk carries bytes of, for messages."""
        return [self.structure.names[row] for row in self.chunk_tensors(number).tolist()]

    def packed_leaves(self, number: int) -> tuple[int, int]:
        """First leaf and end of the leaves in a packed chunk; leaf ``large_chunks + k`` is ``small[k]``."""
        at = number - self.large_chunks
        return self.large_chunks + self._packs[at], self.large_chunks + self._packs[at + 1]

    def chunk_leaves(self, number: int) -> tuple[int, int]:
        """First leaf and end of the leaves in a chunk, packed or not."""
        return (number, number + 1) if number < self.large_chunks else self.packed_leaves(number)

    def packed_places(self, number: int) -> list[slice]:
        """Where each tensor of a packed chunk lies in the chunk, in the image's order."""
        at = number - self.large_chunks
        return self._places[self._packs[at] : self._packs[at + 1]]

    def packed_gaps(self, number: int) -> list[int] | None:
        """Bytes of zeros between each tensor of a packed chunk and the next one; None where there are none at all."""
        at = number - self.large_chunks
        if not self._gappy[at]:
            return None
        rows = self.small[self._packs[at] : self._packs[at + 1]]
        starts = self.offsets[rows]
        gaps: list[int] = (starts[1:] - starts[:-1] - self.structure.nbytes[rows[:-1]]).tolist()
        return gaps

    @cached_property
    def _places(self) -> list[slice]:
        """For each small tensor its place in its chunk. Few places are different ones, and those are shared."""
        counts = np.diff(self._pack_starts)
        # Where all are empty there is no chunk, and they have no place.
        rows = self.small[: int(counts.sum())]
        starts = self.offsets[rows] - np.repeat(self.chunk_starts[self.large_chunks :], counts)
        # Both are at most LEAF_SIZE, or an empty tensor's, just beyond.
        pairs, which = np.unique(starts << 32 | (starts + self.structure.nbytes[rows]), return_inverse=True)
        different = list(map(slice, (pairs >> 32).tolist(), (pairs & 0xFFFFFFFF).tolist()))
        return list(map(different.__getitem__, which.tolist()))

    @cached_property
    def _gappy(self) -> list[bool]:
        """For each packed chunk, whether there are bytes between its tensors."""
        if not len(self._pack_starts) > 1:
            return []
        filled = np.add.reduceat(self.structure.nbytes[self.small], self._pack_starts[:-1])
        gappy: list[bool] = (filled != self.chunk_sizes[self.large_chunks :]).tolist()
        return gappy

    def tensor_chunks(self, row: int) -> tuple[int, int]:
        """First chunk and end of the chunks that carry the tensor in ``row`` (or the one it is tied to)."""
        row = int(self.structure.primary[row])
        if self.structure.nbytes[row] >= LEAF_SIZE:
            at = int(np.searchsorted(self.large, row))
            return int(self._leaf_starts[at]), int(self._leaf_starts[at + 1])
        if not self.structure.nbytes[row]:
            return 0, 0
        at = int(np.searchsorted(self._pack_starts, self._small_position[row], side="right")) - 1
        return self.large_chunks + at, self.large_chunks + at + 1

    @cached_property
    def _small_position(self) -> dict[int, int]:
        return {row: at for at, row in enumerate(self.small.tolist())}

    @cached_property
    def leaf_chunks(self) -> npt.NDArray[np.int64]:
        """i64: the chunk that each leaf lies in. Where nothing but empty tensors is small, those have none and are not
        in it."""
        packed = np.repeat(np.arange(len(self._pack_starts) - 1), np.diff(self._pack_starts))
        return np.concatenate((np.arange(self.large_chunks), self.large_chunks + packed))

    def leaves_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """i64: the leaves of the tensors in these rows, one tensor after the other."""
        firsts, counts = self.tensor_leaves()
        first, count = firsts[rows], counts[rows]
        ends = np.cumsum(count)
        leaves: npt.NDArray[np.int64] = np.repeat(first - (ends - count), count) + np.arange(int(count.sum()))
        return leaves

    def leaf_rows(self) -> npt.NDArray[np.int64]:
        """i64[leaves]: the row that each leaf belongs to."""
        return np.concatenate((np.repeat(self.large, np.diff(self._leaf_starts)), self.small))

    def tensor_leaves(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First leaf and number of leaves of every row, tied rows with those of their primary."""
        first = np.zeros(len(self.structure), dtype=np.int64)
        count = np.ones(len(self.structure), dtype=np.int64)
        first[self.large] = self._leaf_starts[:-1]
        count[self.large] = np.diff(self._leaf_starts)
        first[self.small] = self.large_chunks + np.arange(len(self.small))
        return first[self.structure.primary], count[self.structure.primary]
