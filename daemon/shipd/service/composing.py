"""The next version of a model out of its current one and the tensors of a partial push.

    receive into an image of its own -> ties agree -> digests -> copy both into a slot -> digest what has changed there

On the wire nothing is known of the others; what becomes of them is decided here.
"""

import asyncio
import contextlib
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.images.slots import Slot
from shipd.service.host import Host
from shipd.service.models import Model
from shipproto.digests import LeafDigests
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.limits import TENSOR_ALIGNMENT
from shipproto.structure import rows_in

_COPY_BYTES: Final = 4 * 1024 * 1024
"""Bytes that are copied without a look at whether it is still wanted: a millisecond, or a few with fresh pages."""


class Part:
    """Where the tensors of a partial offer lie in the model. Pure; the offer has been found to fit.

    offered, resident  layouts of what is sent, and of the model
    """

    def __init__(self, offered: Layout, resident: Layout) -> None:
        self.offered = offered
        self.resident = resident
        structure, whole = offered.structure, resident.structure
        self._rows = rows_in(structure.names, whole)
        groups, first, which = np.unique(whole.primary[self._rows], return_index=True, return_inverse=True)
        self._into: npt.NDArray[np.int64] = groups
        """Rows of the model whose bytes are replaced."""
        self._from: npt.NDArray[np.int64] = structure.primary[first]
        """For each of them the offered row that has the new ones."""
        self._chosen: npt.NDArray[np.int64] = self._from[which]
        """For each offered row the one that is taken for it: another where the model ties what was offered apart."""

    def unequal(self, sent: LeafDigests) -> list[tuple[str, str]]:
        """Pairs of offered names that the model ties, and that were sent with other bytes each."""
        names = self.offered.structure.names
        digests = sent.tensor_digests()
        rows = np.flatnonzero((digests != digests[self._chosen]).any(axis=1))
        return [(names[self._chosen[row]], names[row]) for row in rows.tolist()]

    def current(self, base: LeafDigests) -> LeafDigests | None:
        """Digests, in the layout of what is sent, of what the model has now.

        None where it has two values for what is sent as one tensor, so that it cannot be what is sent.
        """
        digests = base.tensor_digests()[self._rows]
        if bool((digests != digests[self.offered.structure.primary]).any()):
            return None
        primary = np.unique(self.offered.structure.primary)
        found = LeafDigests(self.offered)
        found.take(self.offered.leaves_of(primary), base, self.resident.leaves_of(self._rows[primary]))
        return found

    def composed(self, base: LeafDigests, sent: LeafDigests) -> LeafDigests:
        """The digests of the next version: those of ``base``, and of what is ``sent``."""
        every = np.arange(self.resident.leaves)
        found = LeafDigests(self.resident)
        found.take(every, base, every)
        found.take(self.resident.leaves_of(self._into), sent, self.offered.leaves_of(self._from))
        return found

    def replaced(self) -> npt.NDArray[np.bool_]:
        """bool[chunks]: which chunks of the model have bytes of what is sent."""
        leaves, places = self.resident.leaves_of(self._into), self.resident.leaf_chunks
        found = np.zeros(self.resident.chunks, dtype=np.bool_)
        found[places[leaves[leaves < len(places)]]] = True
        return found

    def moves(self) -> list[tuple[int, int, int]]:
        """Start in the model's image, start in the image of what is sent, and bytes: what is to be copied.

        Neighbours in both are one move, with the zeros between them: thousands of small tensors are few.
        """
        into, sizes = self.resident.offsets[self._into], self.resident.structure.nbytes[self._into]
        filled = np.flatnonzero(sizes)
        order = filled[np.argsort(into[filled])]
        into, sizes, source = into[order], sizes[order], self.offered.offsets[self._from[order]]
        if not len(order):
            return []
        ends = into + sizes
        gaps = into[1:] - ends[:-1]
        follows = (gaps < TENSOR_ALIGNMENT) & (np.diff(source) == np.diff(into))
        begins = np.flatnonzero(np.concatenate(([True], ~follows)))
        last = np.append(begins[1:], len(order)) - 1
        return list(
            zip(into[begins].tolist(), source[begins].tolist(), (ends[last] - into[begins]).tolist(), strict=True)
        )


class Composing:
    """Of one partial push: the image that it is received into, and the work that follows. Belongs to the loop.

    Raises TransferError where there is no room for that image.
    """

    def __init__(self, host: Host, model: Model, part: Part) -> None:
        self._host = host
        self._model = model
        self._closed = threading.Event()
        self._running: asyncio.Future[None] | None = None
        self.part = part
        memory = self._memory = host.images.make_image(model, part.offered.size)
        self.image = memory.view
        host.background(lambda stop: memory.mapping.populate(lambda: stop() or self._closed.is_set()))

    async def digests(self, base: LeafDigests, sent: LeafDigests) -> tuple[LeafDigests, bytes]:
        """Those of the next version. Raises TransferError where tensors that the model ties were sent with other bytes
        each."""
        unequal = await self._host.work(self.part.unequal, sent)
        if unequal:
            raise _ties_differ(self._model.name, unequal)
        digests = await self._host.work(self.part.composed, base, sent)
        return digests, await self._host.work(digests.version_digest)

    async def compose(self, base: Slot, slot: Slot, digests: LeafDigests) -> None:
        """Fill ``slot`` with the next version, which has these ``digests``; ``base`` has the current one.

        Raises TransferError where it has others then: the memory does not keep what is written to it.
        """
        work = asyncio.ensure_future(self._host.work(self._compose, base, slot, digests))
        self._running = work
        # What runs on the thread cannot be cancelled: end() waits for it.
        await asyncio.shield(work)

    async def end(self) -> None:
        """Until what it began writes into no image any more, which takes a moment at most."""
        self._closed.set()
        while self._running is not None and not self._running.done():
            # Whoever wants this over sooner would have images given back too soon.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({self._running})
        if self._running is not None and not self._running.cancelled():
            # Who waited for it has been told, or has been cancelled.
            self._running.exception()

    def free(self) -> None:
        """Give its image back, into which nothing may be written any more."""
        self.image = memoryview(b"")
        self._host.images.free_image(self._memory)

    # --- on a thread ---------------------------------------------------------------------------------------

    def _compose(self, base: Slot, slot: Slot, digests: LeafDigests) -> None:
        part, layout = self.part, self.part.resident
        assert base.digests is not None
        replaced = part.replaced()
        # Chunks of a large tensor that is sent are overwritten as a whole; others have neighbours that are kept.
        needed = ~replaced
        needed[layout.large_chunks :] = True
        if slot.before is not None:
            needed &= replaced | base.digests.differing(slot.before)
        target = np.frombuffer(slot.memory.view, dtype=np.uint8)
        current = np.frombuffer(base.memory.view, dtype=np.uint8)
        for start, size in _runs(layout, needed):
            self._copy(target[start : start + size], current[start : start + size])
        received = np.frombuffer(self._memory.view, dtype=np.uint8)
        for start, source, size in part.moves():
            self._copy(target[start : start + size], received[source : source + size])
        for chunk in np.flatnonzero(replaced).tolist():
            if self._closed.is_set():
                return
            start, size = layout.chunk(chunk)
            changed = digests.record(chunk, slot.memory.view[start : start + size])
            if changed is not None:
                name = layout.structure.names[changed]
                raise TransferError(
                    AbortCode.INTEGRITY,
                    f"tensor {name!r} is another in the next version of model {self._model.name!r} than was received: "
                    "the daemon's memory is faulty",
                    tensor=name,
                )

    def _copy(self, target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        """Piece by piece, as long as it is wanted. numpy lets go of the GIL while it copies."""
        for at in range(0, len(source), _COPY_BYTES):
            if self._closed.is_set():
                return
            np.copyto(target[at : at + _COPY_BYTES], source[at : at + _COPY_BYTES])


def _runs(layout: Layout, chunks: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and bytes, in the image, of each run of ``chunks``, with the zeros between them."""
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], chunks, [False])).astype(np.int8))).reshape(-1, 2)
    spans = [layout.span(range(first, stop)) for first, stop in bounds.tolist()]
    return [(start, end - start) for start, end in spans]


def _ties_differ(model: str, unequal: list[tuple[str, str]]) -> TransferError:
    one, other = unequal[0]
    more = f", and {len(unequal) - 1} more pairs of its tensors" if len(unequal) > 1 else ""
    return TransferError(
        AbortCode.MISMATCH,
        f"model {model!r} ties {one!r} and {other!r}{more}, but this push has other values for each: send one of them, "
        "or equal values",
        tensor=other,
        details=tuple(f"tied: {first} and {second} have other values" for first, second in unequal),
    )
