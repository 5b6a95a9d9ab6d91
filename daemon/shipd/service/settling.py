"""In which layout, and in whose images, a push is received: settled before its first chunk."""

import asyncio
from collections.abc import Callable
from functools import partial

from shipd.images.slots import SlotPool
from shipd.matching.differences import mismatches, summarise
from shipd.service.composing import Part
from shipd.service.config import table
from shipd.service.host import Host
from shipd.service.models import NOTHING, Model
from shipd.units import format_bytes
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.messages import Offer
from shipproto.receiver import Receiver
from shipproto.structure import Structure


class Settling:
    """Of one push. ``flush`` writes what the receiver has to say. Both raise TransferError where it cannot be."""

    def __init__(self, host: Host, model: Model, receiver: Receiver, flush: Callable[[], None]) -> None:
        self._host = host
        self._model = model
        self._receiver = receiver
        self._flush = flush
        self._encoded: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def arrived(self, encoded: bytes) -> None:
        """The offered structure has come."""
        if not self._encoded.done():
            self._encoded.set_result(encoded)

    async def layout(self, offer: Offer) -> Layout:
        """The layout to receive in: the resident model's, where there is one."""
        pool = self._model.pool
        if pool is not None and pool.layout.structure.digest == offer.structure:
            return pool.layout
        offered = await self._offered()
        resident = self._model.structure
        if resident is not None:
            problems = await self._host.work(mismatches, offered, resident, self._model.transient)
            if not problems:
                assert self._model.pool is not None
                return self._model.pool.layout
            if self._model.ruled:
                raise TransferError(AbortCode.MISMATCH, self._why_ruled(problems), details=tuple(problems))
        _require_tensors(offered)
        self._check_size(offered)
        return await self._host.work(Layout, offered)

    async def part(self, offer: Offer) -> Part:
        """What is offered of a part of the model, and where it belongs. There is a version then, and it stays until the
        push is over."""
        name = self._model.name
        if self._model.config.policy == "strict":
            raise TransferError(
                AbortCode.REFUSED,
                f"this push leaves tensors of model {name!r} out, and the daemon's configuration says policy = "
                f'"strict" of it ({table(name)}). Push all of its tensors, or have policy = "subset" or '
                '"partial" put there and the daemon reloaded.',
            )
        # Not while a process attaches, which may be bringing the first version.
        async with self._model.lock:
            pool = self._model.pool
            if pool is None or self._model.version is None:
                raise TransferError(
                    AbortCode.REFUSED,
                    f"model {name!r} has no version yet, so that what this push leaves out has no values to keep. Push "
                    "all of its tensors first, or attach a process that serves it.",
                )
        resident = pool.layout
        if resident.structure.digest == offer.structure:
            return await self._host.work(Part, resident, resident)
        offered = await self._offered()
        _require_tensors(offered)
        # Buffers that are not persistent are no part of any version, and what is offered here is all to be live.
        problems = await self._host.work(partial(mismatches, offered, resident.structure, NOTHING, partial=True))
        if problems:
            raise self._mismatch(problems)
        return await self._host.work(lambda: Part(Layout(offered), resident))

    def _mismatch(self, problems: list[str]) -> TransferError:
        return TransferError(AbortCode.MISMATCH, summarise(problems, self._model.name), details=tuple(problems))

    async def _offered(self) -> Structure:
        """The offered structure, which is asked for."""
        self._receiver.want_structure()
        self._flush()
        patience = self._host.config.stall + self._host.config.resume_window
        try:
            async with asyncio.timeout(patience):
                encoded = await self._encoded
        except TimeoutError:
            raise TransferError(AbortCode.STALLED, f"the structure did not arrive within {patience:.0f} s") from None
        return await self._host.work(self._receiver.decode_structure, encoded)

    def _why_ruled(self, problems: list[str]) -> str:
        headline = summarise(problems, self._model.name)
        delivered = [str(session.pid) for session in self._model.sessions if session.delivered]
        if len(delivered) < len(self._model.sessions):
            return headline
        # They would take any names, but an undo needs the images of the version before.
        assert self._model.version is not None
        return (
            f"{headline}. Its processes ({', '.join(delivered)}) were given {self._model.version.label!r} through "
            "load_weights, and while they are attached every version must have the same tensors. To push others, stop "
            "those processes or have them detach()."
        )

    def _check_size(self, structure: Structure) -> None:
        """Refuse what cannot fit before anything is laid out for it: a few bytes can describe terabytes."""
        size = structure.total_bytes
        allowed = self._model.config.limit
        if allowed is not None and size > allowed:
            raise TransferError(
                AbortCode.MEMORY_LIMIT,
                f"model {self._model.name!r} may have {format_bytes(allowed)} (max_bytes), and this version has "
                f"{format_bytes(size)}",
            )
        limit = self._host.images.budget.limit
        if size > limit:
            raise TransferError(
                AbortCode.MEMORY_LIMIT,
                f"model {self._model.name!r}: this version has {format_bytes(size)}, more than the daemon's "
                f"memory_limit ({format_bytes(limit)})",
            )

    async def pool(self, layout: Layout) -> tuple[SlotPool, bool]:
        """The model's images; or new ones, which are the caller's, where those are laid out otherwise and nothing is
        attached to them. Which of the two."""
        self._check_size(layout.structure)
        # Not while a process attaches, which may be laying out images as well.
        async with self._model.lock:
            pool = self._model.pool
            if pool is not None and pool.layout.structure.digest == layout.structure.digest:
                return pool, False
            if self._model.ruled:
                raise TransferError(
                    AbortCode.BUSY,
                    f"a process has just attached model {self._model.name!r} with other tensors: push again",
                )
            pool = self._host.images.make_pool(self._model, layout, 2)
        for slot in pool.slots:
            # The first touch of fresh memory costs 0.5 to 3 s a GB: better ahead of the loop than on it.
            self._host.background(slot.memory.mapping.populate)
        return pool, True


def _require_tensors(offered: Structure) -> None:
    if not len(offered):
        raise TransferError(AbortCode.MISMATCH, "the checkpoint has no tensors")
