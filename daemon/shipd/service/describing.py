"""Answers to DESCRIBE: what a version of a model must consist of, and what it is served by."""

from collections import Counter
from collections.abc import Coroutine
from typing import Any, Final, Protocol

import msgspec

from shipd.environment import environment
from shipd.service.host import Host
from shipd.service.models import Model
from shipd.service.session import Session
from shipd.transfer.peer import Peer
from shipproto.description import Description, ProcessDescription, encode_description
from shipproto.errors import LimitExceeded
from shipproto.messages import DescriptionIs
from shipproto.structure import Structure

_MAX_UNANSWERED: Final = 4
"""DESCRIBEs of one connection that wait for their answers, each of which may have two structures in it."""


class DescribingHost(Host, Protocol):
    """What this needs of the daemon around it."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Describer:
    """Describes models to whoever asks, off the loop: structures have up to 64 MiB."""

    def __init__(self, host: DescribingHost) -> None:
        self._host = host
        self._unanswered: Counter[Peer] = Counter()

    def ask(self, peer: Peer, model: Model, known: bytes) -> None:
        """``peer`` wants to know, and has the structure with the digest ``known``, if any. Raises LimitExceeded."""
        if self._unanswered[peer] >= _MAX_UNANSWERED:
            raise LimitExceeded(f"more than {_MAX_UNANSWERED} unanswered DESCRIBEs")
        self._unanswered[peer] += 1
        self._host.spawn(self._answer(peer, self._describe(model), model.structure, model.transient, known))

    async def _answer(
        self, peer: Peer, found: Description, structure: Structure | None, transient: Structure, known: bytes
    ) -> None:
        try:
            body = await self._host.work(_encode, found, structure, transient, known)
        finally:
            self._unanswered -= Counter((peer,))
        peer.send(DescriptionIs(), body)

    def _describe(self, model: Model) -> Description:
        """All but the structures."""
        version, config, budget = model.version, model.config, self._host.images.budget
        return Description(
            model=model.name,
            delivered=bool(model.sessions) and all(session.delivered for session in model.sessions),
            version=version is not None,
            label=version.label if version else "",
            digest=version.digest if version else b"",
            policy=config.policy or "",
            cast=config.cast,
            limit=config.limit or 0,
            memory_limit=budget.limit,
            memory_used=budget.used,
            environment=environment(),
            processes=[_process(session) for session in model.sessions],
        )


def _process(session: Session) -> ProcessDescription:
    return ProcessDescription(
        pid=session.pid, mode=session.mode, model_class=session.model_class, environment=session.environment
    )


def _encode(found: Description, structure: Structure | None, transient: Structure, known: bytes) -> bytes:
    if structure is not None:
        found = msgspec.structs.replace(
            found,
            structure=b"" if structure.digest == known else structure.encoded,
            structure_digest=structure.digest,
            transient=transient.encoded if len(transient) else b"",
        )
    return encode_description(found)
