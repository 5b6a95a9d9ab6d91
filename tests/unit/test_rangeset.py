"""shipproto.rangeset, against Python's sets."""

import random
import struct

import numpy as np
import pytest

from shipproto.errors import LimitExceeded, MalformedMessage
from shipproto.limits import MAX_RANGES
from shipproto.rangeset import RangeSet
from tests.support import naive


def test_it_is_a_set() -> None:
    ranges = RangeSet([(3, 5), (7, 7), (9, 12), (5, 6)])
    assert list(ranges) == [3, 4, 5, 9, 10, 11]
    assert list(ranges.ranges()) == [(3, 6), (9, 12)]
    assert len(ranges) == 6
    assert bool(ranges)
    assert not RangeSet()
    assert 5 in ranges
    assert 6 not in ranges
    assert -1 not in ranges
    assert ranges.first() == 3
    assert RangeSet().first() is None
    assert repr(ranges) == "RangeSet([(3, 6), (9, 12)])"
    assert ranges == RangeSet([(9, 12), (3, 6)])
    assert ranges != RangeSet([(3, 6)])
    assert ranges != {3, 4, 5, 9, 10, 11}
    with pytest.raises(TypeError):
        hash(ranges)


def test_a_copy_is_independent() -> None:
    ranges = RangeSet([(0, 4)])
    twin = ranges.copy()
    twin.discard(1)
    assert list(ranges) == [0, 1, 2, 3]
    assert list(twin) == [0, 2, 3]


def test_pop_first() -> None:
    ranges = RangeSet([(3, 5), (9, 10)])
    assert [ranges.pop_first() for _ in range(3)] == [3, 4, 9]
    assert not ranges
    assert len(ranges) == 0
    with pytest.raises(IndexError):
        ranges.pop_first()


@pytest.mark.parametrize("method", ["add", "discard"])
@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (-1, None)])
def test_what_is_no_range(method: str, start: int, stop: int | None) -> None:
    with pytest.raises(ValueError, match="not a range"):
        getattr(RangeSet(), method)(start, stop)


@pytest.mark.parametrize("method", ["add", "discard"])
def test_an_empty_range_changes_nothing(method: str) -> None:
    for at in range(6):
        ranges = RangeSet([(1, 2), (3, 5)])
        getattr(ranges, method)(at, at)
        assert list(ranges.ranges()) == [(1, 2), (3, 5)]


def test_against_python_sets() -> None:
    rng = random.Random(4)
    for _ in range(150):
        ranges, naively = RangeSet(), set[int]()
        for _ in range(25):
            start = rng.randrange(40)
            stop = None if rng.random() < 0.3 else start + rng.randrange(12)
            numbers = range(start, start + 1 if stop is None else stop)
            if rng.random() < 0.6:
                ranges.add(start, stop)
                naively.update(numbers)
            else:
                ranges.discard(start, stop)
                naively.difference_update(numbers)
            assert list(ranges) == sorted(naively)
            assert list(ranges.ranges()) == naive.runs(naively)
            assert len(ranges) == len(naively)
            assert [number in ranges for number in range(60)] == [number in naively for number in range(60)]
            total = rng.randrange(60)
            assert list(ranges.missing(total)) == [number for number in range(total) if number not in naively]
            body = ranges.encode()
            assert body == naive.encode_ranges(naive.runs(naively))
            assert RangeSet.decode(body, 60) == ranges


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_decoding_takes_any_buffer(form) -> None:
    decoded = RangeSet.decode(form(naive.encode_ranges([(1, 3), (5, 6)])), 6)
    assert list(decoded) == [1, 2, 5]
    decoded.add(3)
    decoded.discard(1)
    assert list(decoded) == [2, 3, 5]
    assert len(decoded) == 3


def test_nothing() -> None:
    assert RangeSet.decode(b"", 0) == RangeSet()
    assert RangeSet().encode() == b""
    assert RangeSet().missing(0) == RangeSet()
    assert list(RangeSet().missing(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    "pairs",
    [[(5, 5)], [(5, 4)], [(1, 5), (5, 6)], [(1, 5), (4, 6)], [(5, 6), (1, 2)], [(0, 11)], [(0xFFFFFFFE, 0xFFFFFFFF)]],
)
def test_what_is_no_range_list(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(MalformedMessage):
        RangeSet.decode(naive.encode_ranges(pairs), 10)


def test_ragged_and_too_many() -> None:
    with pytest.raises(MalformedMessage, match="12 bytes"):
        RangeSet.decode(bytes(12), 10)
    largest = np.arange(2 * MAX_RANGES, dtype="<u4").tobytes()
    assert len(RangeSet.decode(largest, 2 * MAX_RANGES)) == MAX_RANGES
    with pytest.raises(LimitExceeded, match=str(MAX_RANGES + 1)):
        RangeSet.decode(largest + struct.pack("<II", 1 << 20, 1 << 21), 1 << 22)


def test_too_ragged_a_set_is_sent_as_a_superset() -> None:
    rng = random.Random(5)
    ranges = RangeSet()
    at = 0
    for _ in range(MAX_RANGES + 700):
        at += rng.randrange(1, 6)
        start = at
        at += rng.randrange(1, 4)
        ranges.add(start, at)
        at += 1
    assert len(list(ranges.ranges())) > MAX_RANGES
    sent = RangeSet.decode(ranges.encode(), at)
    assert len(list(sent.ranges())) == MAX_RANGES
    assert all(start in sent and stop - 1 in sent for start, stop in ranges.ranges())
    assert (sent.first(), max(sent)) == (ranges.first(), max(ranges))
    extra = len(sent) - len(ranges)
    gaps = sorted(
        second[0] - first[1] for first, second in zip(ranges.ranges(), list(ranges.ranges())[1:], strict=False)
    )
    assert extra == sum(gaps[: len(list(ranges.ranges())) - MAX_RANGES]), "the smallest gaps are closed"


def test_building_a_ragged_set_is_not_quadratic() -> None:
    ranges = RangeSet()
    for number in range(0, 60_000, 2):
        ranges.add(number)
    for number in range(1, 60_000, 2):
        ranges.add(number)
    assert list(ranges.ranges()) == [(0, 60_000)]
