"""The dense codecs: every run comes back bit for bit, with the compiled kernels and without, and in its bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shipd.codecs.codec import CodecError
from shipd.codecs.duh import DUH
from shipd.codecs.f32d import F32D
from shipd.codecs.planes import PLANES
from shipd.codecs.xph import XPH
from shipproto.dtypes import BY_NAME, DTYPES
from tests.support import naive_codecs
from tests.support.runs import ENOUGH, bfloat16, decoded, like_weights, whole_runs, without_numba

BF16, F32 = BY_NAME["bfloat16"].code, BY_NAME["float32"].code
CODECS = (XPH, DUH, F32D, PLANES)
CHUNK = 512 * 1024
MOST_NAIVELY = 4096
"""Bytes of a run that the second decoder is asked about too: it has one word after the other."""


def encoded(codec, content: bytes, base: bytes | None, dtype: int = 0) -> bytes:
    """The payload, which numpy's kernels make the same of."""
    payload = codec.encode(content, base, dtype=dtype, most=ENOUGH)
    assert payload is not None
    with without_numba():
        assert codec.encode(content, base, dtype=dtype, most=ENOUGH) == payload
    return payload


def comes_back(codec, content: bytes, base: bytes | None, dtype: int = 0) -> bytes:
    payload = encoded(codec, content, base, dtype)
    if len(content) <= MOST_NAIVELY:
        assert naive_codecs.decode(codec.number, payload, base, len(content)) == content
    for in_place in (False, True):
        assert decoded(codec, payload, base, len(content), in_place=in_place) == content
        with without_numba():
            assert decoded(codec, payload, base, len(content), in_place=in_place) == content
    return payload


def base_for(codec, base: bytes) -> bytes | None:
    return base if codec.delta else None


# --- SPEC.md's examples --------------------------------------------------------------------------------------------

EXAMPLES = {
    "A.2": (XPH, "803f 80bf c03f 0100", None, "00 7f7f7f00 00018002"),
    "A.5": (DUH, "803f 7f3f 8040", "803f 803f 803f", "02000000 01000000 01000000 100f ff 0002"),
    "A.6": (F32D, "2c01803f 010080bf", "0000803f 000080bf", "02000000" * 4 + "5801 0200 0000 0000"),
    "A.7": (PLANES, "010203040506070809", "01" * 9, "0401" + "02000000" * 4 + "0004 0307 0206 0509 08"),
}


def test_the_other_example_of_exponents() -> None:
    payload = bytes.fromhex("01 7f 02000000 00f0 00 00018002")
    content = bytes.fromhex("803f 80bf c03f 0100")
    assert decoded(XPH, payload, None, 8) == content
    assert naive_codecs.decode(XPH.number, payload, None, 8) == content


@pytest.mark.parametrize("section", EXAMPLES)
def test_the_examples_of_the_specification(section: str) -> None:
    codec, *texts = EXAMPLES[section]
    content, base, payload = (None if text is None else bytes.fromhex(text) for text in texts)
    assert content is not None
    assert payload is not None
    assert decoded(codec, payload, base, len(content)) == content
    assert naive_codecs.decode(codec.number, payload, base, len(content)) == content
    assert codec.encode(content, base, dtype=F32, most=ENOUGH) == payload


# --- arbitrary runs ------------------------------------------------------------------------------------------------


@given(whole_runs(2), st.sampled_from((0, BF16, BY_NAME["float16"].code, BY_NAME["int16"].code)))
def test_words_of_16_bits(run, dtype) -> None:
    content, base = run
    comes_back(XPH, content, None, dtype)
    comes_back(DUH, content, base, dtype)


@given(whole_runs(4))
def test_words_of_32_bits(run) -> None:
    content, base = run
    comes_back(F32D, content, base, F32)


@given(st.sampled_from((2, 4, 8)).flatmap(whole_runs), st.binary(max_size=7), st.sampled_from([0, *DTYPES]))
def test_planes_of_any_dtype_and_length(run, rest, dtype) -> None:
    content, base = run
    code = dtype.code if dtype else 0
    comes_back(PLANES, content + rest, None, code)
    comes_back(PLANES, content + rest, base + bytes(len(rest)), code)


@given(st.binary(max_size=300), st.integers(0, 255))
def test_planes_of_arbitrary_bytes(content, dtype) -> None:
    comes_back(PLANES, content, None, dtype)
    comes_back(PLANES, content, content[::-1], dtype)
    comes_back(PLANES, content, content, dtype)


@pytest.mark.parametrize("codec", CODECS)
def test_nothing(codec) -> None:
    payload = comes_back(codec, b"", base_for(codec, b""))
    assert len(payload) == {XPH: 1, DUH: 12, F32D: 16, PLANES: 6}[codec]


@pytest.mark.parametrize("codec", [XPH, DUH])
def test_every_pattern_of_16_bits(codec) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for by in (0, 1, 0x7FFF, 0x8000):
        comes_back(codec, patterns.tobytes(), base_for(codec, (patterns + np.uint16(by)).tobytes()))


# --- runs like a model's -------------------------------------------------------------------------------------------


def stepped(values: np.ndarray, share: float) -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.where(rng.random(len(values)) < share, values * np.float32(1.004), values)


def test_exponents_make_bfloat16_a_third_shorter() -> None:
    content = bfloat16(like_weights(CHUNK // 2))
    payload = comes_back(XPH, content, None, BF16)
    assert len(payload) < CHUNK / 1.45
    words = np.frombuffer(content, dtype=np.uint16)
    assert payload[-CHUNK // 2 :] == ((words & 0x7F) << 1 | words >> 15).astype(np.uint8).tobytes()


def test_exponents_in_pairs_and_whole() -> None:
    weights = np.frombuffer(bfloat16(like_weights(CHUNK // 2)), dtype=np.uint16)
    outliers, share = weights.copy(), np.random.default_rng(3).random(len(weights))
    outliers[share < 0.01] = 0
    outliers[share < 0.001] = 0x7FC1
    assert comes_back(XPH, weights.tobytes(), None, BF16)[0] == 1
    assert comes_back(XPH, outliers.tobytes(), None, BF16)[0] == 1
    assert comes_back(XPH, outliers.tobytes()[:-2], None, BF16)[0] == 1, "of an odd number of words too"
    assert comes_back(XPH, bytes(CHUNK), None, BF16)[0] == 1
    outliers[share < 0.1] = 0
    assert comes_back(XPH, outliers.tobytes(), None, BF16)[0] == 0
    halves = like_weights(CHUNK // 2).astype(np.float16)
    assert comes_back(XPH, halves.tobytes(), None, BY_NAME["float16"].code)[0] == 0


def test_steps_of_a_fifth_of_the_words() -> None:
    values = like_weights(CHUNK)
    payload = comes_back(DUH, bfloat16(stepped(values, 0.2)), bfloat16(values), BF16)
    assert len(payload) < 2 * CHUNK / 8


def test_differences_of_floats() -> None:
    values = like_weights(CHUNK // 4)
    payload = comes_back(F32D, (values + np.float32(1e-6)).tobytes(), values.tobytes(), F32)
    assert len(payload) < CHUNK / 2


@pytest.mark.parametrize("changed", [0, 3, 100])
def test_planes_use_a_base_where_it_helps(changed: int) -> None:
    values = np.random.default_rng(1).integers(0, 1 << 62, CHUNK // 8, dtype=np.int64)
    base = values.copy()
    base[::1000][:changed] += 1
    with_base = comes_back(PLANES, values.tobytes(), base.tobytes(), BY_NAME["int64"].code)
    assert len(with_base) < 2000
    assert with_base[:2] == b"\x08\x01"
    foreign = np.random.default_rng(2).integers(0, 1 << 62, CHUNK // 8, dtype=np.int64)
    counters = np.arange(CHUNK // 8, dtype=np.int64)
    without = comes_back(PLANES, counters.tobytes(), foreign.tobytes(), BY_NAME["int64"].code)
    assert without[:2] == b"\x08\x00"
    assert len(without) < CHUNK // 50


def test_planes_find_the_width_of_words_that_nobody_named() -> None:
    values = like_weights(CHUNK // 8)
    for width, run in ((2, bfloat16(values)), (4, values.tobytes()), (8, values.astype(np.float64).tobytes())):
        assert encoded(PLANES, run, None, 0)[0] == width
    assert encoded(PLANES, b"text of no width " * 1000, None, 0)[0] == 1


def test_noise_costs_no_more_than_heads() -> None:
    content = np.random.default_rng(1).bytes(CHUNK)
    base = np.random.default_rng(2).bytes(CHUNK)
    assert len(comes_back(XPH, content, None)) == CHUNK + 1
    assert len(comes_back(F32D, content, base)) == CHUNK + 16
    assert len(comes_back(PLANES, content, base, F32)) == CHUNK + 2 + 16
    # Most steps are large: this codec is not for them.
    assert len(comes_back(DUH, content, base)) < 1.3 * CHUNK


# --- rules -----------------------------------------------------------------------------------------------------------


@given(whole_runs(4, most=40))
@settings(max_examples=30)
def test_no_payload_is_longer_than_may_be(run) -> None:
    for codec in CODECS:
        content, base = run[0], base_for(codec, run[1])
        payload = encoded(codec, content, base, F32)
        assert codec.encode(content, base, dtype=F32, most=len(payload)) == payload
        assert codec.encode(content, base, dtype=F32, most=len(payload) - 1) is None
        assert codec.encode(content, base, dtype=F32, most=-1) is None


def test_a_shorter_way_is_taken_where_only_that_fits() -> None:
    content, base = bytes(1000), np.random.default_rng(1).bytes(1000)
    payload = encoded(PLANES, content, base, F32)
    assert payload[1] == 0
    assert PLANES.encode(content, base, dtype=F32, most=len(payload)) == payload


@pytest.mark.parametrize("codec", [XPH, DUH, F32D])
def test_a_run_that_is_not_of_whole_words(codec) -> None:
    for size in (1, codec.word - 1, codec.word + 1, 1001):
        run = bytes(size)
        assert codec.encode(run, base_for(codec, run), dtype=0, most=ENOUGH) is None
        whole = run[: size // codec.word * codec.word]
        payload = encoded(codec, whole, base_for(codec, whole))
        with pytest.raises(CodecError):
            codec.decode(payload, base_for(codec, run), memoryview(bytearray(size)))


@pytest.mark.parametrize("codec", [DUH, F32D])
def test_a_delta_without_a_base_is_the_callers_mistake(codec) -> None:
    payload = encoded(codec, bytes(64), bytes(64))
    for base in (None, bytes(60), bytes(68)):
        with pytest.raises(ValueError, match="base"):
            codec.encode(bytes(64), base, dtype=0, most=ENOUGH)
        with pytest.raises(ValueError, match="base"):
            codec.decode(payload, base, memoryview(bytearray(64)))


def test_memory_that_lies_across_its_alignment() -> None:
    content = bfloat16(like_weights(2048))
    base = bfloat16(like_weights(2048) * np.float32(1.01))
    for codec in CODECS:
        for dtype in (BF16, BY_NAME["float64"].code):
            payload = encoded(codec, content, base_for(codec, base), dtype)
            shifted, shifted_base = (memoryview(b"\0" + run)[1:] for run in (content, base))
            given_base = shifted_base if codec.delta else None
            assert codec.encode(shifted, given_base, dtype=dtype, most=ENOUGH) == payload
            out = memoryview(bytearray(len(content) + 1))[1:]
            codec.decode(memoryview(b"\0" + payload)[1:], given_base, out)
            assert out == content
