"""Range sets: any operations, against Python's sets; any bytes, accepted only in their one form."""

from hypothesis import given
from hypothesis import strategies as st

from shipproto.errors import LimitExceeded, MalformedMessage
from shipproto.rangeset import RangeSet
from tests.property.strategies import examples, mutate, mutations
from tests.support import naive

numbers = st.integers(0, 60)
operations = st.lists(st.tuples(st.sampled_from(("add", "discard", "add one", "discard one", "pop")), numbers, numbers))


@examples(300)
@given(operations, numbers)
def test_it_is_a_set(todo: list[tuple[str, int, int]], total: int) -> None:
    ranges, naively = RangeSet(), set[int]()
    for what, first, second in todo:
        start, stop = min(first, second), max(first, second)
        before = ranges.copy()
        if what == "add":
            ranges.add(start, stop)
            naively |= set(range(start, stop))
        elif what == "discard":
            ranges.discard(start, stop)
            naively -= set(range(start, stop))
        elif what == "add one":
            ranges.add(start)
            naively.add(start)
        elif what == "discard one":
            ranges.discard(start)
            naively.discard(start)
        elif naively:
            assert ranges.pop_first() == min(naively)
            naively.remove(min(naively))
        assert list(before.ranges()) == naive.runs(before), "a copy does not change"
        assert list(ranges.ranges()) == naive.runs(naively)
        assert len(ranges) == len(naively)
        assert bool(ranges) == bool(naively)
        assert ranges.first() == min(naively, default=None)
    assert [number in ranges for number in range(70)] == [number in naively for number in range(70)]
    assert set(ranges.missing(total)) == set(range(total)) - naively
    assert RangeSet.decode(ranges.encode(), 61) == ranges
    assert RangeSet(reversed(list(ranges.ranges()))) == ranges


@examples(300)
@given(st.sets(numbers), mutations)
def test_what_is_accepted_is_canonical(members: set[int], changes: list[tuple[str, int, int]]) -> None:
    body = mutate(naive.encode_ranges(naive.runs(members)), changes)
    try:
        ranges = RangeSet.decode(body, 64)
    except (MalformedMessage, LimitExceeded):
        return
    assert ranges.encode() == body
    assert all(0 <= start < stop <= 64 for start, stop in ranges.ranges())
