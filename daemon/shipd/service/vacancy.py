"""A slot to fill: free, read by nobody, and if need be taken from processes that do not let go of it in time."""

import asyncio
import contextlib

from shipd.images.slots import Slot, SlotPool
from shipd.service.models import ImageStore, Model
from shipd.service.session import Session
from shipproto.errors import AbortCode, TransferError


async def take_slot(
    images: ImageStore, model: Model, pool: SlotPool, timeout: float
) -> tuple[Slot, list[tuple[Session, str]]]:
    """A slot of ``pool`` that is being filled from now on, and who was evicted for it, and why.

    Waits ``timeout`` seconds for slots to be released. Raises TransferError where there is none even then.
    """
    evicted: list[tuple[Session, str]] = []
    slot = pool.find_writable() or await _free_slot(model, pool, timeout, evicted)
    if images.renew(model, slot):
        # It has new memory: every process needs its descriptor.
        for session in list(model.sessions):
            if session.pool is pool:
                session.give_further_images([slot])
    pool.begin(slot)
    return slot, evicted


async def _free_slot(model: Model, pool: SlotPool, timeout: float, evicted: list[tuple[Session, str]]) -> Slot:
    """Wait for a slot to be released; past the deadline, evict whoever holds it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while (slot := pool.find_writable()) is None:
        stale = next((slot for slot in pool.slots if slot.leases and not _is_current(model, slot)), None)
        if loop.time() >= deadline and stale is not None:
            holders = pool.holders(stale)
            for session in [session for session in model.sessions if session.number in holders]:
                why = "it did not release an image in time"
                session.evict(why)
                evicted.append((session, why))
            pool.forget(stale)
            continue
        if loop.time() >= deadline:
            raise TransferError(AbortCode.BUSY, f"every image of model {model.name!r} is in use")
        model.released.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await model.released.wait()
    return slot


def _is_current(model: Model, slot: Slot) -> bool:
    return model.version is not None and model.version.slot is slot
