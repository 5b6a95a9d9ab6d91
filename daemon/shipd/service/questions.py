"""Answers to STATUS and VERIFY: what is being served, and whether it is really what is live."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

from shipd.codecs import compiled
from shipd.release import AGENT
from shipd.service.models import ImageStore, Model
from shipd.service.session import Session, SessionLost
from shipd.transfer.peer import Peer
from shipproto.errors import LimitExceeded
from shipproto.limits import MAX_TEXT
from shipproto.messages import VerifyIs
from shipproto.names import harmless
from shipproto.receiver import Receiver
from shipproto.status import (
    ModelStatus,
    ProcessStatus,
    ProcessVerification,
    Status,
    TransferStatus,
    Verification,
    encode,
)

_VERIFY_SECONDS: Final = 60.0
"""How long a serving process may take to read its parameters back."""

_MAX_UNANSWERED: Final = 16
"""VERIFY_REQUESTs of one connection that wait for their answers."""


def status(models: list[Model], images: ImageStore, started: float) -> Status:
    """The state of ``models``; ``started`` is when the daemon did, in Unix time."""
    return Status(
        agent=AGENT,
        pid=os.getpid(),
        uptime_seconds=time.time() - started,
        memory_used=images.budget.used,
        memory_limit=images.budget.limit,
        codecs=_codecs(),
        models=[_model(model) for model in sorted(models, key=lambda model: model.name)],
    )


def _codecs() -> str:
    if compiled.kernels() is not None:
        return "compiled"
    return f"numpy ({harmless(why, MAX_TEXT)})" if (why := compiled.why_not()) else ""


def _model(model: Model) -> ModelStatus:
    version = model.version
    structure = model.structure
    return ModelStatus(
        name=model.name,
        label=version.label if version else "",
        digest=version.digest.hex() if version else "",
        tensors=len(structure) if structure else 0,
        bytes=structure.total_bytes if structure else 0,
        image_bytes=model.pool.size if model.pool else 0,
        committed_at=version.committed_at if version else 0.0,
        metadata=dict(version.metadata) if version else {},
        processes=[_process(session, model) for session in model.sessions],
        transfer=_transfer(model),
        failed=model.failed,
    )


def _process(session: Session, model: Model) -> ProcessStatus:
    return ProcessStatus(
        pid=session.pid,
        state=state_of(session, model),
        mode=session.mode,
        label=session.label,
        digest=session.digest.hex(),
        attached_seconds=time.time() - session.attached_at,
        pinned=session.pinned,
        model_class=session.model_class,
        environment=session.environment,
    )


def state_of(session: Session, model: Model) -> str:
    """What a process is doing: it is stale where it serves anything but the current version."""
    current = session.digest == _digest(model)
    return session.state if current or session.state != "serving" else "stale"


def _digest(model: Model) -> bytes:
    """Of the current version. Where there is none yet, what is attached has been given none either."""
    return model.version.digest if model.version is not None else b""


def _transfer(model: Model) -> TransferStatus | None:
    incoming = model.incoming
    if incoming is None:
        return None
    receiver = incoming.receiver
    layout = receiver.layout
    return TransferStatus(
        transfer_id=incoming.transfer_id,
        peer=incoming.peer_name,
        stage=receiver.state.name.lower(),
        label=receiver.label,
        bytes_held=held_bytes(receiver),
        bytes_total=layout.wire_bytes if layout is not None else receiver.offer.nbytes,
        connected=receiver.attended,
    )


def held_bytes(receiver: Receiver) -> int:
    """Bytes of a transfer that need not travel any more."""
    layout = receiver.layout
    if layout is None:
        return 0
    return sum(int(layout.chunk_sizes[start:stop].sum()) for start, stop in receiver.held.ranges())


class Verifier:
    """Has models read back, one round at a time for each: however many ask, the serving processes read once.

    What is asked while a round runs is answered by the next: that one has begun after the question, so that nobody is
    told of parameters as they were before.
    """

    def __init__(self, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._spawn = spawn
        self._askers: dict[str, Counter[Peer]] = {}
        """Who waits for the next round of a model, and how many answers each is owed."""
        self._running: set[str] = set()
        self._unanswered: Counter[Peer] = Counter()

    def ask(self, peer: Peer, model: Model) -> None:
        """``peer`` wants to know; it is answered when a round has ended. Raises LimitExceeded."""
        if self._unanswered[peer] >= _MAX_UNANSWERED:
            raise LimitExceeded(f"more than {_MAX_UNANSWERED} unanswered VERIFY_REQUESTs")
        self._unanswered[peer] += 1
        self._askers.setdefault(model.name, Counter())[peer] += 1
        if model.name not in self._running:
            self._running.add(model.name)
            self._spawn(self._rounds(model))

    async def _rounds(self, model: Model) -> None:
        try:
            while askers := self._askers.pop(model.name, None):
                try:
                    body = encode(await _verify(model))
                finally:
                    self._unanswered -= askers
                for peer in askers.elements():
                    peer.send(VerifyIs(), body)
        finally:
            self._running.discard(model.name)


async def _verify(model: Model) -> Verification:
    """Have every process of ``model`` read back its live parameters."""
    version = model.version
    answers = await asyncio.gather(*(_read_back(session, model) for session in model.sessions))
    return Verification(
        model=model.name,
        label=version.label if version else "",
        digest=version.digest.hex() if version else "",
        processes=list(answers),
    )


async def _read_back(session: Session, model: Model) -> ProcessVerification:
    try:
        answer = await session.read_back(_VERIFY_SECONDS)
    except SessionLost as error:
        return ProcessVerification(pid=session.pid, error=str(error))
    except TimeoutError:
        return ProcessVerification(pid=session.pid, error=f"no answer within {_VERIFY_SECONDS:.0f} s")
    return ProcessVerification(
        pid=session.pid,
        label=answer.label,
        digest=answer.digest.hex(),
        matches=not answer.error and answer.digest == _digest(model),
        error=answer.error[:MAX_TEXT],
        delivered=answer.delivered,
    )
