"""Floats as whole numbers: an order of bit patterns in which neighbours differ by one, small differences small codes.

A float's bit pattern is sign and magnitude. ``key`` turns it into a number that grows with the float, so that one unit
in the last place is a difference of one, also across zero. It is a bijection of all patterns: -0.0, infinities and the
payloads of NaNs are patterns like any other, and two of them are equal only where every bit is.

``zigzag`` of a difference of keys is 0, 1, 2, 3, 4 for 0, -1, 1, -2, 2; differences wrap around at the word's width.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

_Word = TypeVar("_Word", np.uint16, np.uint32)


def key(words: npt.NDArray[_Word]) -> npt.NDArray[_Word]:
    """The key of each bit pattern: with the sign bit set where it was clear, else with every bit flipped."""
    bits = words.dtype.itemsize * 8
    # All ones where the sign is set, else the sign bit alone.
    flip = (words >> words.dtype.type(bits - 1)) * words.dtype.type((1 << (bits - 1)) - 1)
    return words ^ (flip + words.dtype.type(1 << (bits - 1)))


def unkey(keys: npt.NDArray[_Word]) -> npt.NDArray[_Word]:
    """The bit pattern of each key."""
    bits = keys.dtype.itemsize * 8
    top = keys.dtype.type(1 << (bits - 1))
    flip = ((~keys) >> keys.dtype.type(bits - 1)) * keys.dtype.type((1 << (bits - 1)) - 1)
    return keys ^ (flip + top)


def zigzag(content: npt.NDArray[_Word], base: npt.NDArray[_Word]) -> npt.NDArray[_Word]:
    """For each word how far its key is from that of the base's, as zigzag."""
    difference = key(content) - key(base)
    bits = difference.dtype.itemsize * 8
    negative = difference >> difference.dtype.type(bits - 1)
    codes: npt.NDArray[_Word] = (difference << difference.dtype.type(1)) ^ (~negative + negative.dtype.type(1))
    return codes


def unzigzag(codes: npt.NDArray[_Word], base: npt.NDArray[_Word]) -> npt.NDArray[_Word]:
    """The words that are so far from ``base``."""
    one = codes.dtype.type(1)
    difference = (codes >> one) ^ (~(codes & one) + one)
    return unkey(key(base) + difference)
