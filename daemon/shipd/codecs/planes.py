"""PLANES: any dtype, with a base or without. Bytes of one kind lie together, and each kind is packed as suits it.

SPEC.md, A.7. What has a base is XORed with it first where that is shorter, so that what did not change is zeros.
"""

from typing import Any, Final

import numpy as np

from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.plane_kernels import Bytes, plane_kernels
from shipd.codecs.sections import base_of, lay_base, pack_planes, unpack_planes, whole_words
from shipproto.dtypes import BY_CODE
from shipproto.frame import Buffer

_WORDS: Final[dict[int, type[np.unsignedinteger[Any]]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""The types of words, by their bytes."""

_XORED: Final = 1
"""Flag: the content is XORed with the base."""

_HEAD: Final = 2
"""Bytes: those of a word, and flags."""

_SAMPLE: Final = 64 * 1024
"""Bytes of a run of unknown dtype by which the length of its words is chosen."""

_PLAINLY_SHORT: Final = 4
"""How many times shorter than the content an XORed payload is that is not compared with one that is not."""


class _Planes:
    """See Codec. A base may be there or not; both sides need it where the payload says that it was used."""

    number = 7
    name = "planes"
    word = 1
    delta = False

    def encode(self, content: Buffer, base: Buffer | None, *, dtype: int, most: int) -> bytes | None:
        """See Codec."""
        plain = whole_words(content, np.uint8)
        if base is None:
            return _encode(plain, _width(dtype, plain), 0, most)
        xored = plain ^ whole_words(base_of(base, len(content)), np.uint8)
        found = _encode(xored, _width(dtype, xored), _XORED, most)
        if found is not None and len(found) * _PLAINLY_SHORT <= len(content):
            return found
        shorter = _encode(plain, _width(dtype, plain), 0, most if found is None else len(found) - 1)
        return found if shorter is None else shorter

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        if len(payload) < _HEAD:
            raise CodecError(f"a payload of {len(payload)} bytes has no head")
        width, flags = payload[0], payload[1]
        if width not in _WORDS or flags not in (0, _XORED):
            raise CodecError(f"words of {width} bytes with flags {flags:#x}")
        if flags and base is None:
            raise CodecError("a payload that needs a base")
        words = whole_words(out, _WORDS[width])
        end = len(payload) - len(out) % width
        if end < _HEAD:
            raise CodecError(f"{len(payload)} bytes cannot hold what is left of {len(out)}")
        planes = unpack_planes(memoryview(payload)[_HEAD:end], width, len(words))
        target = whole_words(out, np.uint8)
        if flags:
            lay_base(whole_words(base_of(base, len(out)), np.uint8), target)
        else:
            target[:] = 0
        if width == 1:
            target ^= planes[0]
        else:
            plane_kernels(words).xor_planes(np.stack(planes), words)
            target[words.nbytes :] ^= np.frombuffer(payload, dtype=np.uint8, offset=end)


def _encode(content: Bytes, width: int, flags: int, most: int) -> bytes | None:
    words = whole_words(content.data, _WORDS[width])
    rest = content[words.nbytes :]
    planes = np.empty((width, len(words)), dtype=np.uint8) if width > 1 else content.reshape(1, -1)
    if width > 1:
        plane_kernels(words).split_words(words, planes)
    packed = pack_planes(planes, most - _HEAD - len(rest))
    return None if packed is None else b"".join((bytes((width, flags)), *packed, rest.data))


def _width(dtype: int, content: Bytes) -> int:
    """How many bytes the words have that a run of this dtype is split as."""
    known = BY_CODE.get(dtype)
    if known is not None:
        # A complex number is two words.
        return known.itemsize // 2 if known.name.startswith("complex") else known.itemsize
    sample = content[:_SAMPLE]
    lengths = {width: len(_encode(sample, width, 0, 2 * _SAMPLE) or sample) for width in _WORDS}
    return min(lengths, key=lengths.__getitem__)


PLANES: Final[Codec] = _Planes()
