"""Digests of content: leaf, tensor and version, all xxh3-128. They detect damage; they authenticate nobody.

    leaf     xxh3-128 of at most LEAF_SIZE bytes of one tensor
    tensor   its only leaf's digest, or xxh3-128 of its leaves' digests one after the other
    version  xxh3-128 of the structure's identity (names, dtypes, shapes) and every tensor's digest, by name

So a version digest depends on content alone, not on chunks, packing, lanes, order, ties, label or metadata.
xxh3-128: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash
from crc32c import crc32c

from shipproto.layout import Layout
from shipproto.limits import DIGEST_SIZE

leaf_digest: Final = xxhash.xxh3_128_digest
"""The digest of one leaf's bytes. Lets go of the GIL."""

_BLOCK: Final = 128 * 1024
"""What stays in a core's L2 cache from the first look at it to the second; 512 KiB do not. A fifth faster."""


def digest_and_crc(leaf: memoryview) -> tuple[bytes, int]:
    """``leaf_digest`` and the CRC32C of its bytes, which go through the caches once for both."""
    hasher, crc = xxhash.xxh3_128(), 0
    for start in range(0, len(leaf), _BLOCK):
        block = leaf[start : start + _BLOCK]
        hasher.update(block)
        crc = crc32c(block, crc)
    return hasher.digest(), crc


EMPTY: Final = leaf_digest(b"")


class LeafDigests:
    """The leaf digests of one version as they become known, and what follows from them.

    Different chunks may be recorded by several threads at once.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._digests: npt.NDArray[np.uint8] = np.zeros((layout.leaves, DIGEST_SIZE), dtype=np.uint8)
        self._flat = self._digests.reshape(-1).data if layout.leaves else memoryview(bytearray())
        self._known = bytearray(layout.leaves)
        # Empty tensors have no bytes and so no chunk that would bring their digest.
        for at in np.flatnonzero(layout.structure.nbytes[layout.small] == 0).tolist():
            leaf = layout.large_chunks + at
            self._flat[leaf * DIGEST_SIZE : (leaf + 1) * DIGEST_SIZE] = EMPTY
            self._known[leaf] = 1

    @property
    def complete(self) -> bool:
        """Whether every leaf's digest is known."""
        return self._known.find(0) < 0

    def knows(self, chunk: int) -> bool:
        """Whether every leaf of ``chunk`` has a digest."""
        if chunk < self.layout.large_chunks:
            return bool(self._known[chunk])
        first, last = self.layout.packed_leaves(chunk)
        return self._known.find(0, first, last) < 0

    def record(self, chunk: int, content: memoryview) -> int | None:
        """Digest a chunk's decoded bytes and remember the result.

        ``content`` is the chunk as it lies in the image. Returns None, or the row of the first tensor
        whose digest was known already and is another now: its bytes have changed.
        """
        first, last = self.layout.chunk_leaves(chunk)
        return self.note(first, last, leaf_digests(self.layout, chunk, content))

    def note(self, first: int, last: int, digests: bytes) -> int | None:
        """Remember the digests of leaves [first, last), one after the other.

        None, or the row of the first tensor whose digest was known already and is another now: its bytes have changed.
        """
        place = self._flat[first * DIGEST_SIZE : last * DIGEST_SIZE]
        changed = None
        if self._known.find(1, first, last) >= 0 and place != digests:
            found = np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_SIZE)
            known = np.frombuffer(self._known[first:last], dtype=np.uint8) == 1
            differing = np.flatnonzero(known & (found != self._digests[first:last]).any(axis=1))
            if len(differing):
                changed = int(self.layout.leaf_rows()[first + int(differing[0])])
        place[:] = digests
        self._known[first:last] = bytes([1]) * (last - first)
        return changed

    def adopt(self, chunks: range, other: "LeafDigests") -> None:
        """Take the digests of these chunks from another version of the same layout, whose bytes they have."""
        self.note(*self.layout.run_leaves(chunks), other.of_chunks(chunks))

    def take(self, leaves: npt.NDArray[np.int64], other: "LeafDigests", others: npt.NDArray[np.int64]) -> None:
        """Take the digests of these leaves from another version, of any layout, whose leaves ``others`` have their
        bytes."""
        self._digests[leaves] = other.leaves[others]
        np.frombuffer(self._known, dtype=np.uint8)[leaves] = 1

    def differing(self, other: "LeafDigests") -> npt.NDArray[np.bool_]:
        """bool[chunks]: which chunks have other bytes in another version of the same layout. Both must be complete."""
        places = self.layout.leaf_chunks
        unequal = (self._digests != other.leaves).any(axis=1)[: len(places)]
        found = np.zeros(self.layout.chunks, dtype=np.bool_)
        found[places[unequal]] = True
        return found

    def of_chunks(self, chunks: range) -> bytes:
        """The digests of the leaves of chunks that follow each other, one after the other."""
        first, last = self.layout.run_leaves(chunks)
        return bytes(self._flat[first * DIGEST_SIZE : last * DIGEST_SIZE])

    def chunk_digest(self, chunk: int) -> bytes:
        """What stands for a chunk whose leaves are known: of a large tensor its leaf's digest, else the digest of its
        leaves' digests."""
        leaves = self.of_chunks(range(chunk, chunk + 1))
        return leaves if chunk < self.layout.large_chunks else leaf_digest(leaves)

    def chunk_digests(self) -> npt.NDArray[np.uint8]:
        """u8[chunks, 16], of every chunk. Every leaf must be known."""
        if not self.complete:
            raise ValueError("a leaf's digest is not known yet")
        large = self.layout.large_chunks
        packed = b"".join(map(self.chunk_digest, range(large, self.layout.chunks)))
        return np.concatenate((self._digests[:large], np.frombuffer(packed, dtype=np.uint8).reshape(-1, DIGEST_SIZE)))

    def forget(self, chunk: int) -> None:
        """Take back what was recorded for ``chunk``, so that it can be received again."""
        if chunk < self.layout.large_chunks:
            self._known[chunk] = 0
            return
        first, last = self.layout.packed_leaves(chunk)
        self._known[first:last] = bytes(last - first)

    @property
    def leaves(self) -> npt.NDArray[np.uint8]:
        """u8[leaves, 16], the digest of each leaf; zeros where one is not known yet."""
        return self._digests

    @property
    def encoded(self) -> bytes:
        """The digests of all leaves, one after the other; zeros where one is not known yet."""
        return bytes(self._flat)

    def tensor_digests(self) -> npt.NDArray[np.uint8]:
        """u8[n, 16], one row for each name of the structure, tied ones included. Every leaf must be known."""
        if not self.complete:
            raise ValueError("a leaf's digest is not known yet")
        first, count = self.layout.tensor_leaves()
        if not len(first):
            return np.zeros((0, DIGEST_SIZE), dtype=np.uint8)
        digests = self._digests[first]
        several = np.flatnonzero(count > 1)
        starts = first[several] * DIGEST_SIZE
        places = map(slice, starts.tolist(), (starts + count[several] * DIGEST_SIZE).tolist())
        joined = b"".join(map(xxhash.xxh3_128_digest, map(self._flat.__getitem__, places)))
        digests[several] = np.frombuffer(joined, dtype=np.uint8).reshape(-1, DIGEST_SIZE)
        return digests

    def version_digest(self) -> bytes:
        """16 bytes that stand for every name, dtype, shape and byte of the version."""
        return version_digest(self.layout, self.tensor_digests())


def leaf_digests(layout: Layout, chunk: int, content: memoryview) -> bytes:
    """The digests of a chunk's leaves, 16 bytes each; ``content`` is the chunk as it lies in the image."""
    if chunk < layout.large_chunks:
        return leaf_digest(content)
    # Nothing here is Python code for each tensor: that would cost more than to digest it.
    return b"".join(map(leaf_digest, map(content.__getitem__, layout.packed_places(chunk))))


def version_digest(layout: Layout, tensor_digests: npt.NDArray[np.uint8]) -> bytes:
    """The version digest for given tensor digests, u8[n, 16] in the structure's order."""
    hasher = layout.structure.identity_hash()
    hasher.update(np.ascontiguousarray(tensor_digests).data)
    return hasher.digest()


def digest_image(layout: Layout, image: memoryview) -> LeafDigests:
    """The digests of a whole image; one pass over its bytes."""
    digests = LeafDigests(layout)
    for chunk in range(layout.chunks):
        start, size = layout.chunk(chunk)
        digests.record(chunk, image[start : start + size])
    return digests
