"""The coded part of a push over one connection: runs that an encoder has made ready go out on the transfer's own one.

Whether runs are coded is decided again and again: an encoder that finds the bytes as they are to be soonest there ends,
the rest travels on as many lanes as make it faster, and where that turns out slow it begins once more.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

from shipd.checkpoints.source import Source
from shipd.client.account import Account
from shipd.client.choice import RAW
from shipd.client.chunks import ChunkReader
from shipd.client.encoding import Encoded, Encoder, encoding_threads
from shipd.client.incremental import Incremental
from shipd.client.lanes import Outlets
from shipd.codecs.registry import SAME
from shipd.errors import TransferFailed
from shipd.threads import start
from shipd.transfer.lane import Lane
from shipproto.connection import Event
from shipproto.sender import Sender

_PATIENCE: Final = 0.02
"""Seconds to wait for an encoder before the receiver is listened to."""

_PROVEN: Final = 16 << 20
"""Bytes that must have been written as they are before the kernel may keep as much of them as it likes: what is slow
after all should not have megabytes to carry before anything else."""

_LOOK_SECONDS: Final = 0.25
"""How often the rate of bytes as they are is looked at."""


class CodedRuns:
    """Belongs to the thread of the conversation."""

    def __init__(
        self,
        sender: Sender,
        source: Source,
        lane: Lane,
        outlets: Outlets,
        incremental: Incremental,
        account: Account,
        stall: float,
    ) -> None:
        self._sender = sender
        self._source = source
        self._lane = lane
        self._outlets = outlets
        self._incremental = incremental
        self._account = account
        self._stall = stall
        self._encoder: Encoder | None = None
        self._beginning: _Beginning | None = None
        self._agreed: object = None
        self._looked = (0.0, 0)
        self._proven = False
        """Whether the link is fast beyond doubt."""

    @property
    def active(self) -> bool:
        """Whether what is to be sent next comes from an encoder; starts one where that is best."""
        if self._encoder is not None or self._beginning is not None:
            return True
        sender = self._sender
        if not sender.sending:
            return False
        if self._agreed is not sender.agreed:
            # WANT has come: for the first time on this connection, or for what has to come again.
            self._agreed = sender.agreed
            if self._incremental.reads_base(sender):
                self._beginning = _Beginning(lambda: self._incremental.begin(sender, encoding_threads()))
                return True
            self._begun(self._incremental.begin(sender, encoding_threads()))
        if not self._incremental.coding_pays:
            self._look()
            return False
        self._begin()
        return True

    @property
    def beginning(self) -> bool:
        """Whether nothing can be sent yet, because a base is being opened."""
        return self._beginning is not None

    @property
    def _sent(self) -> int:
        return self._lane.bytes_sent + self._outlets.bytes_sent

    def _look(self) -> None:
        """How fast it goes without."""
        now, sent = time.monotonic(), self._sent
        since, before = self._looked
        if now - since >= _LOOK_SECONDS:
            self._looked = (now, sent)
            self._incremental.reconsider((sent - before) / (now - since))
            if not self._proven and not self._incremental.coding_pays and sent >= _PROVEN:
                self._proven = True
                self._lane.hold_little(False)  # noqa: FBT003

    def _begun(self, coding: bool) -> None:
        """Whether coded runs are to be sent at all is known."""
        self._looked = (time.monotonic(), self._sent)
        self._proven = not coding
        self._lane.hold_little(coding)

    def _begin(self) -> None:
        assert self._incremental.chooser is not None
        # Lanes take no chunks meanwhile.
        self._outlets.want(1)
        self._encoder = Encoder(
            self._sender,
            self._outlets.lock,
            lambda: ChunkReader(self._sender, self._source),
            base=self._incremental.base,
            chooser=self._incremental.chooser,
            link=lambda: self._incremental.link(self._lane),
            plain=self._incremental.plain,
            threads=encoding_threads(),
        )

    def step(self, drain: Callable[[], list[Event]]) -> list[Event]:
        """Send what is ready, or wait a moment for it; what the receiver has said meanwhile."""
        if self._beginning is not None:
            coding = self._beginning.take(_PATIENCE)
            if coding is not None:
                self._beginning = None
                self._begun(coding)
            return list(self._lane.pump())
        encoder = self._encoder
        assert encoder is not None
        ready = encoder.take(_PATIENCE)
        if ready is not None:
            return self._send(ready, drain)
        if encoder.done:
            self._end()
        return list(self._lane.pump())

    def _send(self, ready: Encoded, drain: Callable[[], list[Event]]) -> list[Event]:
        connection = self._lane.connection
        if ready.codec == RAW:
            connection.send_data(ready.chunks[0], memoryview(ready.payload))
        else:
            connection.send_coded(ready.chunks, ready.codec, ready.payload)
        # Of a version that the receiver alone has, nothing can be said but that chunks are the same.
        has_base = ready.codec == SAME or self._incremental.base is not None
        self._account.coded(ready.codec, ready.size, len(ready.payload), self._sender.base if has_base else b"")
        waited = self._lane.times.wait
        events = drain()
        self._account.wire_wait += self._lane.times.wait - waited
        self._sender.sent(ready.chunks)
        return events

    def _end(self) -> None:
        if self._encoder is not None:
            self._encoder.stop()
            self._account.times.add(self._encoder.times)
            self._encoder = None
            # What was sent until now says little of how fast bytes as they are would be.
            self._looked = (time.monotonic(), self._sent)

    def stop(self) -> None:
        """Nothing is encoded any more, and nothing reads the base."""
        if self._beginning is not None:
            self._beginning.join()
            self._beginning = None
        self._end()
        self._incremental.end()


class _Beginning(threading.Thread):
    """``begin`` on a thread of its own, where it reads a base: for that long the receiver must not take this side for
    dead."""

    def __init__(self, begin: Callable[[], bool]) -> None:
        super().__init__(name="shipd base", daemon=True)
        self._begin = begin
        self._result: bool | BaseException | None = None
        start(self, TransferFailed, "the base cannot be read")

    def run(self) -> None:
        try:
            self._result = self._begin()
        except BaseException as error:  # noqa: BLE001  raised by take, on the thread that asks
            self._result = error

    def take(self, patience: float) -> bool | None:
        """What ``begin`` has returned, None before it has; waits at most so many seconds. Raises what it raised."""
        self.join(patience)
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result
