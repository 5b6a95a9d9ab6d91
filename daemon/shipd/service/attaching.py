"""How a serving process joins a model: it gets the images, and leaves with the version that is committed.

The first process of a model brings its first version: it fills a slot with its live parameters. Every other
one, and every one that comes when a version has been committed, has that version installed before its
attach() returns. Two processes of one name never serve two versions.

A process to which versions are delivered takes whatever tensors there are, and can bring none of its own. Where there
is no version it waits for the first, attached, and without images.
"""

import dataclasses
import logging
from typing import Final

import numpy as np

from shipd.images.slots import Slot, SlotPool
from shipd.matching.differences import mismatches, summarise
from shipd.service.host import Host
from shipd.service.models import Model, Version
from shipd.service.rollout import swap_grace
from shipd.service.session import ON_ATTACH, Session, SessionLost
from shipproto.digests import LeafDigests, digest_image
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.limits import MAX_PROCESSES
from shipproto.messages import Attach, Attached
from shipproto.resident import Resident

log = logging.getLogger("shipd.session")

INITIAL_LABEL: Final = "initial"
"""Label of a version that nobody pushed: the one that the first process came with."""


class Attaching:
    """Takes processes in, one at a time for each model."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def attach(self, model: Model, session: Session, attach: Attach, resident: Resident) -> None:
        """Bring ``session`` to the model's version. Raises TransferError, SessionLost or TimeoutError."""
        while True:
            async with model.lock:
                incoming = model.incoming
                if incoming is None or not incoming.has_own_images:
                    await self._attach(model, session, attach, resident)
                    return
            # It fills images that are laid out for what is being pushed; what the model is will be known after it.
            await incoming.wait()

    async def _attach(self, model: Model, session: Session, attach: Attach, resident: Resident) -> None:
        if len(model.sessions) >= MAX_PROCESSES:
            raise TransferError(AbortCode.BUSY, f"model {model.name!r} has {MAX_PROCESSES} processes attached already")
        self._require_alive(session)
        self._host.images.reclaim(model, attached_pid=session.pid)
        if model.version is None and session.delivered and not len(resident.structure):
            session.serves("", b"")
            answer = Attached(digest=b"", generation=0, label="", slot=0)
        else:
            version = await self._lead(model, session, attach, resident)
            session.serves(version.label, version.digest)
            answer = Attached(
                digest=version.digest,
                generation=version.slot.generation,
                label=version.label,
                slot=version.slot.index,
            )
        model.sessions.append(session)
        session.peer.send(answer)
        log.info(
            "a process has attached",
            extra={
                "model": model.name,
                "pid": session.pid,
                "mode": session.mode,
                "label": session.label,
                "digest": session.digest.hex(),
                "pinned": session.pinned,
            },
        )

    async def _lead(self, model: Model, session: Session, attach: Attach, resident: Resident) -> Version:
        """Give the process the images of the model, and one version with all others; that version."""
        waiting = list(model.sessions) if model.version is None else []
        if waiting and not attach.digest:
            raise TransferError(
                AbortCode.BUSY,
                f"process {waiting[0].pid} takes the versions of model {model.name!r} through load_weights and has "
                "been given none yet, so that its weights may be others than those of this module. Push a version "
                "first, or attach the module under another name.",
            )
        pool = await self._pool(model, session, resident, slots=3 if attach.mode == "flip" else 2)
        if not session.delivered:
            model.transient = resident.transient
        version = model.version
        if version is None:
            version = await self._first_version(model, pool, session, attach)
            for other in waiting:
                await self._catch_up(other, pool, version)
        else:
            session.join_pool(pool)
            pool.lease(session.number, version.slot)
            if attach.digest != version.digest:
                await self._install(session, version)
        self._require_alive(session)
        return version

    def _require_alive(self, session: Session) -> None:
        """It may have died while it waited for its turn, and nobody would ever take it out of the books again."""
        if session.lost:
            raise SessionLost(f"process {session.pid} is gone")

    async def _pool(self, model: Model, session: Session, resident: Resident, slots: int) -> SlotPool:
        """The model's images, laid out for ``resident``."""
        pool = model.pool
        if pool is not None and session.delivered and model.version is not None:
            return pool
        if pool is not None and pool.layout.structure.digest != resident.structure.digest:
            problems = await self._host.work(mismatches, pool.layout.structure, resident.structure, resident.transient)
            if problems and (model.sessions or (model.version is not None and model.version.pushed)):
                raise TransferError(
                    AbortCode.MISMATCH,
                    f"this is not the model that is {'served' if model.sessions else 'committed'} as {model.name!r}: "
                    f"{summarise(problems, model.name)}. Attach it under another name.",
                    details=tuple(problems),
                )
            if model.sessions or model.incoming is not None:
                raise TransferError(
                    AbortCode.BUSY,
                    f"model {model.name!r} is in use with slightly different tensors; attach it under another name",
                )
            await self._lay_out_anew(model, pool, Layout(resident.structure), keep=not problems)
            pool = model.pool
        if pool is None:
            layout = await self._host.work(Layout, resident.structure)
            pool = model.pool = self._host.images.make_pool(model, layout, slots)
            self._populate(pool)
        while len(pool.slots) < slots:
            self._host.images.grow_pool(model, pool)
            for other in list(model.sessions):
                if other.pool is pool:
                    other.give_further_images(pool.slots[-1:])
        return pool

    def _populate(self, pool: SlotPool) -> None:
        """Fault the pages in, in the background: the first touch of fresh memory costs 0.5 to 3 s a GB."""
        for slot in pool.slots[1:]:
            self._host.background(slot.memory.mapping.populate)

    async def _lay_out_anew(self, model: Model, old: SlotPool, layout: Layout, *, keep: bool) -> None:
        """Move the committed version into images of a process's layout, or drop one that nobody pushed."""
        version = model.version
        if version is None or not keep:
            model.version = None
            model.pool = None
            self._host.images.free_pool(old)
            return
        pool = self._host.images.make_pool(model, layout, 2)
        slot = pool.slots[0]
        pool.begin(slot)
        try:
            digests = await self._host.work(_copy_version, old.layout, version.slot, layout, slot)
        except BaseException:
            self._host.images.free_pool(pool)
            raise
        pool.commit(slot, digests)
        digest = digests.version_digest()
        model.becomes(dataclasses.replace(version, digest=digest, slot=slot))
        model.pool = pool
        self._host.images.free_pool(old)

    async def _first_version(self, model: Model, pool: SlotPool, session: Session, attach: Attach) -> Version:
        """The process's own parameters become the first version."""
        slot = pool.find_writable()
        if slot is None:
            raise TransferError(AbortCode.BUSY, f"every image of model {model.name!r} is in use")
        self._host.images.renew(model, slot)
        pool.begin(slot)
        try:
            session.join_pool(pool, writable=slot)
            pool.lease(session.number, slot)
            await session.fill(slot, self._host.config.stage_timeout)
            session.give_images([slot])
            digests: LeafDigests = await self._host.work(digest_image, pool.layout, slot.memory.view)
        except BaseException:
            pool.discard(slot)
            raise
        digest = digests.version_digest()
        # A process that lost its daemon knows the name of what it holds; if that is still what it holds.
        label = attach.label if attach.label and attach.digest == digest else INITIAL_LABEL
        pool.commit(slot, digests)
        version = Version(label, digest, slot, pushed=label != INITIAL_LABEL, committed_at=0.0)
        model.becomes(version)
        return version

    async def _catch_up(self, session: Session, pool: SlotPool, version: Version) -> None:
        """Lead a process that has been attached without a version to the first one, or give it up."""
        try:
            session.join_pool(pool)
            pool.lease(session.number, version.slot)
            await self._install(session, version)
        except SessionLost:
            return
        except (TransferError, TimeoutError) as error:
            session.evict(str(error) or "it did not take the first version in time")
            return
        session.serves(version.label, version.digest)

    async def _install(self, session: Session, version: Version) -> None:
        """Lead the process from whatever it has to the committed version."""
        config = self._host.config
        ready = await session.stage(ON_ATTACH, version.slot, version.label, version.digest, config.stage_timeout)
        if ready.error:
            raise TransferError(AbortCode.STAGE_FAILED, f"the committed version cannot be staged: {ready.error}")
        grace = swap_grace(session, config)
        swapped = await session.swap(ON_ATTACH, version.slot, config.commit_timeout, grace)
        if swapped.error:
            raise TransferError(AbortCode.SWAP_FAILED, f"the committed version cannot be swapped in: {swapped.error}")


def _copy_version(old: Layout, source: Slot, new: Layout, target: Slot) -> LeafDigests:
    """Copy a version between images of two layouts of the same tensors; the digests of the copy.

    Raises TransferError where the new layout ties what has different values in the old one.
    """
    for row, name in enumerate(new.structure.names):
        at = old.structure.index.get(name)
        if at is None:
            # Tied in the new layout to a tensor that the old one has.
            group = np.flatnonzero(new.structure.primary == new.structure.primary[row]).tolist()
            at = next(
                old.structure.index[new.structure.names[other]]
                for other in group
                if new.structure.names[other] in old.structure.index
            )
        size = int(new.structure.nbytes[row])
        start, begin = int(new.offsets[row]), int(old.offsets[at])
        place, content = target.memory.view[start : start + size], source.memory.view[begin : begin + size]
        primary = int(new.structure.primary[row])
        if primary == row:
            place[:] = content
        elif not np.array_equal(np.frombuffer(place, np.uint8), np.frombuffer(content, np.uint8)):
            raise TransferError(
                AbortCode.MISMATCH,
                f"this model ties {new.structure.names[primary]!r} and {name!r}, but the committed version has other "
                "values for each. Push one that has equal ones, or attach the model under another name.",
                tensor=name,
            )
    return digest_image(new, target.memory.view)
