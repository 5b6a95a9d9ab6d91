"""A histogram of seconds: how many observations fell into each bucket. Plain numbers, no clock and no lock.

Observed on the event loop's thread; any thread may read it, and may see an observation in one figure a moment before
it sees it in another.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, Self

TRANSFER_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""From a few megabytes over loopback to a hundred gigabytes over a thin link."""

STAGE_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""From a process that has nothing to copy ahead to the default ``stage_timeout``."""

PAUSE_SECONDS: Final = (0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""From rebinding the tensors of a small model to copying tens of gigabytes."""

LAG_SECONDS: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.5, 1.0),
)
"""Fine around 20 ms, which is what the 99th percentile must stay below."""


class Histogram:
    """Counts by bucket. ``bounds`` are inclusive upper bounds in seconds, ascending; beyond the last is one more."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Observations altogether."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Count ``value`` in."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, other: Self) -> None:
        """Count in everything that ``other``, which has the same bounds, has counted."""
        self.counts = [one + another for one, another in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def copy(self) -> "Histogram":
        """What has been counted up to now; it stays as it is."""
        taken = Histogram(self.bounds)
        taken.counts = list(self.counts)
        taken.sum = self.sum
        return taken

    def since(self, earlier: "Histogram") -> "Histogram":
        """What has been counted after ``earlier`` was taken of this histogram by ``copy``."""
        rest = self.copy()
        rest.counts = [now - then for now, then in zip(rest.counts, earlier.counts, strict=True)]
        rest.sum -= earlier.sum
        return rest

    def cumulative(self) -> list[tuple[float, int]]:
        """Each upper bound, the last one infinite, with the number of observations up to it."""
        return list(zip((*self.bounds, math.inf), itertools.accumulate(self.counts), strict=True))

    def quantile(self, share: float) -> float:
        """A value that ``share`` (0 to 1) of the observations do not exceed: the upper bound of a bucket.

        Infinite where they lie beyond the last bound, NaN where nothing has been observed.
        """
        cumulative = self.cumulative()
        count = cumulative[-1][1]
        if not count:
            return math.nan
        return next(bound for bound, number in cumulative if number >= share * count)
