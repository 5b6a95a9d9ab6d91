"""What of a version has arrived, and where the rest of it lands: the books that a receiver keeps of its chunks.

Whom a chunk is taken from is in ``claims``; what is said to the sender about it, in ``receiver``.
"""

from shipproto.claims import Claims
from shipproto.connection import ChunkArrived, Connection
from shipproto.digests import LeafDigests
from shipproto.errors import MalformedMessage
from shipproto.layout import Layout
from shipproto.rangeset import RangeSet


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
        self._claims = Claims()

    @property
    def complete(self) -> bool:
        """Whether every chunk is held."""
        return len(self.held) == self.layout.chunks

    def missing(self) -> RangeSet:
        """What is not held."""
        return self.held.missing(self.layout.chunks)

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
        start, size = self.layout.chunk(chunk)
        return image[start : start + size]

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

    def give_up(self, connection: Connection) -> None:
        """A connection brings nothing any more."""
        for chunk in self._claims.give_up(connection):
            # It may have been digested already, and will come again.
            self.digests.forget(chunk)

    def take_back(self, rows: tuple[int, ...]) -> RangeSet:
        """The chunks that carry these tensors, which have to come again although they were held."""
        again = RangeSet()
        for row in rows:
            again.add(*self.layout.tensor_chunks(row))
        for chunk in again:
            self.digests.forget(chunk)
            self._claims.forget(chunk)
        for start, stop in again.ranges():
            self.held.discard(start, stop)
        return again

    def close(self) -> None:
        """Let go of the image: its memory may be reused."""
        self.image = None
        self._claims = Claims()
