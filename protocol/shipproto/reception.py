"""The chunks of a transfer as a receiver gets them: what it asks for, on which connections it comes, what it takes.

The transfer's own connection carries the conversation as well, which is in ``receiver``. Further ones, the lanes, only
bring chunks, each on a thread of its own: ``take_on_thread``, and what is called when something lands, run there. A
chunk belongs to whichever connection claims it first. Everything else belongs to the one thread that keeps the books.
"""

from functools import partial

from shipproto.agreement import Ability, Agreement
from shipproto.connection import ChunkArrived, ChunkDamaged, Connection, Event, RunArrived
from shipproto.errors import AbortCode, LocalError, MalformedMessage, TransferError
from shipproto.frame import Buffer
from shipproto.intake import Intake
from shipproto.messages import Coded, Data, Held, Join, Joined, Message, Offer, StructureIs, Want
from shipproto.outcomes import RunToDecode
from shipproto.rangeset import RangeSet


class Reception:
    """The connections of one transfer, and what they bring. ``offer`` is the sender's latest.

    connection   the transfer's own; None while the sender is not connected
    lanes        further ones by number; replaced and never changed, since threads look at it
    intake       the books of what has arrived; None before the transfer is accepted and after it was forgotten
    """

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.connection: Connection | None = None
        self.lanes: dict[int, Connection] = {}
        self.intake: Intake | None = None
        self._lane_limit = 1
        self._ability = Ability()
        self._agreed = Agreement()
        self._plain = False
        """A run did not decode, or not to what it should: what is asked for from now on travels as it is."""

    @property
    def books(self) -> Intake:
        """The intake, where there has to be one."""
        if self.intake is None:
            raise LocalError("the transfer was not accepted")
        return self.intake

    def say(self, message: Message, body: Buffer = b"") -> None:
        """Tell the sender, if it is there."""
        if self.connection is not None:
            self.connection.send(message, body)

    # --- connections ---------------------------------------------------------------------------------------

    def connected(self, connection: Connection, offer: Offer) -> None:
        """The sender is here, for the first time or again. What earlier connections still bring lands nowhere."""
        self.let_go(lanes=True)
        self.connection = connection
        self.offer = offer

    def disconnected(self, connection: Connection) -> None:
        """A connection is gone."""
        if self.connection is connection:
            self.let_go(lanes=True)
            self.connection = None

    def join(self, connection: Connection, join: Join) -> None:
        """The sender brings chunks on this connection as well. Raises TransferError where that is not wanted."""
        if join.lane >= self._lane_limit or join.lane in self.lanes:
            raise TransferError(
                AbortCode.PROTOCOL, f"lane {join.lane} of {self._lane_limit} cannot join, or has joined"
            )
        self.lanes = {**self.lanes, join.lane: connection}
        connection.landing = partial(self._land, connection)
        connection.send(Joined(lane=join.lane, transfer=self.offer.transfer))

    def brings(self, connection: Connection) -> bool:
        """Whether anything is taken from this connection."""
        return connection is self.connection or connection in self.lanes.values()

    def part(self, connection: Connection) -> None:
        """A connection brings nothing any more; what was arriving on it lands nowhere."""
        self.lanes = {lane: other for lane, other in self.lanes.items() if other is not connection}
        connection.withdraw()
        if self.intake is not None:
            self.intake.give_up(connection)

    def let_go(self, *, lanes: bool) -> None:
        """The same of the transfer's own, and of lanes once their threads have ended."""
        for connection in (self.connection, *(self.lanes.values() if lanes else ())):
            if connection is not None:
                self.part(connection)

    # --- what is asked for ---------------------------------------------------------------------------------

    def begin(self, intake: Intake, *, lanes: int = 1, ability: Ability | None = None) -> None:
        """The transfer is accepted; from here on chunks are taken, on so many connections."""
        self.intake = intake
        self._lane_limit = lanes
        self._ability = ability or Ability()
        self.ask()

    def ask(self) -> None:
        """Ask the sender for everything that is missing, if it is there, and listen to what it sends."""
        intake = self.books
        if self.connection is None:
            return
        self._listen(self.connection)
        self._agreed = Agreement() if self._plain else self._ability.answer(self.offer)
        if self._agreed.told and self._ability.digests is not None:
            self.say(Held(transfer=self.offer.transfer), self._ability.digests.chunk_digests().tobytes())
        intake.lost = RangeSet()
        self._want(intake.missing())

    def ask_again(self, chunks: RangeSet) -> None:
        """Ask for chunks that the sender has sent once already; they come as they are from now on."""
        self._plain, self._agreed = True, Agreement()
        if self.connection is not None and self.connection.landing is None:
            # It was opened meanwhile, when there was nothing to receive.
            self._listen(self.connection)
        self._want(chunks)

    def _listen(self, connection: Connection) -> None:
        connection.landing = partial(self._land, connection)
        structure = self.books.layout.structure
        if structure.digest != self.offer.structure:
            connection.send(StructureIs(transfer=self.offer.transfer), structure.encoded)

    def _want(self, missing: RangeSet) -> None:
        want = Want(
            base=self._agreed.base,
            codecs=tuple(self._agreed.codecs),
            lanes=self._lane_limit,
            speeds=tuple(self._agreed.codecs.values()),
            structure=self.books.layout.structure.digest,
            transfer=self.offer.transfer,
        )
        self.say(want, missing.encode())

    # --- what arrives --------------------------------------------------------------------------------------

    def _land(self, connection: Connection, message: Data | Coded, size: int) -> memoryview | None:
        """The memory for a chunk or a coded run, or None where it is not wanted any more."""
        intake = self.intake
        if intake is None or intake.closed:
            return None
        if isinstance(message, Data):
            intake.check(message.chunk, size)
            return intake.place(message.chunk, connection) if self.brings(connection) else None
        intake.check_run(message)
        if not self.brings(connection):
            return None
        if message.codec not in self._agreed.codecs:
            raise MalformedMessage(f"codec {message.codec} was not asked for")
        return memoryview(bytearray(size))

    def take_on_thread(self, connection: Connection, event: Event) -> None:
        """What has to be done of a lane's event on its thread, before its NACK leaves and the other thread is told."""
        if isinstance(event, ChunkArrived):
            self.books.digests.record(event.chunk, event.content)
        elif isinstance(event, ChunkDamaged) and event.chunk is not None:
            # It may come again at once, on any connection.
            self.books.damaged(event.chunk, connection)
        elif isinstance(event, RunArrived):
            self.books.claim_run(event, connection)

    def hold(self, connection: Connection, event: ChunkArrived) -> bool:
        """A chunk has arrived. Whether it is held since now."""
        intake = self.intake
        return intake is not None and not intake.closed and intake.arrived(event, connection)

    def begin_run(self, connection: Connection, event: RunArrived) -> RunToDecode | None:
        """A run has arrived. None where it is not to be decoded."""
        intake = self.intake
        if intake is None or intake.closed:
            return None
        if connection is self.connection:
            intake.claim_run(event, connection)
        return intake.begin(event, connection)

    def undecodable(self, run: RunToDecode) -> bool:
        """A run does not decode: have its chunks come again. False where the transfer is over."""
        intake = self.books
        if not intake.undecodable(run):
            return False
        self._plain = True
        if run.connection is self.connection:
            run.connection.nack(run.sequence)
        else:
            intake.lost.add(run.chunks.start, run.chunks.stop)
        return True

    def ask_for_lost(self) -> bool:
        """Where nothing is missing but what no NACK could ask for, ask for that. Whether it was so."""
        intake = self.books
        if not intake.lost or intake.decoding or intake.lost != intake.missing():
            return False
        lost, intake.lost = intake.lost, RangeSet()
        self.ask_again(lost)
        return True

    def forget(self) -> None:
        """Keep no books of it, neither its own nor those of the base."""
        self.intake = None
        self._ability, self._agreed = Ability(), Agreement()

    def close(self) -> None:
        """Let go of the image: its memory may be reused once nothing is being decoded."""
        self.let_go(lanes=False)
        if self.intake is not None:
            self.intake.close()
