"""Of one file: what of it is there, what is under way, who waits for what, and what is to be fetched next.

Nothing here waits or locks: ``fetching`` does, around every call.
"""

from collections.abc import Iterator
from typing import Final

from shipd.checkpoints.remote.server import Answer, Broken, Line, Refusal, Remote, changed
from shipd.checkpoints.remote.spool import Spool
from shipd.checkpoints.wording import quoted
from shipd.units import format_bytes
from shipproto.limits import MAX_IMAGE_BYTES
from shipproto.rangeset import RangeSet

_OPENING: Final = 256 * 1024
"""Bytes asked for before anything is known of a file: most headers of safetensors are shorter."""

_LEAST: Final = 64 * 1024
"""Bytes asked for at least where only some are wanted: a question costs more than they do."""

_LARGEST: Final = 2 * MAX_IMAGE_BYTES
"""Bytes of a file: of one with twice as much as any version has, most is no tensor of it."""


class Part:
    """Bytes [at, stop) of a file, asked for; ``at`` moves on as they arrive. ``stop`` is None until it is known."""

    def __init__(self, at: int, stop: int | None, outages: int) -> None:
        self.at = at
        self.stop = stop
        self.outages = outages
        """How often the server had failed when it was asked for."""
        self.line: Line | None = None


class Download:
    """A file of a server on its way into a spool.

    size      its bytes; None until they are known, which of some files is at the end
    in_parts  whether any part of it can be asked for; otherwise it comes from its beginning to its end
    complete  whether all of it is there
    """

    def __init__(self, remote: Remote, spool: Spool) -> None:
        self.remote = remote
        self.spool = spool
        self.size: int | None = None
        self.described = False
        self.in_parts = False
        self.complete = False
        self.held = RangeSet()
        self.flying: list[Part] = []
        self.wants: list[tuple[int, int]] = []
        """Ranges that readers wait for."""
        self.everything = False
        """Whether to fetch also what nobody waits for yet."""
        self.cursor = 0
        """From where on that is."""
        self.failure: Refusal | None = None
        self.failures = 0
        """In a row, without a byte more."""
        self.trouble = ""
        """Why the last of them was one; empty where nothing came in time."""
        self.outages = 0
        self.resume_at = 0.0
        """Time before which the server is left alone."""
        self.closed = False

    def has(self, start: int, stop: int) -> bool:
        """Whether bytes [start, stop) are there."""
        if self.complete or start >= stop:
            return True
        return any(low <= start and stop <= high for low, high in self.held.ranges())

    def want(self, start: int, stop: int) -> None:
        """Someone waits for bytes [start, stop), and will probably read on from there."""
        self.wants.append((start, stop))
        self.cursor = start

    def next_part(self, piece: int, *, ahead: bool = True) -> Part | None:
        """What to fetch next, in parts of at most ``piece`` bytes; None where all of it is there or under way.

        ahead  whether that may be what nobody waits for
        """
        if self.failure is not None or self.closed or self.complete:
            return None
        if not self.described:
            return None if self.flying else self._part(0, min(_OPENING, self.remote.most))
        if not self.in_parts:
            return None if self.flying else self._part(0, self.size)
        assert self.size is not None
        taken = self.held.copy()
        for part in self.flying:
            taken.add(part.at, part.stop)
        piece = min(piece, self.remote.most)
        for start, stop in self.wants:
            gap = _gap(taken, start, min(stop, self.size))
            if gap is not None:
                # What follows is read next, and comes with it.
                end = next(_gaps(taken, gap[0], self.size))[1]
                most = piece if self.everything else max(_LEAST, min(stop - gap[0], piece))
                return self._part(gap[0], min(end, gap[0] + most))
        if self.everything and ahead:
            gap = _gap(taken, self.cursor, self.size) or _gap(taken, 0, self.cursor)
            if gap is not None:
                return self._part(gap[0], min(gap[1], gap[0] + piece))
        return None

    def _part(self, start: int, stop: int | None) -> Part:
        return Part(start, stop, self.outages)

    # --- what has come -------------------------------------------------------------------------------------

    def learn(self, part: Part, answer: Answer) -> bool:
        """The server has answered a question for ``part``. Whether it was the first answer. Raises Refusal."""
        shown = self.remote.shown
        first = not self.described
        if first:
            if answer.size is not None:
                self.require_possible(answer.size, "by its server's account")
                self.spool.resize(answer.size)
            self.size, self.in_parts = answer.size, answer.in_parts
            self.complete = answer.size == 0
            self.described = True
        elif None not in (answer.size, self.size) and answer.size != self.size:
            raise changed(shown, f"it had {self.size} bytes, and now has {answer.size}")
        part.at, part.stop = answer.start, answer.stop
        return first

    def require_possible(self, size: int, whose: str) -> None:
        """Raise Refusal where no checkpoint has so many bytes."""
        if size > _LARGEST:
            raise Refusal(f"{quoted(self.remote.shown)} has {size} bytes {whose}, and at most {_LARGEST} can be pushed")

    def keep(self, part: Part, stop: int) -> bool:
        """What has come of ``part`` up to byte ``stop`` is in the spool. Whether any of it was not there before."""
        before = len(self.held)
        self.held.add(part.at, stop)
        part.at = stop
        self.complete = len(self.held) == self.size
        if len(self.held) == before:
            return False
        self.failures = 0
        return True

    def end(self, part: Part) -> None:
        """No more comes of ``part``. Raises Broken where something is missing, Refusal where too much is there."""
        if part.stop is not None and part.at < part.stop:
            raise Broken(f"it broke off at byte {part.at}")
        if self.size is None:
            if part.at < len(self.held):
                raise changed(self.remote.shown, f"it had {len(self.held)} bytes, and now has {part.at}")
            self.size = part.at
            self.complete = True

    @property
    def so_far(self) -> str:
        """How far it got, as a clause."""
        held = len(self.held)
        if self.size is None:
            return f"{format_bytes(held)} of it are there" if held else "nothing of it is there"
        return f"{format_bytes(held)} of its {format_bytes(self.size)} are there"


def _gap(taken: RangeSet, start: int, stop: int) -> tuple[int, int] | None:
    return next(_gaps(taken, start, stop), None)


def _gaps(taken: RangeSet, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The gaps between the ranges of ``taken`` within [start, stop)."""
    for low, high in taken.ranges():
        if low >= stop:
            break
        if low > start:
            yield start, low
        start = max(start, high)
    if start < stop:
        yield start, stop
