"""What moves the bytes of a connection through the proxy: two pumps, one for each way, each on a thread of its own.

Frames are taken in whole and passed on here, and connections ended; what is done to which of them, the proxy knows.
"""

import contextlib
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Literal

from tests.support.frames import PRELUDE, Way

if TYPE_CHECKING:
    from tests.support.proxy import Proxy

How = Literal["fin", "rst"]
"""Whether a connection is closed or reset."""


class Severed(Exception):
    """Nothing more is to pass this way."""


class Pair:
    """The two sockets of one connection. Closed by whichever of its two pumps ends last."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.severed = threading.Event()
        self.how: How = "fin"
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable once severed."""
        self._lock = threading.Lock()
        self._pumps = 2

    def sever(self, how: How) -> None:
        """End it for both sides."""
        with self._lock:
            if self.severed.is_set() or not self._pumps:
                return
            self.how = how
            self.severed.set()
            os.eventfd_write(self.wake, 1)

    def end(self) -> None:
        """Both sides see the end of the stream."""
        for sock in (self.near, self.far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        """A pump has ended."""
        with self._lock:
            self._pumps -= 1
            if self._pumps:
                return
            for sock in (self.near, self.far):
                if self.severed.is_set() and self.how == "rst":
                    reset(sock)
                else:
                    sock.close()
            os.close(self.wake)


def reset(sock: socket.socket) -> None:
    """Close it at once: the other end sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Pump:
    """One direction of one connection, on a thread of its own."""

    def __init__(
        self, proxy: "Proxy", pair: Pair, connection: int, way: Way, source: socket.socket, target: socket.socket
    ) -> None:
        self.pair = pair
        self._proxy = proxy
        self._connection = connection
        self._way = way
        self._source = source
        self._target = target
        self._written = 0
        self._readable = select.poll()
        self._readable.register(source, select.POLLIN)
        self._readable.register(pair.wake, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(target, select.POLLOUT)
        self._writable.register(pair.wake, select.POLLIN)

    def run(self) -> None:
        """Until the stream ends, or is ended."""
        try:
            try:
                self._frames()
            except (OSError, Severed):
                self.pair.sever("rst")
                if self.pair.how == "fin":
                    # Both ways before anything is drained: what one side writes until it sees the end would be drained,
                    # too, and it may be long until the other pump's thread gets its turn.
                    self.pair.end()
                    self._drain()
            else:
                self.end()
        except Exception as error:  # noqa: BLE001  raised at the end of the test
            self._proxy.errors.append(error)
            self.pair.sever("rst")
        finally:
            self.pair.leave()

    def end(self) -> None:
        """The reader sees the end of the stream."""
        with contextlib.suppress(OSError):
            self._target.shutdown(socket.SHUT_WR)

    def write(self, data: bytes | bytearray) -> None:
        """Pass bytes on, at the link's pace."""
        cut = self._proxy.cut_of(self._way, self._connection)
        if cut is not None:
            data = data[: max(0, cut[0] - self._written)]
        for piece, seconds in self._proxy.slices(self._way, data):
            if seconds and self.pair.severed.wait(seconds):
                raise Severed
            self._send(piece)
        self._written += len(data)
        if cut is not None and self._written == cut[0]:
            self.pair.sever(cut[1])
            raise Severed

    def _frames(self) -> None:
        while True:
            prelude = self._read(PRELUDE)
            if len(prelude) < PRELUDE or prelude[:4] != b"SHPD":
                self.write(prelude)
                self._pass_on()
                return
            _magic, kind, _flags, header_length, payload_length, _crc, sequence = struct.unpack_from(
                "!4sBBHIIQ", prelude
            )
            rest = self._read(header_length + payload_length)
            data = prelude + rest
            if len(rest) < header_length + payload_length:
                self.write(data)
                return
            frame = self._proxy.note(
                self._connection, self._way, kind, sequence, bytes(rest[:header_length]), payload_length
            )
            for rule in self._proxy.rules_for(frame):
                rule.applied += 1
                rule.reached.set()
                rule.apply(self, frame, data, rule)
            self.write(data)

    def _pass_on(self) -> None:
        view = memoryview(bytearray(65536))
        while count := self._receive(view):
            self.write(bytes(view[:count]))

    def _read(self, count: int) -> bytearray:
        """``count`` bytes, fewer at the end of the stream."""
        data = bytearray(count)
        at = 0
        with memoryview(data) as view:
            while at < count and (received := self._receive(view[at:])):
                at += received
        del data[at:]
        return data

    # Sockets do not block, so that a cut finds no thread in the middle of a call.

    def _receive(self, view: memoryview) -> int:
        while True:
            self._wait(self._readable)
            try:
                count = self._source.recv_into(view)
            except BlockingIOError:
                continue
            self._proxy.received[self._way] += count
            return count

    def _send(self, piece: memoryview) -> None:
        at = 0
        while at < len(piece):
            self._wait(self._writable)
            with contextlib.suppress(BlockingIOError):
                at += self._target.send(piece[at:])

    def _wait(self, ready: select.poll) -> None:
        ready.poll()
        if self.pair.severed.is_set():
            raise Severed

    def _drain(self) -> None:
        """Take what still comes, so that the end of the stream is no reset."""
        waste = bytearray(65536)
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        with contextlib.suppress(OSError):
            while not self._proxy.closing.is_set():
                if poll.poll(20) and not self._source.recv_into(waste):
                    return
