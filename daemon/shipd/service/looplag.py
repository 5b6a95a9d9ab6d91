"""How late the event loop is: the time that something which is due waits until the loop comes to it.

A grid of moments, 50 ms apart, stands for events that might arrive. When the loop's timer fires, every moment that has
passed is counted with how long ago it was. So a loop that stands still for a second counts as twenty events that waited
from a second down to nothing, and not as a single late timer: quantiles are shares of time.
"""

import asyncio
import time
from collections import deque
from typing import Final

from shipd.service.histogram import LAG_SECONDS, Histogram

_INTERVAL: Final = 0.05
"""Seconds between the moments. A wake-up costs up to 150 µs where system calls are slow: three thousandths of that."""

_GRAIN: Final = 0.001
"""libuv's timers count in milliseconds and may fire that much too early."""

_AT_MOST: Final = 1200
"""Moments counted at once, a minute's worth: a daemon that was stopped for a day must not spend time on that."""

_RECENT: Final = (6, 10.0)
"""The recent maximum is that of six spans of ten seconds."""


class LoopLag:
    """Measures the loop that ``start`` runs on. Read ``histogram`` from any thread:

    before = lag.histogram.copy()
    ...
    p99 = lag.histogram.since(before).quantile(0.99)
    """

    def __init__(self) -> None:
        self.histogram = Histogram(LAG_SECONDS)
        """Seconds of lag since the start."""
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._spans: deque[tuple[int, float]] = deque(maxlen=_RECENT[0])

    def start(self) -> None:
        """Measure from now on."""
        self._due = time.monotonic() + _INTERVAL
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._tick)

    def stop(self) -> None:
        """Measure no longer. What has been counted stays. Harmless before ``start``."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def recent_max(self) -> float:
        """The longest lag, in seconds, of the last minute (the last 50 to 60 seconds)."""
        oldest = _span(time.monotonic()) - _RECENT[0]
        return max((longest for span, longest in list(self._spans) if span > oldest), default=0.0)

    def _tick(self) -> None:
        now = time.monotonic()
        self._passed(now)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, self._due - time.monotonic()), self._tick)

    def _passed(self, now: float) -> None:
        """Count every moment of the grid up to ``now``."""
        self._note(now, now - self._due)
        for _ in range(_AT_MOST):
            if self._due > now + _GRAIN:
                return
            self.histogram.observe(max(0.0, now - self._due))
            self._due += _INTERVAL
        self._due = now + _INTERVAL

    def _note(self, now: float, lag: float) -> None:
        span = _span(now)
        if self._spans and self._spans[-1][0] == span:
            self._spans[-1] = (span, max(lag, self._spans[-1][1]))
        else:
            self._spans.append((span, max(lag, 0.0)))


def _span(now: float) -> int:
    return int(now / _RECENT[1])
