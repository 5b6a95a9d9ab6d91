"""The receiving end of a lane: a further connection of a transfer, on a thread of its own.

What arrives lands in the image, and is checked and digested, on this thread; only the events go to the loop, and not
one by one. So lanes use as many cores as there are, while the transfer's books stay on one thread and the loop stays
free.

The socket blocks: a thread that sleeps in recv(2) is woken once for what arrives in a burst, where one that polls is
woken for each piece of it. What ends the wait from outside is shutdown(2).
"""

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from shipd.transfer.times import Times
from shipproto.connection import Connection, Event
from shipproto.errors import ProtocolError

log = logging.getLogger("shipd.transfer")

_LEAST_TIMEOUT: Final = 0.001
"""Seconds; to the kernel, zero would be none at all."""


class Inlet:
    """One lane. ``take`` and ``deliver`` are called on its thread; ``deliver`` with None when it has ended.

    take   does what has to be done of an event at once, before anything is answered
    stall  seconds of silence after which the sender is taken for dead
    """

    def __init__(
        self,
        sock: socket.socket,
        connection: Connection,
        peer: str,
        *,
        stall: float,
        take: Callable[["Inlet", Event], None],
        deliver: Callable[["Inlet", Event | None], None],
    ) -> None:
        self.connection = connection
        self.times = Times()
        self._peer = peer
        self._take = take
        self._deliver = deliver
        self.stopping = False
        self._sock = sock
        # Not a timeout of Python's, with which it polls before it receives.
        sock.settimeout(None)
        seconds, rest = divmod(max(stall, _LEAST_TIMEOUT), 1)
        timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._thread = threading.Thread(target=self._run, name=f"shipd lane {peer}", daemon=True)

    def start(self) -> None:
        """Begin to receive. Raises RuntimeError where there can be no further thread; the socket is closed then."""
        try:
            self._thread.start()
        except RuntimeError:
            self._sock.close()
            raise

    def stop(self) -> None:
        """End, within the time that half a megabyte takes. When this returns nothing writes to the image any more."""
        self.stopping = True
        # The thread closes it when it has ended, or has done so.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        why = ""
        try:
            self._write()
            while self._receive():
                pass
        except BlockingIOError:
            why = "nothing came, or went, in time"
        except (OSError, ProtocolError) as error:
            why = str(error)
        except Exception:
            log.exception("a lane failed unexpectedly", extra={"peer": self._peer})
        finally:
            if why and not self.stopping:
                log.info("a lane has ended", extra={"peer": self._peer, "why": why})
            self._sock.close()
            self._deliver(self, None)

    def _receive(self) -> bool:
        """Take what comes next. False at the end of the stream."""
        connection, times = self.connection, self.times
        views = connection.get_buffers()
        began, worked = time.monotonic(), time.thread_time()
        count = self._sock.recvmsg_into(views)[0]
        received, working = time.monotonic(), time.thread_time() - worked
        # The rest of the time this thread slept.
        times.receive += working
        times.wait += received - began - working
        if not count or self.stopping:
            return False
        connection.buffer_updated(count)
        now = time.monotonic()
        times.check += now - received
        if connection.has_events:
            for event in connection.events():
                self._take(self, event)
                self._deliver(self, event)
            times.digest += time.monotonic() - now
        if connection.has_output:
            self._write()
        return True

    def _write(self) -> None:
        for piece in self.connection.take_output():
            self._sock.sendall(piece)
