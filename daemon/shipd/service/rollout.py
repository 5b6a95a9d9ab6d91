"""A version on its way from an image into every serving process of a model: ahead of time, staged, swapped.

All processes stage before any of them swaps. One that dies or does not answer is left behind; one that says no
while staging stops the push. Once the sender has asked for the commit, it fails only where every process that is
left says that its old version is live and whole: then nothing has happened. Otherwise the version is committed,
and whoever could not follow is evicted: it serves nothing until it has attached again, and caught up.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from shipd.images.slots import Slot, SlotPool
from shipd.service.config import Config
from shipd.service.models import Model, alive
from shipd.service.session import NOT_READING, Session, SessionLost
from shipproto.errors import AbortCode, TransferError
from shipproto.messages import StageReady, Swapped
from shipproto.rangeset import RangeSet

log = logging.getLogger("shipd.transfer")

SWAP_GRACE: Final = 5.0
"""Seconds beyond the commit timeout for a process to say how its swap went."""

_DYING_LOOKS: Final = 25
_DYING_SECONDS: Final = 0.02
"""How often, and how long apart, to look whether a process whose connection broke is on its way out."""

_ARRIVING_CHUNKS: Final = 32
"""Chunks after which a process that copies ahead is told of them: 16 MiB."""


def swap_grace(session: Session, config: Config) -> float:
    """Seconds beyond the commit timeout for a process to say how its swap went.

    One that hands the version to somebody's load_weights does there what others do while they stage, and if that fails
    once more with the version before.
    """
    return 2 * config.stage_timeout if session.delivered else SWAP_GRACE


@dataclass(slots=True)
class Outcome:
    """``pause_seconds`` is the longest of all, ``wait_seconds`` and ``copy_seconds`` are parts of that one; ``stale``
    has those that could not follow, and why."""

    swapped: list[Session] = field(default_factory=list)
    stale: list[tuple[Session, str]] = field(default_factory=list)
    pause_seconds: float | None = None
    wait_seconds: float = 0.0
    copy_seconds: float = 0.0


class Rollout:
    """One slot of one model, and the processes that have been told of it."""

    def __init__(self, config: Config, model: Model, pool: SlotPool, slot: Slot, transfer: bytes) -> None:
        self.ready: list[Session] = []
        self.left: list[tuple[Session, str]] = []
        """Processes that were given up, and why. They live, and serve nothing until they have come back."""
        self._config = config
        self._model = model
        self._pool = pool
        self._slot = slot
        self._transfer = transfer
        self._told: list[Session] = []
        self._ahead = RangeSet()

    def arrived(self, chunk: int, *, last: bool) -> None:
        """A chunk is in the slot, intact: processes that copy to a device may begin with it."""
        sessions = [session for session in self._model.sessions if session.pinned and not session.lost]
        if not sessions or self._pool is not self._model.pool:
            return
        self._ahead.add(chunk)
        if len(self._ahead) < _ARRIVING_CHUNKS and not last:
            return
        for session in sessions:
            if session.behind:
                session.evict(NOT_READING)
                self.left.append((session, NOT_READING))
                continue
            # One that has just attached knows nothing of what came before, and copies that when it stages.
            self._tell(session)
            session.arriving(self._transfer, self._slot, self._ahead)
        self._ahead = RangeSet()

    async def stage(self, label: str, digest: bytes) -> float:
        """Have every process make ready; seconds that took. Raises TransferError where the push cannot go on."""
        started = asyncio.get_running_loop().time()
        sessions = [session for session in self._model.sessions if not session.lost]
        failures: list[str] = []
        for session, answer in await self._ask_to_stage(sessions, label, digest):
            if isinstance(answer, StageReady) and not answer.error:
                self.ready.append(session)
            elif isinstance(answer, StageReady):
                raise TransferError(
                    AbortCode.STAGE_FAILED, f"process {session.pid} cannot take the version: {answer.error}"
                )
            else:
                failures.append(f"process {session.pid} {answer}")
                if not session.lost:
                    session.evict(answer)
                    self.left.append((session, answer))
        if sessions and not self.ready:
            raise TransferError(AbortCode.STAGE_FAILED, f"no serving process is left to swap: {'; '.join(failures)}")
        return asyncio.get_running_loop().time() - started

    async def swap(self, label: str, digest: bytes) -> Outcome:
        """Have every process swap. Raises TransferError where no version has changed anywhere."""
        outcome = Outcome()
        late = [session for session in self._model.sessions if session not in self.ready and not session.lost]
        for session, answer in await self._ask_to_stage(late, label, digest):
            if isinstance(answer, StageReady) and not answer.error:
                self.ready.append(session)
            else:
                why = answer.error if isinstance(answer, StageReady) else answer
                outcome.stale.append((session, f"it could not stage the version: {why}"))
        replies = await asyncio.gather(
            *(
                session.swap(self._transfer, self._slot, self._config.commit_timeout, swap_grace(session, self._config))
                for session in self.ready
            ),
            return_exceptions=True,
        )
        refusals: list[str] = []
        for session, reply in zip(self.ready, replies, strict=True):
            if isinstance(reply, Swapped) and not reply.error:
                outcome.swapped.append(session)
                if outcome.pause_seconds is None or reply.pause_seconds > outcome.pause_seconds:
                    outcome.pause_seconds = reply.pause_seconds
                    outcome.wait_seconds, outcome.copy_seconds = reply.wait_seconds, reply.copy_seconds
            elif isinstance(reply, Swapped):
                outcome.stale.append((session, reply.error))
                if not reply.fenced:
                    refusals.append(f"process {session.pid}: {reply.error}")
            elif isinstance(reply, TimeoutError):
                # It may have swapped, or may yet: only what has been committed is safe for it to come back to.
                outcome.stale.append((session, "it did not say in time that it has swapped"))
            elif not isinstance(reply, SessionLost):
                # Others may have swapped already: nothing that went wrong with this one can undo that.
                log.error("a swap went wrong unexpectedly", exc_info=reply, extra={"pid": session.pid})
                outcome.stale.append((session, f"it could not be asked: {reply!r}"))
            elif await _serves_on(session):
                outcome.stale.append((session, "its connection broke in the middle of the swap"))
        if refusals and len(refusals) == len(outcome.stale) and not outcome.swapped:
            raise TransferError(AbortCode.SWAP_FAILED, "; ".join(refusals))
        back = {session.pid for session in (*outcome.swapped, *(session for session, _why in outcome.stale))}
        outcome.stale += [
            (session, why) for session, why in self.left if session.pid not in back and alive(session.pid)
        ]
        return outcome

    def cancel(self) -> None:
        """The version will not be swapped in: everyone forgets it."""
        for session in self._told:
            session.unstage(self._transfer, self._slot)
            if self._pool is not self._model.pool:
                session.leave_pool()

    async def _ask_to_stage(
        self, sessions: list[Session], label: str, digest: bytes
    ) -> list[tuple[Session, StageReady | str]]:
        """Each session with its answer, or with what became of it."""
        timeout = self._config.stage_timeout
        for session in sessions:
            self._tell(session)
        answers = await asyncio.gather(
            *(session.stage(self._transfer, self._slot, label, digest, timeout) for session in sessions),
            return_exceptions=True,
        )
        told: list[tuple[Session, StageReady | str]] = []
        for session, answer in zip(sessions, answers, strict=True):
            if isinstance(answer, SessionLost):
                told.append((session, "died while staging"))
            elif isinstance(answer, TimeoutError):
                told.append((session, f"was not ready to swap within {timeout:g} s"))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                told.append((session, answer))
        return told

    def _tell(self, session: Session) -> None:
        """Name the slot to a process: from now on it may be reading it."""
        if session not in self._told:
            self._told.append(session)
            session.join_pool(self._pool)
            self._pool.lease(session.number, self._slot)


async def _serves_on(session: Session) -> bool:
    """Whether a process lives that has lost its session: it serves what it has until it has attached again.

    One that is being killed closes its sockets a moment before it is gone.
    """
    if session.detached:
        return False
    for _ in range(_DYING_LOOKS):
        if not alive(session.pid):
            return False
        await asyncio.sleep(_DYING_SECONDS)
    return True
