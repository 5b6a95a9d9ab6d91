"""Runs and bases for the tests of sparse codecs, and ways to decode that notice what they must not do."""

from collections.abc import Callable
from typing import Final

import numpy as np
from hypothesis import strategies as st

from shipd.codecs import compiled, egr, egr_numpy
from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.egr_format import Engine
from tests.support.words import words

BFLOAT16: Final = 4
FLOAT16: Final = 3
ENOUGH: Final = 1 << 30
"""More bytes than any payload here has."""

SPECIAL: Final = (
    0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFC1,
    0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0xFC00, 0xFE00, 0x7FFF, 0xFFFF,
)  # fmt: skip
"""Zeros, denormals, ones, infinities and NaNs of several payloads, of bfloat16 and of float16."""

Words = np.ndarray


_STEPS: Final = (1, -1, 1, -1, 2, -3, None, 1 << 15)
"""By what a word changes; None: to any other."""


@st.composite
def runs(draw: st.DrawFn, most: int = 300) -> tuple[Words, Words]:
    """(content, base): few, some or all words changed, by little or to anything."""
    size = draw(st.integers(0, most))
    base = np.array(draw(words(2, size, SPECIAL)), dtype=np.uint16)
    content = base.copy()
    if not size:
        return content, base
    count = draw(st.integers(0, draw(st.sampled_from((0, 3, 30, 2 * most)))))
    changes = np.frombuffer(draw(st.binary(min_size=4 * count, max_size=4 * count)), dtype="<u2")
    others = draw(words(2, count, SPECIAL))
    for place, kind, other in zip(changes[::2].tolist(), changes[1::2].tolist(), others, strict=True):
        by = _STEPS[kind % len(_STEPS)]
        content[place % size] = other if by is None else (int(content[place % size]) + by) & 0xFFFF
    return content, base


def weights(words: int, share: float, seed: int = 1, *, step: int = 1) -> tuple[Words, Words]:
    """(content, base) of bfloat16 like a model's, of which about ``share`` changed by up to ``step``."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(words) * 0.04).astype(np.float32)
    base = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    changed = rng.random(words) < share
    by = rng.integers(1, step, words, endpoint=True) * rng.choice([-1, 1], words)
    return np.where(changed, base + by.astype(np.uint16), base).astype(np.uint16), base


def engines() -> dict[str, Engine]:
    """EGR's engines by name; without the compiled one where it cannot be had."""
    found: dict[str, Engine] = {"numpy": egr_numpy}
    compiled.warm_up()
    if (kernels := compiled.kernels()) is not None:
        found["compiled"] = kernels.egr
    return found


def encoded(codec: Codec, content: Words, base: Words, dtype: int = BFLOAT16) -> bytes:
    payload = codec.encode(content.tobytes(), base.tobytes(), dtype=dtype, most=ENOUGH)
    assert payload is not None
    return payload


def decoded(codec: Codec, payload: bytes, base: Words) -> Words:
    """Decode out of place and in place; both must be the same."""
    before = base.tobytes()
    out = bytearray(b"\xa5" * len(before))
    in_place = bytearray(before)
    failures = []
    for old, new in ((before, out), (in_place, in_place)):
        try:
            codec.decode(payload, old, memoryview(new))
        except CodecError as error:
            failures.append(error)
    if failures:
        assert len(failures) == 2, "refused one way and taken the other"
        raise failures[0]
    assert out == in_place
    return np.frombuffer(bytes(out), dtype=np.uint16)


def outcome(decode: Callable[[bytes, Words], Words], payload: bytes, base: Words) -> bytes | None:
    """What comes of a payload that may be refused."""
    try:
        found = decode(payload, base)
    except CodecError:
        return None
    assert len(found) == len(base)
    return found.tobytes()


def decode_with(engine: Engine) -> Callable[[bytes, Words], Words]:
    """EGR's decoding with that engine, in place."""

    def decode(payload: bytes, base: Words) -> Words:
        run = base.copy()
        egr.decode(engine, payload, run, run)
        return run

    return decode
