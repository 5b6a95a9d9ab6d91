"""F32D: what words of 32 bits changed by. Small differences leave the upper planes empty, and the rest little to say.

SPEC.md, A.6. A difference is the zigzag one of keys (shipd.codecs.words), split into planes of bytes, each packed as
suits it: of one step of a warm optimiser the lowest is noise, the second has few values, and the others are zeros.
"""

from typing import Final

import numpy as np

from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.plane_kernels import plane_kernels
from shipd.codecs.sections import base_of, onto_base, pack_planes, unpack_planes, whole_words
from shipproto.frame import Buffer


class _FloatDelta:
    """See Codec."""

    number = 6
    name = "f32d"
    word = 4
    delta = True

    def encode(self, content: Buffer, base: Buffer | None, *, dtype: int, most: int) -> bytes | None:
        """See Codec."""
        new = whole_words(content, np.uint32)
        old = whole_words(base_of(base, len(content)), np.uint32)
        if len(content) % self.word:
            return None
        planes = np.empty((self.word, len(new)), dtype=np.uint8)
        plane_kernels(new, old).split_differences(new, old, planes)
        packed = pack_planes(planes, most)
        return None if packed is None else b"".join(packed)

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        words = whole_words(out, np.uint32)
        old = whole_words(base_of(base, len(out)), np.uint32)
        if len(out) % self.word:
            raise CodecError(f"a run of {len(out)} bytes is not of whole words")
        first, second, third, fourth = unpack_planes(memoryview(payload), self.word, len(words))
        kernels = plane_kernels(words)
        for piece in onto_base(old, words):
            kernels.apply_differences(first[piece], second[piece], third[piece], fourth[piece], words[piece])


F32D: Final[Codec] = _FloatDelta()
