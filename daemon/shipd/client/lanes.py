"""The further connections of a push: each sends on a thread of its own, and only as many as make it faster.

    one connection --a window of time--> its rate --worth another?--> twice as many --faster?--> and so on

A lane that the receiver does not take, or that cannot be opened, is none: the push goes on without it. One that breaks
after it has carried anything ends the connection of the transfer, as if that had broken: what is not held travels
again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shipd.client.chunks import ChunkReader
from shipd.errors import Interrupted, ShipError
from shipd.transfer.lane import Lane, Waker
from shipd.transfer.times import Times
from shipproto.errors import ProtocolError, TransferError
from shipproto.messages import Ping
from shipproto.sender import Sender

log = logging.getLogger("shipd.client")

_WINDOW_SECONDS: Final = 0.2
"""How long a number of lanes is tried before it is judged: TCP's windows have opened by then."""

_WORTH_SECONDS: Final = 0.5
"""A rest that takes less than this is not worth another connection."""

_FASTER: Final = 1.1
"""How much faster twice as many lanes must be to be kept."""

_CORE_RATE: Final = 500e6
"""Bytes a second above which it is a lane's cores that limit it (one does 1 to 3 GB/s), and below which it is the link,
where more connections cost next to nothing."""

_IDLE_SECONDS: Final = 0.05
"""How often a lane without work looks for some."""


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(slots=True)
class Tuner:
    """How many connections to send on, found by trying. Pure: it is told the time.

    limit   what the receiver takes
    cores   of this side
    """

    limit: int
    cores: int
    lanes: int = 1
    settled: bool = False
    _best: tuple[float, int] = (0.0, 1)
    _since: tuple[float, int] | None = field(default=None)

    def observe(self, now: float, sent: int, remaining: int) -> int:
        """``sent`` bytes have been written by ``now``, and so many remain; the lanes to use from now on."""
        if self.settled or self.limit == 1:
            return self.lanes
        if self._since is None:
            self._since = now, sent
        began, before = self._since
        if now - began < _WINDOW_SECONDS:
            return self.lanes
        rate = (sent - before) / (now - began)
        self._since = None
        best, lanes = self._best
        if self.lanes > lanes and rate < _FASTER * best:
            self.lanes, self.settled = lanes, True
            return self.lanes
        self._best = rate, self.lanes
        # A lane at full speed takes a core, and what the process does besides needs one as well.
        most = self.limit if rate / self.lanes < _CORE_RATE else min(self.limit, max(1, self.cores - 1))
        wanted = min(2 * self.lanes, most)
        if wanted <= self.lanes or remaining < rate * _WORTH_SECONDS:
            self.settled = wanted <= self.lanes
            return self.lanes
        self.lanes = wanted
        return self.lanes


def send_chunk(sender: Sender, reader: ChunkReader, chunk: int, lane: Lane) -> None:
    """Read, digest and queue one chunk, and count what each took. On the lane's thread."""
    started = time.monotonic()
    content = reader.read(chunk)
    have = time.monotonic()
    sender.digest_chunk(chunk, content)
    digested = time.monotonic()
    sender.send_digested(chunk, content, lane.connection)
    if reader.lends(content):
        lane.lend(content)
    times = lane.times
    times.read += have - started
    times.digest += digested - have
    times.check += time.monotonic() - digested


class Outlet:
    """One lane of a push, from its opening to its end, on a thread of its own."""

    def __init__(self, number: int, pool: "Outlets") -> None:
        self.number = number
        self.bytes_sent = 0
        self.frames_resent = 0
        self.error: BaseException | None = None
        """What ended it after it had carried something."""
        self.times = Times()
        self._pool = pool
        self.used = False
        self._waited = 0.0
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name=f"shipd lane {number}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have it end."""
        self._waker.wake()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()
        self._waker.close()

    def _run(self) -> None:
        try:
            lane = self._pool.open(self._waker)
            try:
                self._pool.sender.join(lane.connection, self.number)
                while not self._take(lane, self._pool.stall):
                    pass
                self._send(lane)
            finally:
                lane.close()
                self.bytes_sent, self.frames_resent = lane.bytes_sent, lane.connection.frames_resent
                self.times = lane.times
                self.times.wait = self._waited
        except Interrupted:
            pass
        except Exception as error:  # noqa: BLE001  raised again by the push, or told in the log
            if self.used or not isinstance(error, ShipError | TransferError):
                self.error = error
            else:
                log.info("going on without a further connection", extra={"lane": self.number, "why": str(error)})

    def _send(self, lane: Lane) -> None:
        pool = self._pool
        reader = pool.make_reader()
        pinged = time.monotonic()
        while True:
            chunk = None
            if self.number < pool.wanted:
                with pool.lock:
                    chunk = pool.sender.next_chunk()
            if chunk is None:
                if time.monotonic() - pinged > 1.0:
                    pinged = time.monotonic()
                    lane.connection.send(Ping())
                self._take(lane, _IDLE_SECONDS, idle=True)
                continue
            self.used = True
            send_chunk(pool.sender, reader, chunk, lane)
            before = lane.times.wait
            events = lane.drain(pool.stall)
            # Without work a lane waits as well, which is nobody's time.
            self._waited += lane.times.wait - before
            for event in events:
                with pool.lock:
                    pool.sender.receive_on_lane(event)
            self.bytes_sent = lane.bytes_sent

    def _take(self, lane: Lane, seconds: float, *, idle: bool = False) -> bool:
        """Wait for what the receiver says. Whether it has taken the lane."""
        events = lane.pump(seconds) if idle else lane.exchange(time.monotonic() + seconds)
        joined = False
        for event in events:
            try:
                with self._pool.lock:
                    joined |= self._pool.sender.receive_on_lane(event)
            except ProtocolError as error:
                raise lane.fault(error) from error
        return joined


class Outlets:
    """All lanes of one push over one connection, beside that connection itself.

    sender       the transfer; ``lock`` is held for every call of it but ``send_chunk`` and ``digest_chunk``
    open         opens an established connection to the same receiver, which a Waker interrupts
    make_reader  a reader of chunks for one thread
    stall        seconds that the receiver may take no bytes
    """

    def __init__(
        self,
        sender: Sender,
        lock: threading.Lock,
        *,
        open_lane: Callable[[Waker], Lane],
        make_reader: Callable[[], ChunkReader],
        stall: float,
    ) -> None:
        self.sender = sender
        self.lock = lock
        self.open = open_lane
        self.make_reader = make_reader
        self.stall = stall
        self.wanted = 1
        """How many connections send, the transfer's own included."""
        self._outlets: list[Outlet] = []

    def __bool__(self) -> bool:
        return bool(self._outlets)

    def want(self, lanes: int) -> None:
        """Send on so many connections from now on. Lanes that are opened stay, and idle where they are too many."""
        self.wanted = lanes
        while len(self._outlets) < lanes - 1:
            self._outlets.append(Outlet(len(self._outlets) + 1, self))

    def check(self) -> None:
        """Raise what a lane broke with."""
        for outlet in self._outlets:
            if outlet.error is not None:
                raise outlet.error

    @property
    def lanes(self) -> int:
        """How many of them have carried chunks."""
        return sum(outlet.used for outlet in self._outlets)

    def times(self) -> Times:
        """What the work of all of them took."""
        total = Times()
        for outlet in self._outlets:
            total.add(outlet.times)
        return total

    @property
    def bytes_sent(self) -> int:
        """Written by all of them so far."""
        return sum(outlet.bytes_sent for outlet in self._outlets)

    @property
    def frames_resent(self) -> int:
        """Frames that went again on any of them; known when they have been stopped."""
        return sum(outlet.frames_resent for outlet in self._outlets)

    def stop(self) -> None:
        """End all of them."""
        for outlet in self._outlets:
            outlet.wake()
        for outlet in self._outlets:
            outlet.join()
