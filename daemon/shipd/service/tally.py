"""What has happened since the daemon started, in numbers: to pushes, by model, and to connections.

Only what nobody else remembers is counted here, once something is over; what is the case now is read where it is (see
families.py). Numbers live as long as their model. Those of a model that exists no longer go into one remainder, so that
sums over all models never fall and whoever may invent names cannot make this grow.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from shipd.service.histogram import PAUSE_SECONDS, STAGE_SECONDS, TRANSFER_SECONDS, Histogram
from shipd.service.models import Model, alive
from shipd.service.session import Session
from shipd.transfer.peer import Peer
from shipd.transfer.unixpeer import UnixPeer
from shipproto.errors import (
    AbortCode,
    AuthFailed,
    BadPrelude,
    ForeignPeer,
    ProtocolError,
    TransferError,
    VersionMismatch,
)

if TYPE_CHECKING:
    from shipd.service.incoming import Incoming

COMMITTED: Final = "committed"
ALREADY: Final = "already"
OUTCOMES: Final = (COMMITTED, ALREADY, *map(str, AbortCode))
"""How a push can end: committed, current already, or with an ABORT of some code."""

TRANSPORTS: Final = ("tcp", "unix")

NO_HANDSHAKE: Final = "no-handshake"
_FAILURES: Final[Mapping[type[ProtocolError], str]] = {
    ForeignPeer: "foreign",
    AuthFailed: "auth",
    VersionMismatch: "version",
    BadPrelude: "damaged",
}
_OTHER_FAILURE: Final = "protocol"
FAILURES: Final = (*_FAILURES.values(), _OTHER_FAILURE, NO_HANDSHAKE)
"""Why connections ended that did not end well: what the peer did wrong, or that it never said who it is."""


class ModelTally:
    """The pushes of one model that are over, and its processes that were given up."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.payload_bytes = 0
        self.decoded_bytes = 0
        self.frames_damaged = 0
        self.evictions = 0
        self.transfer_seconds = Histogram(TRANSFER_SECONDS)
        self.stage_seconds = Histogram(STAGE_SECONDS)
        self.pause_seconds = Histogram(PAUSE_SECONDS)
        self.given_up: set[int] = set()
        """Processes that were evicted or could not follow a commit, and have not been seen again since."""

    def give_up(self, pids: Iterable[int]) -> None:
        """Processes have been left behind."""
        self.given_up = {pid for pid in self.given_up if alive(pid)}.union(pids)

    def absorb(self, other: "ModelTally") -> None:
        """Count in what ``other`` has counted."""
        self.outcomes += other.outcomes
        self.payload_bytes += other.payload_bytes
        self.decoded_bytes += other.decoded_bytes
        self.frames_damaged += other.frames_damaged
        self.evictions += other.evictions
        self.transfer_seconds.add(other.transfer_seconds)
        self.stage_seconds.add(other.stage_seconds)
        self.pause_seconds.add(other.pause_seconds)

    def stale(self, model: Model) -> int:
        """How many processes live that serve nothing because they were given up."""
        back = {session.pid for session in model.sessions if not session.lost}
        leaving = {session.pid for session in model.sessions if session.lost}
        self.given_up = {pid for pid in self.given_up - back if alive(pid)}
        return len(self.given_up | (leaving - back))


class ConnectionTally:
    """Connections of one kind that are closed."""

    def __init__(self) -> None:
        self.closed = 0
        self.bytes_received = 0
        self.frames_resent = 0
        self.failures: Counter[str] = Counter()


class Tally:
    """Counts. ``models`` are the daemon's, which come and go."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.connections = {transport: ConnectionTally() for transport in TRANSPORTS}
        self.rest = ModelTally()
        """Of models that exist no longer, or never have."""
        self._models = models
        self._tallies: dict[str, ModelTally] = {}

    def of(self, name: str) -> ModelTally:
        """The numbers of a model; those of the remainder where there is none of that name."""
        if name not in self._models:
            return self.rest
        if name not in self._tallies:
            # Only here does the dictionary grow, so only here need it be weeded.
            self._forget()
            self._tallies[name] = ModelTally()
        return self._tallies[name]

    def each(self) -> Iterator[tuple[str, ModelTally]]:
        """Every model that exists, by name, and the remainder, which has none, as soon as there is one."""
        self._forget()
        for name in sorted(self._models):
            yield name, self.of(name)
        if self.rest.outcomes or self.rest.evictions:
            yield "", self.rest

    def _forget(self) -> None:
        for name in [name for name in self._tallies if name not in self._models]:
            self.rest.absorb(self._tallies.pop(name))

    # --- what the daemon says ------------------------------------------------------------------------------

    def finished(self, incoming: "Incoming") -> None:
        """A push is over."""
        tally = self.of(incoming.model.name)
        receiver = incoming.receiver
        tally.payload_bytes += receiver.payload_bytes
        tally.decoded_bytes += incoming.decoded_bytes
        tally.frames_damaged += receiver.chunks_damaged
        if incoming.stage_seconds is not None:
            tally.stage_seconds.observe(incoming.stage_seconds)
        outcome = receiver.outcome
        if outcome is None:
            tally.outcomes[str(AbortCode.INTERNAL if receiver.error is None else receiver.error.code)] += 1
            return
        tally.outcomes[ALREADY if outcome.already else COMMITTED] += 1
        if not outcome.already:
            tally.transfer_seconds.observe(time.monotonic() - incoming.began)
        if outcome.pause_seconds is not None:
            tally.pause_seconds.observe(outcome.pause_seconds)
        tally.give_up(map(int, outcome.stale))

    def lane_ended(self, received: int, resent: int) -> None:
        """A lane is gone; until it joined it was counted as a connection."""
        self.connections["tcp"].bytes_received += received
        self.connections["tcp"].frames_resent += resent

    def refused(self, model: str, error: TransferError) -> None:
        """A push was refused before it had begun. ``model`` is what its sender called it."""
        self.of(model).outcomes[str(error.code)] += 1

    def lost(self, peer: Peer, session: Session | None) -> None:
        """A connection that was counted in is closed; ``session`` is that of the process at its end."""
        tally = self.connections[transport(peer)]
        connection = peer.connection
        tally.closed += 1
        tally.bytes_received += connection.bytes_received
        tally.frames_resent += connection.frames_resent
        if peer.error is not None:
            tally.failures[_FAILURES.get(type(peer.error), _OTHER_FAILURE)] += 1
        elif not connection.established:
            tally.failures[NO_HANDSHAKE] += 1
        if session is not None and session.evicted:
            model = self.of(session.model)
            model.evictions += 1
            model.give_up([session.pid])


def transport(peer: Peer) -> str:
    """Which of TRANSPORTS a connection is."""
    return "unix" if isinstance(peer, UnixPeer) else "tcp"
