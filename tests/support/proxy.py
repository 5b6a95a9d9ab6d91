"""A TCP proxy between a sender and a daemon that counts frames and does damage by rule.

It knows of the protocol only what a prelude says: where a frame ends, of which type it is, and which of its bytes are
prelude, header and payload. Frames are taken in whole, counted, treated by the rules that match, and passed on; a
stream that is none of shipd's is passed on as it comes.

    with Proxy(daemon.port) as proxy:
        proxy.flip("payload", kind=DATA, nth=3)
        push(proxy.address, ...)
        assert proxy.count(DATA) == chunks + 1

Nothing here waits by the clock except what is meant to be slow: tests wait for ``reached`` and ``wait_until_frames``.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

from tests.support.frames import DATA, PRELUDE, Frame, Part, Way
from tests.support.pumps import How, Pair, Pump, Severed, reset

DEADLINE = 20.0
"""Seconds until a test that waits for something gives up: nothing here takes one."""

RECEIVE_BUFFER = 524288
"""Bounds what lies in the kernel, sent but not yet counted here."""


@dataclass(eq=False)
class Rule:
    """What is done to which frames.

    kind        of this type, or any
    nth         the n-th of this kind, from 0, over all connections or within ``connection``; where any kind is
                meant, the frame of this sequence number
    every       also every later frame with the same header: the same chunk, sent again
    times       no more often than this
    reached     set when it is first applied; a hold then waits for ``release``
    """

    apply: Callable[[Pump, Frame, bytearray, "Rule"], None]
    way: Way
    kind: int | None = None
    nth: int | None = None
    connection: int | None = None
    every: bool = False
    times: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    applied: int = 0
    _header: bytes | None = None

    def matches(self, frame: Frame) -> bool:
        """Whether ``frame`` is one that it is meant for."""
        if self.times is not None and self.applied >= self.times:
            return False
        if frame.way is not self.way or (self.kind is not None and frame.kind != self.kind):
            return False
        if self.connection is not None and frame.connection != self.connection:
            return False
        if self.every and self._header is not None:
            return frame.header == self._header
        number = frame.number if self.connection is None else frame.number_here
        if self.kind is None:
            number = frame.sequence
        if self.nth is not None and number != self.nth:
            return False
        self._header = frame.header if self.nth is not None else None
        return True

    def wait(self, deadline: float = DEADLINE) -> None:
        """Until it has been applied."""
        assert self.reached.wait(deadline), "the proxy has not seen the frame that a rule waits for"

    def release(self) -> None:
        """Let what is held go on."""
        self.let_go.set()


class Proxy:
    """Listens on a loopback port of its own and connects on to ``upstream``, which may be changed at any time."""

    def __init__(self, upstream: int, *, receive_buffer: int | None = RECEIVE_BUFFER) -> None:
        """``receive_buffer`` None leaves the size of the kernel's buffer alone."""
        self.upstream = upstream
        self.port = 0
        self.frames: list[Frame] = []
        """Every frame that was taken in whole, in the order of their arrival."""
        self.received = Counter[Way]()
        """Bytes taken in."""
        self.connections = 0
        self.closing = threading.Event()
        self.errors: list[Exception] = []
        """Bugs of the proxy's own."""
        self._receive_buffer = receive_buffer
        self._rules: list[Rule] = []
        self._cuts: dict[tuple[Way, int], tuple[int, How]] = {}
        self._rates: dict[Way, float] = {}
        self._slices: dict[Way, int] = {}
        self._changed = threading.Condition()
        self._numbers = Counter[tuple[Way, int] | tuple[Way, int, int]]()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._threads: list[threading.Thread] = []
        self._pairs: list[Pair] = []

    # --- life ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.refuse()
        for rule in self._rules:
            rule.let_go.set()
        for pair in self._pairs:
            pair.sever("fin")
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive(), f"{thread.name} does not end"
        assert not self.errors, self.errors

    @property
    def address(self) -> str:
        """What a sender connects to."""
        return f"127.0.0.1:{self.port}"

    def refuse(self) -> None:
        """Connections are refused from now on; those that stand, stay."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # Wakes accept(), which a mere close() would not.
        listener.shutdown(socket.SHUT_RDWR)
        assert self._acceptor is not None
        self._acceptor.join(DEADLINE)
        listener.close()

    def accept(self) -> None:
        """Listen (again), on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._receive_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="proxy accept", daemon=True)
        self._acceptor.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _address = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.upstream), timeout=DEADLINE)
            except OSError:
                reset(near)
                continue
            for sock in (near, far):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                pair = Pair(near, far)
                self._pairs.append(pair)
                number = self.connections
                self.connections += 1
                self._changed.notify_all()
            for way, source, target in ((Way.TO_DAEMON, near, far), (Way.TO_SENDER, far, near)):
                pump = Pump(self, pair, number, way, source, target)
                thread = threading.Thread(target=pump.run, name=f"proxy {number} {way.value}", daemon=True)
                self._threads.append(thread)
                thread.start()

    # --- what is done to frames ----------------------------------------------------------------------------

    def flip(
        self,
        part: Part,
        *,
        kind: int | None = DATA,
        nth: int | None = 0,
        way: Way = Way.TO_DAEMON,
        connection: int | None = None,
        every: bool = False,
        times: int | None = None,
        bit: int | None = None,
    ) -> Rule:
        """Flip one bit of the part, by default in its middle.

        every   each time the same frame comes by, but at most ``times`` times
        """

        def apply(_pump: Pump, frame: Frame, data: bytearray, _rule: Rule) -> None:
            start = frame.offset(part)
            size = {"prelude": PRELUDE, "header": len(frame.header), "payload": frame.payload}[part]
            at = size * 8 // 2 if bit is None else bit
            data[start + at // 8] ^= 1 << at % 8

        return self._add(Rule(apply, way, kind, nth, connection, every, times))

    def cut(
        self,
        *,
        kind: int | None = DATA,
        nth: int | None = 0,
        way: Way = Way.TO_DAEMON,
        connection: int | None = None,
        keep: float = 0.0,
        how: How = "rst",
    ) -> Rule:
        """End the connection at the frame, of which the share ``keep`` still passes."""

        def apply(pump: Pump, frame: Frame, data: bytearray, _rule: Rule) -> None:
            del data[int(frame.size * keep) :]
            pump.write(data)
            data.clear()
            pump.pair.sever(how)
            raise Severed

        return self._add(Rule(apply, way, kind, nth, connection))

    def cut_at_byte(self, count: int, *, connection: int, way: Way = Way.TO_DAEMON, how: How = "rst") -> None:
        """End a connection after exactly ``count`` bytes."""
        self._cuts[way, connection] = (count, how)

    def stall(
        self,
        *,
        kind: int | None = DATA,
        nth: int | None = 0,
        way: Way = Way.TO_DAEMON,
        connection: int | None = None,
        keep: float = 0.0,
    ) -> Rule:
        """From the frame on nothing passes this way any more; the connection stands."""

        def apply(pump: Pump, frame: Frame, data: bytearray, _rule: Rule) -> None:
            pump.write(data[: int(frame.size * keep)])
            data.clear()
            pump.pair.severed.wait()
            raise Severed

        return self._add(Rule(apply, way, kind, nth, connection))

    def half_close(
        self, *, kind: int | None = DATA, nth: int = 0, way: Way = Way.TO_DAEMON, connection: int | None = None
    ) -> Rule:
        """The reader sees the end of the stream at the frame; the other way stays open."""

        def apply(pump: Pump, _frame: Frame, data: bytearray, _rule: Rule) -> None:
            data.clear()
            pump.end()
            pump.pair.severed.wait()
            raise Severed

        return self._add(Rule(apply, way, kind, nth, connection))

    def hold(
        self, *, kind: int | None = DATA, nth: int = 0, way: Way = Way.TO_DAEMON, connection: int | None = None
    ) -> Rule:
        """Keep the frame, and what follows it, until ``release()``."""

        def apply(pump: Pump, _frame: Frame, _data: bytearray, rule: Rule) -> None:
            while not rule.let_go.wait(0.01):
                if pump.pair.severed.is_set():
                    raise Severed

        return self._add(Rule(apply, way, kind, nth, connection))

    def duplicate(self, count: int, *, kind: int = DATA, nth: int = 0, way: Way = Way.TO_DAEMON) -> Rule:
        """Send the last ``count`` bytes of the frame twice."""

        def apply(_pump: Pump, _frame: Frame, data: bytearray, _rule: Rule) -> None:
            data += data[-count:]

        return self._add(Rule(apply, way, kind, nth))

    def drop(self, count: int, *, kind: int = DATA, nth: int = 0, way: Way = Way.TO_DAEMON) -> Rule:
        """Lose the last ``count`` bytes of the frame."""

        def apply(_pump: Pump, _frame: Frame, data: bytearray, _rule: Rule) -> None:
            del data[-count:]

        return self._add(Rule(apply, way, kind, nth))

    def delay(self, seconds: float, *, kind: int | None = None, nth: int | None = None, way: Way) -> Rule:
        """Let every such frame wait."""

        def apply(pump: Pump, _frame: Frame, _data: bytearray, _rule: Rule) -> None:
            pump.pair.severed.wait(seconds)

        return self._add(Rule(apply, way, kind, nth))

    def throttle(self, bytes_per_second: float, way: Way = Way.TO_DAEMON) -> None:
        """A thin link, this way."""
        self._rates[way] = bytes_per_second

    def trickle(self, count: int, way: Way = Way.TO_DAEMON) -> None:
        """Write no more than ``count`` bytes at a time."""
        self._slices[way] = count

    def forget_rules(self) -> None:
        """What comes from now on passes unharmed."""
        for rule in self._rules:
            rule.let_go.set()
        self._rules.clear()

    def _add(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        return rule

    # --- what was seen -------------------------------------------------------------------------------------

    def seen(self, kind: int, way: Way = Way.TO_DAEMON, connection: int | None = None) -> list[Frame]:
        """Frames of a kind that were taken in."""
        return [
            frame
            for frame in list(self.frames)
            if frame.kind == kind and frame.way is way and connection in (None, frame.connection)
        ]

    def count(self, kind: int, way: Way = Way.TO_DAEMON, connection: int | None = None) -> int:
        """How many of them."""
        return len(self.seen(kind, way, connection))

    def wait_until_frames(
        self, count: int, *, kind: int = DATA, way: Way = Way.TO_DAEMON, deadline: float = DEADLINE
    ) -> None:
        """Until ``count`` frames of a kind were taken in."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._numbers[way, kind] >= count, deadline)
        assert arrived, f"{self._numbers[way, kind]} frames of kind {kind} {way.value} where {count} were expected"

    def wait_until_connections(self, count: int, deadline: float = DEADLINE) -> None:
        """Until ``count`` connections were accepted."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.connections >= count, deadline), (
                f"{self.connections} connections"
            )

    def sever_all(self, how: How = "rst") -> None:
        """Cut every connection that stands."""
        for pair in list(self._pairs):
            pair.sever(how)

    # --- for the pumps -------------------------------------------------------------------------------------

    def note(self, connection: int, way: Way, kind: int, sequence: int, header: bytes, payload: int) -> Frame:
        """A frame was taken in."""
        with self._changed:
            number, here = self._numbers[way, kind], self._numbers[way, kind, connection]
            frame = Frame(connection, way, kind, sequence, header, payload, number, here)
            self._numbers[way, kind] = number + 1
            self._numbers[way, kind, connection] = here + 1
            self.frames.append(frame)
            self._changed.notify_all()
        return frame

    def rules_for(self, frame: Frame) -> list[Rule]:
        """What is to be done to it."""
        return [rule for rule in list(self._rules) if rule.matches(frame)]

    def cut_of(self, way: Way, connection: int) -> tuple[int, How] | None:
        """After how many bytes a connection ends."""
        return self._cuts.get((way, connection))

    def slices(self, way: Way, data: bytes | bytearray) -> Iterator[tuple[memoryview, float]]:
        """What is written at a time, and how long it takes on this link."""
        rate = self._rates.get(way)
        # A throttled link sends twenty times a second.
        size = self._slices.get(way) or (max(1, int(rate / 20)) if rate else max(1, len(data)))
        view = memoryview(data)
        for start in range(0, len(view), size):
            piece = view[start : start + size]
            yield piece, len(piece) / rate if rate else 0.0


def until(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Ask until it is so. For what has no event to wait on, such as the state of another process."""
    end = time.monotonic() + deadline
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"not within {deadline:.0f} s: {what}"
        pause.wait(0.005)
