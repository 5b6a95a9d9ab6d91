"""GZ and EGR: any run on any base comes back bit for bit, and whatever a payload is, nothing but a refusal happens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipd.codecs import egr
from shipd.codecs.codec import Codec
from shipd.codecs.egr import EGR
from shipd.codecs.gz import GZ
from tests.property.strategies import examples
from tests.support import sparse
from tests.support.sparse import BFLOAT16, ENOUGH, FLOAT16, Words, decoded, encoded

ENGINES = sparse.engines()
CODECS = pytest.mark.parametrize("codec", [EGR, GZ], ids=["egr", "gz"])
dtypes = st.sampled_from((BFLOAT16, FLOAT16, 0, 18))


@CODECS
@examples(400)
@given(sparse.runs(), dtypes)
def test_round_trip(codec: Codec, run: tuple[Words, Words], dtype: int) -> None:
    content, base = run
    assert (decoded(codec, encoded(codec, content, base, dtype), base) == content).all()


@examples(300)
@given(sparse.runs(), dtypes)
def test_both_engines_give_the_same_bytes(run: tuple[Words, Words], dtype: int) -> None:
    content, base = run
    payloads = {name: egr.encode(engine, content, base, dtype, ENOUGH) for name, engine in ENGINES.items()}
    assert len(set(payloads.values())) == 1
    for payload in payloads.values():
        assert payload is not None
        for engine in ENGINES.values():
            assert (sparse.decode_with(engine)(payload, base) == content).all()


@CODECS
@examples(200)
@given(sparse.runs(most=80), sparse.runs(most=80), st.data())
def test_a_payload_on_another_base_is_refused_or_makes_a_run(
    codec: Codec, run: tuple[Words, Words], other: tuple[Words, Words], data: st.DataObject
) -> None:
    payload = encoded(codec, *run)
    base = other[1]
    if len(run[1]) and data.draw(st.booleans()):
        base = run[1].copy()
        base[data.draw(st.integers(0, len(base) - 1))] ^= 1 << data.draw(st.integers(0, 15))
    sparse.outcome(lambda some, on: decoded(codec, some, on), payload, base)


@CODECS
@examples(600)
@given(sparse.runs(most=60), st.data())
def test_a_changed_payload_is_refused_or_makes_a_run(
    codec: Codec, run: tuple[Words, Words], data: st.DataObject
) -> None:
    payload = bytearray(encoded(codec, *run))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=4))
    outcomes = {sparse.outcome(lambda some, on: decoded(codec, some, on), bytes(payload), run[1])}
    if codec is EGR:
        outcomes |= {sparse.outcome(sparse.decode_with(by), bytes(payload), run[1]) for by in ENGINES.values()}
    assert len(outcomes) == 1, "the engines do not agree"


@CODECS
@examples(300)
@given(sparse.runs(), st.integers(-3, 3))
def test_most_is_kept(codec: Codec, run: tuple[Words, Words], by: int) -> None:
    content, base = (words.tobytes() for words in run)
    whole = codec.encode(content, base, dtype=BFLOAT16, most=ENOUGH)
    assert whole is not None
    most = len(whole) + by
    assert codec.encode(content, base, dtype=BFLOAT16, most=most) == (whole if by >= 0 else None)


def test_every_word_becomes_every_kind_of_other() -> None:
    """All 65536 words, moved by steps of every size and to their own complement."""
    base = np.arange(1 << 16, dtype=np.uint16)
    for codec in (EGR, GZ):
        for by in (1, 0xFFFF, 2, 127, 128, 0x7FFF, 0x8000, 0x8001):
            content = base + np.uint16(by)
            assert (decoded(codec, encoded(codec, content, base), base) == content).all()
        assert (decoded(codec, encoded(codec, ~base, base, FLOAT16), base) == ~base).all()
