"""The kernels of the plane codecs (shipd.codecs.plane_kernels) in numpy, for where nothing can be compiled.

Everything goes through in blocks, whose temporary arrays stay in the caches.
"""

from collections.abc import Iterator
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from shipd.codecs.words import unzigzag, zigzag

_BLOCK: Final = 1 << 14
"""Words."""

_AnyWord = TypeVar("_AnyWord", bound=np.unsignedinteger[Any])
_Bytes = npt.NDArray[np.uint8]


def _blocks(words: int) -> Iterator[slice]:
    for start in range(0, words, _BLOCK):
        yield slice(start, start + _BLOCK)


def _marked(codes: npt.NDArray[np.uint64], words: int) -> Iterator[tuple[slice, npt.NDArray[np.intp]]]:
    """Each block, and where in it the codes of 15 are."""
    for block in _blocks(words):
        yield block, np.flatnonzero(codes.view(np.uint8)[block] == 15)


def split_exponents(words: npt.NDArray[np.uint16], exponents: _Bytes, rest: _Bytes) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(words)):
        rotated = words[block] << np.uint16(1)
        rest[block] = rotated
        rotated >>= np.uint16(8)
        exponents[block][: len(rotated)] = rotated
        np.right_shift(words[block], np.uint16(15), out=rotated)
        rest[block] |= rotated.astype(np.uint8)


def merge_exponents(exponents: _Bytes, rest: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(words)):
        low = rest[block].astype(np.uint16)
        merged = exponents[block].astype(np.uint16)
        merged <<= np.uint16(7)
        merged |= low >> np.uint16(1)
        low <<= np.uint16(15)
        np.bitwise_or(merged, low, out=words[block])


def split_exponent_codes(words: npt.NDArray[np.uint16], low: int, codes: _Bytes, rest: _Bytes) -> None:
    """See PlaneKernels."""
    split_exponents(words, codes, rest)
    for block in _blocks(len(words)):
        part = codes[block][: len(words[block])]
        part -= np.uint8(low)
        np.minimum(part, np.uint8(15), out=part)


def merge_exponent_codes(codes: _Bytes, low: int, rest: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(words)):
        part = words[block]
        merge_exponents(codes[block][: len(part)] + np.uint8(low), rest[block], part)


def gather_exponents(words: npt.NDArray[np.uint16], codes: npt.NDArray[np.uint64], beyond: _Bytes) -> int:
    """See PlaneKernels."""
    found = 0
    for block, places in _marked(codes, len(words)):
        beyond[found : found + len(places)] = words[block][places] >> np.uint16(7)
        found += len(places)
    return found


def correct_exponents(codes: npt.NDArray[np.uint64], beyond: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    found = 0
    for block, places in _marked(codes, len(words)):
        part, exponents = words[block], beyond[found : found + len(places)].astype(np.uint16)
        part[places] = part[places] & np.uint16(0x807F) | exponents << np.uint16(7)
        found += len(places)


def split_steps(content: npt.NDArray[np.uint16], base: npt.NDArray[np.uint16], codes: _Bytes) -> int:
    """See PlaneKernels."""
    largest = 0
    for block in _blocks(len(content)):
        steps = np.minimum(zigzag(content[block], base[block]), np.uint16(15))
        largest = max(largest, int(steps.max()))
        codes[block][: len(steps)] = steps
    return largest


def gather_steps(
    content: npt.NDArray[np.uint16],
    base: npt.NDArray[np.uint16],
    codes: npt.NDArray[np.uint64],
    beyond: npt.NDArray[np.uint16],
) -> int:
    """See PlaneKernels."""
    found = 0
    for block, places in _marked(codes, len(content)):
        beyond[found : found + len(places)] = zigzag(content[block][places], base[block][places])
        found += len(places)
    return found


def pair_codes(codes: npt.NDArray[np.uint16], pairs: _Bytes) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(codes)):
        pairs[block] = codes[block] | codes[block] >> np.uint16(4)


def part_codes(pairs: _Bytes, codes: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(codes)):
        both = pairs[block].astype(np.uint16)
        both |= both << np.uint16(4)
        np.bitwise_and(both, np.uint16(0x0F0F), out=codes[block])


def apply_steps(codes: _Bytes, words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(words)):
        part = words[block]
        part[:] = unzigzag(codes[block][: len(part)].astype(np.uint16), part)


def correct_steps(codes: npt.NDArray[np.uint64], beyond: npt.NDArray[np.uint16], words: npt.NDArray[np.uint16]) -> None:
    """See PlaneKernels."""
    found = 0
    for block, places in _marked(codes, len(words)):
        part = words[block]
        # 15 is eight down, 16 is eight up.
        base = unzigzag(np.full(len(places), 16, dtype=np.uint16), part[places])
        part[places] = unzigzag(beyond[found : found + len(places)], base)
        found += len(places)


def split_differences(content: npt.NDArray[np.uint32], base: npt.NDArray[np.uint32], planes: _Bytes) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(content)):
        split_words(zigzag(content[block], base[block]), planes[:, block])


def apply_differences(
    first: _Bytes, second: _Bytes, third: _Bytes, fourth: _Bytes, words: npt.NDArray[np.uint32]
) -> None:
    """See PlaneKernels."""
    for block in _blocks(len(words)):
        codes = fourth[block].astype(np.uint32)
        for plane in (third, second, first):
            codes <<= np.uint32(8)
            codes |= plane[block]
        words[block] = unzigzag(codes, words[block])


def split_words(words: npt.NDArray[_AnyWord], planes: _Bytes) -> None:
    """See PlaneKernels."""
    byte = words.dtype.type(8)
    for block in _blocks(len(words)):
        left = words[block].copy()
        for plane in planes:
            plane[block] = left
            left >>= byte


def xor_planes(planes: _Bytes, words: npt.NDArray[_AnyWord]) -> None:
    """See PlaneKernels."""
    byte = words.dtype.type(8)
    for block in _blocks(len(words)):
        merged = np.zeros(len(words[block]), dtype=words.dtype)
        for plane in planes[::-1]:
            merged <<= byte
            merged |= plane[block]
        words[block] ^= merged
