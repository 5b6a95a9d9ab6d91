"""Words of any width, drawn by hypothesis, as many as a run has.

They are drawn as bytes, all at once: one by one it takes longer to draw them than to code and decode them.
"""

from collections.abc import Sequence
from typing import Final

from hypothesis import strategies as st

_EXPONENT: Final = {1: 0, 2: 8, 4: 8, 8: 11}
"""Bits of it in a bfloat16, float32 and float64, by the bytes of a word."""


@st.composite
def words(draw: st.DrawFn, width: int, count: int, special: Sequence[int]) -> list[int]:
    """``count`` words of ``width`` bytes: of ``special``, NaNs of any payload, or any at all, each as often."""
    kinds = draw(st.binary(min_size=count, max_size=count))
    raw = draw(st.binary(min_size=count * width, max_size=count * width))
    found = []
    for at, kind in enumerate(kinds):
        value = int.from_bytes(raw[at * width : (at + 1) * width], "little")
        if kind % 3 == 0:
            value = special[kind // 3 % len(special)]
        elif kind % 3 == 1:
            value = nan(width, value)
        found.append(value)
    return found


def nan(width: int, payload: int) -> int:
    """A bit pattern with every bit of the exponent set, of a bfloat16, float32 or float64."""
    mantissa = 8 * width - 1 - _EXPONENT[width]
    return ((1 << _EXPONENT[width]) - 1) << mantissa | payload % (1 << mantissa)


def joined(values: Sequence[int], width: int) -> bytes:
    """The bytes of these words, little-endian."""
    return b"".join(value.to_bytes(width, "little") for value in values)
