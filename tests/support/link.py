"""An in-memory link between two Connections that damages, loses, cuts and stalls; and small shells around the two state
machines. No clocks, no threads: what happens next is drawn from a seeded generator, so that a failure repeats.

    feed(connection, data)      bytes into one connection: whole, split or byte by byte
    handshaken(...)             two connections that have greeted each other
    Link                        moves bytes between two connections and applies Faults to whole frames
    Sending, Receiving          what a client and a daemon do with a Sender and a Receiver, without the I/O
    Push                        a whole push over as many links as it takes; it ends or it raises Deadlock
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

from shipproto.connection import Connection, Established, Event, MessageArrived
from shipproto.digests import LeafDigests
from shipproto.errors import AbortCode, ProtocolError, TransferError
from shipproto.layout import Layout
from shipproto.messages import Committed, Offer
from shipproto.receiver import (
    CommitRequested,
    ReadyToVerify,
    Receiver,
    ReceiverEvent,
    ReceiverState,
    StructureArrived,
)
from shipproto.sender import DigestChunk, SendChunk, Sender, SenderState
from shipproto.structure import Structure
from tests.support import naive
from tests.support.models import build, contents, make_image, read_image

Chop = Literal["whole", "split", "bytes"]
CHOPS: Final[tuple[Chop, ...]] = ("whole", "split", "bytes")


@dataclass
class Fed:
    """What came of feeding bytes: the events before the error, the error if there was one, and what was answered."""

    events: list[Event]
    error: ProtocolError | None
    output: bytes


def pieces(data: bytes, chop: Chop, rng: random.Random) -> Iterable[bytes]:
    """``data`` as a network might hand it over."""
    if chop == "whole":
        yield data
        return
    at = 0
    while at < len(data):
        size = 1 if chop == "bytes" else rng.choice((1, 2, 3, 7, 31, 32, 33, 64, 97, 500, 4096, 70_000))
        yield data[at : at + size]
        at += size


def feed(connection: Connection, data: bytes | bytearray, *, chop: Chop = "whole", seed: int = 0) -> Fed:
    """Give ``data`` to ``connection`` the way a shell does."""
    events: list[Event] = []
    try:
        for piece in pieces(bytes(data), chop, random.Random(seed)):
            connection.receive(piece)
            events += connection.events()
    except ProtocolError as error:
        events += connection.events()
        return Fed(events, error, output_of(connection))
    return Fed(events, None, output_of(connection))


def output_of(connection: Connection) -> bytes:
    """Everything queued, as one."""
    return b"".join(bytes(piece) for piece in connection.take_output())


def nonce(seed: int) -> bytes:
    """32 bytes that are no secret."""
    return bytes((seed + at) & 0xFF for at in range(32))


def handshaken(
    *, token: bytes | None = None, landing: Callable[[int, int], memoryview | None] | None = None
) -> tuple[Connection, Connection]:
    """An initiator and an acceptor, established, with nothing queued. ``landing`` is the acceptor's."""
    initiator = Connection(initiator=True, nonce=nonce(1), agent="left", token=token)
    acceptor = Connection(initiator=False, nonce=nonce(101), agent="right", token=token, landing=landing)
    while initiator.has_output or acceptor.has_output:
        acceptor.receive(output_of(initiator))
        initiator.receive(output_of(acceptor))
    for side in (initiator, acceptor):
        assert [type(event) for event in side.events()] == [Established]
    return initiator, acceptor


# --- the link ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong with the ``at``-th frame that ``side`` sends, counted over all connections.

    payload, header, prelude   one bit flipped there (in the prelude where that part is empty)
    cut                        the connection breaks in the middle of the frame
    lose, again                the frame is swallowed, or comes twice: no TCP does that, a broken proxy might
    stall                      nothing more arrives at the other side; the sender tires of it and connects anew
    """

    side: int
    at: int
    kind: Literal["payload", "header", "prelude", "cut", "lose", "again", "stall"]
    bit: int = 0


class Link:
    """Two connections and the bytes between them. Side 0 and side 1; ``queues[n]`` is on its way to side n."""

    def __init__(self, sides: tuple[Connection, Connection], faults: "Faults") -> None:
        self.sides = sides
        self.queues = (bytearray(), bytearray())
        self.down = False
        self.stalled = False
        self.hopeless = False
        """Something that was sent will never arrive: waiting for an answer may be in vain."""
        self._faults = faults

    def collect(self, side: int) -> None:
        """What ``side`` has queued goes on its way."""
        data = output_of(self.sides[side])
        for frame in naive.frames(data):
            raw = data[frame.start : frame.start + frame.size]
            fault = self._faults.next(side, frame)
            if self.down or self.stalled:
                continue
            queue = self.queues[1 - side]
            kind = fault.kind if fault is not None else None
            if kind in ("payload", "header", "prelude"):
                assert fault is not None
                queue += flip(raw, frame, kind, fault.bit)
            elif kind == "cut":
                assert fault is not None
                queue += raw[: fault.bit % len(raw)]
                self.down = True
            elif kind == "stall":
                assert fault is not None
                queue += raw[: fault.bit % len(raw)]
                self.stalled = self.hopeless = True
            elif kind == "lose":
                self.hopeless = True
            else:
                queue += raw * (2 if kind == "again" else 1)

    def deliver(self, side: int, size: int, on_event: Callable[[Event], None]) -> None:
        """At most ``size`` bytes reach ``side``; a ProtocolError takes the link down."""
        connection = self.sides[side]
        data = bytes(self.queues[side][:size])
        del self.queues[side][:size]
        at = 0
        try:
            while at < len(data):
                view = connection.get_buffer()
                count = min(len(view), len(data) - at)
                view[:count] = data[at : at + count]
                at += count
                connection.buffer_updated(count)
                for event in connection.events():
                    on_event(event)
        except ProtocolError:
            self.down = True


def flip(raw: bytes, frame: naive.Frame, part: str, bit: int) -> bytes:
    """``raw`` with one bit flipped in one part of the frame."""
    header = 32 + len(frame.header)
    start, stop = {"prelude": (0, 32), "header": (32, header), "payload": (header, len(raw))}[part]
    if start == stop:
        start, stop = 0, 32
    at, bit = divmod(bit % (8 * (stop - start)), 8)
    damaged = bytearray(raw)
    damaged[start + at] ^= 1 << bit
    return bytes(damaged)


class Faults:
    """A plan of faults, and the count of what travelled."""

    def __init__(self, plan: Iterable[Fault] = ()) -> None:
        self._plan = {(fault.side, fault.at): fault for fault in plan}
        self._sent = [0, 0]
        self.counts = (Counter[str](), Counter[str]())
        """Frames that each side has sent, by name."""
        self.applied: list[Fault] = []

    def next(self, side: int, frame: naive.Frame) -> Fault | None:
        """What happens to this frame."""
        self.counts[side][frame.name] += 1
        fault = self._plan.pop((side, self._sent[side]), None)
        self._sent[side] += 1
        if fault is not None:
            self.applied.append(fault)
        return fault


# --- the shells --------------------------------------------------------------------------------------------------


class Sending:
    """What a client does with a Sender."""

    def __init__(
        self,
        structure: Structure,
        data: Mapping[str, bytes],
        *,
        transfer: bytes = b"T" * 16,
        model: str = "m",
        label: str | None = "v1",
    ) -> None:
        self.data = data
        self.sender = Sender(
            transfer=transfer, model=model, structure=structure, label=label, make_label=lambda digest: digest.hex()[:8]
        )
        self._image: tuple[Layout, bytearray] | None = None

    def image(self) -> memoryview:
        """The image in the layout that rules now."""
        layout = self.sender.layout
        if self._image is None or self._image[0] is not layout:
            offered = self.sender.offered.names
            for left, right in self.sender.equal_rows:
                if self.data[offered[left]] != self.data[offered[right]]:
                    raise TransferError(AbortCode.MISMATCH, f"{offered[left]!r} and {offered[right]!r} differ")
            rows = self.sender.source_rows.tolist()
            data = {name: self.data[offered[row]] for name, row in zip(layout.structure.names, rows, strict=True)}
            self._image = layout, make_image(layout, data)
        return memoryview(self._image[1])

    def on_event(self, event: Event) -> None:
        """Hand an event to the machine."""
        self._guard(lambda: self.sender.receive(event))

    def step(self) -> bool:
        """Do the next thing; False where there is nothing to do."""
        before = self.sender.state
        if before is SenderState.STAGED:
            self.sender.commit()
            return True
        step = None

        def do() -> None:
            nonlocal step
            step = self.sender.next_step()
            if step is not None:
                start, size = self.sender.layout.chunk(step.chunk)
                content = self.image()[start : start + size]
                if isinstance(step, SendChunk):
                    self.sender.send_chunk(step.chunk, content)
                else:
                    assert isinstance(step, DigestChunk)
                    self.sender.digest_chunk(step.chunk, content)

        self._guard(do)
        return step is not None or self.sender.state is not before

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except TransferError as error:
            self.sender.abort(error)


@dataclass
class Installed:
    """A version that a Receiving side has committed."""

    label: str
    digest: bytes
    layout: Layout
    image: bytearray
    digests: LeafDigests
    content: dict[str, bytes]
    """The bytes of every tensor at the moment of the commit."""


@dataclass
class Receiving:
    """What a daemon does with its Receivers. Everything that takes time waits in ``work``."""

    resident: Structure | None = None
    """The model's structure; None takes whatever is offered."""
    transient: Structure | None = None
    """Tensors that may be offered and are left out."""
    current: Installed | None = None
    receivers: dict[bytes, Receiver] = field(default_factory=dict)
    connections: dict[Connection, Receiver] = field(default_factory=dict)
    work: deque[Callable[[], None]] = field(default_factory=deque)
    commits: int = 0
    tamper: Callable[[Receiver, memoryview], None] | None = None
    """Called with the image just before it is verified: memory that went bad."""

    def on_event(self, connection: Connection, event: Event) -> None:
        """Take an event of a connection. Raises ProtocolError."""
        if isinstance(event, MessageArrived) and isinstance(event.message, Offer):
            self._offered(connection, event.message)
            return
        receiver = self.connections.get(connection)
        if receiver is not None:
            for outcome in receiver.receive(connection, event):
                self._on_outcome(receiver, outcome)

    def do_next(self) -> None:
        """The oldest piece of work."""
        self.work.popleft()()

    def gone(self, connection: Connection) -> None:
        """A connection has been lost."""
        receiver = self.connections.pop(connection, None)
        if receiver is not None:
            receiver.disconnected(connection)

    def _offered(self, connection: Connection, offer: Offer) -> None:
        receiver = self.receivers.get(offer.transfer)
        known = receiver is not None
        if receiver is None:
            receiver = self.receivers[offer.transfer] = Receiver(offer)
        self.connections[connection] = receiver
        receiver.connected(connection, offer)
        if known:
            return
        if self.resident is not None and self.resident.digest == offer.structure:
            self.work.append(lambda: self._accept(receiver, Layout(self.resident or Structure.build(()))))
        else:
            receiver.want_structure()

    def _accept(self, receiver: Receiver, layout: Layout) -> None:
        if receiver.state is not ReceiverState.OFFERED:
            return
        current = self.current
        if current is not None and current.label == receiver.offer.label:
            receiver.compare(current.digests)
        else:
            receiver.accept(layout, memoryview(bytearray(layout.size)))

    def _on_outcome(self, receiver: Receiver, outcome: ReceiverEvent) -> None:
        if isinstance(outcome, StructureArrived):
            self.work.append(lambda: self._settle(receiver, outcome.encoded))
        elif isinstance(outcome, ReadyToVerify):
            self.work.append(lambda: self._verify(receiver))
        elif isinstance(outcome, CommitRequested):
            self.work.append(lambda: self._commit(receiver))

    def _settle(self, receiver: Receiver, encoded: bytes) -> None:
        resident = self.resident
        try:
            offered = receiver.decode_structure(encoded)
        except TransferError as error:
            receiver.abort(error)
            return
        if resident is None:
            self._accept(receiver, Layout(offered))
            return
        allowed = self.transient.index if self.transient is not None else {}
        rows = {(spec.name, spec.dtype, spec.shape) for spec in offered.specs()}
        roots = {spec.name: spec.tied_to or spec.name for spec in resident.specs()}
        reached = {roots[spec.name] for spec in resident.specs() if (spec.name, spec.dtype, spec.shape) in rows}
        missing = [name for name, root in roots.items() if root not in reached]
        unexpected = [name for name in offered.names if name not in resident.index and name not in allowed]
        if missing or unexpected:
            details = (*(f"missing {name}" for name in missing), *(f"unexpected {name}" for name in unexpected))
            receiver.abort(TransferError(AbortCode.MISMATCH, "the model has other tensors", details=details))
        else:
            self._accept(receiver, Layout(resident))

    def _verify(self, receiver: Receiver) -> None:
        if receiver.state is not ReceiverState.VERIFYING:
            return
        if self.tamper is not None and receiver._image is not None:
            self.tamper(receiver, receiver._image)
            again = LeafDigests(receiver._require_layout())
            for chunk in range(receiver._require_layout().chunks):
                start, size = receiver._require_layout().chunk(chunk)
                again.record(chunk, receiver._image[start : start + size])
            receiver._digests = again
        try:
            differing = receiver.verify()
            current = self.current
            if receiver._image is None:
                assert current is not None
                if differing:
                    raise TransferError(AbortCode.LABEL_CONFLICT, f"{current.label!r} is taken")
                receiver.verified(())
                receiver.committed(
                    Committed(already=True, digest=current.digest, label=current.label, transfer=receiver.transfer)
                )
            elif receiver.verified(differing):
                self.work.append(lambda: self._stage(receiver))
        except TransferError as error:
            receiver.abort(error)

    def _stage(self, receiver: Receiver) -> None:
        if receiver.state is ReceiverState.STAGING:
            receiver.staged(1, 0.25)

    def _commit(self, receiver: Receiver) -> None:
        layout, image = receiver.layout, receiver._image
        assert layout is not None
        assert image is not None
        kept = image.obj
        assert isinstance(kept, bytearray)
        self.current = Installed(
            receiver.label, receiver.digest, layout, kept, receiver.digests, read_image(layout, kept)
        )
        self.commits += 1
        receiver.committed(
            Committed(digest=receiver.digest, label=receiver.label, swapped=1, transfer=receiver.transfer)
        )


# --- a whole push ------------------------------------------------------------------------------------------------


class Deadlock(AssertionError):
    """Nothing can happen any more and the push has not ended."""


class Push:
    """One push from ``sending`` to ``receiving``, over as many links as it takes.

    sender_side   0: the sender connects; 1: the sender accepts, as for a pull
    """

    def __init__(
        self,
        sending: Sending,
        receiving: Receiving,
        *,
        faults: Sequence[Fault] = (),
        seed: int = 0,
        sender_side: int = 0,
        token: bytes | None = None,
    ) -> None:
        self.sending = sending
        self.receiving = receiving
        self.faults = Faults(faults)
        self.links = 0
        self.frames_resent = 0
        self._rng = random.Random(seed)
        self._side = sender_side
        self._token = token
        self._link: Link | None = None
        self._zombies: list[Link] = []
        self._trace: deque[str] = deque(maxlen=60)

    @property
    def data_frames(self) -> int:
        """DATA frames that the sender has put on the wire."""
        return self.faults.counts[self._side]["Data"]

    def run(self, steps: int = 200_000) -> Sender:
        """Until the sender has ended and everything in flight has arrived. Raises Deadlock."""
        sender = self.sending.sender
        for _ in range(steps):
            if self._link is None or self._link.down:
                if sender.ended:
                    break
                self._connect()
            if not self._act():
                if sender.ended:
                    break
                if not self._current.hopeless:
                    self._fail("nothing can happen")
                # The sender's patience has run out; the receiver notices later, or never.
                self._zombies.append(self._current)
                self._drop(tell=False)
        else:
            self._fail(f"still going after {steps} steps")
        self._drop(tell=True)
        self._settle()
        return sender

    @property
    def _current(self) -> Link:
        assert self._link is not None
        return self._link

    def _connect(self) -> None:
        if self._link is not None:
            tell = self._rng.random() < 0.5
            if not tell:
                self._zombies.append(self._link)
            self._drop(tell=tell)
        self.links += 1
        if self.links > 60:
            self._fail("sixty connections")
        sides = (
            Connection(initiator=True, nonce=nonce(2 * self.links), agent="left", token=self._token),
            Connection(initiator=False, nonce=nonce(2 * self.links + 1), agent="right", token=self._token),
        )
        self._link = Link(sides, self.faults)

    def _drop(self, *, tell: bool) -> None:
        if self._link is not None:
            self.frames_resent += self._link.sides[self._side].frames_resent
            if tell:
                self.receiving.gone(self._link.sides[1 - self._side])
            self._link = None

    def _act(self) -> bool:
        """One thing that can happen, drawn at random; False where nothing can."""
        link = self._current
        sender_there = link.sides[self._side].established and self.sending.sender._connection is link.sides[self._side]
        actions = self._possible(link)
        self._rng.shuffle(actions)
        if sender_there and not self.sending.sender.ended and self._rng.random() < 0.7:
            actions.insert(0, ("step", self.sending.step))
        elif sender_there:
            actions.append(("step", self.sending.step))
        for name, action in actions:
            if action() is not False:
                self._trace.append(name)
                return True
        return False

    def _possible(self, link: Link) -> list[tuple[str, Callable[[], bool | None]]]:
        """What may happen next, but for a step of the sender."""
        receiving_end = 1 - self._side
        actions: list[tuple[str, Callable[[], bool | None]]] = []
        for side in (0, 1):
            if link.sides[side].has_output:
                actions.append((f"collect {side}", partial(link.collect, side)))
            if link.queues[side]:
                actions.append((f"deliver {side}", partial(self._deliver, link, side)))
        if self.receiving.work:
            actions.append(("work", self.receiving.do_next))
        for zombie in self._zombies:
            if self._rng.random() > 0.05:
                continue  # what it does, it does late
            if zombie.queues[receiving_end]:
                actions.append(("zombie", partial(self._deliver, zombie, receiving_end)))
            elif zombie.sides[receiving_end] in self.receiving.connections:
                actions.append(("bury", partial(self._bury, zombie)))
        return actions

    def _deliver(self, link: Link, side: int) -> None:
        size = self._rng.choice((1, 20, 33, 64, 100, 300, 1000, 5000, 1 << 30))
        connection = link.sides[side]
        before = link.down

        def on_event(event: Event) -> None:
            self._trace.append(f"{side}: {event!r:.150}")
            if side == 1 - self._side:
                self.receiving.on_event(connection, event)
            elif isinstance(event, Established):
                self.sending.sender.connected(connection)
            elif link is self._link:
                self.sending.on_event(event)

        if side == self._side and connection.established and self.sending.sender.ended:
            size = 1 << 30
        link.deliver(side, size, on_event)
        if link.down and not before:
            self._trace.append(f"{side}: broken: {connection._failed!r:.150}")

    def _bury(self, zombie: Link) -> None:
        self.receiving.gone(zombie.sides[1 - self._side])
        self._zombies.remove(zombie)

    def _settle(self) -> None:
        """What is still in flight arrives late; what still has to be done is done."""
        for zombie in self._zombies:
            self._deliver_rest(zombie)
        while self.receiving.work:
            self.receiving.work.popleft()()

    def _deliver_rest(self, zombie: Link) -> None:
        side = 1 - self._side
        connection = zombie.sides[side]
        while zombie.queues[side]:
            zombie.deliver(side, 1 << 30, lambda event: self.receiving.on_event(connection, event))
        self.receiving.gone(connection)

    def _fail(self, why: str) -> None:
        states = [receiver.state.name for receiver in self.receiving.receivers.values()]
        trace = "\n".join(self._trace)
        raise Deadlock(f"{why}; sender {self.sending.sender.state.name}, receivers {states}\n{trace}")


def check_committed(push: Push, rows: Sequence[naive.Tensor] | None = None, *, leaf: int = naive.LEAF) -> Installed:
    """The push ended committed, with the right digest and the right bytes, and they are still there."""
    sender = push.sending.sender
    assert sender.state is SenderState.COMMITTED, sender.error
    assert sender.committed is not None
    installed = push.receiving.current
    assert installed is not None
    structure = installed.layout.structure
    offered = push.sending.data
    source = {
        name: offered[sender.offered.names[row]]
        for name, row in zip(structure.names, sender.source_rows.tolist(), strict=True)
    }
    expected = naive.version_digest(
        rows or [naive.Tensor(spec.name, spec.dtype, spec.shape, spec.tied_to) for spec in structure.specs()],
        source,
        leaf,
    )
    assert sender.committed.digest == installed.digest == expected
    assert installed.content == source
    assert read_image(installed.layout, installed.image) == source, "the image was scribbled on after its commit"
    return installed


def simple_push(
    rows: Sequence[naive.Tensor], *, resident: Sequence[naive.Tensor] | None = None, version: int = 0, **options: object
) -> Push:
    """A push of ``rows`` into a model that has them, or ``resident``."""
    structure = build(rows)
    sending = Sending(structure, contents(structure, version))
    receiving = Receiving(resident=build(resident if resident is not None else rows))
    return Push(sending, receiving, **options)  # type: ignore[arg-type]
