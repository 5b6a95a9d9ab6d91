"""One model's last committed versions in memory: the newest as an image, older ones as patches back to them.

    image = newest --undo--> the one before --undo--> the one before that ...

An undo is a patch for each chunk that differs. While a version is taken in, the image is already new up to some chunk
and old behind it; the undo of the version before grows along with it, so every version kept can be read all the time.

Memory is private to the process and wiped in its children: a fork neither copies it page by page when the next version
is taken in, nor leaves a child with a base that it might use.
"""

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.bases.base import BaseLost, check_room, run_range
from shipd.bases.patch import SPAN, apply_patch, make_patch
from shipproto.layout import Layout

_MADV_WIPEONFORK: Final = 18
"""Linux 4.14. Not in Python's mmap module."""


class _Version:
    """A version that is not the image, or not for long: its digest, and what makes it of the next newer one.

    undo    for each chunk a patch, or None where they are the same
    """

    __slots__ = ("digest", "size", "undo")

    def __init__(self, digest: bytes, chunks: int) -> None:
        self.digest = digest
        self.undo: list[bytes | None] = [None] * chunks
        self.size = 0
        """Bytes of the patches."""


class History:
    """The versions of one model. Many may read while one takes in the next.

    versions       how many are kept, the newest included
    most_patches   bytes of patches that are kept
    charge         is told of bytes of patches taken and given back; whether they may be kept
    Raises OSError where there is no memory for an image.
    """

    def __init__(
        self, model: str, layout: Layout, *, versions: int, most_patches: int, charge: Callable[["History", int], bool]
    ) -> None:
        self.model = model
        self.layout = layout
        self.leaves = b""
        """Digests of the newest version's leaves, one after the other; empty while there is none."""
        self.charged = 0
        self.advancing = False
        """These two are the store's, under its lock."""
        self._most = versions
        self._most_patches = most_patches
        self._charge = charge
        self._lock = threading.Lock()
        self._image: npt.NDArray[np.uint8] | None = _memory(layout.size)
        self._versions: tuple[_Version, ...] = ()
        self._patches = 0
        self._writes = 0

    @property
    def closed(self) -> bool:
        """Whether it was dropped."""
        return self._image is None

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Of the versions that can be read, newest first. While one is taken in, it is not among them."""
        return () if self.closed else tuple(version.digest for version in self._versions)

    def close(self) -> None:
        """Give the memory back, once nobody is reading. Readers and whoever takes in a version are told."""
        self._image = None
        self._versions = ()

    def forget_locks(self) -> None:
        """After a fork, in the child: whoever held the lock is not here."""
        self._lock = threading.Lock()
        self.close()

    # --- reading -------------------------------------------------------------------------------------------

    def read(self, digest: bytes, first: int, count: int, into: memoryview) -> None:
        """See ``Base.read``, of the version with this digest."""
        start, stop = run_range(self.layout, first, count)
        check_room(into, stop - start)
        out = np.frombuffer(into, dtype=np.uint8)
        with self._lock:
            image, patches = self._plan(digest, first, count)
            writes = self._writes
        # Without the lock, so that several threads encode at the speed of several.
        np.copyto(out, image[start:stop])
        with self._lock:
            if self._writes != writes:
                # Another version was being written meanwhile, perhaps here.
                image, patches = self._plan(digest, first, count)
                np.copyto(out, image[start:stop])
        for place, patch in patches:
            apply_patch(patch, out[place])

    def _plan(self, digest: bytes, first: int, count: int) -> tuple[npt.NDArray[np.uint8], list[tuple[slice, bytes]]]:
        """The image, and the patches that lead from it to a version, in order and with their places in the run."""
        image, versions = self._image, self._versions
        at = next((at for at, version in enumerate(versions) if version.digest == digest), None)
        if image is None or at is None:
            raise BaseLost(f"version {digest.hex()} is no longer kept")
        return image, list(self._patches_of(versions[: at + 1], first, count))

    def _patches_of(self, versions: tuple[_Version, ...], first: int, count: int) -> Iterator[tuple[slice, bytes]]:
        start = self.layout.chunk(first)[0]
        for version in versions:
            for chunk, patch in enumerate(version.undo[first : first + count], first):
                if patch is not None:
                    begin, size = self.layout.chunk(chunk)
                    yield slice(begin - start, begin - start + size), patch

    # --- the next version ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """A version is going to be taken in: make room for it among those that are kept."""
        with self._lock:
            while len(self._versions) >= self._most:
                self._drop_oldest()

    def update(self, chunk: int, content: npt.NDArray[np.uint8]) -> None:
        """The new version has this chunk. Raises BaseLost where the history was dropped meanwhile.

        content   u8[k], the chunk and zeros up to a multiple of SPAN
        """
        start, size = self.layout.chunk(chunk)
        image = self._image
        if image is None:
            raise BaseLost("dropped while a version was taken in")
        place = image[start : start + len(content)]
        # Nobody else writes, so the old content may be looked at without the lock.
        patch = make_patch(content, place, size) if self._versions else None
        with self._lock:
            if self._image is None:
                raise BaseLost("dropped while a version was taken in")
            if patch is not None and self._versions:
                self._keep(chunk, patch)
            self._writes += 1
            np.copyto(place, content)

    def _keep(self, chunk: int, patch: bytes) -> None:
        version = self._versions[0]
        version.undo[chunk] = patch
        version.size += len(patch)
        self._patches += len(patch)
        fits = self._charge(self, len(patch))
        while self._versions and not (fits and self._patches <= self._most_patches):
            fits = self._drop_oldest()

    def _drop_oldest(self) -> bool:
        size = self._versions[-1].size
        self._versions = self._versions[:-1]
        self._patches -= size
        return self._charge(self, -size)

    def finish(self, digest: bytes, leaves: bytes) -> None:
        """Every chunk that differs has been updated: the image is the version with this digest. Raises BaseLost."""
        with self._lock:
            if self._image is None:
                raise BaseLost("dropped while a version was taken in")
            self.leaves = leaves
            self._versions = (_Version(digest, self.layout.chunks), *self._versions)


class KeptVersion:
    """A ``Base`` out of a history. Keeps nothing alive: a version that is dropped is lost to its readers."""

    def __init__(self, history: History, digest: bytes) -> None:
        self.digest = digest
        self._history: History | None = history

    def read(self, first: int, count: int, into: memoryview) -> None:
        """See ``Base.read``."""
        history = self._history
        if history is None:
            raise BaseLost("the base is closed")
        history.read(self.digest, first, count, into)

    def close(self) -> None:
        """See ``Base.close``."""
        self._history = None


def rounded(size: int) -> int:
    """Bytes of a chunk as ``History.update`` takes it."""
    return -(-size // SPAN) * SPAN


def _memory(size: int) -> npt.NDArray[np.uint8]:
    """``size`` zero bytes that are taken as they are touched."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), _MADV_WIPEONFORK):
        # Other systems have neither; then a fork copies what is written afterwards, and the child drops it too.
        if advice is not None and hasattr(memory, "madvise"):
            with contextlib.suppress(OSError):
                memory.madvise(advice)
    # The array keeps the mapping: it is unmapped with the last that reads it.
    return np.frombuffer(memory, dtype=np.uint8)
