"""Which kernels split words into planes and put them together again: compiled where that is possible, else numpy's.

Both write the same bytes. What they are given has been checked: kernels look at no length but that of the words.
"""

from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from shipd.codecs import planes_numpy
from shipd.codecs.compiled import kernels

Bytes = npt.NDArray[np.uint8]
AnyWord = TypeVar("AnyWord", bound=np.unsignedinteger[Any])


class PlaneKernels(Protocol):
    """What there is to call. All arrays are C-contiguous and aligned; n is the number of words."""

    def split_exponents(self, words: npt.NDArray[np.uint16], exponents: Bytes, rest: Bytes) -> None:
        """Each word rotated left by one bit: the upper byte into ``exponents[n]``, the lower one into ``rest[n]``."""

    def merge_exponents(self, exponents: Bytes, rest: Bytes, words: npt.NDArray[np.uint16]) -> None:
        """What split_exponents was given."""

    def split_exponent_codes(self, words: npt.NDArray[np.uint16], low: int, codes: Bytes, rest: Bytes) -> None:
        """As split_exponents, with each exponent less ``low`` in ``codes[n]``, and 15 for those outside of 0 to 14."""

    def merge_exponent_codes(self, codes: Bytes, low: int, rest: Bytes, words: npt.NDArray[np.uint16]) -> None:
        """What split_exponent_codes was given, but for the words whose code is 15."""

    def gather_exponents(self, words: npt.NDArray[np.uint16], codes: npt.NDArray[np.uint64], beyond: Bytes) -> int:
        """The exponent of each word whose code is 15, one after the other into ``beyond[n]``; how many those are.

        codes   of split_exponent_codes, eight in each number; zeros after the last word
        """

    def correct_exponents(self, codes: npt.NDArray[np.uint64], beyond: Bytes, words: npt.NDArray[np.uint16]) -> None:
        """After merge_exponent_codes: give the words whose code is 15 their exponents. There are as many of each."""

    def pair_codes(self, codes: npt.NDArray[np.uint16], pairs: Bytes) -> None:
        """Two bytes below 16 each into one: the first (the lower byte of each code) is its lower half."""

    def part_codes(self, pairs: Bytes, codes: npt.NDArray[np.uint16]) -> None:
        """What pair_codes was given."""

    def split_steps(self, content: npt.NDArray[np.uint16], base: npt.NDArray[np.uint16], codes: Bytes) -> int:
        """How far each word is from the base's, as zigzag (shipd.codecs.words) and at most 15; the largest of these."""

    def gather_steps(
        self,
        content: npt.NDArray[np.uint16],
        base: npt.NDArray[np.uint16],
        codes: npt.NDArray[np.uint64],
        beyond: npt.NDArray[np.uint16],
    ) -> int:
        """The whole step of each word whose code is 15, one after the other into ``beyond[n]``; how many those are.

        codes   of split_steps, eight in each number; zeros after the last word
        """

    def apply_steps(self, codes: Bytes, words: npt.NDArray[np.uint16]) -> None:
        """Move each word of a base so far as ``codes[m]`` says, in place."""

    def correct_steps(
        self, codes: npt.NDArray[np.uint64], beyond: npt.NDArray[np.uint16], words: npt.NDArray[np.uint16]
    ) -> None:
        """After apply_steps: move what was moved by 15 as far as gather_steps has found. There are as many of each."""

    def split_differences(self, content: npt.NDArray[np.uint32], base: npt.NDArray[np.uint32], planes: Bytes) -> None:
        """How far each word is from the base's, as zigzag: byte k, the lowest first, into ``planes[k]`` of [4, n]."""

    def apply_differences(
        self, first: Bytes, second: Bytes, third: Bytes, fourth: Bytes, words: npt.NDArray[np.uint32]
    ) -> None:
        """Move each word of a base so far as the planes of split_differences say, in place."""

    def split_words(self, words: npt.NDArray[AnyWord], planes: Bytes) -> None:
        """Byte k of each word, the lowest first, into ``planes[k]`` of [bytes of a word, n]."""

    def xor_planes(self, planes: Bytes, words: npt.NDArray[AnyWord]) -> None:
        """XOR the words that split_words was given into ``words``."""


def plane_kernels(*words: npt.NDArray[AnyWord]) -> PlaneKernels:
    """The kernels for these arrays: the compiled ones take no word that lies across its alignment."""
    compiled = kernels()
    if compiled is not None and all(array.flags.aligned for array in words):
        return compiled.planes
    return planes_numpy
