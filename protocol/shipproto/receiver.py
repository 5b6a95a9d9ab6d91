"""The receiving side of a transfer, as a machine: what is held, what is missing, what may be swapped in.

                                accept()              FINISH, all held         verified()        staged()
    OFFERED -> (STRUCTURE) -------------> RECEIVING -----------------> VERIFYING ------> STAGING ------> STAGED
                                              ^______________________________/                             |
                                               some digests differ: WANT those again                COMMIT |
                                                                                                           v
    ABORT, abort(), from every state before COMMITTED -> ABORTED             COMMITTED <------------ COMMITTING
                                                                                         committed()

The shell decides (is there such a model, a free slot, are the processes ready) and owns the memory; the
machine keeps the books and talks to the sender. A connection may come and go in every state: ``connected``
answers a repeated OFFER from where the transfer stands, also when it is over.

Further connections, the lanes, may bring chunks as well, each on a thread of its own: a chunk belongs to whichever
connection claims it first, and that is the one thing here that may happen on any thread.
"""

from collections.abc import Mapping
from functools import partial
from typing import Final

import xxhash

from shipproto.aborts import read_abort, send_abort
from shipproto.connection import ChunkArrived, ChunkDamaged, Connection, Event, MessageArrived
from shipproto.digests import LeafDigests
from shipproto.errors import (
    AbortCode,
    LocalError,
    MalformedMessage,
    ProtocolError,
    TransferError,
    UnexpectedMessage,
)
from shipproto.frame import Buffer
from shipproto.intake import Intake
from shipproto.layout import Layout
from shipproto.messages import (
    Abort,
    Commit,
    Committed,
    Finish,
    Join,
    Joined,
    Message,
    Offer,
    Progress,
    Staged,
    StructureIs,
    StructureWanted,
    Want,
)
from shipproto.outcomes import (
    ChunkHeld,
    CommitRequested,
    ReadyToVerify,
    ReceiverEvent,
    StructureArrived,
    TransferAborted,
)
from shipproto.rangeset import RangeSet
from shipproto.states import RECEIVER_ENDED, ReceiverState
from shipproto.structure import Structure
from shipproto.verification import Verification, check_size

_PROGRESS_CHUNKS: Final = 32
"""A PROGRESS every 16 MiB: often enough for a progress bar at 1 Gbit/s, nothing beside the data itself."""

_DETAILS_KEPT: Final = 100
"""Of what was wrong, for a sender that comes back."""

_Handler = str
_TRANSITIONS: Final[Mapping[tuple[ReceiverState, type[Message]], tuple[_Handler, ReceiverState | None]]] = {
    (ReceiverState.STRUCTURE, StructureIs): ("_on_structure", ReceiverState.OFFERED),
    (ReceiverState.RECEIVING, Finish): ("_on_finish", None),
    (ReceiverState.STAGED, Commit): ("_on_commit", ReceiverState.COMMITTING),
    # A commit is never interrupted: the sender will be told how it ended.
    (ReceiverState.COMMITTING, Abort): ("_on_late_abort", None),
    **{
        (state, Abort): ("_on_abort", ReceiverState.ABORTED)
        for state in ReceiverState
        if state not in RECEIVER_ENDED and state is not ReceiverState.COMMITTING
    },
}
"""What is allowed when: the handler, and the state that follows (None: the handler decides)."""


class Receiver:
    """One version on its way in. ``offer`` is the sender's first one."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.state = ReceiverState.OFFERED
        self.error: TransferError | None = None
        self.outcome: Committed | None = None
        self.label = offer.label
        self.digest = b""
        self.chunks_damaged = 0
        self.payload_bytes = 0
        """Bytes of chunks that arrived intact, those that had to come again included."""
        self._intake: Intake | None = None
        self._connection: Connection | None = None
        # Replaced and never changed: threads that receive look at it.
        self._lanes: dict[int, Connection] = {}
        self._lane_limit = 1
        self._verification = Verification()
        self._staged: Staged | None = None
        self._stage = "receiving"

    @property
    def transfer(self) -> bytes:
        """The transfer's id."""
        return self.offer.transfer

    @property
    def ended(self) -> bool:
        """Whether the transfer is over, one way or the other."""
        return self.state in RECEIVER_ENDED

    @property
    def complete(self) -> bool:
        """Whether every chunk is held."""
        return self._intake is not None and self._intake.complete

    @property
    def layout(self) -> Layout | None:
        """The one that rules; None before it was decided."""
        return self._intake.layout if self._intake is not None else None

    @property
    def held(self) -> RangeSet:
        """The chunks that are in their place."""
        return self._intake.held if self._intake is not None else RangeSet()

    @property
    def finishing(self) -> bool:
        """Whether the sender has said that everything wanted was sent."""
        return self._verification.finish is not None

    @property
    def attended(self) -> bool:
        """Whether the sender is connected."""
        return self._connection is not None

    @property
    def digests(self) -> LeafDigests:
        """The leaf digests of what has arrived."""
        return self._require_intake().digests

    # --- connections ---------------------------------------------------------------------------------------

    def connected(self, connection: Connection, offer: Offer) -> None:
        """The sender (again) offers this transfer on this connection. Answers if it can; raises as ``check_offer``."""
        self.check_offer(offer)
        # What earlier ones still bring is not waited for, and lands nowhere.
        self._let_go(lanes=True)
        self._connection = connection
        if self.state is ReceiverState.RECEIVING:
            # The sender starts over: it will say again that it is done.
            self._verification.forget()
            self._listen(connection)
            self._want(self._require_intake().missing())
        elif self.state is ReceiverState.STRUCTURE:
            connection.send(StructureWanted(transfer=self.transfer))
        elif self.state is ReceiverState.STAGED and self._staged is not None:
            connection.send(self._staged)
        elif self.outcome is not None:
            connection.send(self.outcome)
        elif self.error is not None:
            send_abort(connection, self.transfer, self.error)
        else:
            self.report(self._stage)

    def check_offer(self, offer: Offer) -> None:
        """Raises TransferError if ``offer`` is not the one that the transfer began with."""
        same = (offer.model, offer.structure) == (self.offer.model, self.offer.structure)
        if not same or (self.label and offer.label not in ("", self.label)):
            raise TransferError(AbortCode.PROTOCOL, "the transfer's id was offered before with other content")

    def disconnected(self, connection: Connection) -> None:
        """A connection is gone, and with it the chunk that was arriving on it."""
        if self._connection is connection:
            self._let_go(lanes=True)
            self._connection = None

    def joined(self, connection: Connection, join: Join) -> None:
        """The sender brings chunks on this connection as well. Raises TransferError where that is not wanted."""
        receiving = self.state is ReceiverState.RECEIVING and self._require_intake().image is not None
        if not receiving or self._connection is None:
            raise TransferError(AbortCode.PROTOCOL, f"no lane can join a transfer that is {self.state.name.lower()}")
        if join.lane >= self._lane_limit or join.lane in self._lanes:
            raise TransferError(
                AbortCode.PROTOCOL, f"lane {join.lane} of {self._lane_limit} cannot join, or has joined"
            )
        self._lanes = {**self._lanes, join.lane: connection}
        connection.landing = partial(self._land, connection)
        connection.send(Joined(lane=join.lane, transfer=self.transfer))

    def parted(self, connection: Connection) -> None:
        """A lane is gone, and with it the chunk that was arriving on it. Nothing may write to the image for it."""
        self._lanes = {lane: other for lane, other in self._lanes.items() if other is not connection}
        connection.withdraw()
        if self._intake is not None:
            self._intake.give_up(connection)

    def take_on_thread(self, connection: Connection, event: Event) -> None:
        """What has to be done of a lane's event on its thread, before its NACK leaves and ``receive`` is told."""
        if isinstance(event, ChunkArrived):
            self.digests.record(event.chunk, event.content)
        elif isinstance(event, ChunkDamaged) and event.chunk is not None:
            # It may come again at once, on any connection.
            self._require_intake().damaged(event.chunk, connection)

    def receive(self, connection: Connection, event: Event) -> list[ReceiverEvent]:
        """Take an event of one of the transfer's connections; of the lanes and the latest other one.

        Raises UnexpectedMessage or MalformedMessage: that connection is broken, the transfer may go on.
        """
        lane = connection in self._lanes.values()
        if connection is not self._connection and not lane:
            return []
        if isinstance(event, ChunkArrived):
            return self._arrived(connection, event)
        if isinstance(event, ChunkDamaged):
            self.chunks_damaged += 1
            if self._intake is not None and event.chunk is not None and not lane:
                self._intake.damaged(event.chunk, connection)
        elif isinstance(event, MessageArrived) and lane:
            raise UnexpectedMessage(f"{type(event.message).__name__} on a lane")
        elif isinstance(event, MessageArrived):
            if self.ended or getattr(event.message, "transfer", b"") not in (self.transfer, b""):
                return []
            handler, state = _TRANSITIONS.get((self.state, type(event.message)), ("", None))
            if not handler:
                raise UnexpectedMessage(f"{type(event.message).__name__} in state {self.state.name}")
            events: list[ReceiverEvent] = getattr(self, handler)(event.message, event.body)
            self.state = state or self.state
            return events
        return []

    def awaits(self, connection: Connection, message: Message, size: int) -> bool:
        """Whether a body of ``size`` bytes that ``message`` announces is for this transfer, and due.

        Nothing of any other is to be kept: see ``Connection.awaited``. Raises UnexpectedMessage or MalformedMessage.
        """
        if connection is not self._connection or self.ended or getattr(message, "transfer", b"") != self.transfer:
            return False
        if (self.state, type(message)) not in _TRANSITIONS:
            raise UnexpectedMessage(f"{type(message).__name__} in state {self.state.name}")
        if isinstance(message, Finish):
            check_size(size, self._require_intake().layout)
        return True

    # --- what the shell decides ----------------------------------------------------------------------------

    def want_structure(self) -> None:
        """This side does not know the offered structure."""
        if self.state is not ReceiverState.OFFERED:
            raise LocalError(f"want_structure in state {self.state.name}")
        self.state = ReceiverState.STRUCTURE
        if self._connection is not None:
            self._connection.send(StructureWanted(transfer=self.transfer))

    def decode_structure(self, encoded: bytes) -> Structure:
        """The offered structure. Pure, and milliseconds for many tensors: may run on another thread.

        Raises TransferError where it is no structure, or not what the offer says it is.
        """
        try:
            structure = Structure.decode(encoded)
        except ProtocolError as error:
            raise TransferError(AbortCode.PROTOCOL, f"the offered structure is not valid: {error}") from error
        if (self.offer.tensors, self.offer.nbytes) != (len(structure), structure.total_bytes):
            raise TransferError(AbortCode.PROTOCOL, "the offered structure has other figures than the offer")
        return structure

    def accept(self, layout: Layout, image: memoryview, *, lanes: int = 1) -> None:
        """Take the version into ``image``, laid out as ``layout``, whose structure rules from now on; its chunks on at
        most so many connections at once."""
        if len(image) < layout.size:
            raise LocalError("the image is smaller than its layout")
        self._lane_limit = lanes
        self._begin(Intake(layout, LeafDigests(layout), image))

    def compare(self, digests: LeafDigests) -> None:
        """Take no bytes, only the sender's digests, to compare with those of a version that is held."""
        self._begin(Intake(digests.layout, digests, None))

    def _begin(self, intake: Intake) -> None:
        if self.state is not ReceiverState.OFFERED:
            raise LocalError(f"accept in state {self.state.name}")
        self._intake = intake
        self.state = ReceiverState.RECEIVING
        connection = self._connection
        if connection is not None:
            self._listen(connection)
            self._want(intake.missing())

    def report(self, stage: str) -> None:
        """Tell the sender what is going on; it also shows that this side is alive."""
        self._stage = stage
        if self._connection is not None:
            self._connection.send(Progress(held=len(self.held), stage=stage, transfer=self.transfer))

    def verify(self) -> tuple[int, ...]:
        """Rows of the tensors whose digests differ from the sender's. Pure: may run on another thread.

        Raises TransferError where the sender contradicts itself.
        """
        if not self.finishing:
            raise LocalError("nothing to verify yet")
        return self._verification.differing(self.digests)

    def verified(self, differing: tuple[int, ...]) -> bool:
        """Take the result of ``verify``. True: go on and stage. False: tensors were asked for again.

        Raises TransferError, naming the tensor, once that has happened MAX_VERIFY_ROUNDS times.
        """
        finish = self._verification.finish
        if self.state is not ReceiverState.VERIFYING or finish is None:
            raise LocalError(f"verified in state {self.state.name}")
        if not differing:
            self.digest = finish.digest
            self.label = finish.label
            self.state = ReceiverState.STAGING
            self._stage = "staging"
            return True
        intake = self._require_intake()
        names = [intake.layout.structure.names[row] for row in differing]
        self._verification.failed(names, repairable=intake.image is not None)
        again = intake.take_back(differing)
        self.state = ReceiverState.RECEIVING
        if self._connection is not None and self._connection.landing is None:
            # It was opened meanwhile, when there was nothing to receive.
            self._listen(self._connection)
        self._want(again)
        return False

    def staged(self, processes: int, stage_seconds: float) -> None:
        """Every serving process is ready."""
        if self.state is not ReceiverState.STAGING:
            raise LocalError(f"staged in state {self.state.name}")
        self.state = ReceiverState.STAGED
        self._stage = "staged"
        self._staged = Staged(processes=processes, stage_seconds=stage_seconds, transfer=self.transfer)
        if self._connection is not None:
            self._connection.send(self._staged)

    def committed(self, outcome: Committed) -> None:
        """The version is the current one."""
        if self.ended:
            raise LocalError(f"committed in state {self.state.name}")
        self.state = ReceiverState.COMMITTED
        self.outcome = outcome
        self._close()
        if self._connection is not None:
            self._connection.send(outcome)

    def abort(self, error: TransferError) -> None:
        """End the transfer from this side."""
        if self.ended:
            return
        self.state = ReceiverState.ABORTED
        self.error = error
        self._close()
        if self._connection is not None:
            send_abort(self._connection, self.transfer, error)

    def forget(self) -> None:
        """Keep how it ended, which is all that a sender that comes back is told: the books of it may be megabytes."""
        if not self.ended:
            raise LocalError(f"forget in state {self.state.name}")
        self._intake = None
        self._verification = Verification()
        if (error := self.error) is not None:
            # Another one: this one's traceback holds on to everything that was at hand where it was raised.
            self.error = TransferError(
                error.code, str(error), tensor=error.tensor, details=error.details[:_DETAILS_KEPT]
            )

    # --- what the sender says ------------------------------------------------------------------------------

    def _on_structure(self, _message: StructureIs, body: Buffer) -> list[ReceiverEvent]:
        encoded = bytes(body)
        if xxhash.xxh3_128_digest(encoded) != self.offer.structure:
            raise MalformedMessage("the structure that arrived is not the one that was offered")
        return [StructureArrived(encoded)]

    def _on_finish(self, finish: Finish, body: Buffer) -> list[ReceiverEvent]:
        if finish.label != self.offer.label and self.offer.label:
            raise MalformedMessage(f"FINISH is labelled {finish.label!r} where {self.offer.label!r} was offered")
        self._verification.note(finish, body, self._require_intake().layout)
        return self._check_complete()

    def _on_commit(self, _commit: Commit, _body: Buffer) -> list[ReceiverEvent]:
        self._stage = "committing"
        return [CommitRequested()]

    def _on_late_abort(self, _abort: Abort, _body: Buffer) -> list[ReceiverEvent]:
        return []

    def _on_abort(self, abort: Abort, body: Buffer) -> list[ReceiverEvent]:
        self.error = read_abort(abort, body)
        self._close()
        return [TransferAborted(self.error)]

    def _land(self, connection: Connection, chunk: int, size: int) -> memoryview | None:
        """The memory for a chunk, or None where it is held or already arriving: it is never overwritten."""
        if self.ended:
            return None
        intake = self._require_intake()
        intake.check(chunk, size)
        if self.state is not ReceiverState.RECEIVING:
            return None
        if connection is not self._connection and connection not in self._lanes.values():
            return None
        return intake.place(chunk, connection)

    def _arrived(self, connection: Connection, event: ChunkArrived) -> list[ReceiverEvent]:
        intake = self._intake
        if intake is None or not intake.arrived(event, connection):
            return []
        self.payload_bytes += len(event.content)
        if intake.complete or len(intake.held) % _PROGRESS_CHUNKS == 0:
            self.report("receiving")
        return [ChunkHeld(event.chunk), *self._check_complete()]

    def _check_complete(self) -> list[ReceiverEvent]:
        if not self.finishing or not self.complete:
            return []
        self.state = ReceiverState.VERIFYING
        self._stage = "verifying"
        return [ReadyToVerify()]

    def _want(self, missing: RangeSet) -> None:
        if self._connection is not None:
            digest = self._require_intake().layout.structure.digest
            want = Want(lanes=self._lane_limit, structure=digest, transfer=self.transfer)
            self._connection.send(want, missing.encode())

    def _listen(self, connection: Connection) -> None:
        connection.landing = partial(self._land, connection)
        structure = self._require_intake().layout.structure
        if structure.digest != self.offer.structure:
            connection.send(StructureIs(transfer=self.transfer), structure.encoded)

    def _let_go(self, *, lanes: bool) -> None:
        """Nothing that connections still bring lands in the image; of lanes, once their threads have ended."""
        for connection in (self._connection, *(self._lanes.values() if lanes else ())):
            if connection is not None:
                self.parted(connection)

    def _close(self) -> None:
        """Let go of the image: its memory may be reused."""
        self._let_go(lanes=False)
        if self._intake is not None:
            self._intake.close()

    def _require_intake(self) -> Intake:
        if self._intake is None:
            raise LocalError("the transfer was not accepted")
        return self._intake
