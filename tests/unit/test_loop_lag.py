"""The measure of the loop's lag, with moments that are given to it, and on a loop that is really held up."""

import asyncio
import time

import pytest
import uvloop

from shipd.service import looplag
from shipd.service.looplag import LoopLag

INTERVAL = looplag._INTERVAL


@pytest.fixture
def lag(monkeypatch):
    """Its clock stands until a test moves it; the first moment is due at 1000 s."""
    measured = LoopLag()
    measured._due = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    return measured


def test_a_timer_in_time_is_one_moment(lag):
    lag._passed(1000.0003)
    assert lag.histogram.count == 1
    assert lag.histogram.quantile(1.0) == 0.0005
    assert lag._due == 1000.0 + INTERVAL


def test_a_timer_too_early_by_its_grain_is_no_negative_lag(lag):
    lag._passed(999.9995)
    assert (lag.histogram.count, lag.histogram.sum) == (1, 0.0)
    assert lag.recent_max == 0.0


def test_a_loop_that_stands_still_is_many_moments(lag):
    """A second: twenty events would have arrived meanwhile, and waited from a second down to nothing."""
    lag._passed(1001.0)
    assert lag.histogram.count == 1 / INTERVAL + 1 == 21
    assert lag.histogram.sum == pytest.approx(21 / 2, rel=1e-6)
    assert lag.histogram.quantile(0.5) == 0.5 + 0.5, "the bucket from 0.5 to 1 s"
    assert lag._due > 1001.0


def test_a_daemon_that_was_stopped_for_a_day_counts_a_minute(lag):
    lag._passed(1000.0 + 86400)
    assert lag.histogram.count == looplag._AT_MOST
    assert lag._due == 1000.0 + 86400 + INTERVAL, "and goes on from now"


def test_the_recent_maximum_is_forgotten(lag, monkeypatch):
    lag._passed(1000.3)
    assert lag.recent_max == pytest.approx(0.3)
    for later in (1010.0, 1049.0):
        monkeypatch.setattr(time, "monotonic", lambda later=later: later)
        lag._due = later - 0.1
        lag._passed(later)
        assert lag.recent_max == pytest.approx(0.3)
    monkeypatch.setattr(time, "monotonic", lambda: 1061.0)
    assert lag.recent_max == pytest.approx(0.1)
    monkeypatch.setattr(time, "monotonic", lambda: 2000.0)
    assert lag.recent_max == 0.0


async def _counts(lag, count):
    while lag.histogram.count < count:  # noqa: ASYNC110  by a timer that says nothing
        await asyncio.sleep(0)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_on_a_real_loop(run):
    """Held up for 0.3 s: the longest that anything has waited is that, less one interval."""

    async def measure():
        lag = LoopLag()
        lag.start()
        try:
            async with asyncio.timeout(20):
                await _counts(lag, 1)
                before = lag.histogram.copy()
                time.sleep(0.3)  # noqa: ASYNC251  what is measured
                await _counts(lag, before.count + 1)
        finally:
            lag.stop()
        count = lag.histogram.count
        await asyncio.sleep(3 * INTERVAL)
        assert lag.histogram.count == count, "it has stopped"
        return lag.histogram.since(before), lag.recent_max

    seen, longest = run(measure())
    assert longest >= 0.3 - INTERVAL - 0.002
    assert seen.count >= 5
    assert seen.quantile(1.0) >= 0.3
