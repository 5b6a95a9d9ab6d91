"""The kernels of the plane codecs (shipd.codecs.plane_kernels), compiled by numba. Importing this imports and compiles.

The compiler makes vector code of each loop over all words: every intermediate result is cut to the word's width at
once, because numba computes in 64 bits otherwise, and nothing branches. What is rare is gathered and corrected by loops
that look at eight codes at a time.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shipd.codecs.compiled import kernel

_AnyWord = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
_Bytes = npt.NDArray[np.uint8]

_BLOCK: Final = 1 << 12
"""Words: what is gone through once for each plane stays in the first cache."""


def _array(item: types.Type, dimensions: int = 1, *, written: bool = False) -> types.Array:
    return types.Array(item, dimensions, "C", readonly=not written)


_U8: Final = _array(types.uint8)
_U8_OUT: Final = _array(types.uint8, written=True)
_PLANES: Final = _array(types.uint8, 2)
_PLANES_OUT: Final = _array(types.uint8, 2, written=True)
_U16: Final = _array(types.uint16)
_U16_OUT: Final = _array(types.uint16, written=True)
_U64: Final = _array(types.uint64)
_U32: Final = _array(types.uint32)
_U32_OUT: Final = _array(types.uint32, written=True)
_WORDS: Final = (_U16, _U32, _U64)
_WORDS_OUT: Final = (_U16_OUT, _U32_OUT, _array(types.uint64, written=True))


@kernel()
def _marks(codes: np.uint64) -> np.uint64:
    """Of eight bytes below 16, the top bit of each that is 15."""
    # Adding 127 sets the top bit of every difference but none.
    tops = np.uint64((codes ^ np.uint64(0x0F0F0F0F0F0F0F0F)) + np.uint64(0x7F7F7F7F7F7F7F7F))
    return np.uint64(~tops & np.uint64(0x8080808080808080))


@kernel()
def _byte_of(mark: np.uint64) -> np.int64:
    """Which byte has ``mark`` as its top bit: every byte below gives one, and the product adds them up."""
    below = np.uint64(((mark >> np.uint64(7)) - np.uint64(1)) & np.uint64(0x0101010101010101))
    return np.int64(np.uint64(below * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel([types.void(_U16, _U8_OUT, _U8_OUT)])
def split_exponents(words: npt.NDArray[np.uint16], exponents: _Bytes, rest: _Bytes) -> None:
    """See PlaneKernels."""
    for at in range(len(words)):
        word = words[at]
        exponents[at] = np.uint8(np.uint16(word >> np.uint16(7)))
        rest[at] = np.uint8(np.uint16(np.uint16(word << np.uint16(1)) | np.uint16(word >> np.uint16(15))))


@kernel([types.void(_U8, _U8, _U16_OUT)])
def merge_exponents(exponents: _Bytes, rest: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    for at in range(len(words)):
        low = np.uint16(rest[at])
        upper = np.uint16(np.uint16(exponents[at]) << np.uint16(7))
        words[at] = upper | np.uint16(np.uint16(low >> np.uint16(1)) | np.uint16(low << np.uint16(15)))


@kernel([types.void(_U16, types.int64, _U8_OUT, _U8_OUT)])
def split_exponent_codes(words: npt.NDArray[np.uint16], low: int, codes: _Bytes, rest: _Bytes) -> None:
    """See PlaneKernels."""
    least = np.uint8(low)
    for at in range(len(words)):
        word = words[at]
        exponent = np.uint8(np.uint16(word >> np.uint16(7)))
        codes[at] = min(np.uint8(exponent - least), np.uint8(15))
        rest[at] = np.uint8(np.uint16(np.uint16(word << np.uint16(1)) | np.uint16(word >> np.uint16(15))))


@kernel([types.void(_U8, types.int64, _U8, _U16_OUT)])
def merge_exponent_codes(codes: _Bytes, low: int, rest: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    least = np.uint8(low)
    for at in range(len(words)):
        below = np.uint16(rest[at])
        upper = np.uint16(np.uint16(np.uint8(codes[at] + least)) << np.uint16(7))
        words[at] = upper | np.uint16(np.uint16(below >> np.uint16(1)) | np.uint16(below << np.uint16(15)))


@kernel([types.int64(_U16, _U64, _U8_OUT)])
def gather_exponents(words: npt.NDArray[np.uint16], codes: npt.NDArray[np.uint64], beyond: _Bytes) -> int:
    """See PlaneKernels."""
    found = 0
    for group in range(len(codes)):
        marks = _marks(codes[group])
        while marks != np.uint64(0):
            rest = np.uint64(marks & (marks - np.uint64(1)))
            at = 8 * group + _byte_of(np.uint64(marks ^ rest))
            beyond[found] = np.uint8(np.uint16(words[at] >> np.uint16(7)))
            found += 1
            marks = rest
    return found


@kernel([types.void(_U64, _U8, _U16_OUT)])
def correct_exponents(codes: npt.NDArray[np.uint64], beyond: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    found = 0
    for group in range(len(codes)):
        marks = _marks(codes[group])
        while marks != np.uint64(0):
            rest = np.uint64(marks & (marks - np.uint64(1)))
            at = 8 * group + _byte_of(np.uint64(marks ^ rest))
            exponent = np.uint16(np.uint16(beyond[found]) << np.uint16(7))
            words[at] = np.uint16(words[at] & np.uint16(0x807F)) | exponent
            found += 1
            marks = rest


@kernel()
def _step(new: np.uint16, old: np.uint16) -> np.uint16:
    """How far two words are apart, as zigzag (shipd.codecs.words). An arithmetic shift makes all ones of a set sign."""
    new = np.uint16(new ^ np.uint16(np.uint16(np.int16(new) >> np.int16(15)) | np.uint16(0x8000)))
    old = np.uint16(old ^ np.uint16(np.uint16(np.int16(old) >> np.int16(15)) | np.uint16(0x8000)))
    step = np.uint16(new - old)
    return np.uint16(np.uint16(step << np.uint16(1)) ^ np.uint16(np.int16(step) >> np.int16(15)))


@kernel()
def _stepped(old: np.uint16, code: np.uint16) -> np.uint16:
    """The word that is so far from ``old``."""
    key = np.uint16(old ^ np.uint16(np.uint16(np.int16(old) >> np.int16(15)) | np.uint16(0x8000)))
    step = np.uint16(np.uint16(code >> np.uint16(1)) ^ np.uint16(np.uint16(0) - np.uint16(code & np.uint16(1))))
    key = np.uint16(key + step)
    return np.uint16(key ^ np.uint16(np.uint16(~np.uint16(np.int16(key) >> np.int16(15))) | np.uint16(0x8000)))


@kernel([types.int64(_U16, _U16, _U8_OUT)])
def split_steps(content: npt.NDArray[np.uint16], base: npt.NDArray[np.uint16], codes: _Bytes) -> int:
    """See PlaneKernels."""
    largest = np.uint16(0)
    for at in range(len(content)):
        step = _step(content[at], base[at])
        step = min(step, np.uint16(15))
        largest = max(largest, step)
        codes[at] = np.uint8(step)
    return int(largest)


@kernel([types.int64(_U16, _U16, _U64, _U16_OUT)])
def gather_steps(
    content: npt.NDArray[np.uint16],
    base: npt.NDArray[np.uint16],
    codes: npt.NDArray[np.uint64],
    beyond: npt.NDArray[np.uint16],
) -> int:
    """See PlaneKernels."""
    found = 0
    for group in range(len(codes)):
        marks = _marks(codes[group])
        while marks != np.uint64(0):
            rest = np.uint64(marks & (marks - np.uint64(1)))
            at = 8 * group + _byte_of(np.uint64(marks ^ rest))
            beyond[found] = _step(content[at], base[at])
            found += 1
            marks = rest
    return found


@kernel([types.void(_U64, _U16, _U16_OUT)])
def correct_steps(codes: npt.NDArray[np.uint64], beyond: npt.NDArray[np.uint16], words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    found = 0
    for group in range(len(codes)):
        marks = _marks(codes[group])
        while marks != np.uint64(0):
            rest = np.uint64(marks & (marks - np.uint64(1)))
            at = 8 * group + _byte_of(np.uint64(marks ^ rest))
            # 15 is eight down, 16 is eight up.
            words[at] = _stepped(_stepped(words[at], np.uint16(16)), beyond[found])
            found += 1
            marks = rest


@kernel([types.void(_U16, _U8_OUT)])
def pair_codes(codes: npt.NDArray[np.uint16], pairs: _Bytes) -> None:
    """See PlaneKernels."""
    for at in range(len(codes)):
        pairs[at] = np.uint8(np.uint16(codes[at] | np.uint16(codes[at] >> np.uint16(4))))


@kernel([types.void(_U8, _U16_OUT)])
def part_codes(pairs: _Bytes, codes: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    for at in range(len(codes)):
        both = np.uint16(pairs[at])
        codes[at] = np.uint16(both | np.uint16(both << np.uint16(4))) & np.uint16(0x0F0F)


@kernel([types.void(_U8, _U16_OUT)])
def apply_steps(codes: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    for at in range(len(words)):
        words[at] = _stepped(words[at], np.uint16(codes[at]))


@kernel([types.void(_U32, _U32, _PLANES_OUT)])
def split_differences(content: npt.NDArray[np.uint32], base: npt.NDArray[np.uint32], planes: _Bytes) -> None:
    """See PlaneKernels."""
    for at in range(len(content)):
        new, old = content[at], base[at]
        new = np.uint32(new ^ np.uint32(np.uint32(np.int32(new) >> np.int32(31)) | np.uint32(0x80000000)))
        old = np.uint32(old ^ np.uint32(np.uint32(np.int32(old) >> np.int32(31)) | np.uint32(0x80000000)))
        code = np.uint32(new - old)
        code = np.uint32(np.uint32(code << np.uint32(1)) ^ np.uint32(np.int32(code) >> np.int32(31)))
        planes[0, at] = np.uint8(code)
        planes[1, at] = np.uint8(np.uint32(code >> np.uint32(8)))
        planes[2, at] = np.uint8(np.uint32(code >> np.uint32(16)))
        planes[3, at] = np.uint8(np.uint32(code >> np.uint32(24)))


@kernel([types.void(_U8, _U8, _U8, _U8, _U32_OUT)])
def apply_differences(
    first: _Bytes, second: _Bytes, third: _Bytes, fourth: _Bytes, words: npt.NDArray[np.uint32]
) -> None:
    """See PlaneKernels."""
    for at in range(len(words)):
        lower = np.uint32(np.uint32(first[at]) | np.uint32(np.uint32(second[at]) << np.uint32(8)))
        upper = np.uint32(np.uint32(third[at]) | np.uint32(np.uint32(fourth[at]) << np.uint32(8)))
        code = np.uint32(lower | np.uint32(upper << np.uint32(16)))
        old = words[at]
        key = np.uint32(old ^ np.uint32(np.uint32(np.int32(old) >> np.int32(31)) | np.uint32(0x80000000)))
        step = np.uint32(np.uint32(code >> np.uint32(1)) ^ np.uint32(np.uint32(0) - np.uint32(code & np.uint32(1))))
        key = np.uint32(key + step)
        words[at] = key ^ np.uint32(np.uint32(~np.uint32(np.int32(key) >> np.int32(31))) | np.uint32(0x80000000))


@kernel([types.void(words, _PLANES_OUT) for words in _WORDS])
def split_words(words: _AnyWord, planes: _Bytes) -> None:
    """See PlaneKernels."""
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        for number in range(planes.shape[0]):
            plane = planes[number, start : start + _BLOCK]
            shift = words.dtype.type(8 * number)
            for at in range(len(block)):
                plane[at] = np.uint8(block[at] >> shift)


@kernel([types.void(_PLANES, words) for words in _WORDS_OUT])
def xor_planes(planes: _Bytes, words: _AnyWord) -> None:
    """See PlaneKernels."""
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        for number in range(planes.shape[0]):
            plane = planes[number, start : start + _BLOCK]
            shift = words.dtype.type(8 * number)
            for at in range(len(block)):
                block[at] ^= words.dtype.type(words.dtype.type(plane[at]) << shift)
