"""The daemon's view of one serving process: what it was asked, and what it has answered."""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Final

from shipd.images.slots import Slot, SlotPool
from shipd.transfer.unixpeer import UnixPeer
from shipproto.description import ENVIRONMENT
from shipproto.errors import AbortCode, TransferError, UnexpectedMessage
from shipproto.limits import TRANSFER_ID_SIZE
from shipproto.messages import (
    Arriving,
    Attach,
    DigestIs,
    DigestRequest,
    Evicted,
    Fill,
    Filled,
    Images,
    ImageSlot,
    LaidOut,
    Message,
    Stage,
    StageReady,
    Swap,
    Swapped,
    Unstage,
)
from shipproto.rangeset import RangeSet
from shipproto.structure import Structure

log = logging.getLogger("shipd.session")

_numbers = itertools.count(1)

_MAX_BACKLOG: Final = 1024 * 1024
"""Bytes of messages that a process may leave unread: it is told a few hundred bytes for every version."""

_NO_TENSORS: Final = Structure.build(())

ON_ATTACH: Final = bytes(TRANSFER_ID_SIZE)
"""Stands where a transfer's id would: the version is installed because the process attaches."""


NOT_READING: Final = "it has stopped reading its messages"


class SessionLost(Exception):
    """The process went away, or was evicted, before it answered."""


class Session:
    """One attached (or attaching) process."""

    def __init__(self, peer: UnixPeer, attach: Attach) -> None:
        self.number = next(_numbers)
        self.peer = peer
        self.model = attach.model
        self.mode = attach.mode
        self.pinned = attach.pinned
        self.model_class = attach.model_class
        said = peer.connection.peer.environment
        self.environment: dict[str, str] = {key: said[key] for key in ENVIRONMENT if key in said}
        self.delivered = attach.delivered
        """It takes tensors of any names, and cannot read back what it made of them."""
        self.pool: SlotPool | None = None
        """Whose images it has; None where there has been no version that it could be given."""
        self.state = "attaching"
        self.label = attach.label
        self.digest = b""
        self.attached_at = time.time()
        self.detached = False
        """It said that it reads no image any more."""
        self.evicted = False
        """The daemon gave it up."""
        self._waiting: dict[tuple[type[Message], int], asyncio.Future[Message]] = {}
        self._requests = itertools.count(1)
        self._arriving: bytes | None = None

    @property
    def pid(self) -> int:
        """The process."""
        return self.peer.pid

    @property
    def lost(self) -> bool:
        """Whether the process is gone."""
        return self.peer.closed

    @property
    def behind(self) -> bool:
        """Whether the process has stopped reading what it is told: nothing more may be queued for it."""
        return self.peer.backlog > _MAX_BACKLOG

    def on_message(self, message: Message) -> None:
        """Take an answer. Raises UnexpectedMessage for one that nobody waits for."""
        key: tuple[type[Message], int]
        if isinstance(message, Filled | StageReady | Swapped):
            key = (type(message), message.generation)
        elif isinstance(message, DigestIs):
            key = (DigestIs, message.request)
        else:
            raise UnexpectedMessage(f"{type(message).__name__} from {self.peer.name}")
        waiting = self._waiting.pop(key, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def on_lost(self) -> None:
        """The connection is gone: nobody waits any longer."""
        self.state = "gone"
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(SessionLost(f"{self.peer.name} is gone"))
        self._waiting.clear()

    # --- what it is told and asked -------------------------------------------------------------------------

    def join_pool(self, pool: SlotPool, *, writable: Slot | None = None) -> None:
        """Hand over all images of ``pool``, unless it has them, and before that how they are laid out.

        Raises TransferError as ``give_images`` does.
        """
        if self.pool is pool:
            return
        self.pool = pool
        if self.delivered:
            self.peer.send(LaidOut(), pool.layout.structure.encoded)
        self.give_images(pool.slots, writable=writable)

    def leave_pool(self) -> None:
        """Have it forget images that never became the model's. Only for one to which versions are delivered."""
        self.pool = None
        self.peer.send(LaidOut(), _NO_TENSORS.encoded)

    def give_images(self, slots: Sequence[Slot], *, writable: Slot | None = None) -> None:
        """Hand over descriptors: read-only, except for the slot it is about to fill.

        Raises TransferError where the daemon has too few left.
        """
        entries = []
        fds = []
        for slot in slots:
            open_for_writing = slot is writable
            entries.append(ImageSlot(size=slot.memory.size, slot=slot.index, writable=open_for_writing))
            fds.append(slot.memory.fd if open_for_writing else slot.memory.read_only_fd)
        try:
            self.peer.send_with_fds(Images(slots=tuple(entries)), fds)
        except OSError as error:
            raise TransferError(
                AbortCode.BUSY,
                f"the daemon cannot hand the images of model {self.model!r} to process {self.pid}: {error.strerror}. "
                "Let it have more descriptors (LimitNOFILE of its unit).",
            ) from error

    def give_further_images(self, slots: Sequence[Slot]) -> None:
        """Hand over images beside those that it has, or in place of some.

        Where that fails the session ends: the process serves on, and gets all of them when it attaches again.
        """
        try:
            self.give_images(slots)
        except TransferError as error:
            self.peer.close(str(error))

    async def fill(self, slot: Slot, timeout: float) -> None:
        """Have the process write its live parameters into ``slot``."""
        self.peer.send(Fill(generation=slot.generation, slot=slot.index))
        await self._answer(Filled, slot.generation, timeout)

    def arriving(self, transfer: bytes, slot: Slot, chunks: RangeSet) -> None:
        """Tell the process which chunks it may copy ahead."""
        self._arriving = transfer
        self.peer.send(Arriving(generation=slot.generation, slot=slot.index, transfer=transfer), chunks.encode())

    async def stage(self, transfer: bytes, slot: Slot, label: str, digest: bytes, timeout: float) -> StageReady:
        """Have the process make ready to swap to ``slot``."""
        self.state = "staging"
        self.peer.send(
            Stage(digest=digest, generation=slot.generation, label=label, slot=slot.index, transfer=transfer)
        )
        answer = await self._answer(StageReady, slot.generation, timeout)
        assert isinstance(answer, StageReady)
        return answer

    async def swap(self, transfer: bytes, slot: Slot, timeout: float, grace: float) -> Swapped:
        """Have the process swap; it has ``timeout`` to reach a safe point, and ``grace`` to say so."""
        self.state = "swapping"
        # Whole seconds of a Config made in Python may be an int, which is another number on the wire.
        self.peer.send(Swap(generation=slot.generation, timeout=float(timeout), transfer=transfer))
        answer = await self._answer(Swapped, slot.generation, timeout + grace)
        assert isinstance(answer, Swapped)
        return answer

    def unstage(self, transfer: bytes, slot: Slot) -> None:
        """The transfer has ended; the process forgets it and releases the slot."""
        self._arriving = None
        if self.state in ("staging", "swapping"):
            self.state = "serving"
        self.peer.send(Unstage(generation=slot.generation, transfer=transfer))

    def serves(self, label: str, digest: bytes) -> None:
        """The process holds this version from now on."""
        self.label = label
        self.digest = digest
        self.state = "serving"

    async def read_back(self, timeout: float) -> DigestIs:
        """Have the process digest its live parameters."""
        if self.behind:
            self.evict(NOT_READING)
        request = next(self._requests)
        self.peer.send(DigestRequest(request=request))
        answer = await self._answer(DigestIs, request, timeout)
        assert isinstance(answer, DigestIs)
        return answer

    def evict(self, reason: str) -> None:
        """The process missed a deadline: tell it so and end the session. It attaches again by itself."""
        log.warning("evicting a serving process", extra={"model": self.model, "pid": self.pid, "why": reason})
        self.evicted = True
        self.peer.send(Evicted(reason=reason))
        self.peer.close()

    async def _answer(self, kind: type[Message], key: int, timeout: float) -> Message:
        if self.lost:
            raise SessionLost(f"{self.peer.name} is gone")
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[kind, key] = future
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._waiting.pop((kind, key), None)
