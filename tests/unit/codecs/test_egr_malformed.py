"""EGR payloads that are cut, flipped, or lie: refused, or a run of the right length, by both engines alike."""

from typing import Any

import numpy as np
import pytest

from shipd.codecs import egr
from shipd.codecs.codec import CodecError
from shipd.codecs.egr import EGR
from tests.support import naive_codecs, payloads, sparse
from tests.support.payloads import Class, bit_string, number
from tests.support.sparse import encoded, weights

ENGINES = sparse.engines()
BASE = np.full(100, 0x3F80, dtype=np.uint16)
"""Of one class, the highest, with top 127."""

K = 23
FAR = 1 << 31


def refused(some: bytes, base: np.ndarray = BASE) -> None:
    """By every engine, and by the second decoder."""
    for engine in ENGINES.values():
        with pytest.raises(CodecError):
            sparse.decode_with(engine)(some, base)
    with pytest.raises(ValueError, match=r"\S"):
        naive_codecs.decode(EGR.number, some, base.tobytes(), base.nbytes)


def one(**fields) -> bytes:
    """A payload of one class; by default the changes are the words 5 and 16, each by one up."""
    given: dict[str, Any] = {"gaps": [5, 10], "signs": [0, 0], "r": 2} | fields
    return payloads.egr(7, 127, {K: Class(**given)})


def test_it_is_what_it_says() -> None:
    for engine in ENGINES.values():
        run = sparse.decode_with(engine)(one(), BASE)
        assert np.flatnonzero(run != BASE).tolist() == [5, 16]
        assert run[[5, 16]].tolist() == [0x3F81, 0x3F81]


RICH = [
    weights(400, 0.3, step=40),
    weights(3000, 0.01),
    (np.where(np.arange(600) % 37, BASE[0], 0xBF80).astype(np.uint16), np.full(600, BASE[0], dtype=np.uint16)),
]


@pytest.mark.parametrize("run", RICH, ids=["dense", "sparse", "escapes"])
def test_every_cut(run: tuple[np.ndarray, np.ndarray]) -> None:
    whole = encoded(EGR, *run)
    for size in range(len(whole)):
        refused(whole[:size], run[1])
    refused(whole + b"\0", run[1])
    refused(whole + b"\0\0\0\x01", run[1])
    refused(whole + b"\xff\0\0\0", run[1])


@pytest.mark.parametrize("run", RICH, ids=["dense", "sparse", "escapes"])
def test_every_flipped_bit(run: tuple[np.ndarray, np.ndarray]) -> None:
    whole = encoded(EGR, *run)
    taken = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        outcomes = {sparse.outcome(sparse.decode_with(by), bytes(flipped), run[1]) for by in ENGINES.values()}
        outcomes.add(naive_codecs.outcome(EGR.number, bytes(flipped), run[1].tobytes(), run[1].nbytes))
        assert len(outcomes) == 1, bit
        taken += outcomes != {None}
    # Flipped signs, for one, make another run: the digests find those.
    assert taken


HEADS = {
    "no head": b"",
    "a shift that no float has": payloads.egr(8, 127, {}),
    "an exponent that no float16 has": payloads.egr(10, 32, {}),
    "more after no change": payloads.egr(7, 127, {}) + b"\0",
    "a class without changes": payloads.egr(7, 127, {K: Class([], [])}),
    "more changes than words": payloads.egr(7, 127, {K: Class([0] * 101, [0] * 101)}),
    "more changes than words in two classes": payloads.egr(
        7, 127, {22: Class([0] * 51, [0] * 51), K: Class([0] * 50, [0] * 50)}
    ),
    "a kind that there is not": one(kind=3),
    "a gap parameter that is too large": one(r=24),
    "a magnitude parameter that is too large": one(kind=1, lists=[([1, 1], 16)]),
    "a place parameter that is too large": one(kind=2, lists=[([1], 24), ([1], 0)]),
    "a rest parameter that is too large": one(kind=2, lists=[([1], 0), ([1], 16)]),
    "some magnitudes, and none": one(kind=2, lists=[([], 0), ([], 0)]),
    "more magnitudes than changes": one(kind=2, lists=[([0, 0, 0], 0), ([0, 0, 0], 0)]),
    "a number of five bytes": b"\x07\x7f\0\0\x80" + b"\x80\x80\x80\x80\x01",
    "a number that ends in zero": b"\x07\x7f\0\0\x80" + b"\x82\x00\x02\0",
    "a class of a huge claim": one(changes=FAR >> 4),
    "changes that the unary part cannot have": payloads.egr(7, 127, {K: Class([0] * 3, [0] * 3, changes=90)}),
    "a unary part of a huge claim": payloads.egr(7, 127, {K: Class([5], [0])}, unary_size=(1 << 28) - 1),
    "a unary part that is too long": payloads.egr(7, 127, {K: Class([5], [0])}, unary_size=2),
    "a unary part that is too short": payloads.egr(7, 127, {K: Class([5, 9], [0, 0])}, unary_size=1),
    "signs that are not filled up with zeros": one()[:-1] + bytes((one()[-1] | 0x80,)),
}


@pytest.mark.parametrize("which", HEADS)
def test_heads_that_lie(which: str) -> None:
    refused(HEADS[which])


def parts(unary: list[int], low: list[int], signs: list[int], escapes: bytes = b"", *, changes: int = 1) -> bytes:
    """A payload of one class with parameter 2, whose parts are as given."""
    head = b"\x07\x7f\0\0\x80" + number(changes) + b"\x02" + number(len(bit_string(unary)))
    return head + bit_string(unary) + bit_string(low) + bit_string(signs) + escapes


PARTS = {
    "no value": parts([0] * 8, [0, 0], [0]),
    "a value more": parts([1, 1], [0, 0], [0]),
    "a value more in the next byte": parts([1, *[0] * 7, 1], [0, 0], [0]),
    "a unary part with a byte more": parts([1, *[0] * 15], [0, 0], [0]),
    "a quotient of 32": parts([0] * 32 + [1], [0, 0], [0]),
    "a quotient of 70": parts([0] * 70 + [1], [0, 0], [0]),
    "no escape": parts([0] * 31 + [1], [0, 0], [0]),
    "an escape more": parts([1], [0, 0], [0], b"\x1f\0\0\0"),
    "an escape below 31": parts([0] * 31 + [1], [0, 0], [0], b"\x1e\0\0\0"),
    "an escape beyond the run": parts([0] * 31 + [1], [0, 0], [0], b"\x20\0\0\0"),
    "an escape beyond everything": parts([0] * 31 + [1], [0, 0], [0], b"\xff\xff\xff\xff"),
    "low bits that are not filled up with zeros": parts([1], [0, 0, 1], [0]),
    "a gap as long as the run": one(gaps=[100], signs=[0]),
    "gaps that add up to the run": one(gaps=[50, 49]),
    "a place behind the last change": one(kind=2, lists=[([2], 0), ([0], 0)]),
    "places behind the last change": one(kind=2, lists=[([1, 0], 0), ([0, 0], 0)]),
    "a magnitude beyond every word": one(kind=1, lists=[([0, 32768], 15)]),
    "a rare magnitude beyond every word": one(kind=2, lists=[([0], 0), ([32767], 15)]),
    "32768 up": one(kind=1, lists=[([0, 32767], 15)]),
    "32768 up, rarely": one(kind=2, lists=[([0], 0), ([32766], 15)]),
    "a change in a class that has no words": payloads.egr(7, 127, {22: Class([0], [0])}),
}


@pytest.mark.parametrize("which", PARTS)
def test_parts_that_lie(which: str) -> None:
    refused(PARTS[which])


def test_what_is_only_just_allowed() -> None:
    """The last word, an escape, the largest parameters, and the one step that has only one sign."""
    for some, places in (
        (one(gaps=[99], signs=[1]), [99]),
        (one(gaps=[50, 48]), [50, 99]),
        (one(gaps=[40], signs=[0], r=0), [40]),
        (one(r=23), [5, 16]),
        (one(kind=1, lists=[([0, 32767], 15)], signs=[0, 1]), [5, 16]),
        (one(kind=2, lists=[([1], 23), ([32766], 15)], signs=[0, 1]), [5, 16]),
        (one(kind=2, lists=[([0, 0], 0), ([0, 0], 0)]), [5, 16]),
    ):
        for engine in ENGINES.values():
            run = sparse.decode_with(engine)(some, BASE)
            assert np.flatnonzero(run != BASE).tolist() == places


def test_a_shorter_base_than_was_meant() -> None:
    content, base = weights(5000, 0.1)
    whole = encoded(EGR, content, base)
    for size in (0, 1, 64, 4500):
        refused(whole, base[:size])


def test_a_long_run_that_a_short_payload_is_for() -> None:
    """Nothing of a claimed size is made before it is known to be there: the run itself is all there is."""
    base = np.zeros(1 << 23, dtype=np.uint16)
    lies = (
        payloads.egr(7, 0, {K: Class([5], [0], changes=1 << 23)}),
        payloads.egr(7, 0, {K: Class([5], [0])}, unary_size=1 << 27),
    )
    for some in lies:
        for engine in ENGINES.values():
            with pytest.raises(CodecError):
                egr.decode(engine, some, base, base)
