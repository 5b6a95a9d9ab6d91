"""What the daemon knows of each model: its structure, its images, the version that is current, its processes."""

import asyncio
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shipd.images.slots import Budget, ImageMemory, Slot, SlotPool
from shipd.service.config import ModelConfig
from shipd.service.session import Session
from shipd.units import format_bytes
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.status import FailedPush
from shipproto.structure import Structure

if TYPE_CHECKING:
    from shipd.service.incoming import Incoming

_LABELS = 4096
"""Labels remembered for each model: a version a minute for nearly three days."""

NOTHING = Structure.build(())


@dataclass(frozen=True, slots=True)
class Version:
    """The committed version. ``pushed``: it came over the wire, not with a process that attached."""

    label: str
    digest: bytes
    slot: Slot
    pushed: bool
    committed_at: float = field(default_factory=time.time)
    metadata: Mapping[str, str] = field(default_factory=dict)


class Model:
    """One name. It exists while it is declared, or has been attached to or pushed to."""

    def __init__(self, name: str, config: ModelConfig | None = None) -> None:
        self.name = name
        self.config = config or ModelConfig()
        """What the configuration says of it, if anything."""
        self.transient: Structure = NOTHING
        self.pool: SlotPool | None = None
        self.version: Version | None = None
        self.labels: dict[str, bytes] = {}
        """Digest by label of the versions there have been: a label never stands for two contents."""
        self.sessions: list[Session] = []
        self.incoming: Incoming | None = None
        self.failed: FailedPush | None = None
        """The latest push, if it ended without effect."""
        self.released = asyncio.Event()
        """Set whenever a lease has ended."""
        self.attaching = 0
        """Processes that are in the middle of attaching."""
        self.lock = asyncio.Lock()
        """Held while sessions are led from one version to another, by a push or because one attaches."""
        self.abandoned: list[tuple[ImageMemory, int]] = []
        """Images that a straggling process (by pid) may still map: they stay in the budget while it lives."""
        self.unfinished: list[ImageMemory] = []
        """Images that threads of the daemon's that hang may still write into: they stay in the budget until then."""

    def becomes(self, version: Version) -> None:
        """``version`` is the current one."""
        self.version = version
        if version.pushed:
            self.labels.pop(version.label, None)
            self.labels[version.label] = version.digest
            while len(self.labels) > _LABELS:
                del self.labels[next(iter(self.labels))]

    @property
    def declared(self) -> bool:
        """Whether it exists whatever is attached."""
        return self.config.limit is not None

    @property
    def ruled(self) -> bool:
        """Whether processes have images of it, so that every version must be laid out like those."""
        return any(session.pool is not None for session in self.sessions)

    @property
    def structure(self) -> Structure | None:
        """What a version must consist of, if anything is known of it yet."""
        return None if self.pool is None else self.pool.layout.structure


class ImageStore:
    """Makes and frees the images of all models within the memory limit."""

    def __init__(self, limit: int) -> None:
        self.budget = Budget(limit)

    def make_pool(self, model: Model, layout: Layout, slots: int) -> SlotPool:
        """A pool with ``slots`` images. Raises TransferError where it does not fit."""
        self._reserve(model, layout.size * slots, f"{slots} images of {format_bytes(layout.size)}")
        pool = SlotPool(model.name, layout)
        try:
            for _ in range(slots):
                pool.grow()
        except OSError as error:
            self._undo(pool, layout.size * slots)
            raise TransferError(
                AbortCode.MEMORY_LIMIT, f"model {model.name!r}: the kernel refused the images: {error.strerror}"
            ) from error
        return pool

    def grow_pool(self, model: Model, pool: SlotPool) -> None:
        """One more image in a pool."""
        self._reserve(model, pool.layout.size, "one more image")
        try:
            pool.grow()
        except OSError as error:
            self.budget.release(pool.layout.size)
            raise TransferError(
                AbortCode.MEMORY_LIMIT, f"model {model.name!r}: the kernel refused an image: {error.strerror}"
            ) from error

    def free_pool(self, pool: SlotPool) -> None:
        """Give a pool's images back."""
        self._undo(pool, pool.size)

    def make_image(self, model: Model, size: int) -> ImageMemory:
        """An image beside those of the model's pool, for a part of a version. Raises as ``make_pool``."""
        self._reserve(model, size, "an image for the tensors that are sent")
        try:
            return ImageMemory(f"{model.name}:part", size)
        except OSError as error:
            self.budget.release(size)
            raise TransferError(
                AbortCode.MEMORY_LIMIT, f"model {model.name!r}: the kernel refused an image: {error.strerror}"
            ) from error

    def free_image(self, memory: ImageMemory) -> None:
        """Give such an image back."""
        memory.close()
        self.budget.release(memory.size)

    def renew(self, model: Model, slot: Slot) -> bool:
        """Give a writable slot new memory if somebody may still use the old one. True if it did."""
        if slot.unfinished:
            # Whatever comes of that late must reach nobody.
            model.unfinished.append(self._replaced(model, slot, "a read that does not end"))
            return True
        living = {pid for pid in slot.readers if alive(pid)}
        slot.readers &= living
        if not living:
            return False
        holding = living - {session.pid for session in model.sessions}
        if holding:
            self.replace(model, slot, min(holding))
        else:
            # All have attached anew since, and so let go of it: nobody has to be waited for to give it back.
            self._exchange(model, slot, f"process {min(living)}").close()
        return True

    def replace(self, model: Model, slot: Slot, pid: int) -> None:
        """Give a slot that process ``pid`` cannot be made to release new memory."""
        self.reclaim(model)
        model.abandoned.append((self._replaced(model, slot, f"process {pid}"), pid))

    def _replaced(self, model: Model, slot: Slot, holder: str) -> ImageMemory:
        """New memory for a slot, beside the old one, which is returned and still counts."""
        self._reserve(model, slot.memory.size, f"a new image, since {holder} does not release the old one")
        try:
            return self._exchange(model, slot, holder)
        except TransferError:
            self.budget.release(slot.memory.size)
            raise

    def _exchange(self, model: Model, slot: Slot, holder: str) -> ImageMemory:
        """New memory for a slot; the old one."""
        assert model.pool is not None
        try:
            return model.pool.replace(slot)
        except OSError as error:
            raise TransferError(
                AbortCode.BUSY, f"model {model.name!r}: {holder} still uses the image that is needed"
            ) from error

    def reclaim(self, model: Model, attached_pid: int | None = None) -> None:
        """Free abandoned images whose process has died, or has attached anew and so let go of them."""
        kept = []
        for memory, pid in model.abandoned:
            if pid != attached_pid and alive(pid):
                kept.append((memory, pid))
            else:
                self.budget.release(memory.size)
                memory.close()
        model.abandoned = kept

    def finished(self, model: Model, slot: Slot, memory: ImageMemory) -> None:
        """What hung has ended, and writes no more into ``memory``, which is or was that of ``slot``."""
        if slot.memory is memory:
            slot.unfinished = False
        elif memory in model.unfinished:
            model.unfinished.remove(memory)
            self.free_image(memory)

    def close(self, model: Model) -> None:
        """Free everything of a model."""
        if model.pool is not None:
            self.free_pool(model.pool)
            model.pool = None
        for memory in (*model.unfinished, *(memory for memory, _pid in model.abandoned)):
            self.free_image(memory)
        model.unfinished.clear()
        model.abandoned.clear()

    def _reserve(self, model: Model, amount: int, what: str) -> None:
        if not self.budget.reserve(amount):
            raise TransferError(
                AbortCode.MEMORY_LIMIT,
                f"model {model.name!r} needs {format_bytes(amount)} ({what}), and of the daemon's memory_limit of "
                f"{format_bytes(self.budget.limit)} only {format_bytes(max(0, self.budget.limit - self.budget.used))} "
                "are left",
            )

    def _undo(self, pool: SlotPool, amount: int) -> None:
        pool.close()
        self.budget.release(amount)


def alive(pid: int) -> bool:
    """Whether a process runs. One that has ended but that its parent has not asked after does not."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError:
        # No pidfds here: better to keep memory too long than to write under somebody's eyes.
        return True
    try:
        return not select.select([process], [], [], 0)[0]
    finally:
        os.close(process)
