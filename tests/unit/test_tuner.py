"""How many connections a push tries, by what each number of them carried."""

import pytest

from shipd.client.lanes import Tuner

MB = 1_000_000
HUGE = 1_000_000 * MB


def drive(tuner: Tuner, rate, *, windows: int = 12, remaining: int = HUGE) -> list[int]:
    """The lanes in use after each window, on a path that carries ``rate(lanes)`` bytes a second."""
    now, sent = 0.0, 0
    used = [tuner.observe(now, sent, remaining)]
    for _ in range(windows):
        sent += int(rate(tuner.lanes) * 0.25)
        now += 0.25
        used.append(tuner.observe(now, sent, remaining))
        # The first look of the next window.
        tuner.observe(now, sent, remaining)
    return used


def test_a_link_that_each_lane_fills_a_part_of_gets_as_many_as_it_takes() -> None:
    used = drive(Tuner(limit=16, cores=2), lambda lanes: 40 * MB * lanes)
    assert used[0] == 1
    assert used[-1] == 16
    assert used == sorted(used)


def test_a_link_that_one_lane_fills_keeps_one() -> None:
    tuner = Tuner(limit=16, cores=8)
    used = drive(tuner, lambda lanes: 110 * MB)
    assert max(used) == 2, "a second one was tried"
    assert used[-1] == 1
    assert tuner.settled


@pytest.mark.parametrize(("cores", "most"), [(1, 1), (2, 1), (4, 3), (16, 8)])
def test_lanes_that_are_limited_by_cores_get_no_more_than_there_are(cores: int, most: int) -> None:
    used = drive(Tuner(limit=8, cores=cores), lambda lanes: 2000 * MB * lanes)
    assert used[-1] == most


def test_it_goes_back_to_the_best_number_and_stays_there() -> None:
    tuner = Tuner(limit=16, cores=32)
    used = drive(tuner, lambda lanes: min(lanes, 4) * 1000 * MB)
    assert max(used) == 8
    assert used[-1] == 4
    assert tuner.observe(1e6, HUGE, HUGE) == 4


def test_the_end_of_a_push_is_not_worth_another_connection() -> None:
    used = drive(Tuner(limit=16, cores=32), lambda lanes: 1000 * MB * lanes, remaining=400 * MB)
    assert set(used) == {1}


def test_a_receiver_of_one_connection_gets_one() -> None:
    assert set(drive(Tuner(limit=1, cores=32), lambda lanes: MB * lanes)) == {1}


def test_what_was_asked_for_is_not_tried_but_done() -> None:
    assert set(drive(Tuner(limit=16, cores=1, lanes=5, settled=True), lambda lanes: 1000 * MB)) == {5}
