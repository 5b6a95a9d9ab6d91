"""From measured pushes to the rows about successive steps, thin links and loopback."""

import dataclasses

import pytest

from tests.benchmarks import loopback, steps, thin
from tests.benchmarks.steps import GROWTH, STEPS, WARM, Step
from tests.benchmarks.thin import Times

MIB = 1 << 20


def series(count: int = STEPS) -> list[Step]:
    """Two real steps, of which the second is the warm one, and synthetic ones; nothing grows."""
    names = ("40", "41")
    return [
        Step(
            name=names[number] if number < len(names) else "",
            agreed=True,
            total=45_000_000,
            sent=60_000 if number == 1 else 90_000,
            seconds=0.1,
            daemon=100 * MIB,
            sender=300 * MIB,
        )
        for number in range(count)
    ]


def rows_of(found):
    """By the beginning of their names."""
    return {row.name.partition(",")[0].partition(":")[0]: row for row in steps.table(found)}


def test_steps_that_agree_and_do_not_grow():
    rows = rows_of(series())
    agreed = rows["50 successive steps"]
    assert (agreed.value, agreed.floor, agreed.verdict) == (50, 50, "floor")
    warm = rows["one warm step at LR 1e-6"]
    assert (warm.value, warm.verdict, warm.note) == (750.0, "floor", "60 kB of 45.0 MB")
    assert rows["a synthetic step after that"].value == pytest.approx(0.1)
    for side, total in (("daemon", 100), ("sender", 300)):
        row = rows[f"{side}'s own memory"]
        assert (row.value, row.verdict, row.note) == (0.0, "floor", f"{total} MiB at the end")


def test_one_step_that_differs_is_seen():
    found = series()
    found[20] = dataclasses.replace(found[20], agreed=False)
    row = rows_of(found)["50 successive steps"]
    assert (row.value, row.verdict) == (49, "missed")


def test_memory_that_grows_with_every_step_is_seen_and_warming_up_is_none():
    found = series()
    growing = [
        dataclasses.replace(one, daemon=one.daemon + number * MIB, sender=one.sender - (number < WARM) * 200 * MIB)
        for number, one in enumerate(found)
    ]
    rows = rows_of(growing)
    assert rows["daemon's own memory"].value == 30.0 > GROWTH
    assert rows["daemon's own memory"].verdict == "missed"
    assert rows["sender's own memory"].verdict == "floor"


def test_a_thin_link_is_judged_by_how_much_faster_a_step_is():
    times = Times(
        step=[0.5, 0.6, 0.7], step_sent=66_000, whole=36.0, whole_sent=45_433_000, packed=[2.5, 2.4], raw=[3.75, 3.6]
    )
    step, whole = thin.table(times)
    assert (step.value, step.reference, step.verdict) == (0.6, 36.0, "floor")
    assert step.ratio == pytest.approx(60.0)
    assert step.spread == pytest.approx((36 / 0.7, 72.0))
    assert step.note == "66 kB; against all of it, 45.4 MB"
    assert (whole.value, whole.verdict) == (2.45, "floor")
    assert whole.ratio == pytest.approx(1.5)
    slow = thin.table(dataclasses.replace(times, step=[0.8] * 3, packed=[2.8, 2.8]))
    assert [row.verdict for row in slow] == ["missed", "missed"]


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "floor"), (1.09, "floor"), (1.11, "missed")])
def test_loopback_is_judged_round_by_round(factor, verdict):
    off = [0.1, 0.2, 0.4]
    (row,) = loopback.table([factor * seconds for seconds in off], off, 200_000_000)
    assert row.ratio == pytest.approx(factor)
    assert (row.name, row.verdict) == ("a step of 200 MB over loopback", verdict)
