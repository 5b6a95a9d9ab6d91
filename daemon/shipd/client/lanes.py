"""The further connections of a push: each sends on a thread of its own, and only as many as make it faster.

    one connection --a window of time--> its rate --worth another?--> twice as many --faster?--> and so on

Where cores are the limit and not the link, chunks leave the transfer's own connection as soon as that shows: the daemon
reads it on its event loop, and a lane on a thread that does nothing else.

A lane that the receiver does not take, or that cannot be opened, is none: the push goes on without it. One that breaks
after it has carried anything ends the connection of the transfer, as if that had broken: what is not held travels
again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from shipd.checkpoints.waiting import while_waiting
from shipd.client.chunks import ChunkReader
from shipd.client.sending import RUN, send_chunks
from shipd.errors import Interrupted, ShipError, Stalled
from shipd.transfer.lane import ConnectionLost, Lane
from shipd.transfer.times import Times
from shipd.transfer.waker import Waker
from shipproto.connection import Event
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

_CORE_RATE: Final = 250e6
"""Bytes a second above which it is a lane's cores that limit it (one does 1 to 3 GB/s, and less where others use it
too), and below which it is the link, where more connections cost next to nothing."""

_APART_AFTER: Final = 16 * 1024 * 1024
"""Bytes by which the rate is known well enough to tell cores from links."""

_APART_WORTH: Final = 64 * 1024 * 1024
"""Bytes that must remain for it to pay."""

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
    apart: bool = False
    """Whether chunks travel on lanes alone, as many as ``lanes`` says."""
    _began: float | None = None
    _best: tuple[float, int] = (0.0, 1)
    _since: tuple[float, int] | None = field(default=None)

    def observe(self, now: float, sent: int, remaining: int) -> int:
        """``sent`` bytes have been written by ``now``, and so many remain; the connections to send on from now on."""
        if self._began is None:
            self._began = now
        if not self.apart and not self.settled and self.limit > 1 and sent >= _APART_AFTER:
            self.apart = remaining >= _APART_WORTH and sent > _CORE_RATE * (now - self._began)
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


class Outlet:
    """One lane of a push, from its opening to its end, on a thread of its own."""

    def __init__(self, number: int, pool: "Outlets") -> None:
        self.number = number
        self.bytes_sent = 0
        self.bytes_unchanged = 0
        self.frames_resent = 0
        self.error: BaseException | None = None
        """What ended it after it had carried something."""
        self.times = Times()
        self._pool = pool
        self.used = False
        self.ready = False
        """Whether the receiver takes chunks on it; it may have ended since."""
        self._waited = 0.0
        self._pinged = time.monotonic()
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name=f"shipd lane {number}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._waker.close()
            raise

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
                self.ready = True
                with while_waiting(partial(self._show_life, lane)):
                    self._send(lane)
            finally:
                self.ready = False
                lane.close(discard=self._pool.discard)
                self.bytes_sent, self.frames_resent = lane.bytes_sent, lane.connection.frames_resent
                self.bytes_unchanged = lane.bytes_unchanged
                self.times = lane.times
                self.times.wait = self._waited
        except Interrupted:
            pass
        except Stalled as error:
            # It is this path that carries nothing; what is not held goes over other connections.
            if self.used:
                self.error = ConnectionLost(str(error), peer=error.peer)
        except Exception as error:  # noqa: BLE001  raised again by the push, or told in the log
            if isinstance(error, ConnectionLost):
                # Of use on this lane alone.
                error.heard = ()
            if self.used or not isinstance(error, ShipError | TransferError):
                self.error = error
            else:
                log.info("going on without a further connection", extra={"lane": self.number, "why": str(error)})

    def _send(self, lane: Lane) -> None:
        pool = self._pool
        reader = pool.make_reader()
        drain = partial(lane.drain, pool.stall)
        while True:
            chunks = range(0)
            if pool.has_turn(self.number):
                with pool.lock:
                    chunks = pool.sender.next_chunks(RUN)
            if not chunks:
                self._keep_alive(lane)
                self._take(lane, _IDLE_SECONDS, idle=True)
                continue
            self.used = True
            before = lane.times.wait
            events = send_chunks(pool.sender, reader, lane, chunks, drain)
            # Without work a lane waits as well, which is nobody's time.
            self._waited += lane.times.wait - before
            self._hear(lane, (*events, *lane.pump()))
            self.bytes_sent = lane.bytes_sent

    def _keep_alive(self, lane: Lane) -> None:
        if time.monotonic() - self._pinged > 1.0:
            self._pinged = time.monotonic()
            lane.connection.send(Ping())

    def _show_life(self, lane: Lane) -> None:
        """While the source makes this side wait."""
        self._keep_alive(lane)
        self._take(lane, 0.0, idle=True)

    def _take(self, lane: Lane, seconds: float, *, idle: bool = False) -> bool:
        """Wait for what the receiver says. Whether it has taken the lane."""
        return self._hear(lane, lane.pump(seconds) if idle else lane.exchange(time.monotonic() + seconds))

    def _hear(self, lane: Lane, events: Iterable[Event]) -> bool:
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

    sender       the transfer; ``lock`` is held for every call of it that does not say otherwise
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
        """How many connections send."""
        self.apart = False
        """Whether the transfer's own is none of them, once there is another."""
        self._outlets: list[Outlet] = []
        self._given_up = False
        self.discard = False
        """Whether lanes that end leave nothing on its way."""

    def __bool__(self) -> bool:
        return bool(self._outlets)

    def want(self, lanes: int, *, apart: bool = False) -> None:
        """Send on so many connections from now on. Lanes that are opened stay, and idle where they are too many."""
        self.wanted, self.apart = lanes, apart
        while len(self._outlets) < lanes - (not apart) and not self._given_up:
            try:
                self._outlets.append(Outlet(len(self._outlets) + 1, self))
            except (ShipError, RuntimeError) as error:
                # No descriptors, or no threads: what there is must do.
                self._given_up = True
                log.info("going on without further connections", extra={"why": str(error)})

    @property
    def carry(self) -> bool:
        """Whether lanes carry all that is to be sent."""
        return self.apart and any(outlet.ready and self.has_turn(outlet.number) for outlet in self._outlets)

    def has_turn(self, number: int) -> bool:
        """Whether the lane of this number is to send."""
        return number < self.wanted + self.apart

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
    def bytes_unchanged(self) -> int:
        """Of chunks that any of them has left out; known when they have been stopped."""
        return sum(outlet.bytes_unchanged for outlet in self._outlets)

    @property
    def frames_resent(self) -> int:
        """Frames that went again on any of them; known when they have been stopped."""
        return sum(outlet.frames_resent for outlet in self._outlets)

    def stop(self, *, discard: bool = False) -> None:
        """End all of them; with ``discard`` as ``Lane.close`` says."""
        self.discard = discard
        for outlet in self._outlets:
            outlet.wake()
        for outlet in self._outlets:
            outlet.join()
