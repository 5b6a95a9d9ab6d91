"""Sets of chunk numbers kept as sorted, disjoint, half-open ranges: what a receiver holds or lacks.

A model of any size that arrives in order is one range; damage and lost connections add a few more.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from shipproto.errors import LimitExceeded, MalformedMessage
from shipproto.limits import MAX_RANGES

_PAIR: Final = 8


class RangeSet:
    """A mutable set of non-negative integers as ranges ``[start, stop)``.

    Adding to or removing from either end is O(1) amortised, anywhere else O(number of ranges).
    """

    __slots__ = ("_count", "_starts", "_stops")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._count = 0
        for start, stop in ranges:
            self.add(start, stop)

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self._count > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, item: int) -> bool:
        at = bisect_right(self._starts, item) - 1
        return at >= 0 and item < self._stops[at]

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.ranges():
            yield from range(start, stop)

    def __repr__(self) -> str:
        return f"RangeSet({list(self.ranges())!r})"

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ranges in ascending order."""
        return zip(self._starts, self._stops, strict=True)

    def copy(self) -> "RangeSet":
        """An independent copy."""
        twin = RangeSet()
        twin._starts = self._starts.copy()
        twin._stops = self._stops.copy()
        twin._count = self._count
        return twin

    def add(self, start: int, stop: int | None = None) -> None:
        """Add ``[start, stop)``, or the single number ``start``."""
        stop = start + 1 if stop is None else stop
        if start < 0 or stop < start:
            raise ValueError(f"not a range: [{start}, {stop})")
        if start == stop:
            return
        if self._stops and start == self._stops[-1]:
            # In order, as nearly everything arrives.
            self._stops[-1] = stop
            self._count += stop - start
            return
        # Every range that overlaps or touches [start, stop) melts into one.
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
            self._count -= sum(self._stops[first:last]) - sum(self._starts[first:last])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        self._count += stop - start

    def discard(self, start: int, stop: int | None = None) -> None:
        """Remove ``[start, stop)``, or the single number ``start``; what is absent stays absent."""
        stop = start + 1 if stop is None else stop
        if start < 0 or stop < start:
            raise ValueError(f"not a range: [{start}, {stop})")
        if start == stop:
            return
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return
        removed = sum(self._stops[first:last]) - sum(self._starts[first:last])
        kept = [
            (low, high) for low, high in ((self._starts[first], start), (stop, self._stops[last - 1])) if low < high
        ]
        self._starts[first:last] = [low for low, _ in kept]
        self._stops[first:last] = [high for _, high in kept]
        self._count += sum(high - low for low, high in kept) - removed

    def first(self) -> int | None:
        """The smallest number, or None."""
        return self._starts[0] if self._starts else None

    def pop_first(self) -> int:
        """Remove and return the smallest number; IndexError where there is none."""
        number = self._starts[0]
        self._starts[0] = number + 1
        if self._starts[0] == self._stops[0]:
            del self._starts[0], self._stops[0]
        self._count -= 1
        return number

    def pop_run(self, most: int, below: int) -> range:
        """Remove and return numbers that follow each other from the smallest on: at most ``most``, and only such as are
        all smaller than ``below`` or none of them; empty where there are none."""
        if not self._starts:
            return range(0)
        start = self._starts[0]
        stop = min(self._stops[0], start + most)
        if start < below:
            stop = min(stop, below)
        self.discard(start, stop)
        return range(start, stop)

    def missing(self, total: int) -> "RangeSet":
        """The complement within ``[0, total)``."""
        gaps = RangeSet()
        at = 0
        for start, stop in self.ranges():
            if start >= total:
                break
            gaps.add(at, start)
            at = stop
        if at < total:
            gaps.add(at, total)
        return gaps

    def encode(self) -> bytes:
        """Wire form: for each range, start and stop as little-endian u32, ascending.

        A set of more than MAX_RANGES ranges is encoded as a superset that has that many: its smallest
        gaps are closed. Only sets for which a superset is harmless are ever sent.
        """
        starts = np.array(self._starts, dtype=np.int64)
        stops = np.array(self._stops, dtype=np.int64)
        excess = len(starts) - MAX_RANGES
        if excess > 0:
            gaps = starts[1:] - stops[:-1]
            keep = np.ones(len(gaps), dtype=bool)
            keep[np.argsort(gaps, kind="stable")[:excess]] = False
            starts = starts[np.concatenate(([True], keep))]
            stops = stops[np.concatenate((keep, [True]))]
        return np.stack((starts, stops), axis=1).astype("<u4").tobytes()

    @classmethod
    def decode(cls, body: bytes | bytearray | memoryview, total: int) -> "RangeSet":
        """The set encoded in ``body``, all of it within ``[0, total)``.

        Raises LimitExceeded for too many ranges and MalformedMessage for ranges that are empty,
        unsorted, touching, overlapping or outside.
        """
        size = memoryview(body).nbytes
        if size > MAX_RANGES * _PAIR:
            raise LimitExceeded(f"{size // _PAIR} ranges; at most {MAX_RANGES} are allowed")
        if size % _PAIR:
            raise MalformedMessage(f"a list of ranges has {size} bytes, which is no multiple of {_PAIR}")
        flat = np.frombuffer(body, dtype="<u4").astype(np.int64)
        if len(flat) and (not bool(np.all(flat[1:] > flat[:-1])) or int(flat[-1]) > total):
            raise MalformedMessage(f"ranges must be ascending, apart and below {total}")
        decoded = cls()
        decoded._starts = flat[0::2].tolist()
        decoded._stops = flat[1::2].tolist()
        decoded._count = int(flat[1::2].sum() - flat[0::2].sum())
        return decoded
