"""An in-memory link between two Connections that damages, loses, cuts and stalls; and a whole push over such links. No
clocks, no threads: what happens next is drawn from a seeded generator, so that a failure repeats.

    feed(connection, data)      bytes into one connection: whole, split or byte by byte
    handshaken(...)             two connections that have greeted each other
    Link                        moves bytes between two connections and applies Faults to whole frames
    Push                        a whole push over as many links as it takes; it ends or it raises Deadlock

What the two ends do, Sending and Receiving, is in tests.support.shells; their names can be had from here, too.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from shipproto.connection import Connection, Established, Event, Landing
from shipproto.errors import ProtocolError
from shipproto.sender import Sender
from shipproto.states import SenderState
from tests.support import naive
from tests.support.models import build, contents, read_image
from tests.support.shells import Installed, Receiving, Sending

__all__ = [
    "CHOPS", "Chop", "Deadlock", "Fault", "Faults", "Fed", "Installed", "Link", "Push", "Receiving", "Sending",
    "check_committed", "feed", "flip", "handshaken", "nonce", "output_of", "pieces", "simple_push",
]  # fmt: skip

Chop = Literal["whole", "split", "bytes", "scattered"]
CHOPS: Final[tuple[Chop, ...]] = ("whole", "split", "bytes", "scattered")


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
            (scatter if chop == "scattered" else Connection.receive)(connection, piece)
            events += connection.events()
    except ProtocolError as error:
        events += connection.events()
        return Fed(events, error, output_of(connection))
    return Fed(events, None, output_of(connection))


def scatter(connection: Connection, data: bytes) -> None:
    """Receive as a scattering read does: into a payload's rest and the next frame's head at once."""
    left = memoryview(data)
    while left:
        count = 0
        for view in connection.get_buffers():
            size = min(len(view), len(left))
            view[:size] = left[:size]
            left, count = left[size:], count + size
        connection.buffer_updated(count)


def output_of(connection: Connection) -> bytes:
    """Everything queued, as one."""
    return b"".join(bytes(piece) for piece in connection.take_output())


def nonce(seed: int) -> bytes:
    """32 bytes that are no secret."""
    return bytes((seed + at) & 0xFF for at in range(32))


def handshaken(*, token: bytes | None = None, landing: Landing | None = None) -> tuple[Connection, Connection]:
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
