"""Questions to a daemon, on a blocking thread. The connection may have gone meanwhile: asking twice is harmless."""

import logging
import math
import time
from collections.abc import Callable
from typing import Final

from shipd.errors import ConnectError, Interrupted
from shipd.transfer.faults import peer_error, remote_error
from shipd.transfer.lane import Lane
from shipd.transfer.waker import Waker
from shipproto.aborts import read_abort
from shipproto.connection import MessageArrived
from shipproto.errors import ProtocolError
from shipproto.frame import Buffer
from shipproto.messages import Abort, Message

log = logging.getLogger("shipd.client")

_BACKOFF: Final = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Pauses before a question is asked again, after connections that broke; there are no more attempts than that."""


def ask(lane: Lane, question: Message, answer: type[Message], seconds: float) -> Buffer:
    """Ask over an established lane and wait for the body of the answer. Raises ShipError."""
    lane.connection.send(question)
    deadline = time.monotonic() + seconds
    while True:
        for event in lane.exchange(deadline):
            if not isinstance(event, MessageArrived):
                continue
            if isinstance(event.message, Abort):
                try:
                    raise remote_error(read_abort(event.message, event.body), lane.peer)
                except ProtocolError as error:
                    raise peer_error(error, lane.peer) from error
            if isinstance(event.message, answer):
                return bytes(event.body)


class Questioner:
    """Asks one daemon, over ``lane`` while that lasts, and over new connections where it breaks.

    open_lane  opens a connection; raises ShipError
    waker      interrupts every wait
    until      when there must be an answer at the latest (time.monotonic)
    """

    def __init__(
        self, open_lane: Callable[[], Lane], waker: Waker, lane: Lane | None = None, *, until: float = math.inf
    ) -> None:
        self._open_lane = open_lane
        self._waker = waker
        self._lane = lane
        self._until = until
        self.bytes_sent = 0
        """Of questions."""
        self.open_seconds = 0.0
        """What opening connections took."""
        self._reached = lane is not None
        """Some connection has stood: a path that breaks then is worth another attempt."""

    @property
    def lane(self) -> Lane:
        """The connection, opened where there is none. Raises ShipError."""
        if self._lane is None:
            self._lane = self._open_lane()
            self.open_seconds += self._lane.open_seconds
            self._reached = True
        self._lane.use(self._waker)
        return self._lane

    def ask(self, question: Message, answer: type[Message], seconds: float) -> Buffer:
        """The body of the answer. Raises ShipError: Stalled where there is none in time, Interrupted where woken."""
        deadline = min(time.monotonic() + seconds, self._until)
        for pause in (*_BACKOFF, None):
            try:
                lane = self.lane
                sent = lane.bytes_sent
                try:
                    return ask(lane, question, answer, max(0.001, deadline - time.monotonic()))
                finally:
                    self.bytes_sent += lane.bytes_sent - sent
            except ConnectError as error:
                self.close()
                if not self._reached or pause is None:
                    raise
                log.debug("asking again over a new connection", extra={"why": str(error)})
                if self._waker.wait(min(pause, max(0.0, deadline - time.monotonic()))):
                    raise Interrupted("interrupted while asking the daemon; nothing was changed") from error
            except BaseException:
                self.close()
                raise
        raise AssertionError("the last attempt returns or raises")

    def take(self) -> Lane | None:
        """The connection, which is the caller's from now on; None where there is none."""
        lane, self._lane = self._lane, None
        return lane

    def close(self) -> None:
        """Close the connection, if there is one. Harmless when repeated."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
