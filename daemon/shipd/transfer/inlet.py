"""The receiving end of a lane: a further connection of a transfer, on a thread of its own.

What arrives lands in the image, and is checked and digested, on this thread; only the events go to the loop. So lanes
use as many cores as there are, while the transfer's books stay on one thread.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable

from shipd.errors import Interrupted, ShipError
from shipd.transfer.lane import Lane, Waker
from shipd.transfer.times import Times
from shipproto.connection import ChunkArrived, Connection, Event

log = logging.getLogger("shipd.transfer")


class Inlet:
    """One lane. ``digest`` and ``deliver`` are called on its thread; ``deliver`` with None when it has ended.

    stall  seconds of silence after which the sender is taken for dead
    """

    def __init__(
        self,
        sock: socket.socket,
        connection: Connection,
        peer: str,
        *,
        stall: float,
        digest: Callable[[ChunkArrived], None],
        deliver: Callable[["Inlet", Event | None], None],
    ) -> None:
        self.connection = connection
        self._stall = stall
        self._digest = digest
        self._deliver = deliver
        self._waker = Waker()
        self._lane = Lane(sock, peer, connection=connection, waker=self._waker)
        self._thread = threading.Thread(target=self._run, name=f"shipd lane {peer}", daemon=True)

    @property
    def times(self) -> Times:
        """What its work took."""
        return self._lane.times

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def stop(self) -> None:
        """End, within the time that half a megabyte takes. When this returns nothing writes to the image any more."""
        self._waker.wake()
        self._thread.join()
        self._waker.close()

    def _run(self) -> None:
        try:
            while True:
                for event in self._lane.exchange(time.monotonic() + self._stall):
                    if isinstance(event, ChunkArrived):
                        started = time.monotonic()
                        self._digest(event)
                        self.times.digest += time.monotonic() - started
                    self._deliver(self, event)
        except Interrupted:
            pass
        except ShipError as error:
            log.debug("a lane has ended", extra={"peer": self._lane.peer, "why": str(error)})
        except Exception:
            log.exception("a lane failed unexpectedly", extra={"peer": self._lane.peer})
        finally:
            self._lane.close()
            self._deliver(self, None)
