"""Runs for the tests of codecs: words that are special, words that are like a model's, and bases near and far."""

import contextlib
from collections.abc import Iterator
from typing import Final

import numpy as np
from hypothesis import strategies as st

from shipd.codecs import compiled, egr, plane_kernels
from shipd.codecs.codec import Codec, CodecError
from tests.support.words import joined, words

# Until somebody has, numpy does the work, and would be compared with itself.
compiled.warm_up()

SPECIAL: Final = {
    # Zeros, denormals, ones, infinities, NaNs of several payloads; of bfloat16 and of float16.
    2: (0, 0x8000, 1, 0x8001, 0x7F, 0x3F80, 0xBF80, 0x3C00, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7C00, 0x7C01, 0xFFFF),
    4: (0, 0x80000000, 1, 0x80000001, 0x3F800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF),
    8: (0, 1 << 63, 1, 0x3FF0 << 48, 0x7FF0 << 48, 0xFFF8 << 48, (0x7FF0 << 48) + 1, (1 << 64) - 1),
}  # fmt: skip
ENOUGH: Final = 1 << 40
"""More bytes than any payload has."""


@st.composite
def whole_runs(draw: st.DrawFn, width: int, most: int = 200) -> tuple[bytes, bytes]:
    """A run of words of ``width`` bytes, at most ``most`` of them, and a base: equal, near, or of other words."""
    count = draw(st.integers(0, most))
    content = draw(words(width, count, SPECIAL[width]))
    step = draw(st.sampled_from((0, 1, 127, 128, 1 << (8 * width - 1))))
    steps = draw(st.binary(min_size=count * width, max_size=count * width))
    by = (int.from_bytes(steps[at * width : (at + 1) * width], "little") % (2 * step + 1) - step for at in range(count))
    base = [(value + step) % (1 << 8 * width) for value, step in zip(content, by, strict=True)]
    return joined(content, width), joined(base, width)


def like_weights(words: int, seed: int = 1) -> np.ndarray:
    """f32[words] as a model's weights are distributed, about."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(words) * 0.05).astype(np.float32)


def bfloat16(values: np.ndarray) -> bytes:
    """Rounded towards zero, which does for runs that only have to be realistic."""
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()


def decoded(codec: Codec, payload: bytes, base: bytes | None, size: int, *, in_place: bool = False) -> bytes:
    """What ``payload`` is of a run of ``size`` bytes; with ``in_place``, written over its base."""
    out = bytearray(base if in_place and base is not None else b"\xa5" * size)
    codec.decode(payload, out if in_place and base is not None else base, memoryview(out))
    assert len(out) == size
    return bytes(out)


def outcome(codec: Codec, payload: bytes, base: bytes | None, size: int) -> bytes | None:
    """The run, or None where the payload is refused."""
    try:
        return decoded(codec, payload, base, size)
    except CodecError:
        return None


@contextlib.contextmanager
def without_numba() -> Iterator[None]:
    """As where nothing can be compiled."""
    # By hand: unittest.mock takes longer to make its objects than the codecs to decode a run.
    modules = (plane_kernels, egr)
    found = [module.kernels for module in modules]
    for module in modules:
        setattr(module, "kernels", _nothing)  # noqa: B010  mypy takes functions of modules for constants
    try:
        yield
    finally:
        for module, kernels in zip(modules, found, strict=True):
            setattr(module, "kernels", kernels)  # noqa: B010  as above


def _nothing() -> None:
    """Stands for ``compiled.kernels``."""
