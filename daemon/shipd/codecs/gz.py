"""GZ, for sparse deltas of 16-bit words over a fast link: gaps and steps in streams of bytes, each through zstd.

numpy and zstandard alone. Layout: SPEC.md, annex A.3.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs.bits import MAX_NUMBER, Reader, check_padding, put_number
from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.words import unzigzag, zigzag
from shipd.codecs.zstd import squeeze_entropy, unsqueeze
from shipproto.frame import Buffer

_STREAMS: Final = 4
_ESCAPE: Final = 255

_BLOCK: Final = 1 << 20
"""Words, and changes, that are worked on at once: bounds memory, and is enough to make numpy's calls cheap."""

_Words = npt.NDArray[np.uint16]
_Bytes = npt.NDArray[np.uint8]
_Places = npt.NDArray[np.uint32]
_Longs = npt.NDArray[np.int64]


class _GapsAndSteps:
    """See Codec."""

    number = 3
    name = "gz"
    word = 2
    delta = True

    def encode(self, content: Buffer, base: Buffer | None, *, dtype: int, most: int) -> bytes | None:
        """See Codec."""
        if base is None or len(base) != len(content):
            raise ValueError("a delta is made from a base of the same size")
        if len(content) % self.word or len(content) // self.word > MAX_NUMBER:
            return None
        payload = _encode(np.frombuffer(content, dtype=np.uint16), np.frombuffer(base, dtype=np.uint16))
        return payload if len(payload) <= most else None

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        if base is None or len(base) != len(out):
            raise ValueError("a delta is applied to a base of the same size")
        if len(out) % self.word or len(out) // self.word > MAX_NUMBER:
            raise CodecError(f"a run of {len(out)} bytes is not coded in words")
        old, new = np.frombuffer(base, dtype=np.uint16), np.frombuffer(out, dtype=np.uint16)
        if old.ctypes.data != new.ctypes.data:
            np.copyto(new, old)
        _decode(memoryview(payload).cast("B"), new)


GZ: Final[Codec] = _GapsAndSteps()


def _encode(content: _Words, base: _Words) -> bytes:
    # One for every four words of a block; used again, because to touch new memory costs as much as to compare.
    unequal = np.empty(-(-min(len(content), _BLOCK) // 32) * 8, dtype=np.bool_)
    found = [
        _changed(content[start : start + _BLOCK], base[start : start + _BLOCK], start, unequal)
        for start in range(0, len(content), _BLOCK)
    ]
    head = bytearray()
    count = sum(len(places) for places, _, _ in found)
    put_number(head, count)
    if not count:
        return bytes(head)
    places, new, old = map(np.concatenate, zip(*found, strict=True))
    streams = tuple(np.empty(count, dtype=np.uint8) for _ in range(_STREAMS))
    far: list[npt.NDArray[np.uint32]] = []
    large: list[npt.NDArray[np.uint16]] = []
    for start in range(0, count, _BLOCK):
        part = slice(start, start + _BLOCK)
        gaps = np.diff(places[part], prepend=places[start - 1] if start else np.uint32(0xFFFFFFFF)) - np.uint32(1)
        pages = gaps >> np.uint32(8)
        codes = zigzag(new[part], old[part])
        steps = (codes - np.uint16(1)) >> np.uint16(1)
        octets = (gaps, np.minimum(pages, _ESCAPE), codes & np.uint16(1), np.minimum(steps, _ESCAPE))
        for stream, values in zip(streams, octets, strict=True):
            np.copyto(stream[part], values, casting="unsafe")
        far.append(pages[pages >= _ESCAPE])
        large.append(steps[steps >= _ESCAPE])
    low, high, signs, magnitudes = streams
    frames = [squeeze_entropy(part.data) for part in (low, high, np.packbits(signs, bitorder="little"), magnitudes)]
    for frame in frames:
        put_number(head, len(frame))
    return b"".join((head, *frames, np.concatenate(far).data, np.concatenate(large).data))


def _changed(new: _Words, old: _Words, start: int, unequal: npt.NDArray[np.bool_]) -> tuple[_Places, _Words, _Words]:
    """Where two blocks differ, counted from ``start`` words before them, and both sides' words there.

    Looks at four words at once, of which nearly all are equal.
    """
    fours = len(new) // 4
    new_fours, old_fours = new[: 4 * fours].view(np.uint64), old[: 4 * fours].view(np.uint64)
    np.not_equal(new_fours, old_fours, out=unequal[:fours])
    # Eight times as many at once, where to find the few is faster than to look at all.
    unequal[fours:] = False
    eights = unequal.view(np.uint64)
    some = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights[some].view(np.bool_))
    at = some[within >> 3] * 8 + (within & 7)
    new_words, old_words = new_fours[at].view(np.uint16), old_fours[at].view(np.uint16)
    within = np.flatnonzero(new_words != old_words)
    places = (at[within >> 2] * 4 + (within & 3) + start).astype(np.uint32)
    new_words, old_words = new_words[within], old_words[within]
    rest = np.flatnonzero(new[4 * fours :] != old[4 * fours :]) + 4 * fours
    if not len(rest):
        return places, new_words, old_words
    return (
        np.append(places, (rest + start).astype(np.uint32)),
        np.append(new_words, new[rest]),
        np.append(old_words, old[rest]),
    )


def _decode(payload: memoryview, run: _Words) -> None:
    """Turn the base into the content, in place."""
    reader = Reader(payload)
    count = reader.number(len(run))
    if not count:
        if len(reader.rest()):
            raise CodecError("something follows where nothing has changed")
        return
    sizes = [reader.number(len(payload)) for _ in range(_STREAMS)]
    rest = reader.rest()
    if sum(sizes) > len(rest):
        raise CodecError(f"streams of {sum(sizes)} bytes in {len(rest)}")
    streams = []
    for size, due in zip(sizes, (count, count, -(-count // 8), count), strict=True):
        streams.append(np.frombuffer(unsqueeze(rest[:size], due), dtype=np.uint8))
        rest = rest[size:]
    low, high, signs, steps = streams
    check_padding(signs.data, count)
    far, large = _escapes(rest, int(np.count_nonzero(high == _ESCAPE)), int(np.count_nonzero(steps == _ESCAPE)))
    if len(far) and far.max() > len(run) >> 8:
        raise CodecError("a gap that is longer than the run")
    last = -1
    for start in range(0, count, _BLOCK):
        part = slice(start, min(start + _BLOCK, count))
        gaps, far = _with_escapes(high[part], far)
        gaps = (gaps << 8) + low[part]
        places = np.cumsum(gaps + 1) + last
        last = int(places[-1])
        if last >= len(run):
            raise CodecError("a change behind the end of the run")
        magnitudes, large = _with_escapes(steps[part], large)
        negative = np.unpackbits(signs[start // 8 : -(-part.stop // 8)], count=len(places), bitorder="little")
        codes = magnitudes * 2 + 2 - negative
        if codes.max() > 0xFFFF:
            raise CodecError("a change of 32768 up, which is said as one down")
        run[places] = unzigzag(codes.astype(np.uint16), run[places])


def _escapes(rest: memoryview, far: int, large: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
    """So many of both kinds, which is all of ``rest``."""
    if len(rest) != 4 * far + 2 * large:
        raise CodecError(f"{len(rest)} bytes of escapes where {4 * far + 2 * large} are due")
    pages = np.frombuffer(rest[: 4 * far], dtype=np.uint32)
    magnitudes = np.frombuffer(rest[4 * far :], dtype=np.uint16)
    if far and pages.min() < _ESCAPE:
        raise CodecError("a gap that was not to be escaped")
    if large and not _ESCAPE <= magnitudes.min() <= magnitudes.max() < 0x8000:
        raise CodecError("a step that was not to be escaped, or one of more than 32768")
    return pages, magnitudes


def _with_escapes(
    octets: _Bytes, escapes: npt.NDArray[np.unsignedinteger]
) -> tuple[_Longs, npt.NDArray[np.unsignedinteger]]:
    """The values of ``octets``, those that did not fit taken from ``escapes``; and the escapes that are left."""
    values: _Longs = octets.astype(np.int64)
    which = np.flatnonzero(octets == _ESCAPE)
    values[which] = escapes[: len(which)]
    return values, escapes[len(which) :]
