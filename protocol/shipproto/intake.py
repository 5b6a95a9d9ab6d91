"""What of a version has arrived, and where the rest of it lands: the books that a receiver keeps of its chunks.

Whom a chunk is taken from is in ``claims``; what is said to the sender about it, in ``receiver``.
"""

from typing import Final

from shipproto.claims import Claims
from shipproto.connection import ChunkArrived, Connection, RunArrived
from shipproto.digests import LeafDigests
from shipproto.errors import LimitExceeded, LocalError, MalformedMessage
from shipproto.layout import Layout
from shipproto.lent import Lent
from shipproto.limits import MAX_RUN_BYTES
from shipproto.messages import SAME, Coded
from shipproto.outcomes import RunToDecode
from shipproto.rangeset import RangeSet

LENT: Final = 0
"""In place of a codec: the chunks of the run are in files that were lent."""

LENT_RUN: Final = 32
"""Chunks of such a run: 16 MiB, after which it is told that they are held."""


class Intake:
    """The chunks of one transfer.

    layout   the one that rules
    digests  of what has arrived; or of a version that is held, where only digests are compared
    image    where chunks land; None where none is to
    """

    def __init__(self, layout: Layout, digests: LeafDigests, image: memoryview | None) -> None:
        self.layout = layout
        self.digests = digests
        self.image = image
        self.held = RangeSet() if image is not None else RangeSet([(0, layout.chunks)])
        self.lost = RangeSet()
        """Chunks of runs that did not decode, and whose connection, the only one on which to say so, is gone."""
        self.closed = False
        """The transfer is over: nothing lands any more."""
        self._touched = bytearray(layout.chunks)
        """1 for each chunk whose place in the image may have been written to, by whatever came for it."""
        self._as_it_is = bytearray(layout.chunks)
        """1 for each chunk of a run that did not decode: it must come as it is."""
        self._claims = Claims()
        self._decoding: set[RunToDecode] = set()

    @property
    def decoding(self) -> int:
        """How many runs are being decoded."""
        return len(self._decoding)

    @property
    def complete(self) -> bool:
        """Whether every chunk is held."""
        return len(self.held) == self.layout.chunks

    def missing(self) -> RangeSet:
        """What is neither held nor being decoded."""
        missing = self.held.missing(self.layout.chunks)
        for run in self._decoding:
            missing.discard(run.chunks.start, run.chunks.stop)
        return missing

    # --- chunks --------------------------------------------------------------------------------------------

    def check(self, chunk: int, size: int) -> None:
        """Raises MalformedMessage where there is no such chunk, or it has another size."""
        if chunk >= self.layout.chunks:
            raise MalformedMessage(f"chunk {chunk} of {self.layout.chunks}")
        expected = self.layout.chunk(chunk)[1]
        if size != expected:
            raise MalformedMessage(f"chunk {chunk} has {size} bytes where {expected} are due")

    def place(self, chunk: int, connection: Connection) -> memoryview | None:
        """The memory for a chunk that begins to arrive, or None where it is held or already arriving: it is never
        overwritten. On any thread."""
        image = self.image
        if image is None or not self._claims.claim(chunk, connection):
            return None
        self._touched[chunk] = 1
        start, size = self.layout.chunk(chunk)
        return image[start : start + size]

    def touched(self, chunk: int) -> bool:
        """Whether the place of this chunk in the image may have been written to, if only by one that arrived damaged.

        Of a chunk of a run of SAME that is being decoded; on any thread.
        """
        return bool(self._touched[chunk])

    def arrived(self, event: ChunkArrived, connection: Connection) -> bool:
        """A chunk is in its place, intact. False where it was not this connection's to bring, or is held already."""
        if not self._claims.hold(event.chunk, connection):
            return False
        if not self.digests.knows(event.chunk):
            self.digests.record(event.chunk, event.content)
        self.held.add(event.chunk)
        return True

    def damaged(self, chunk: int, connection: Connection) -> None:
        """A chunk has arrived damaged, and may come again on any connection. On any thread."""
        self._claims.damaged(chunk, connection)

    # --- runs ----------------------------------------------------------------------------------------------

    def check_run(self, run: Coded) -> None:
        """Raises MalformedMessage where there are no such chunks, or a run of them did not decode before: so nobody can
        have runs refused for ever. LimitExceeded where they are too much for one run."""
        stop = run.chunk + run.chunks
        if stop > self.layout.chunks:
            raise MalformedMessage(f"chunks [{run.chunk}, {stop}) of {self.layout.chunks}")
        start, end = self.layout.span(range(run.chunk, stop))
        if run.codec != SAME and end - start > MAX_RUN_BYTES:
            raise LimitExceeded(f"a run of {end - start} bytes; at most {MAX_RUN_BYTES}")
        if self._as_it_is.find(1, run.chunk, stop) >= 0:
            raise MalformedMessage(f"chunks [{run.chunk}, {stop}) in a run again, although one of them did not decode")

    def claim_run(self, event: RunArrived, connection: Connection) -> None:
        """A run has arrived: its chunks are received nowhere else. On any thread, that of ``connection``."""
        free = self._claims.claim_run(event.chunks, connection, event.sequence)
        if 0 < free < len(event.chunks):
            # What is held or arriving must not be overwritten: the others come again one by one.
            connection.nack(event.sequence)

    def begin(self, event: RunArrived, connection: Connection) -> RunToDecode | None:
        """The run is to be decoded, if its chunks were claimed for it."""
        if not self._claims.decode_run(event.chunks, connection, event.sequence):
            return None
        run = RunToDecode(event.chunks, event.codec, event.payload, connection, event.sequence)
        self._decoding.add(run)
        if run.codec != SAME:
            self._touched[run.chunks.start : run.chunks.stop] = b"\1" * len(run.chunks)
        return run

    def lend(self, lent: Lent, connection: Connection) -> list[RunToDecode]:
        """What is lent and still missing is going to be read by this side. The runs to read, in the files' order."""
        missing = self.missing()
        found = []
        for chunks in lent.runs(LENT_RUN, missing):
            if self._claims.take_run(chunks, connection):
                run = RunToDecode(chunks, LENT, memoryview(b""), connection, -1)
                self._decoding.add(run)
                self._touched[chunks.start : chunks.stop] = b"\1" * len(chunks)
                found.append(run)
        return found

    def decoded(self, run: RunToDecode) -> bool:
        """The run is in its place. False where the transfer is over."""
        image = self._end(run)
        if image is None:
            return False
        for chunk in run.chunks:
            if not self.digests.knows(chunk):
                start, size = self.layout.chunk(chunk)
                self.digests.record(chunk, image[start : start + size])
        self._claims.hold_run(run.chunks)
        self.held.add(run.chunks.start, run.chunks.stop)
        return True

    def undecodable(self, run: RunToDecode) -> bool:
        """The run does not decode, and its chunks have to come again. False where the transfer is over."""
        image = self._end(run)
        if image is None:
            return False
        self._claims.drop_run(run.chunks)
        self._as_it_is[run.chunks.start : run.chunks.stop] = b"\1" * len(run.chunks)
        for chunk in run.chunks:
            self.digests.forget(chunk)
        self._clear(image, run.chunks)
        return True

    def _end(self, run: RunToDecode) -> memoryview | None:
        if run not in self._decoding:
            raise LocalError("no such run is being decoded")
        self._decoding.remove(run)
        return None if self.closed else self.image

    def _clear(self, image: memoryview, chunks: range) -> None:
        """Chunks that come one by one leave as it is what a run has written between them; deltas of later versions rely
        on its being zeros."""
        for start, end in self.layout.gaps(chunks):
            image[start:end] = bytes(end - start)

    # --- ends ----------------------------------------------------------------------------------------------

    def give_up(self, connection: Connection) -> None:
        """A connection brings nothing any more."""
        for chunk in self._claims.give_up(connection):
            # It may have been digested already, and will come again.
            self.digests.forget(chunk)

    def take_back(self, rows: tuple[int, ...]) -> RangeSet:
        """The chunks that carry these tensors, which have to come again although they were held."""
        assert self.image is not None
        again = RangeSet()
        for row in rows:
            again.add(*self.layout.tensor_chunks(row))
        for chunk in again:
            self.digests.forget(chunk)
            self._claims.forget(chunk)
        for start, stop in again.ranges():
            self.held.discard(start, stop)
            self._clear(self.image, range(max(0, start - 1), min(stop + 1, self.layout.chunks)))
        return again

    def close(self) -> None:
        """Let go of the image: its memory may be reused once nothing is being decoded."""
        self.closed = True
        self.image = None
        self._claims = Claims()
