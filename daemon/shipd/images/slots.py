"""The images of one model: slots, their generations and the leases on them. Bookkeeping, no I/O, no clock.

    FREE --begin()--> FILLING --commit()--> COMMITTED --(the next commit)--> FREE
                         |  \\--discard()--> FREE

A slot's generation names one filling of it. A lease says that a session may be reading one generation of a slot;
the daemon takes it before it names the slot to anyone, and only the holder's RELEASE of that generation, or
the end of its session, ends it. The daemon writes only into a slot that is FREE and without leases, and if
a process may still be reading although its session has ended, the slot gets new memory first.
"""

import contextlib
import enum
import itertools
import os
from dataclasses import dataclass, field
from typing import Self

from shipd.images.memory import ImageMapping, create_memfd, open_read_only
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from shipproto.limits import MAX_SLOTS

_generations = itertools.count(1)
"""Unique over all slots and pools of the process, so that a late RELEASE can never end another's lease."""


class SlotState(enum.Enum):
    """What a slot's bytes are."""

    FREE = enum.auto()
    FILLING = enum.auto()
    COMMITTED = enum.auto()


class ImageMemory:
    """One sealed memfd, the daemon's writable mapping of it and a read-only descriptor to hand out."""

    def __init__(self, name: str, size: int) -> None:
        """Raises OSError, and nothing is left of it then."""
        self.size = size
        with contextlib.ExitStack() as undo:
            self.fd = create_memfd(f"shipd:{name}", size)
            undo.callback(os.close, self.fd)
            self.read_only_fd = open_read_only(self.fd)
            undo.callback(os.close, self.read_only_fd)
            self.mapping = ImageMapping.shared(self.fd, size)
            undo.pop_all()

    @property
    def view(self) -> memoryview:
        """The image's bytes, writable."""
        return self.mapping.view

    def close(self) -> None:
        """Give the memory back, as far as no process maps it any more."""
        self.mapping.close()
        os.close(self.fd)
        os.close(self.read_only_fd)


@dataclass(frozen=True, slots=True)
class Lease:
    """``session`` may be reading ``generation`` of a slot."""

    session: int
    generation: int


@dataclass(eq=False, slots=True)
class Slot:
    """One image. ``digests`` are those of its current content, where that is whole."""

    index: int
    memory: ImageMemory
    generation: int = 0
    state: SlotState = SlotState.FREE
    digests: LeafDigests | None = None
    before: LeafDigests | None = None
    """Those of what was whole in the memory before the filling that is under way; for chunks that it has not written
    yet they still hold."""
    leases: set[Lease] = field(default_factory=set)
    readers: set[int] = field(default_factory=set)
    """Processes whose session ended while they had a lease: while they live they may still read this memory."""
    unfinished: bool = False
    """A thread of the daemon's that hangs may still write into this memory, at any time."""

    @property
    def writable(self) -> bool:
        """Whether nobody's bytes would be overwritten."""
        return self.state is SlotState.FREE and not self.leases


class SlotPool:
    """All slots of one model, of one layout."""

    def __init__(self, name: str, layout: Layout) -> None:
        self.name = name
        self.layout = layout
        self.slots: list[Slot] = []

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(slot.memory.size for slot in self.slots)

    def grow(self) -> Slot:
        """Add a slot. Creates memory: the caller has reserved it."""
        if len(self.slots) >= MAX_SLOTS:
            raise ValueError(f"a model has at most {MAX_SLOTS} slots")
        slot = Slot(len(self.slots), ImageMemory(f"{self.name}:{len(self.slots)}", self.layout.size))
        self.slots.append(slot)
        return slot

    def find_writable(self) -> Slot | None:
        """A slot that may be filled, or None."""
        return next((slot for slot in self.slots if slot.writable), None)

    def begin(self, slot: Slot) -> None:
        """Start filling a slot: a new generation."""
        if not slot.writable:
            raise ValueError(f"slot {slot.index} is in use")
        slot.generation = next(_generations)
        slot.state = SlotState.FILLING
        slot.before, slot.digests = slot.digests, None

    def commit(self, slot: Slot, digests: LeafDigests) -> None:
        """The slot's content is the current version; the slot of the previous one becomes free."""
        for other in self.slots:
            if other.state is SlotState.COMMITTED:
                other.state = SlotState.FREE
        slot.state = SlotState.COMMITTED
        slot.before, slot.digests = None, digests

    def discard(self, slot: Slot) -> None:
        """What was being filled is worth nothing."""
        slot.state = SlotState.FREE
        slot.before = slot.digests = None

    def lease(self, session: int, slot: Slot) -> None:
        """Take a lease on the slot's present generation."""
        slot.leases.add(Lease(session, slot.generation))

    def release(self, session: int, index: int, generation: int) -> bool:
        """End a lease. False where there is no such lease."""
        if index >= len(self.slots):
            return False
        lease = Lease(session, generation)
        held = lease in self.slots[index].leases
        self.slots[index].leases.discard(lease)
        return held

    def release_all(self, session: int, reader: int | None = None) -> None:
        """End every lease of a session that is over. ``reader`` is its process, if that may read on."""
        for slot in self.slots:
            held = {lease for lease in slot.leases if lease.session == session}
            slot.leases -= held
            if held and reader is not None:
                slot.readers.add(reader)

    def forget(self, slot: Slot) -> None:
        """End the leases of sessions that no longer exist on a slot."""
        slot.leases.clear()

    def holders(self, slot: Slot) -> set[int]:
        """Sessions that have a lease on the slot."""
        return {lease.session for lease in slot.leases}

    def replace(self, slot: Slot) -> ImageMemory:
        """Give a slot whose readers cannot be waited for new memory. Returns the old one, still mapped by them."""
        old = slot.memory
        slot.memory = ImageMemory(f"{self.name}:{slot.index}", self.layout.size)
        slot.leases.clear()
        slot.readers.clear()
        slot.unfinished = False
        slot.before = slot.digests = None
        return old

    def close(self) -> None:
        """Give all memory back."""
        for slot in self.slots:
            slot.memory.close()
        self.slots.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Budget:
    """The daemon's memory limit, in bytes: reserved before it is promised to anyone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def reserve(self, amount: int) -> bool:
        """Reserve ``amount``; False where it does not fit."""
        if self.used + amount > self.limit:
            return False
        self.used += amount
        return True

    def release(self, amount: int) -> None:
        """Give back what was reserved."""
        self.used -= amount
