"""A connection on a thread of its own: blocking code around a non-blocking socket and poll().

Used by everything that connects: pushes, questions to a daemon, and serving processes on the Unix socket. And by the
daemon, for the further connections of a transfer.
CRC, digest and sendmsg happen inline on this thread; every wait has a deadline.
"""

import array
import errno
import itertools
import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from shipd.address import Address
from shipd.environment import environment
from shipd.errors import ConnectError, Interrupted, ShipError, Stalled
from shipd.release import AGENT
from shipd.transfer import link_rate
from shipd.transfer.dialling import dial_tcp, dial_unix
from shipd.transfer.faults import peer_error
from shipd.transfer.pages import MOST_BEFORE, PageSender
from shipd.transfer.times import Times
from shipd.transfer.waker import Waker
from shipproto.connection import Connection, Established, Event
from shipproto.errors import BadPrelude, ProtocolError
from shipproto.frame import Buffer
from shipproto.limits import MAX_SLOTS, NONCE_SIZE

_GOODBYE_SECONDS: Final = 1.0
_WATCH_SECONDS: Final = 0.1
_MOST_SECONDS: Final = 86400.0
"""Of one poll(2), which cannot wait for ever by the clock, nor for 25 days. Deadlines are looked at after each."""

_ANCILLARY: Final = socket.CMSG_SPACE(4 * MAX_SLOTS) if hasattr(socket, "CMSG_SPACE") else 0


class ConnectionLost(ConnectError):
    """The connection broke; what it was part of may go on over another one.

    heard  what the peer had said on it, and nobody has looked at: it may be why
    """

    heard: Sequence[Event] = ()


class Lane:
    """One established connection. Not thread-safe: one thread reads, writes and closes it.

    ``with_fds`` receives descriptors too, into ``fds``, in the order in which they were sent. ``connection`` is what
    was said on the socket so far, where it was accepted and not opened. Its ``peer`` is the other side's HELLO, with
    what it is able to and what it runs on.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        *,
        token: bytes | None = None,
        waker: Waker | None = None,
        with_fds: bool = False,
        connection: Connection | None = None,
    ) -> None:
        self.peer = peer
        self.connection = connection or Connection(
            initiator=True, nonce=os.urandom(NONCE_SIZE), agent=AGENT, token=token, environment=environment()
        )
        self.fds: deque[int] = deque()
        self.bytes_sent = 0
        self.bytes_unchanged = 0
        """Of chunks of which all that was sent is that they have not changed. Counted by whoever sends."""
        self.times = Times()
        self.open_seconds = 0.0
        """What connecting and the handshake took."""
        self.last_heard = self.last_written = time.monotonic()
        self._sock = sock
        self._broken: OSError | None = None
        self._waker = waker
        self._with_fds = with_fds
        self._outgoing: deque[Buffer] = deque()
        self._pages = PageSender(sock.fileno())
        self._lent: memoryview | None = None
        """The piece of ``_outgoing`` whose pages are sent as they are."""
        self._beside: tuple[Buffer, array.array[int]] | None = None
        """A piece of ``_outgoing``, and the descriptors that go with its first byte."""
        sock.settimeout(0)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._interest = select.POLLIN
        if waker is not None:
            self._poll.register(waker, select.POLLIN)

    @classmethod
    def open(cls, target: Address | Path, *, token: bytes | None, timeout: float, waker: Waker | None = None) -> "Lane":
        """Connect over TCP, or to a Unix socket, and do the handshake, all within ``timeout`` seconds.

        Descriptors can be received over a Unix socket. Raises ConnectError, AuthError, PeerError or Stalled.
        """
        started = time.monotonic()
        deadline = started + timeout
        local = isinstance(target, Path)
        try:
            sock = dial_unix(target, deadline, waker) if isinstance(target, Path) else dial_tcp(target, deadline, waker)
        except OSError as error:
            hint = "Is shipd running there?" if isinstance(error, ConnectionRefusedError | FileNotFoundError) else ""
            raise ConnectError(
                f"cannot connect to {target}: {_reason(error)}. {hint}".rstrip(), peer=str(target)
            ) from error
        lane = cls(sock, str(target), token=token, waker=waker, with_fds=local).shake_hands(deadline)
        lane.open_seconds = time.monotonic() - started
        return lane

    def shake_hands(self, deadline: float) -> "Lane":
        """Finish the handshake; the lane itself, or it is closed and the error raised."""
        try:
            while not self.connection.established:
                for event in self.exchange(deadline):
                    assert isinstance(event, Established)
        except BaseException:
            self.close()
            raise
        return self

    # --- I/O -----------------------------------------------------------------------------------------------

    def exchange(self, deadline: float) -> Iterator[Event]:
        """Write what is queued and wait until something has arrived; the events that came of it.

        Raises Stalled past ``deadline`` (time.monotonic), Interrupted when woken, ConnectionLost, or what
        the peer's breaking of the protocol reads as.
        """
        while True:
            self._write()
            remaining = deadline - time.monotonic()
            if self._step(max(0.0, remaining)):
                return self.connection.events()
            if remaining <= 0:
                raise Stalled(f"{self.peer} has not answered in time", peer=self.peer)

    def pump(self, patience: float = 0.0) -> Iterator[Event]:
        """Write and read what is possible; the events that came of it. Waits at most ``patience`` seconds for something
        to arrive, by default not at all."""
        self._write()
        self._step(patience)
        return self.connection.events()

    def drain(self, grace: float, *, until: float = math.inf, watch: Callable[[], object] | None = None) -> list[Event]:
        """Wait until everything queued is written; events that have arrived by then are returned.

        ``watch`` is called ten times a second meanwhile, and what it raises ends the waiting. Raises Stalled where the
        peer takes no byte for ``grace`` seconds, or has not taken all by ``until``.
        """
        events: list[Event] = []
        try:
            self._drain(grace, until, watch, events)
        except ConnectionLost as lost:
            lost.heard = (*events, *lost.heard)
            raise
        return events

    def _drain(self, grace: float, until: float, watch: Callable[[], object] | None, events: list[Event]) -> None:
        sent = self.bytes_sent
        deadline = time.monotonic() + grace
        while True:
            self._write()
            if not self._outgoing:
                # Whatever the peer has said by now.
                self._step(0.0)
                events.extend(self.connection.events())
                return
            if self.bytes_sent != sent:
                sent = self.bytes_sent
                deadline = time.monotonic() + grace
            remaining = min(deadline, until) - time.monotonic()
            if watch is not None:
                watch()
            if self._step(max(0.0, remaining if watch is None else min(remaining, _WATCH_SECONDS))):
                events.extend(self.connection.events())
            elif remaining <= 0:
                raise Stalled(f"{self.peer} has taken no bytes for {grace:.0f} s", peer=self.peer)

    def _write(self) -> None:
        self._outgoing.extend(self.connection.take_output())
        started = time.monotonic() if self._outgoing else 0.0
        while self._outgoing:
            try:
                sent = self._send()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                # What the peer said before it closed, which may be why, is still to be read. Reading finds the end.
                self._broken = error
                self._outgoing.clear()
                break
            self._wrote(sent)
            self.times.write += self.last_written - started
            started = self.last_written
        interest = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
        if interest != self._interest:
            self._poll.modify(self._sock, interest)
            self._interest = interest

    def transmit(self, content: memoryview) -> bool:
        """Write what is queued, of which ``content`` comes last. Whether all of it is written; if not, ``drain``.

        ``content`` must keep what is in it until the transfer is over: its pages are sent as they are and not copied,
        where that is possible.
        """
        if self._outgoing or not self._pages.worth(len(content)):
            return False
        pieces = self.connection.take_output()
        before = pieces[:-1]
        whole = len(content) + sum(map(len, before))
        sent = 0
        if whole - len(content) <= MOST_BEFORE:
            try:
                sent = self._pages.send(before, content)
            except OSError:
                # The socket takes nothing at the moment, or is lost: whoever writes next finds out which.
                sent = 0
            if sent == whole:
                self.bytes_sent += sent
                self.last_written = time.monotonic()
                return True
        self._outgoing.extend(pieces)
        self._lent = content if self._pages.usable else None
        self._wrote(sent)
        return False

    def send_with_fds(self, send: Callable[[], None], fds: Sequence[int]) -> None:
        """Queue the message that ``send`` has the connection send, with ``fds`` beside its first byte.

        Over a Unix socket. They are the caller's until everything is written.
        """
        self._outgoing.extend(self.connection.take_output())
        send()
        pieces = self.connection.take_output()
        self._outgoing.extend(pieces)
        self._beside = pieces[0], array.array("i", fds)

    def _send(self) -> int:
        """Send from the front of the queue; how many bytes were taken."""
        pieces: list[Buffer] = []
        for piece in itertools.islice(self._outgoing, 64):
            if self._beside is not None and piece is self._beside[0]:
                if pieces:
                    break
                sent = self._sock.sendmsg([piece], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, self._beside[1])])
                self._beside = None
                return sent
            if piece is self._lent:
                if sum(map(len, pieces)) <= MOST_BEFORE:
                    if sent := self._pages.send(pieces, self._lent):
                        return sent
                    self._lent = None
                    pieces.append(piece)
                break
            pieces.append(piece)
        return self._sock.sendmsg(pieces)

    def _wrote(self, sent: int) -> None:
        """So many bytes from the front of the queue have been taken."""
        self.bytes_sent += sent
        self.last_written = time.monotonic()
        while sent:
            piece = self._outgoing.popleft()
            if sent < len(piece):
                rest = memoryview(piece)[sent:]
                if piece is self._lent:
                    self._lent = rest
                self._outgoing.appendleft(rest)
                return
            sent -= len(piece)

    def _step(self, timeout: float) -> bool:
        """Wait for the socket. True when bytes arrived, False when it is only writable or time is up."""
        if self._waker is not None and self._waker.woken:
            raise Interrupted("interrupted", peer=self.peer)
        started = time.monotonic()
        ready = self._poll.poll(min(timeout, _MOST_SECONDS) * 1000)
        polled = time.monotonic()
        self.times.wait += polled - started
        if self._waker is not None and self._waker.woken:
            raise Interrupted("interrupted", peer=self.peer)
        if not any(fd == self._sock.fileno() and mask & ~select.POLLOUT for fd, mask in ready):
            return False
        try:
            count = self._receive(self.connection.get_buffer())
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise self._lost(error) from error
        if not count:
            raise self._lost(self._broken)
        self.last_heard = time.monotonic()
        self.times.receive += self.last_heard - polled
        try:
            self.connection.buffer_updated(count)
            self.times.check += time.monotonic() - self.last_heard
        except BadPrelude as error:
            # The path has damaged it, not the peer: whatever was under way goes on over another connection.
            raise ConnectionLost(f"lost the connection to {self.peer}: {error}", peer=self.peer) from error
        except ProtocolError as error:
            raise self.fault(error) from error
        return True

    def _receive(self, view: memoryview) -> int:
        if not self._with_fds:
            return self._sock.recv_into(view)
        count, ancillary, flags, _address = self._sock.recvmsg_into([view], _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.fds.extend(memoryview(data)[: len(data) // 4 * 4].cast("i"))
        if flags & socket.MSG_CTRUNC:
            # The kernel has closed what this process may not have; the peer takes it for delivered.
            raise OSError(errno.EMFILE, "it sent more descriptors than this process may open (ulimit -n)")
        return count

    def fault(self, error: ProtocolError) -> ShipError:
        """The error for a peer that broke the protocol on this lane."""
        return peer_error(error, self.peer)

    def _lost(self, error: OSError | None) -> ConnectionLost:
        why = _reason(error) if error is not None else "it closed the connection"
        return ConnectionLost(f"lost the connection to {self.peer}: {why}", peer=self.peer)

    def use(self, waker: Waker | None) -> None:
        """Be woken by ``waker`` from now on."""
        if self._waker is not None:
            self._poll.unregister(self._waker)
        self._waker = waker
        if waker is not None:
            self._poll.register(waker, select.POLLIN)

    def close(self, *, flush: bool = False, discard: bool = False) -> None:
        """Close. With ``flush`` what is queued is written first, and the peer gets a second to read it.

        With ``discard`` the kernel sends nothing of lent memory any more: it may be used for something else now.
        """
        if self._sock.fileno() < 0:
            return
        if flush and self.connection.established:
            self._say_goodbye()
        self._pages.close()
        if discard and self._pages.used:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()
        while self.fds:
            os.close(self.fds.popleft())

    def _say_goodbye(self) -> None:
        """Closing with received bytes unread would reset the connection, and with it what was just written."""
        deadline = time.monotonic() + _GOODBYE_SECONDS
        waste = bytearray(65536)
        poll = select.poll()
        try:
            self._write()
            if self._outgoing:
                # In the middle of a frame and the peer takes no more: it will see the connection end.
                return
            self._sock.shutdown(socket.SHUT_WR)
            poll.register(self._sock, select.POLLIN)
            while poll.poll(max(0.0, deadline - time.monotonic()) * 1000) and self._sock.recv_into(waste):
                pass
        except (ShipError, OSError):
            # It is gone already: nobody is left to say goodbye to.
            return

    @property
    def address(self) -> Address | None:
        """Where it leads, as a number: for further connections to the same daemon. None for a Unix socket, and for a
        connection that the peer has reset."""
        ends = self._ends()
        return Address(*ends[1][:2]) if ends is not None else None

    @property
    def local(self) -> bool:
        """Whether the peer is on this very host, so that no link lies between; or was reset, and there is none left."""
        ends = self._ends()
        return ends is None or bool(ends[0][0] == ends[1][0])

    def _ends(self) -> tuple[Any, Any] | None:
        """This side's address and the peer's, where they have any."""
        if self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        try:
            return self._sock.getsockname(), self._sock.getpeername()
        except OSError:
            # The peer has reset it, which whoever reads next is told as what it is.
            return None

    def rate(self) -> link_rate.LinkRate | None:
        """What the link has shown so far, where that is known."""
        return link_rate.measure(self._sock)

    def hold_little(self, little: bool) -> None:
        """See ``link_rate.hold_little``."""
        link_rate.hold_little(self._sock, little)

    def pace(self, rate: float) -> bool:
        """Send at most so many bytes a second. Whether the kernel sees to it."""
        return link_rate.pace(self._sock, rate)

    @property
    def idle(self) -> bool:
        """Whether everything queued has been handed to the kernel."""
        return not self._outgoing and not self.connection.has_output


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)
