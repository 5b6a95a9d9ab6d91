"""TCP connections of the daemon: an asyncio BufferedProtocol that receives straight into the images.

The loop's thread does nothing here but receive, check and hand on: frame checks are inline, per received
piece, while the bytes are in cache (40 µs for a whole frame).
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final, cast

from shipd.transfer.faults import describe_opening
from shipd.transfer.times import Times
from shipproto.connection import ChunkArrived, Connection, Event
from shipproto.errors import ForeignPeer, LocalError, ProtocolError
from shipproto.frame import Buffer
from shipproto.messages import Message

log = logging.getLogger("shipd.transfer")

_FAREWELL_SECONDS: Final = 30.0
"""How long a peer may take to read the last words of a connection."""


class StreamPeer(asyncio.BufferedProtocol):
    """One accepted TCP connection. ``on_event`` may raise ProtocolError, which closes the connection."""

    def __init__(
        self,
        connection: Connection,
        on_open: Callable[["StreamPeer"], None],
        on_event: Callable[["StreamPeer", Event], None],
        on_lost: Callable[["StreamPeer"], None],
    ) -> None:
        self.connection = connection
        self.name = "?"
        self.last_heard = 0.0
        self.times = Times()
        self._asked_at = 0.0
        self.detached = False
        self.error: ProtocolError | None = None
        self._on_open = on_open
        self._on_event = on_event
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._farewell: asyncio.TimerHandle | None = None
        self._closed = False
        self._unread = False
        self._held_back = False

    # --- what the transport calls --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        address: Any = transport.get_extra_info("peername")
        self.name = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.last_heard = self._loop.time()
        self._on_open(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  the connection knows better
        # The transport reads from the socket between this call and the next one.
        self._asked_at = time.monotonic()
        return self.connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        # The loop's own clock, and finer.
        started = self.last_heard = time.monotonic()
        connection, times = self.connection, self.times
        times.receive += started - self._asked_at
        try:
            connection.buffer_updated(nbytes)
            checked = time.monotonic()
            times.check += checked - started
            if not connection.has_events:
                if connection.has_output:
                    self.flush()
                return
            for event in connection.events():
                self._on_event(self, event)
                if isinstance(event, ChunkArrived):
                    digested = time.monotonic()
                    times.digest += digested - checked
                    checked = digested
        except ForeignPeer as error:
            self.error = error
            log.warning(
                "closing a foreign connection", extra={"peer": self.name, "why": describe_opening(error.opening)}
            )
            self.close()
        except ProtocolError as error:
            self.error = error
            log.warning("closing a connection", extra={"peer": self.name, "why": str(error)})
            self.close()
        else:
            self.flush()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        """The peer does not read its answers: then it is not listened to either, or they would pile up here."""
        self._unread = True
        self._listen()

    def resume_writing(self) -> None:
        self._unread = False
        self._listen()

    def _listen(self) -> None:
        if self._transport is None or self._closed:
            return
        if self._unread or self._held_back:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if self._farewell is not None:
            self._farewell.cancel()
        if exc is not None:
            log.info("connection lost", extra={"peer": self.name, "why": str(exc)})
        self._on_lost(self)

    # --- what the daemon calls -----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return self._closed

    def hold_back(self, much: bool) -> None:
        """Take nothing more from the peer for now, or go on."""
        if much != self._held_back:
            self._held_back = much
            self._listen()

    def send(self, message: Message, body: Buffer = b"") -> None:
        """Queue a message and write what is queued."""
        if not self._closed:
            try:
                self.connection.send(message, body)
            except LocalError:
                # The peer left in the middle of the handshake; there is nobody to tell.
                return
            self.flush()

    def flush(self) -> None:
        """Write what the connection has queued."""
        if self._transport is None or self._closed:
            return
        for piece in self.connection.take_output():
            self._transport.write(piece)

    def close(self, reason: str = "") -> None:
        """Write what is queued and close; a peer that does not read it is cut off after a while."""
        if self._closed:
            return
        if reason:
            log.info("closing a connection", extra={"peer": self.name, "why": reason})
        self.flush()
        self._closed = True
        if self._transport is not None:
            self._transport.close()
            self._farewell = self._loop.call_later(_FAREWELL_SECONDS, self._transport.abort)

    def detach(self) -> socket.socket:
        """Hand over the socket, and with it the connection: nothing of it happens on this loop any more.

        Raises OSError where there is no descriptor left; then nothing has happened.
        """
        assert self._transport is not None
        # The transport closes its own descriptor, which ends a connection only with the last duplicate.
        sock = socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno()))
        self.detached = True
        self.abort()
        return sock

    def abort(self) -> None:
        """Close at once; what is queued is lost."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()
