"""The lanes of one push: threads that receive into its image, and the way of what they bring onto the loop."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from shipd.transfer.inlet import Inlet
from shipd.transfer.stream import StreamPeer
from shipd.transfer.times import Times
from shipproto.connection import ChunkArrived, Connection, Event, RunArrived
from shipproto.errors import ProtocolError, UnexpectedMessage
from shipproto.messages import Coded, Data, Join, Message, Nack, Ping
from shipproto.receiver import Receiver

log = logging.getLogger("shipd.transfer")

_LOOK_SECONDS: Final = 0.01
"""How often to look what lanes have brought."""


def _no_body(message: Message, _size: int) -> bool:
    """No body is ever due on a lane."""
    raise UnexpectedMessage(f"{type(message).__name__} on a lane")


class Lanes:
    """Belongs to the loop, but for ``_deliver``.

    on_event  takes what a lane has brought, in its order
    flush     writes what came of that to the sender
    ended     is told of each lane that is gone how many bytes it took and how many frames it resent
    admit     waits, on a lane's thread, until there is room for one more coded run; it is given a way to see that the
              lane is to end
    """

    def __init__(
        self,
        receiver: Receiver,
        on_event: Callable[[Connection, Event], None],
        flush: Callable[[], None],
        ended: Callable[[int, int], None],
        admit: Callable[[Callable[[], bool]], None],
    ) -> None:
        self._receiver = receiver
        self._on_event = on_event
        self._flush = flush
        self._tell_end = ended
        self._admit = admit
        self._loop = asyncio.get_running_loop()
        self._inlets: dict[Inlet, tuple[int, int]] = {}
        """Lanes, and what had been counted of their connections when they joined."""
        self._ended = Times()
        """What the work of lanes that have ended took."""
        self._arrived: deque[tuple[Inlet, Event | None]] = deque()
        self._scheduled = False
        self._looking: asyncio.TimerHandle | None = None

    def join(self, peer: StreamPeer, join: Join, stall: float) -> None:
        """Receive chunks on this connection too, on a thread. Raises TransferError where that is not wanted."""
        connection = peer.connection
        self._receiver.joined(connection, join)
        connection.awaited = _no_body
        connection.accepts = (Data, Coded, Nack, Ping)
        counted = connection.bytes_received, connection.frames_resent
        try:
            inlet = Inlet(
                peer.detach(),
                connection,
                peer.name,
                stall=stall,
                take=self._take_on_thread,
                deliver=self._deliver,
            )
            inlet.start()
        except (OSError, RuntimeError) as error:
            self._receiver.parted(connection)
            log.warning("a lane cannot be received", extra={"peer": peer.name, "why": str(error)})
            peer.abort()
            return
        self._inlets[inlet] = counted
        if self._looking is None:
            self._look()

    def _take_on_thread(self, inlet: Inlet, event: Event) -> None:
        """At once, on the lane's thread."""
        self._receiver.take_on_thread(inlet.connection, event)
        if isinstance(event, RunArrived):
            self._admit(lambda: inlet.stopping)

    def times(self) -> Times:
        """What the work of all of them has taken so far."""
        total = Times()
        for times in (self._ended, *(inlet.times for inlet in self._inlets)):
            total.add(times)
        return total

    def stop(self) -> None:
        """End every lane; what they have brought until then counts. Afterwards nothing writes to the image for them."""
        for inlet in list(self._inlets):
            inlet.stop()
        self.take()
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def _deliver(self, inlet: Inlet, event: Event | None) -> None:
        """On a lane's thread. Chunks wait for the next look, since waking the loop costs much where both share a core;
        but not once the sender has said that this was all."""
        self._arrived.append((inlet, event))
        if not self._scheduled and (self._receiver.finishing or not isinstance(event, ChunkArrived)):
            self._scheduled = True
            self._loop.call_soon_threadsafe(self.take)

    def _look(self) -> None:
        self.take()
        self._looking = self._loop.call_later(_LOOK_SECONDS, self._look) if self._inlets else None

    def take(self) -> None:
        """Take what lanes have brought by now."""
        self._scheduled = False
        if not self._arrived:
            return
        while self._arrived:
            inlet, event = self._arrived.popleft()
            if event is None:
                self._part(inlet)
            elif inlet in self._inlets:
                try:
                    self._on_event(inlet.connection, event)
                except ProtocolError:
                    self._part(inlet)
        self._flush()

    def _part(self, inlet: Inlet) -> None:
        counted = self._inlets.pop(inlet, None)
        if counted is not None:
            inlet.stop()
            connection = inlet.connection
            # It leads back to the connection, whose buffers would be kept until the next full collection.
            connection.landing = None
            self._tell_end(connection.bytes_received - counted[0], connection.frames_resent - counted[1])
            self._ended.add(inlet.times)
            self._receiver.parted(inlet.connection)
