import math

import pytest

from shipd.service.histogram import LAG_SECONDS, PAUSE_SECONDS, STAGE_SECONDS, TRANSFER_SECONDS, Histogram


@pytest.mark.parametrize("bounds", [LAG_SECONDS, PAUSE_SECONDS, STAGE_SECONDS, TRANSFER_SECONDS])
def test_bounds_ascend(bounds):
    assert list(bounds) == sorted(set(bounds))
    assert bounds[0] > 0
    assert math.isfinite(bounds[-1])


def test_a_bound_belongs_to_its_bucket():
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.cumulative() == [(1.0, 2), (2.0, 4), (math.inf, 5)]
    assert (histogram.count, histogram.sum) == (5, 7.0)


def test_quantiles_are_upper_bounds():
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in [0.5] * 98 + [1.5, 3.0]:
        histogram.observe(value)
    assert histogram.quantile(0.5) == 1.0
    assert histogram.quantile(0.98) == 1.0
    assert histogram.quantile(0.99) == 2.0
    assert histogram.quantile(1.0) == 4.0
    histogram.observe(5.0)
    assert histogram.quantile(1.0) == math.inf


def test_quantile_of_nothing_is_no_number():
    assert math.isnan(Histogram((1.0,)).quantile(0.99))


def test_what_has_been_counted_since():
    histogram = Histogram((1.0, 2.0))
    histogram.observe(0.5)
    before = histogram.copy()
    histogram.observe(1.5)
    histogram.observe(9.0)
    assert before.counts == [1, 0, 0], "a copy stays as it is"
    after = histogram.since(before)
    assert (after.counts, after.sum) == ([0, 1, 1], 10.5)


def test_two_become_one():
    one, other = Histogram((1.0,)), Histogram((1.0,))
    one.observe(0.5)
    other.observe(0.25)
    other.observe(3.0)
    one.add(other)
    assert (one.counts, one.sum) == ([2, 1], 3.75)
    with pytest.raises(ValueError, match="argument 2"):
        one.add(Histogram((1.0, 2.0)))
