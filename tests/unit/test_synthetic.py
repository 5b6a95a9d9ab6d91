"""Synthetic versions change where real ones do: as often, in the same binades, by as much."""

import itertools
import math

import numpy as np
import pytest

from tests.support import finetune, synthetic
from tests.support.finetune import Words

MIB = 1 << 20
BINADES = range(112, 124)
"""Biased exponents of weights from 0.00003 to 0.12: nearly all of them, each with enough changes to count."""


def density(before: Words, after: Words) -> float:
    """The share of words that differ."""
    return float(np.mean(before != after))


def densities(before: Words, after: Words) -> list[float]:
    """The same in each binade of the weight before."""
    exponents = (before >> np.uint16(7)) & np.uint16(0xFF)
    changed = before != after
    return [float(np.mean(changed[exponents == exponent])) for exponent in BINADES]


def small_steps(before: Words, after: Words) -> float:
    """The share of changes that are one unit in the last place."""
    at = before != after
    return float(np.mean(np.abs(after[at].astype(np.int32) - before[at].astype(np.int32)) == 1))


@pytest.fixture(scope="module")
def real() -> tuple[Words, Words]:
    """The layers before and after the real warm step."""
    rows = finetune.tensors()
    before, after = (finetune.part_of(rows, flat)[1] for flat in finetune.warm_step())
    return before, after


def test_a_step_from_real_weights_is_like_the_real_one(real):
    before, after = real
    made = synthetic.following(before, seed=1)
    assert density(before, made) == pytest.approx(density(before, after), rel=0.05)
    assert densities(before, made) == pytest.approx(densities(before, after), rel=0.15)
    assert small_steps(before, made) == pytest.approx(small_steps(before, after), abs=0.02)


def test_a_step_from_synthetic_weights_is_like_the_real_one(real):
    before = synthetic.first(synthetic.layers(24 * MIB), seed=2)
    made = synthetic.following(before, seed=3)
    assert density(before, made) == pytest.approx(density(*real), rel=0.15)
    assert densities(before, made) == pytest.approx(densities(*real), rel=0.15)
    assert small_steps(before, made) == pytest.approx(small_steps(*real), abs=0.02)


def test_the_density_halves_with_every_binade_and_grows_with_the_learning_rate():
    before = synthetic.first(synthetic.layers(24 * MIB), seed=4)
    once = densities(before, synthetic.following(before, seed=5))
    # Where a change is still rare: a ratio of 2 for each of eight neighbours.
    assert [a / b for a, b in itertools.pairwise(once[3:])] == pytest.approx([2.0] * 8, rel=0.25)
    tenfold = synthetic.following(before, seed=5, learning_rate=1e-5)
    assert 3 < density(before, tenfold) / density(before, synthetic.following(before, seed=5)) < 10


def test_without_an_update_nothing_changes_not_even_where_binades_meet():
    patterns = np.arange(1 << 16, dtype=np.uint16)
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    assert np.array_equal(synthetic.following(finite, seed=6, learning_rate=0.0), finite)


def test_masters_lie_everywhere_in_the_interval_of_their_word():
    words = np.array([0x0000, 0x8000, 0x3F80, 0xBDCC], dtype=np.uint16)
    for places in (0, 0xFFFF):
        masters = synthetic._masters(words, np.full(len(words), places, dtype=np.uint16))
        assert finetune.rounded(masters).tolist() == words.tolist()
    low = synthetic._masters(words[2:], np.zeros(2, dtype=np.uint16))
    high = synthetic._masters(words[2:], np.full(2, 0xFFFE, dtype=np.uint16))
    # Half an ulp above, and below a power of two half of one that is half as large.
    assert float(high[0]) == pytest.approx(1 + 2**-8, rel=1e-6)
    assert float(low[0]) == pytest.approx(1 - 2**-9, rel=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others():
    rows = synthetic.layers(5 * MIB)
    before = synthetic.first(rows, seed=7)
    assert np.array_equal(before, synthetic.first(rows, seed=7))
    assert density(before, synthetic.first(rows, seed=8)) > 0.9
    one, other = (synthetic.following(before, seed=seed) for seed in (9, 10))
    assert np.array_equal(one, synthetic.following(before, seed=9))
    changed, changed_too = before != one, before != other
    # Two sets of places that have nothing to do with each other meet as often as chance has it, which is more often
    # than the product of their sizes: both like small weights.
    assert np.sum(changed & changed_too) < 0.5 * np.sum(changed)


def test_no_block_of_a_delta_repeats_another():
    before = synthetic.first(synthetic.layers(16 * MIB), seed=11)
    changed = (before != synthetic.following(before, seed=12)).reshape(-1, 1 << 16)
    rows = {row.tobytes() for row in np.packbits(changed, axis=1)}
    assert len(rows) == len(changed)


def test_masters_of_float32_nearly_all_change_and_by_little():
    rows = synthetic.layers(4 * MIB, "float32")
    before = synthetic.first_masters(rows, seed=13)
    after = synthetic.following_masters(before, seed=14)
    assert before.dtype == after.dtype == np.float32
    assert float(np.mean(before != after)) > 0.97
    assert float(np.abs(after - before).max()) < 10 * synthetic.UPDATE * synthetic.LEARNING_RATE
    assert np.array_equal(finetune.rounded(before), synthetic.first(synthetic.layers(2 * MIB), seed=13))


@pytest.mark.parametrize("total", [2, 4 * MIB + 2, 50_000_000])
def test_layers_have_exactly_the_bytes_that_were_asked_for(total):
    rows = synthetic.layers(total)
    assert 2 * sum(math.prod(row.shape) for row in rows) == total
    assert len({row.name for row in rows}) == len(rows)
    assert {len(row.shape) for row in rows[:-1]} <= {2}
