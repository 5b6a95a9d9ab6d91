"""Every codec against the second decoder: both read what it encodes, and of what is damaged both make the same."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipd.codecs.codec import Codec
from shipd.codecs.registry import BY_NAME, CODECS
from tests.property.strategies import examples, mutate, mutations
from tests.support import finetune, naive_codecs
from tests.support.runs import ENOUGH, SPECIAL, decoded, outcome, without_numba
from tests.support.words import joined, words

EACH = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
DTYPES = {1: (23, 0), 2: (4, 3, 18), 4: (2, 17), 8: (1, 16)}
"""Numbers of dtypes, by the bytes of a word: floats, whole numbers, and none."""

Run = tuple[bytes, bytes | None, int]
"""Content, base where there is one, number of the dtype."""


@st.composite
def runs(draw: st.DrawFn, codec: Codec, *, most: int = 150) -> Run:
    """All equal, all different, special or arbitrary words, on a base that is the same, near, or foreign."""
    width = codec.word if codec.word > 1 else draw(st.sampled_from((1, 2, 4, 8)))
    bits = 8 * width
    special = SPECIAL.get(width, (0, 1, 0x7F, 0x80, 0xFF))
    count = draw(st.integers(0, most))
    kind = draw(st.sampled_from(("equal", "different", "any")))
    if kind == "equal":
        base = draw(words(width, 1, special)) * count
    elif kind == "different":
        (start,), step = draw(words(width, 1, special)), draw(st.integers(0, (1 << bits - 1) - 1)) * 2 + 1
        base = [(start + step * index) % (1 << bits) for index in range(count)]
    else:
        base = draw(words(width, count, special))
    content = list(base)
    changed = draw(st.sampled_from(("none", "few", "all", "foreign")))
    if changed == "foreign":
        content = draw(words(width, count, special))
    elif changed == "all":
        by = draw(st.sampled_from((1, -1, 3, 1 << bits - 1, (1 << bits) - 2)))
        content = [(value + by) % (1 << bits) for value in base]
    elif changed == "few" and count:
        for place in draw(st.lists(st.integers(0, count - 1), max_size=8)):
            by = draw(st.sampled_from((1, -1, 1, -1, 2, -40, 1 << bits - 1)))
            content[place] = (content[place] + by) % (1 << bits)
    tail = draw(st.binary(max_size=7)) if codec.word == 1 else b""
    new, old = (joined(run, width) + tail for run in (content, base))
    needs_one = codec.delta or (codec.word == 1 and draw(st.booleans()))
    return new, old if needs_one else None, draw(st.sampled_from(DTYPES[width]))


def encoded(codec: Codec, run: Run) -> bytes:
    content, base, dtype = run
    payload = codec.encode(content, base, dtype=dtype, most=ENOUGH)
    assert payload is not None
    return payload


def outcomes(codec: Codec, payload: bytes, base: bytes | None, size: int) -> set[bytes | None]:
    """What comes of a payload: with compiled loops, with numpy alone, and naively."""
    found = {naive_codecs.outcome(codec.number, payload, base, size)}
    for ways in (contextlib.nullcontext(), without_numba()):
        with ways:
            found.add(outcome(codec, payload, base, size))
    return found


@EACH
@examples(300)
@given(st.data())
def test_what_is_encoded_is_read_alike(codec: Codec, data: st.DataObject) -> None:
    content, base, _ = run = data.draw(runs(codec))
    assert outcomes(codec, encoded(codec, run), base, len(content)) == {content}


@EACH
@examples(400)
@given(st.data(), mutations)
def test_what_is_changed_is_refused_or_read_alike(codec: Codec, data: st.DataObject, changes: list) -> None:
    content, base, _ = run = data.draw(runs(codec, most=40))
    payload = mutate(encoded(codec, run), changes)
    assert len(outcomes(codec, payload, base, len(content))) == 1


@EACH
@examples(60)
@given(st.data())
def test_what_is_cut_is_refused(codec: Codec, data: st.DataObject) -> None:
    content, base, _ = run = data.draw(runs(codec, most=40))
    payload = encoded(codec, run)
    for size in range(len(payload)):
        assert outcomes(codec, payload[:size], base, len(content)) == {None}
    # A packed plane with something after it may be a plane that is not packed.
    longer = payload + data.draw(st.binary(min_size=1, max_size=9))
    assert len(outcomes(codec, longer, base, len(content))) == 1


@EACH
@examples(200)
@given(st.data())
def test_for_another_run_it_is_refused_or_read_alike(codec: Codec, data: st.DataObject) -> None:
    """On a base that another run has, of the same length or another."""
    payload = encoded(codec, data.draw(runs(codec, most=60)))
    content, base, _ = data.draw(runs(codec, most=60))
    assert len(outcomes(codec, payload, base, len(content))) == 1


@pytest.fixture(scope="module")
def steps() -> list[tuple[bytes, bytes]]:
    """(content, base) of bfloat16: 8192 weights of a real model, from one kept version to the next."""
    part = slice(20_000_000, 20_000_000 + 8192)
    versions = [flat[part].tobytes() for _, flat in finetune.words()]
    return list(zip(versions[1:], versions, strict=False))


@EACH
def test_real_steps(codec: Codec, steps: list[tuple[bytes, bytes]]) -> None:
    # No step's worth of fp32 is kept; words of 32 bits are any two weights, and any words will do.
    for content, before in steps:
        assert content != before
        base = before if codec.delta else None
        payload = encoded(codec, (content, base, 4))
        assert outcomes(codec, payload, base, len(content)) == {content}
        middle = len(payload) // 2
        assert len(outcomes(codec, mutate(payload, [("flip", middle, 3)]), base, len(content))) == 1
        if codec is BY_NAME["planes"]:
            assert outcomes(codec, encoded(codec, (content, before, 4)), before, len(content)) == {content}


@pytest.mark.parametrize("name", ["f32d", "planes"])
def test_real_weights_of_32_bits(name: str) -> None:
    base = finetune.masters()[20_000_000 : 20_000_000 + 4096]
    rng = np.random.default_rng(1)
    content = base + (rng.standard_normal(len(base)) * 1e-6).astype(np.float32)
    run = content.tobytes(), base.tobytes(), 2
    payload = encoded(BY_NAME[name], run)
    assert len(payload) < base.nbytes
    assert outcomes(BY_NAME[name], payload, run[1], base.nbytes) == {run[0]}
    assert decoded(BY_NAME[name], payload, run[1], base.nbytes, in_place=True) == run[0]
