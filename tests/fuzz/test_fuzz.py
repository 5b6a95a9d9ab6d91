"""A few thousand inputs for every target, always the same ones. More: ``python -m tests.fuzz all --runs 1000000``."""

import pytest

from tests.fuzz.mutator import Mutator
from tests.fuzz.targets import TARGETS

_RUNS = 3000


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_documented_errors(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    assert len(seeds) >= 10
    mutator = Mutator(seeds, seed=20260101)
    for _ in range(_RUNS):
        data = mutator.next()
        try:
            target.fuzz_one(data)
        except Exception:
            print(f"python -m tests.fuzz {name} --input {data.hex()}")
            raise


def test_the_mutator_repeats_itself() -> None:
    first, second = (Mutator([b"one seed", b"and another"], 7) for _ in range(2))
    inputs = [first.next() for _ in range(200)]
    assert inputs == [second.next() for _ in range(200)]
    assert len(set(inputs)) > 150
