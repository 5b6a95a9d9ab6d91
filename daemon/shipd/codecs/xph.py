"""XPH: floats of 16 bits without a base. Exponents have few values, so their plane is packed; the rest is noise.

SPEC.md, A.2. Rotating each word left by one bit leaves bfloat16's exponent alone in the upper byte, and the sign with
the mantissa in the lower one; of float16 it puts the exponent and three bits of the mantissa together. Splitting off
the exponents: ZipNN (https://arxiv.org/abs/2411.05239).
"""

from typing import Final

import numpy as np

from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.plane_kernels import plane_kernels
from shipd.codecs.sections import pack_entropy, unpack, whole_words
from shipproto.frame import Buffer


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
        if len(content) % self.word or len(words) > most:
            return None
        exponents, rest = np.empty((2, len(words)), dtype=np.uint8)
        plane_kernels(words).split_exponents(words, exponents, rest)
        packed = pack_entropy(exponents)
        return b"".join((packed, rest.data)) if len(packed) + len(rest) <= most else None

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        words = whole_words(out, np.uint16)
        if len(out) % self.word:
            raise CodecError(f"a run of {len(out)} bytes is not of whole words")
        packed = len(payload) - len(words)
        if packed < 0:
            raise CodecError(f"{len(payload)} bytes cannot hold the plane of {len(words)} that is not packed")
        exponents = unpack(memoryview(payload)[:packed], len(words))
        rest = np.frombuffer(payload, dtype=np.uint8, offset=packed)
        plane_kernels(words).merge_exponents(exponents, rest, words)


XPH: Final[Codec] = _ExponentPlane()
