"""A base out of a checkpoint that the user names: the file or the state dict of an older version."""

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from shipd.bases.base import Base, BaseLost, check_room, run_range
from shipd.checkpoints.chunks import SourceChunks
from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.source import Source, open_source
from shipd.checkpoints.waiting import ACT_SECONDS, awaited
from shipd.errors import ShipError
from shipproto.digests import LeafDigests, version_digest
from shipproto.errors import ProtocolError
from shipproto.layout import Layout
from shipproto.sources import sources
from shipproto.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor, nn


class CheckpointBases:
    """A ``Bases`` with one version: a source's tensors, in whatever layout a receiver rules. Takes over ``source``.

    The version's digest depends on the structure that rules, the tensors' do not: those are made once, in one pass over
    the source when they are first asked for. Usable on any thread. Nothing here is read after ``close``.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._tensor_digests: npt.NDArray[np.uint8] | None = None

    @classmethod
    def of(
        cls,
        checkpoint: "str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module",
        *,
        key: str | None = None,
        fetching: Fetching | None = None,
    ) -> Self:
        """Of whatever ``open_source`` takes; raises what it raises."""
        return cls(open_source(checkpoint, key=key, fetching=fetching))

    def digests(self, model: str, offered: Structure) -> tuple[bytes, ...]:  # noqa: ARG002  a checkpoint is no model's
        """See ``Bases.digests``; of the offered structure itself, since no other is known here.

        Makes a pass over the source. Raises the source's ShipErrors.
        """
        placed = self._place(Layout.of(offered))
        return () if placed is None else (placed[1],)

    def open(self, model: str, layout: Layout, digest: bytes) -> Base | None:  # noqa: ARG002  as above
        """See ``Bases.open``; None too where the source is known to have changed. Raises the source's ShipErrors."""
        placed = self._place(layout)
        if placed is None or placed[1] != digest or self._source.changed():
            return None
        return CheckpointBase(SourceChunks(layout, placed[0], self._source), digest)

    def _place(self, layout: Layout) -> tuple[npt.NDArray[np.int64], bytes] | None:
        """For each row of the layout the source's, and the version's digest; None where something is not in it."""
        try:
            rows, equal = sources(self._source.structure, layout.structure)
        except ProtocolError:
            return None
        digests = self._digested()
        if any(bytes(digests[one]) != bytes(digests[other]) for one, other in equal):
            # What the layout ties has different values here.
            return None
        return rows, version_digest(layout, digests[rows])

    def _digested(self) -> npt.NDArray[np.uint8]:
        """u8[n, 16], the digest of each of the source's tensors."""
        with self._lock:
            if self._tensor_digests is None:
                layout = Layout.of(self._source.structure)
                chunks = SourceChunks(layout, np.arange(len(layout.structure), dtype=np.int64), self._source)
                digests = LeafDigests(layout)
                act, acted = awaited(), time.monotonic()
                for chunk in range(layout.chunks):
                    if act is not None and time.monotonic() - acted >= ACT_SECONDS:
                        # It may take minutes, and nobody may want it any more.
                        act()
                        acted = time.monotonic()
                    digests.record(chunk, chunks.read(chunk))
                self._tensor_digests = digests.tensor_digests()
            return self._tensor_digests

    def close(self) -> None:
        """Close the source. Harmless when repeated."""
        self._source.close()


class CheckpointBase:
    """A ``Base`` that reads from a source, which must not change. Ends with the ``CheckpointBases`` that made it."""

    def __init__(self, chunks: SourceChunks, digest: bytes) -> None:
        self.digest = digest
        self._chunks: SourceChunks | None = chunks

    def read(self, first: int, count: int, into: memoryview) -> None:
        """See ``Base.read``."""
        chunks = self._chunks
        if chunks is None:
            raise BaseLost("the base is closed")
        layout = chunks.layout
        start, stop = run_range(layout, first, count)
        check_room(into, stop - start)
        out = np.frombuffer(into, dtype=np.uint8)
        end = 0
        for chunk in range(first, first + count):
            begin, size = layout.chunk(chunk)
            begin -= start
            out[end:begin] = 0
            end = begin + size
            try:
                content = chunks.read(chunk)
            except (ShipError, OSError, ValueError) as error:
                raise BaseLost(f"the base cannot be read any more: {error}") from error
            np.copyto(out[begin:end], np.frombuffer(content, dtype=np.uint8))

    def close(self) -> None:
        """See ``Base.close``. The source stays open."""
        self._chunks = None
