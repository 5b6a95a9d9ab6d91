"""XPH: floats of 16 bits without a base. Exponents have few values, so their plane is packed; the rest is noise.

SPEC.md, A.2. Rotating each word left by one bit leaves bfloat16's exponent alone in the upper byte, and the sign with
the mantissa in the lower one; of float16 it puts the exponent and three bits of the mantissa together. Splitting off
the exponents: ZipNN (https://arxiv.org/abs/2411.05239). Where 15 exponents are nearly all that occur, as in the weights
of most models, two share a byte: as many bytes in the end, and half of them to find Huffman's code for and to decode.
"""

import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.plane_kernels import Bytes, plane_kernels
from shipd.codecs.sections import pack_codes, pack_entropy, room_for_codes, unpack, unpack_codes, whole_words
from shipproto.frame import Buffer

_WHOLE: Final = 0
_PAIRED: Final = 1
"""What the first byte says of the exponents."""

_OTHER: Final = 15
"""The code of every exponent that is none of 15 in a row; those have 0 to 14."""

_HIGHEST: Final = 256 - _OTHER
"""The highest exponent that 15 in a row can begin with."""

_PAIRED_HEAD: Final = struct.Struct("<BBI")
"""_PAIRED; the first of the 15 exponents; bytes of the packed pairs."""

_SAMPLE: Final = 1024
"""Words by which the 15 are chosen, or at most twice as many."""

_COVERED: Final = 63 / 64
"""Share of the sample that the 15 have to be: every other exponent costs a byte of its own."""


class _ExponentPlane:
    """See Codec."""

    number = 2
    name = "xph"
    word = 2
    delta = False

    def encode(self, content: Buffer, base: Buffer | None, *, dtype: int, most: int) -> bytes | None:
        """See Codec."""
        words = whole_words(content, np.uint16)
        # The plane that is not packed is half of the run: what cannot fit is not even begun.
        if len(content) % self.word or len(words) >= most:
            return None
        low = _most_common(words)
        rest = np.empty(len(words), dtype=np.uint8)
        parts: list[Buffer] = _whole(words, rest) if low is None else _paired(words, low, rest)
        return b"".join((*parts, rest.data)) if sum(map(len, parts)) + len(rest) <= most else None

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        words = whole_words(out, np.uint16)
        if len(out) % self.word:
            raise CodecError(f"a run of {len(out)} bytes is not of whole words")
        end = len(payload) - len(words)
        if end < 1:
            raise CodecError(f"{len(payload)} bytes cannot hold the plane of {len(words)} that is not packed")
        packed, rest = memoryview(payload)[:end], np.frombuffer(payload, dtype=np.uint8, offset=end)
        if packed[0] == _WHOLE:
            plane_kernels(words).merge_exponents(unpack(packed[1:], len(words)), rest, words)
        elif packed[0] == _PAIRED:
            _unpair(packed, rest, words)
        else:
            raise CodecError(f"exponents of kind {packed[0]}")


def _most_common(words: npt.NDArray[np.uint16]) -> int | None:
    """The first of the 15 exponents in a row that most words have; None where those are not nearly all."""
    if not len(words):
        return None
    # An odd step, so that it does not keep step with a tensor's rows.
    sample = words[:: len(words) // _SAMPLE | 1] >> np.uint16(7)
    counts = np.bincount(sample.astype(np.uint8), minlength=256)
    up_to = np.concatenate((np.zeros(1, dtype=counts.dtype), np.cumsum(counts)))
    covered = up_to[_OTHER:] - up_to[:-_OTHER]
    low = int(covered.argmax())
    return low if covered[low] >= _COVERED * len(sample) else None


def _whole(words: npt.NDArray[np.uint16], rest: Bytes) -> list[Buffer]:
    exponents = np.empty(len(words), dtype=np.uint8)
    plane_kernels(words).split_exponents(words, exponents, rest)
    return [bytes((_WHOLE,)), pack_entropy(exponents)]


def _paired(words: npt.NDArray[np.uint16], low: int, rest: Bytes) -> list[Buffer]:
    codes = room_for_codes(len(words))
    kernels = plane_kernels(words)
    kernels.split_exponent_codes(words, low, codes, rest)
    others = np.empty(len(words), dtype=np.uint8)
    others = others[: kernels.gather_exponents(words, codes.view(np.uint64), others)]
    packed = pack_codes(codes, len(words))
    return [_PAIRED_HEAD.pack(_PAIRED, low, len(packed)), packed, pack_entropy(others)]


def _unpair(packed: memoryview, rest: Bytes, words: npt.NDArray[np.uint16]) -> None:
    if len(packed) < _PAIRED_HEAD.size:
        raise CodecError(f"{len(packed)} bytes have no head")
    _, low, size = _PAIRED_HEAD.unpack_from(packed)
    middle = _PAIRED_HEAD.size + size
    if low > _HIGHEST or middle > len(packed):
        raise CodecError(f"15 exponents from {low}, in {size} bytes")
    codes = unpack_codes(packed[_PAIRED_HEAD.size : middle], len(words))
    others = unpack(packed[middle:], int(np.count_nonzero(codes == _OTHER)))
    if (others - np.uint8(low) < _OTHER).any():
        raise CodecError("an exponent by itself that has a code")
    kernels = plane_kernels(words)
    kernels.merge_exponent_codes(codes, low, rest, words)
    if len(others):
        kernels.correct_exponents(codes.view(np.uint64), others, words)


XPH: Final[Codec] = _ExponentPlane()
