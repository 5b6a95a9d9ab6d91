"""DUH: what most of the words of 16 bits changed by, where many have. Small steps are common, and get short codes.

SPEC.md, A.5. A step is the zigzag difference of keys (shipd.codecs.words): one byte for nearly all of them, and the few
that are larger by themselves.
"""

import struct
from typing import Final

import numpy as np

from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.plane_kernels import plane_kernels
from shipd.codecs.sections import base_of, onto_base, pack_entropy, unpack, whole_words
from shipd.codecs.words import unzigzag, zigzag
from shipproto.frame import Buffer

_ESCAPE: Final = 255
"""The byte that stands for this step and every larger one."""

_HEAD: Final = struct.Struct("<I")
"""How many steps are escaped."""


class _DenseDelta:
    """See Codec."""

    number = 5
    name = "duh"
    word = 2
    delta = True

    def encode(self, content: Buffer, base: Buffer | None, *, dtype: int, most: int) -> bytes | None:
        """See Codec."""
        new = whole_words(content, np.uint16)
        old = whole_words(base_of(base, len(content)), np.uint16)
        if len(content) % self.word:
            return None
        codes = np.empty(len(new), dtype=np.uint8)
        largest = plane_kernels(new, old).split_steps(new, old, codes)
        escaped = np.empty(0, dtype=np.uint16)
        if largest >= _ESCAPE:
            places = np.flatnonzero(codes == _ESCAPE)
            escaped = zigzag(new[places], old[places])
        packed = pack_entropy(codes)
        if _HEAD.size + len(packed) + escaped.nbytes > most:
            return None
        return b"".join((_HEAD.pack(len(escaped)), packed, escaped.tobytes()))

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        words = whole_words(out, np.uint16)
        old = whole_words(base_of(base, len(out)), np.uint16)
        if len(out) % self.word:
            raise CodecError(f"a run of {len(out)} bytes is not of whole words")
        if len(payload) < _HEAD.size:
            raise CodecError(f"a payload of {len(payload)} bytes has no head")
        count = _HEAD.unpack_from(payload)[0]
        end = len(payload) - count * self.word
        if end < _HEAD.size:
            raise CodecError(f"{len(payload)} bytes cannot hold {count} escaped steps")
        codes = unpack(memoryview(payload)[_HEAD.size : end], len(words))
        marked = codes == _ESCAPE
        if np.count_nonzero(marked) != count:
            raise CodecError(f"{np.count_nonzero(marked)} steps are marked as escaped, and {count} are")
        # Before anything is written, since the base may be where it is written to.
        places = np.flatnonzero(marked) if count else np.empty(0, dtype=np.intp)
        escaped = np.frombuffer(payload, dtype=np.uint16, offset=end)
        if (escaped < _ESCAPE).any():
            raise CodecError("a step is escaped that has a byte of its own")
        moved = unzigzag(escaped, old[places])
        kernels = plane_kernels(words)
        for piece in onto_base(old, words):
            kernels.apply_steps(codes[piece], words[piece])
        words[places] = moved


DUH: Final[Codec] = _DenseDelta()
