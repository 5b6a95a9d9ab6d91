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

Which connections bring the chunks, and where they land, is in ``reception``.
"""

from collections.abc import Mapping
from typing import Final

import xxhash

from shipproto.aborts import read_abort, send_abort
from shipproto.agreement import Ability
from shipproto.connection import (
    ChunkArrived,
    ChunkDamaged,
    Connection,
    Event,
    MessageArrived,
    RunArrived,
    RunDamaged,
)
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
from shipproto.lent import Lent, check_table
from shipproto.messages import (
    Abort,
    Commit,
    Committed,
    Finish,
    Join,
    Lend,
    Message,
    Offer,
    Progress,
    Staged,
    StructureIs,
    StructureWanted,
)
from shipproto.outcomes import (
    ChunkHeld,
    CommitRequested,
    FilesLent,
    ReadyToVerify,
    ReceiverEvent,
    RunToDecode,
    StructureArrived,
    TransferAborted,
)
from shipproto.rangeset import RangeSet
from shipproto.reception import Reception
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
    (ReceiverState.RECEIVING, Lend): ("_on_lend", None),
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
        """Bytes of chunks and coded runs that arrived intact, those that had to come again included."""
        self.runs_undecodable = 0
        self._reception = Reception(offer)
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
        intake = self._reception.intake
        return intake is not None and intake.complete

    @property
    def layout(self) -> Layout | None:
        """The one that rules; None before it was decided."""
        intake = self._reception.intake
        return intake.layout if intake is not None else None

    @property
    def held(self) -> RangeSet:
        """The chunks that are in their place."""
        intake = self._reception.intake
        return intake.held if intake is not None else RangeSet()

    @property
    def decoding(self) -> int:
        """How many runs are being decoded. While there are any the image must not be given back."""
        intake = self._reception.intake
        return intake.decoding if intake is not None else 0

    def touched(self, chunk: int) -> bool:
        """See ``Intake.touched``."""
        return self._reception.books.touched(chunk)

    @property
    def finishing(self) -> bool:
        """Whether the sender has said that everything wanted was sent."""
        return self._verification.finish is not None

    @property
    def attended(self) -> bool:
        """Whether the sender is connected."""
        return self._reception.connection is not None

    @property
    def lanes(self) -> int:
        """How many further connections bring chunks."""
        return len(self._reception.lanes)

    @property
    def digests(self) -> LeafDigests:
        """The leaf digests of what has arrived."""
        return self._reception.books.digests

    # --- connections ---------------------------------------------------------------------------------------

    def connected(self, connection: Connection, offer: Offer) -> None:
        """The sender (again) offers this transfer on this connection. Answers if it can; raises as ``check_offer``."""
        self.check_offer(offer)
        self._reception.connected(connection, offer)
        if self.state is ReceiverState.RECEIVING:
            # The sender starts over: it will say again that it is done.
            self._verification.forget()
            self._reception.ask()
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
        first = self.offer
        same = (offer.model, offer.structure, offer.partial) == (first.model, first.structure, first.partial)
        if not same or (self.label and offer.label not in ("", self.label)):
            raise TransferError(AbortCode.PROTOCOL, "the transfer's id was offered before with other content")

    def disconnected(self, connection: Connection) -> None:
        """A connection is gone, and with it the chunk that was arriving on it."""
        self._reception.disconnected(connection)

    def joined(self, connection: Connection, join: Join) -> None:
        """The sender brings chunks on this connection as well. Raises TransferError where that is not wanted."""
        reception = self._reception
        taking = reception.intake is not None and reception.intake.image is not None
        if self.state is not ReceiverState.RECEIVING or not taking or not self.attended:
            raise TransferError(AbortCode.PROTOCOL, f"no lane can join a transfer that is {self.state.name.lower()}")
        reception.join(connection, join)

    def parted(self, connection: Connection) -> None:
        """A lane is gone, and with it the chunk that was arriving on it. Nothing may write to the image for it."""
        self._reception.part(connection)

    def take_on_thread(self, connection: Connection, event: Event) -> None:
        """What has to be done of a lane's event on its thread, before its NACK leaves and ``receive`` is told."""
        self._reception.take_on_thread(connection, event)

    def receive(self, connection: Connection, event: Event) -> list[ReceiverEvent]:
        """Take an event of one of the transfer's connections; of the lanes and the latest other one.

        Raises UnexpectedMessage or MalformedMessage: that connection is broken, the transfer may go on.
        """
        reception = self._reception
        if not reception.brings(connection):
            return []
        if isinstance(event, ChunkArrived):
            chunks = range(event.chunk, event.chunk + 1)
            return self._took(chunks, len(event.content)) if reception.hold(connection, event) else []
        if isinstance(event, RunArrived):
            run = reception.begin_run(connection, event)
            return [] if run is None else [run]
        lane = connection is not reception.connection
        if isinstance(event, ChunkDamaged | RunDamaged):
            self.chunks_damaged += 1
            if not lane:
                reception.take_on_thread(connection, event)
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
        ours = connection is self._reception.connection and getattr(message, "transfer", b"") == self.transfer
        if not ours or self.ended:
            return False
        if (self.state, type(message)) not in _TRANSITIONS:
            raise UnexpectedMessage(f"{type(message).__name__} in state {self.state.name}")
        if isinstance(message, Finish):
            check_size(size, self._reception.books.layout)
        elif isinstance(message, Lend):
            check_table(size, self._reception.books.layout)
        return True

    # --- what the shell decides ----------------------------------------------------------------------------

    def want_structure(self) -> None:
        """This side does not know the offered structure."""
        if self.state is not ReceiverState.OFFERED:
            raise LocalError(f"want_structure in state {self.state.name}")
        self.state = ReceiverState.STRUCTURE
        self._reception.say(StructureWanted(transfer=self.transfer))

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

    def accept(self, layout: Layout, image: memoryview, *, lanes: int = 1, ability: Ability | None = None) -> None:
        """Take the version into ``image``, laid out as ``layout``, whose structure rules from now on; its chunks on at
        most so many connections at once, and coded runs as far as the sender can make use of ``ability``."""
        if len(image) < layout.size:
            raise LocalError("the image is smaller than its layout")
        base = ability.digests if ability is not None else None
        if base is not None and base.layout.structure.digest != layout.structure.digest:
            raise LocalError("the base is laid out by another structure")
        self._begin(Intake(layout, LeafDigests(layout), image), lanes=lanes, ability=ability)

    def compare(self, digests: LeafDigests) -> None:
        """Take no bytes, only the sender's digests, to compare with those of a version that is held."""
        self._begin(Intake(digests.layout, digests, None))

    def _begin(self, intake: Intake, *, lanes: int = 1, ability: Ability | None = None) -> None:
        if self.state is not ReceiverState.OFFERED:
            raise LocalError(f"accept in state {self.state.name}")
        self.state = ReceiverState.RECEIVING
        self._reception.begin(intake, lanes=lanes, ability=ability)

    def decoded(self, run: RunToDecode) -> list[ReceiverEvent]:
        """The run is in the image, and what it consists of may have been added to ``digests``; what has not is now."""
        return self._took(run.chunks, len(run.payload)) if self._reception.books.decoded(run) else []

    def lend(self, lent: Lent) -> list[RunToDecode]:
        """This side reads what is missing from files that were lent: in these runs, in the files' order."""
        if self._reception.connection is None:
            raise LocalError("nobody is there who could have lent anything")
        return self._reception.books.lend(lent, self._reception.connection)

    def undecodable(self, run: RunToDecode) -> None:
        """The run does not decode: its chunks are asked for again, and to come as they are.

        By NACK where the transfer's own connection has brought it, which the shell has to flush. Where that is gone, or
        it was a lane, whose thread may sleep, they are asked for once everything else has arrived.
        """
        if self._reception.undecodable(run):
            self.runs_undecodable += 1
            if self.finishing:
                self._check_complete()

    def report(self, stage: str) -> None:
        """Tell the sender what is going on; it also shows that this side is alive."""
        self._stage = stage
        self._reception.say(Progress(held=len(self.held), stage=stage, transfer=self.transfer))

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
        intake = self._reception.books
        names = [intake.layout.structure.names[row] for row in differing]
        self._verification.failed(names, repairable=intake.image is not None)
        self.state = ReceiverState.RECEIVING
        self._reception.ask_again(intake.take_back(differing))
        return False

    def staged(self, processes: int, stage_seconds: float) -> None:
        """Every serving process is ready."""
        if self.state is not ReceiverState.STAGING:
            raise LocalError(f"staged in state {self.state.name}")
        self.state = ReceiverState.STAGED
        self._stage = "staged"
        self._staged = Staged(processes=processes, stage_seconds=stage_seconds, transfer=self.transfer)
        self._reception.say(self._staged)

    def committed(self, outcome: Committed) -> None:
        """The version is the current one."""
        if self.ended:
            raise LocalError(f"committed in state {self.state.name}")
        self.state = ReceiverState.COMMITTED
        self.outcome = outcome
        self._reception.close()
        self._reception.say(outcome)

    def abort(self, error: TransferError) -> None:
        """End the transfer from this side."""
        if self.ended:
            return
        self.state = ReceiverState.ABORTED
        self.error = error
        self._reception.close()
        if self._reception.connection is not None:
            send_abort(self._reception.connection, self.transfer, error)

    def forget(self) -> None:
        """Keep how it ended, which is all that a sender that comes back is told: the books of it may be megabytes."""
        if not self.ended or self.decoding:
            raise LocalError(f"forget in state {self.state.name}, {self.decoding} runs being decoded")
        self._reception.forget()
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
        self._verification.note(finish, body, self._reception.books.layout)
        return self._check_complete()

    def _on_lend(self, lend: Lend, body: Buffer) -> list[ReceiverEvent]:
        intake = self._reception.books
        if intake.image is None:
            raise MalformedMessage("LEND where no bytes were asked for")
        return [FilesLent(lend.files, Lent.decode(body, intake.layout, lend.files))]

    def _on_commit(self, _commit: Commit, _body: Buffer) -> list[ReceiverEvent]:
        self._stage = "committing"
        return [CommitRequested()]

    def _on_late_abort(self, _abort: Abort, _body: Buffer) -> list[ReceiverEvent]:
        return []

    def _on_abort(self, abort: Abort, body: Buffer) -> list[ReceiverEvent]:
        self.error = read_abort(abort, body)
        self._reception.close()
        return [TransferAborted(self.error)]

    def _took(self, chunks: range, size: int) -> list[ReceiverEvent]:
        """These chunks are held since just now; so many bytes brought them."""
        self.payload_bytes += size
        intake = self._reception.books
        if len(intake.held) % _PROGRESS_CHUNKS < len(chunks) or intake.complete:
            self.report("receiving")
        held: list[ReceiverEvent] = list(map(ChunkHeld, chunks))
        return held + self._check_complete() if self.finishing else held

    def _check_complete(self) -> list[ReceiverEvent]:
        """The sender has said that it has sent everything: whether it has arrived, or something has to come again."""
        if self.complete:
            self.state = ReceiverState.VERIFYING
            self._stage = "verifying"
            return [ReadyToVerify()]
        if self._reception.ask_for_lost():
            # The sender has nothing more to send until it has heard that, and will then say again that it is done.
            self._verification.forget()
        return []
