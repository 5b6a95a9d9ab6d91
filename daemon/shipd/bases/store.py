"""The versions that this process has pushed and that were committed, of all its models, within a bound of memory.

One store is shared by all clients of a process: whoever pushes one model to several daemons keeps it once.
"""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Final

import numpy as np

from shipd.bases.base import MAX_BASES, Base, BaseLost
from shipd.bases.history import History, KeptVersion, rounded
from shipd.errors import ShipError
from shipd.units import format_bytes
from shipproto.digests import LeafDigests, leaf_digests
from shipproto.errors import ProtocolError
from shipproto.layout import Layout
from shipproto.limits import DIGEST_SIZE
from shipproto.sources import sources
from shipproto.structure import Structure

DEFAULT_LIMIT: Final = 8 << 30
"""Bytes that all models of a process may take."""

_PATCH_SHARE: Final = 0.25
"""Bytes of patches for each byte of a model: eight steps of reinforcement learning take less."""

_MOST_ANSWERS: Final = 64
"""Pairs of structures of which is remembered whether one can be made from the other."""


class VersionStore:
    """A ``Bases``. Usable on any thread.

    limit         bytes in all, images, patches and digests counted; 0 keeps nothing
    versions      versions of a model, the newest included; at most MAX_BASES
    patch_share   bytes of patches for each byte of a model
    """

    def __init__(
        self, *, limit: int = DEFAULT_LIMIT, versions: int = MAX_BASES, patch_share: float = _PATCH_SHARE
    ) -> None:
        if not 1 <= versions <= MAX_BASES or limit < 0 or patch_share < 0:
            raise ValueError(f"{versions} versions, {limit} bytes, a share of {patch_share} for patches")
        self._limit = limit
        self._versions = versions
        self._patch_share = patch_share
        self._lock = threading.Lock()
        """Taken inside a history's, never around it."""
        self._histories: dict[tuple[str, bytes], History] = {}
        """By model and structure, the least recently used first."""
        self._used = 0
        self._answers: dict[tuple[bytes, bytes], bool] = {}
        _stores.add(self)

    @property
    def limit(self) -> int:
        """Bytes that may be taken in all. Set to less, the least recently used models are dropped at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"a limit of {limit} bytes")
        with self._lock:
            self._limit = limit
            self._make_room(0)

    @property
    def memory_used(self) -> int:
        """Bytes taken: images as if every page had been touched, patches, digests of leaves."""
        return self._used

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            for history in list(self._histories.values()):
                self._drop(history)

    # --- asking --------------------------------------------------------------------------------------------

    def digests(self, model: str, offered: Structure) -> tuple[bytes, ...]:
        """See ``Bases.digests``: of the model's own versions newest first, then of others, which may be the same under
        another name.
        """
        with self._lock:
            histories = list(reversed(self._histories.values()))
        histories.sort(key=lambda history: history.model != model)
        found: dict[bytes, None] = {}
        for history in histories:
            if len(found) < MAX_BASES and self._can_be_made(history.layout.structure, offered):
                found.update(dict.fromkeys(history.digests))
        return tuple(found)[:MAX_BASES]

    def open(self, model: str, layout: Layout, digest: bytes) -> Base | None:
        """See ``Bases.open``."""
        with self._lock:
            history = self._holding(model, layout.structure, digest)
            if history is None:
                return None
            self._touch(history)
        return KeptVersion(history, digest)

    def _holding(self, model: str, structure: Structure, digest: bytes) -> History | None:
        """Where a version is, the model's own history first."""
        own = self._histories.get((model, structure.digest))
        others = (kept for kept in self._histories.values() if kept.layout.structure.digest == structure.digest)
        for history in (own, *others):
            if history is not None and digest in history.digests:
                return history
        return None

    def _can_be_made(self, wanted: Structure, offered: Structure) -> bool:
        """Whether everything in ``wanted`` is offered. Remembered: 20,000 names take milliseconds."""
        pair = (wanted.digest, offered.digest)
        known = self._answers.get(pair)
        if known is None:
            known = obtainable(wanted, offered)
            if len(self._answers) >= _MOST_ANSWERS:
                self._answers = {}
            self._answers[pair] = known
        return known

    # --- taking in -----------------------------------------------------------------------------------------

    def keep(self, model: str, digests: LeafDigests, read_chunk: Callable[[int], memoryview]) -> str | None:
        """A receiver has committed a version of ``model``: keep it.

        digests      of what was sent; all of them known
        read_chunk   gives the bytes of a chunk as they lie in the image, valid until its next call; is asked for
                     chunks that differ from the version before, in their order
        Returns why the version is not kept, as the end of a sentence; None where it is. What is read is digested, and
        the model is dropped where that is not what was sent, or reading raises: a ShipError or an OSError is the reason
        then, anything else is raised. Does not wait where another thread is taking in a version of the model.

        Takes four times as long as a memcpy where one word in 200 has changed; lets go of the GIL.
        """
        layout = digests.layout
        digest, leaves = digests.version_digest(), digests.encoded
        with self._lock:
            kept = self._holding(model, layout.structure, digest)
            if kept is not None:
                self._touch(kept)
                return None
            started = self._start(model, layout, len(leaves))
        if isinstance(started, str):
            return started
        try:
            started.begin()
            self._take_in(started, leaves, read_chunk)
            started.finish(digest, leaves)
        except (BaseLost, ShipError, OSError) as error:
            with self._lock:
                self._drop(started)
            return str(error)
        except BaseException:
            with self._lock:
                self._drop(started)
            raise
        with self._lock:
            started.advancing = False
        return None

    def _start(self, model: str, layout: Layout, leaves: int) -> History | str:
        """The history that the version is taken into, marked as busy; or why there is none."""
        size = layout.size + leaves
        if not self._limit:
            return "keeping versions in memory is switched off"
        if size > self._limit:
            return f"it has {format_bytes(size)} and at most {format_bytes(self._limit)} are kept in memory"
        key = (model, layout.structure.digest)
        history = self._histories.get(key)
        if history is not None and history.advancing:
            return "another push of the model is just being kept"
        if history is None:
            self._make_room(size)
            try:
                history = History(
                    model,
                    layout,
                    versions=self._versions,
                    most_patches=int(self._patch_share * layout.size),
                    charge=self._charge,
                )
            except OSError as error:
                return f"there is no memory for {format_bytes(size)}: {error.strerror or error}"
            history.charged = size
            self._used += size
            self._histories[key] = history
        history.advancing = True
        self._touch(history)
        return history

    def _take_in(self, history: History, leaves: bytes, read_chunk: Callable[[int], memoryview]) -> None:
        layout = history.layout
        held = history.leaves
        # What is compared, digested and kept are the same bytes, whatever happens to the source meanwhile.
        copy = np.zeros(rounded(layout.leaf_size), dtype=np.uint8)
        for chunk in range(layout.chunks):
            first, last = layout.chunk_leaves(chunk)
            place = slice(first * DIGEST_SIZE, last * DIGEST_SIZE)
            if held[place] == leaves[place]:
                continue
            size = layout.chunk(chunk)[1]
            copy[size : rounded(size)] = 0
            np.copyto(copy[:size], np.frombuffer(read_chunk(chunk), dtype=np.uint8))
            if leaf_digests(layout, chunk, copy.data[:size]) != leaves[place]:
                name = layout.chunk_names(chunk)[0]
                raise BaseLost(f"tensor {name!r} has changed since it was sent")
            history.update(chunk, copy[: rounded(size)])

    # --- memory --------------------------------------------------------------------------------------------

    def _charge(self, history: History, size: int) -> bool:
        """Patches of ``size`` bytes were made, or dropped where it is negative; whether all that is kept fits."""
        with self._lock:
            if not history.closed:
                history.charged += size
                self._used += size
            return self._used <= self._limit

    def _make_room(self, size: int) -> None:
        """Drop the least recently used until so many bytes more are within the limit."""
        for history in list(self._histories.values()):
            if self._used + size <= self._limit:
                return
            self._drop(history)

    def _drop(self, history: History) -> None:
        if history.closed:
            return
        history.close()
        self._used -= history.charged
        del self._histories[history.model, history.layout.structure.digest]

    def _touch(self, history: History) -> None:
        key = (history.model, history.layout.structure.digest)
        self._histories[key] = self._histories.pop(key)

    def forget_after_fork(self) -> None:
        """In a child: nothing is kept here, and whoever held a lock is not here either."""
        self._lock = threading.Lock()
        for history in self._histories.values():
            history.forget_locks()
        self._histories = {}
        self._used = 0


def obtainable(wanted: Structure, offered: Structure) -> bool:
    """Whether a version of ``wanted`` can be made from one of ``offered``."""
    try:
        sources(offered, wanted)
    except ProtocolError:
        return False
    return True


_stores: Final["weakref.WeakSet[VersionStore]"] = weakref.WeakSet()


def _after_fork() -> None:
    for store in _stores:
        store.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

kept_versions: Final = VersionStore()
"""The process's own."""
