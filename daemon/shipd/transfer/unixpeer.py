"""Unix-socket connections of the daemon: the same frames, and file descriptors beside them.

A plain non-blocking socket with the loop's add_reader: asyncio's transports drop descriptors silently.
"""

import array
import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from shipd.transfer.closing import close_aside
from shipd.transfer.times import Times
from shipproto.connection import ChunkArrived, Connection, Event
from shipproto.errors import LocalError, MalformedMessage, ProtocolError
from shipproto.frame import Buffer
from shipproto.messages import Message

log = logging.getLogger("shipd.transfer")

_LINGER_SECONDS = 5.0
"""How long a connection that is being closed waits for its peer to take what is queued."""

_READS_PER_WAKE = 8
"""Receives before other connections get their turn."""

_HIGH_WATER: Final = 256 * 1024
"""Bytes that wait for a peer to read them, beyond which it is not listened to either."""


_MOST_FDS: Final = 253
"""SCM_MAX_FD of Linux: what one message can carry. With room for fewer the kernel would close the rest itself, here on
the loop."""

_ANCILLARY: Final = socket.CMSG_SPACE(4 * _MOST_FDS)

_SO_PEERGROUPS: Final = 59
"""Linux 4.13; not in Python's socket module. Supplementary groups of whoever connected."""

_MAX_GROUPS: Final = 65536
"""NGROUPS_MAX of Linux."""


def peer_credentials(sock: socket.socket) -> tuple[int, int, frozenset[int]]:
    """Process, user and groups of whoever connected, as the kernel recorded them (SO_PEERCRED, SO_PEERGROUPS)."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    try:
        groups = array.array("I", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS))
    except OSError:
        groups = array.array("I")
    return pid, uid, frozenset((gid, *groups))


class UnixPeer:
    """One accepted Unix connection. ``on_event`` may raise ProtocolError, which closes the connection."""

    def __init__(
        self,
        sock: socket.socket,
        connection: Connection,
        on_event: Callable[["UnixPeer", Event], None],
        on_lost: Callable[["UnixPeer"], None],
    ) -> None:
        self.connection = connection
        self.pid, self.uid, self.groups = peer_credentials(sock)
        self.name = f"process {self.pid}"
        self._sock = sock
        self._on_event = on_event
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self.last_heard = self._loop.time()
        self.times = Times()
        self.error: ProtocolError | None = None
        self._outgoing: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self.backlog = 0
        """Bytes that the peer has not taken, beyond what the kernel keeps for it."""
        self.takes_fds = False
        """Whether descriptors from the peer may be of any use."""
        self._fds: tuple[int, ...] = ()
        """Those that came last, until somebody takes them."""
        self._writing = False
        self._paused = False
        self._held_back = False
        self._closed = False
        self._closing = False
        sock.settimeout(0)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return self._closed or self._closing

    def send(self, message: Message, body: Buffer = b"") -> None:
        """Queue a message and write what is queued."""
        if not self.closed:
            try:
                self.connection.send(message, body)
            except LocalError:
                return
            self.flush()

    def send_with_fds(self, message: Message, fds: Sequence[int]) -> None:
        """Send a message whose first byte carries ``fds``. They are duplicated: the caller may close its own.

        Raises OSError where there are no descriptors left; then nothing is sent.
        """
        if self.closed:
            return
        self.flush()
        if self._sock.fileno() < 0:
            # It was found dead just now: nobody would ever close the duplicates.
            return
        duplicates = _duplicated(fds)
        self.connection.send(message)
        pieces = self.connection.take_output()
        self._queue(pieces[0], duplicates)
        for piece in pieces[1:]:
            self._queue(piece)
        self._write()

    def flush(self) -> None:
        """Write what the connection has queued."""
        if self.closed:
            return
        for piece in self.connection.take_output():
            self._queue(piece)
        self._write()

    def close(self, reason: str = "") -> None:
        """Write what is queued and close; a peer that does not take it is left after a few seconds."""
        if self.closed:
            return
        if reason:
            log.info("closing a local connection", extra={"peer": self.name, "why": reason})
        self.flush()
        self._closing = True
        if self._outgoing:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(_LINGER_SECONDS, self._lose)
        else:
            self._lose()

    def _readable(self) -> None:
        self.last_heard = self._loop.time()
        try:
            for _ in range(_READS_PER_WAKE):
                try:
                    asked = time.monotonic()
                    count = self._receive()
                except (BlockingIOError, InterruptedError):
                    break
                if not count:
                    self._lose()
                    return
                received = time.monotonic()
                self.connection.buffer_updated(count)
                checked = time.monotonic()
                self.times.receive += received - asked
                self.times.check += checked - received
                for event in self.connection.events():
                    self._on_event(self, event)
                    if isinstance(event, ChunkArrived):
                        digested = time.monotonic()
                        self.times.digest += digested - checked
                        checked = digested
                if self.closed:
                    return
                if self.backlog > _HIGH_WATER or self._held_back:
                    break
        except ProtocolError as error:
            self.error = error
            log.warning("closing a local connection", extra={"peer": self.name, "why": str(error)})
            self.close()
        except OSError as error:
            log.info("local connection lost", extra={"peer": self.name, "why": str(error)})
            self._lose()
        except Exception:
            # What was being handled is lost, and whoever waits for what comes of it must not wait for nothing.
            log.exception("a local connection failed unexpectedly", extra={"peer": self.name})
            self._lose()
        else:
            self.flush()
            self._pause()

    def _receive(self) -> int:
        """Bytes received into the connection's buffer. Descriptors that nobody waits for are closed."""
        count, ancillary, _flags, _address = self._sock.recvmsg_into(
            [self.connection.get_buffer()], _ANCILLARY, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                # Those that are still here came with a message that takes none.
                self._drop_fds()
                self._fds = tuple(memoryview(data)[: len(data) // 4 * 4].cast("i"))
                if not self.takes_fds:
                    self._drop_fds()
        return count

    def take_fds(self, count: int) -> tuple[int, ...]:
        """The descriptors that came with the message that is being handled: the caller's from now on.

        Raises MalformedMessage where they are not so many.
        """
        if len(self._fds) != count:
            raise MalformedMessage(f"{count} descriptors were announced and {len(self._fds)} have come")
        taken, self._fds = self._fds, ()
        return taken

    def _drop_fds(self) -> None:
        fds, self._fds = self._fds, ()
        close_aside(fds)

    def hold_back(self, much: bool) -> None:
        """Take nothing more from the peer for now, or go on."""
        self._held_back = much
        if much:
            self._pause()
        elif self._paused and not self.closed and not self._outgoing:
            self._resume()

    def _pause(self) -> None:
        """A peer that does not read its answers is not listened to either, or they would pile up here."""
        if (self.backlog > _HIGH_WATER or self._held_back) and not self.closed and not self._paused:
            self._paused = True
            self._loop.remove_reader(self._sock.fileno())

    def _resume(self) -> None:
        self._paused = False
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def _queue(self, piece: Buffer, fds: tuple[int, ...] = ()) -> None:
        self._outgoing.append((memoryview(piece), fds))
        self.backlog += len(piece)

    def _write(self) -> None:
        while self._outgoing and not self._closed:
            piece, fds = self._outgoing[0]
            try:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._sock.sendmsg([piece], ancillary)
            except (BlockingIOError, InterruptedError):
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._sock.fileno(), self._write)
                return
            except OSError as error:
                log.info("local connection lost", extra={"peer": self.name, "why": str(error)})
                self._lose()
                return
            _close_all(fds)
            self._outgoing[0] = (piece[sent:], ())
            self.backlog -= sent
            if sent == len(piece):
                self._outgoing.popleft()
        if self._closed:
            return
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())
        if self._closing:
            self._lose()
        elif self._paused and not self._held_back:
            self._resume()

    def _lose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        for _piece, fds in self._outgoing:
            _close_all(fds)
        self._outgoing.clear()
        self._drop_fds()
        self.backlog = 0
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        # With it the kernel closes descriptors of messages that nobody has read.
        close_aside((self._sock.detach(),))
        self._on_lost(self)


def _duplicated(fds: Sequence[int]) -> tuple[int, ...]:
    """A duplicate of each. Raises OSError, and there is none then."""
    with contextlib.ExitStack() as undo:
        duplicates = []
        for fd in fds:
            duplicates.append(os.dup(fd))
            undo.callback(os.close, duplicates[-1])
        undo.pop_all()
    return tuple(duplicates)


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
