"""EGR: the example of SPEC.md byte for byte, both engines around the edges of their blocks, and what it is for."""

import tracemalloc

import numpy as np
import pytest

from shipd.codecs import egr, egr_format, egr_numpy
from shipd.codecs.codec import CodecError
from shipd.codecs.egr import EGR
from tests.support import sparse
from tests.support.sparse import BFLOAT16, ENOUGH, FLOAT16, decoded, encoded, weights

ENGINES = sparse.engines()
BASE = np.array([0x3F80, 0x3F81, 0x3E00, 0xBF80, 0x3E01, 0, 0x3F90, 0x3E02, 0x8000, 0x3F7F], dtype=np.uint16)
RUN = np.array([0x3F80, 0x3F82, 0x3E00, 0xBF80, 0x3E00, 0, 0x3F93, 0x3E02, 0x0000, 0x3F7F], dtype=np.uint16)
EXAMPLE = bytes.fromhex("077f 010090 0100 0100 022000 02 aa09 02")

# Around what a mask, the compiled engine's block and numpy's block hold.
SIZES = (0, 1, 2, 31, 63, 64, 65, 127, 2047, 2048, 2049, 4096 + 63, 65535, 65536, 65537, 3 * 65536 + 1)


def test_the_example_of_the_specification() -> None:
    assert encoded(EGR, RUN, BASE) == EXAMPLE
    assert (decoded(EGR, EXAMPLE, BASE) == RUN).all()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_engines_agree_at_every_size(size: int, share: float) -> None:
    content, base = weights(size, share, seed=size, step=9)
    payloads = [egr.encode(engine, content, base, BFLOAT16, ENOUGH) for engine in ENGINES.values()]
    payload = payloads[0]
    assert payload is not None
    assert payloads.count(payload) == len(payloads)
    for engine in ENGINES.values():
        assert (sparse.decode_with(engine)(payload, base) == content).all()


def test_float16_is_classed_by_its_own_exponent() -> None:
    rng = np.random.default_rng(3)
    base = (rng.standard_normal(20_000) * 0.04).astype(np.float16).view(np.uint16)
    # Small weights change more often, as under an optimiser.
    exponents = (base >> 10 & 31).astype(np.int64)
    content = base + (rng.random(len(base)) < 2.0 ** -(exponents - 3)).astype(np.uint16)
    payload = encoded(EGR, content, base, FLOAT16)
    assert payload[0] == 10
    assert (decoded(EGR, payload, base) == content).all()
    assert len(payload) < len(encoded(EGR, content, base, BFLOAT16))


def test_a_few_large_words_do_not_push_the_others_down() -> None:
    content, base = weights(100_000, 0.01)
    alone = encoded(EGR, content, base)
    base[::5000] = content[::5000] = 0x7F80
    assert len(encoded(EGR, content, base)) < 1.02 * len(alone)


def test_gaps_and_steps_that_are_escaped() -> None:
    """Most gaps of 0 and a few of thousands; most steps of one and one of 32768 down."""
    base = np.full(60_000, 0x3F80, dtype=np.uint16)
    content = base.copy()
    content[:5000] += np.uint16(1)
    content[[30_000, 59_999]] ^= np.uint16(0x8000)
    base[40_000], content[40_000] = 0x0000, 0x7FFF
    content[50_000] = 0
    for shift, dtype in ((7, BFLOAT16), (10, FLOAT16)):
        payload = encoded(EGR, content, base, dtype)
        frame, _, parts = egr_format.read(memoryview(payload), len(base))
        assert frame.shift == shift
        assert len(parts.escapes) >= 8
        assert (decoded(EGR, payload, base) == content).all()


def test_all_three_kinds_of_magnitudes_occur() -> None:
    """Each where it is the shortest: all one, mostly one, of any size."""
    base = np.repeat(np.array([0x3F80, 0x3F00, 0x3E80], dtype=np.uint16), 2000)
    content = base + np.uint16(1)
    content[2000:4000:100] += np.uint16(4)
    content[4000:] += np.arange(2000, dtype=np.uint16) % np.uint16(50)
    payload = encoded(EGR, content, base)
    _, table, _ = egr_format.read(memoryview(payload), len(base))
    kinds = table[table[:, egr_format.COUNT] > 0][:, egr_format.KIND].tolist()
    assert kinds == [egr_format.ALL, egr_format.SOME, egr_format.NONE]
    assert (decoded(EGR, payload, base) == content).all()


def test_a_rare_change_costs_little_more_than_where_it_is() -> None:
    """Here every class changes alike, which costs more than it does where the small weights change most."""
    content, base = weights(1 << 20, 0.005)
    changed = int(np.count_nonzero(content != base))
    assert 8 * len(encoded(EGR, content, base)) < 11 * changed


def test_what_lies_at_odd_addresses() -> None:
    content, base = weights(1000, 0.1)
    shifted = [memoryview(b"\0" + words.tobytes())[1:] for words in (content, base)]
    payload = EGR.encode(*shifted, dtype=BFLOAT16, most=ENOUGH)
    assert payload == encoded(EGR, content, base)
    out = memoryview(bytearray(1 + 2 * len(base)))[1:]
    EGR.decode(memoryview(b"\0" + payload)[1:], shifted[1], out)
    assert out == shifted[0]


def test_what_is_no_run_of_words() -> None:
    assert EGR.encode(b"abc", b"abd", dtype=BFLOAT16, most=100) is None
    with pytest.raises(CodecError, match="words"):
        EGR.decode(EXAMPLE, b"abc", memoryview(bytearray(3)))
    with pytest.raises(ValueError, match="same size"):
        EGR.encode(b"abcd", b"ab", dtype=BFLOAT16, most=100)
    with pytest.raises(ValueError, match="same size"):
        EGR.encode(b"abcd", None, dtype=BFLOAT16, most=100)
    with pytest.raises(ValueError, match="same size"):
        EGR.decode(EXAMPLE, b"ab", memoryview(bytearray(20)))


@pytest.mark.parametrize("name", ENGINES)
def test_scanning_ends_where_there_is_too_much(name: str) -> None:
    content, base = weights(300_000, 0.3)
    frame = egr.frame_of(base, BFLOAT16)
    changed = int(np.count_nonzero(content != base))
    for most in (0, 1, changed - 1):
        assert ENGINES[name].scan(content, base, frame, most) is None
    found = ENGINES[name].scan(content, base, frame, changed)
    assert found is not None
    assert len(found.gaps) == changed


@pytest.mark.parametrize("name", ENGINES)
def test_another_base_is_found_out(name: str) -> None:
    content, base = weights(50_000, 0.02)
    payload = encoded(EGR, content, base)
    # The exponents of all words go down, so that the highest classes have too few words for their changes.
    other = base - np.uint16(0x0400)
    with pytest.raises(CodecError, match="base is another"):
        sparse.decode_with(ENGINES[name])(payload, other)


def test_numpy_1_counts_bits_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    content, base = weights(5000, 0.2)
    payload = egr.encode(egr_numpy, content, base, BFLOAT16, ENOUGH)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert egr.encode(egr_numpy, content, base, BFLOAT16, ENOUGH) == payload
    assert payload is not None
    assert (sparse.decode_with(egr_numpy)(payload, base) == content).all()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("share", [0.005, 1.0])
def test_memory_is_a_small_multiple_of_the_run(name: str, share: float) -> None:
    content, base = weights(1 << 20, share)
    engine = ENGINES[name]
    payload = egr.encode(engine, content, base, BFLOAT16, ENOUGH)
    assert payload is not None
    run = base.copy()
    tracemalloc.start()
    try:
        egr.encode(engine, content, base, BFLOAT16, ENOUGH)
        _, encoding = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        egr.decode(engine, payload, run, run)
        _, decoding = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(name, share, encoding / base.nbytes, decoding / base.nbytes)
    assert encoding < 40 * base.nbytes
    assert decoding < 40 * base.nbytes
