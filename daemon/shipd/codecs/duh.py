"""DUH: what most of the words of 16 bits changed by, where many have. Small steps are common, and get short codes.

SPEC.md, A.5. A step is the zigzag difference of keys (shipd.codecs.words). Two steps share a byte, because Huffman's
code spends a whole bit on the most common one: with a byte each, words of which a fifth changed take a quarter more.
Of the steps that are too large for half a byte nearly all fit one, and the others come by themselves.
"""

import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.plane_kernels import Bytes, plane_kernels
from shipd.codecs.sections import (
    base_of,
    onto_base,
    pack_codes,
    pack_entropy,
    room_for_codes,
    unpack,
    unpack_codes,
    whole_words,
)
from shipproto.frame import Buffer

_MEDIUM: Final = 15
"""The least step that has no half byte of its own; the half byte of all of those."""

_LARGE: Final = _MEDIUM + 255
"""The least step that has no byte of its own either; 255 is the byte of all of those."""

_HEAD: Final = struct.Struct("<III")
"""Bytes of the packed pairs; how many steps are medium or large; how many are large."""


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
        codes = room_for_codes(len(new))
        kernels = plane_kernels(new, old)
        beyond = np.empty(len(new), dtype=np.uint16)
        some = kernels.split_steps(new, old, codes) == _MEDIUM
        beyond = beyond[: kernels.gather_steps(new, old, codes.view(np.uint64), beyond) if some else 0]
        large = beyond[beyond >= _LARGE]
        packed = pack_codes(codes, len(new))
        packed_medium = pack_entropy((np.minimum(beyond, _LARGE) - np.uint16(_MEDIUM)).astype(np.uint8))
        if _HEAD.size + len(packed) + len(packed_medium) + large.nbytes > most:
            return None
        return b"".join((_HEAD.pack(len(packed), len(beyond), len(large)), packed, packed_medium, large.tobytes()))

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        words = whole_words(out, np.uint16)
        old = whole_words(base_of(base, len(out)), np.uint16)
        if len(out) % self.word:
            raise CodecError(f"a run of {len(out)} bytes is not of whole words")
        codes, beyond = _read(memoryview(payload), len(words))
        marked = np.count_nonzero(codes == _MEDIUM)
        if marked != len(beyond):
            raise CodecError(f"{marked} steps are marked as too large, and {len(beyond)} are")
        kernels = plane_kernels(words)
        for piece in onto_base(old, words):
            kernels.apply_steps(codes[piece], words[piece])
        if marked:
            kernels.correct_steps(codes.view(np.uint64), beyond, words)


def _read(payload: memoryview, words: int) -> tuple[Bytes, npt.NDArray[np.uint16]]:
    """The code of each step, and those steps that are too large for theirs."""
    if len(payload) < _HEAD.size:
        raise CodecError(f"a payload of {len(payload)} bytes has no head")
    size, count, large_count = _HEAD.unpack_from(payload)
    middle, end = _HEAD.size + size, len(payload) - 2 * large_count
    if middle > end or count > words:
        raise CodecError(f"{len(payload)} bytes for {words} words cannot hold {size}, {count} and {large_count} steps")
    codes = unpack_codes(payload[_HEAD.size : middle], words)
    medium = unpack(payload[middle:end], count)
    large = np.frombuffer(payload, dtype=np.uint16, offset=end)
    marked = medium == _LARGE - _MEDIUM
    if np.count_nonzero(marked) != large_count or (large < _LARGE).any():
        raise CodecError(f"{large_count} large steps, not all of which are marked as such, and large")
    beyond = medium + np.uint16(_MEDIUM)
    beyond[marked] = large
    return codes, beyond


DUH: Final[Codec] = _DenseDelta()
