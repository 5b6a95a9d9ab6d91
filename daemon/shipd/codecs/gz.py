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
_Places = npt.NDArray[np.int64]


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
    streams: tuple[list[_Bytes], ...] = tuple([] for _ in range(_STREAMS))
    far: list[npt.NDArray[np.uint32]] = []
    high: list[npt.NDArray[np.uint16]] = []
    unequal = np.empty(-(-min(len(content), _BLOCK) // 32) * 8, dtype=np.bool_)
    last = -1
    for start in range(0, len(content), _BLOCK):
        new, old = content[start : start + _BLOCK], base[start : start + _BLOCK]
        places = _changed(new, old, unequal)
        if not len(places):
            continue
        gaps = np.diff(places, prepend=last - start) - 1
        last = int(places[-1]) + start
        pages = gaps >> 8
        codes = zigzag(new[places], old[places])
        magnitudes = (codes - np.uint16(1)) >> np.uint16(1)
        octets = (gaps, np.minimum(pages, _ESCAPE), codes & np.uint16(1), np.minimum(magnitudes, np.uint16(_ESCAPE)))
        for stream, values in zip(streams, octets, strict=True):
            stream.append(values.astype(np.uint8))
        far.append(pages[pages >= _ESCAPE].astype(np.uint32))
        high.append(magnitudes[magnitudes >= _ESCAPE])
    head = bytearray()
    put_number(head, sum(map(len, streams[0])))
    if not streams[0]:
        return bytes(head)
    low, page, sign, magnitude = map(np.concatenate, streams)
    frames = [squeeze_entropy(part.data) for part in (low, page, np.packbits(sign, bitorder="little"), magnitude)]
    for frame in frames:
        put_number(head, len(frame))
    return b"".join((head, *frames, np.concatenate(far).data, np.concatenate(high).data))


def _changed(new: _Words, old: _Words, unequal: npt.NDArray[np.bool_]) -> _Places:
    """Where two blocks differ. Looks at four words at once, of which nearly all are equal.

    unequal     for every four words of a block; used again, because to touch new memory costs as much as to compare
    """
    fours = len(new) // 4
    new_fours, old_fours = new[: 4 * fours].view(np.uint64), old[: 4 * fours].view(np.uint64)
    np.not_equal(new_fours, old_fours, out=unequal[:fours])
    # Eight times as many at once where to find the few is faster than to look at all.
    unequal[fours:] = False
    some = np.flatnonzero(unequal.view(np.uint64) != 0)
    within = np.flatnonzero(unequal.reshape(-1, 8)[some])
    at = some[within >> 3] * 8 + (within & 7)
    differ = (new_fours[at] ^ old_fours[at]).view(np.uint16) != 0
    within = np.flatnonzero(differ)
    places = at[within >> 2] * 4 + (within & 3)
    rest = np.flatnonzero(new[4 * fours :] != old[4 * fours :]) + 4 * fours
    return np.concatenate((places, rest)) if len(rest) else places


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
    low, page, sign, magnitude = streams
    check_padding(sign.data, count)
    far, high = int(np.count_nonzero(page == _ESCAPE)), int(np.count_nonzero(magnitude == _ESCAPE))
    if len(rest) != 4 * far + 2 * high:
        raise CodecError(f"{len(rest)} bytes of escapes where {4 * far + 2 * high} are due")
    pages = np.frombuffer(rest[: 4 * far], dtype=np.uint32)
    magnitudes = np.frombuffer(rest[4 * far :], dtype=np.uint16)
    if far and not _ESCAPE <= pages.min() <= pages.max() <= len(run) >> 8:
        raise CodecError("a gap that was not to be escaped, or one longer than the run")
    if high and not _ESCAPE <= magnitudes.min() <= magnitudes.max() < 0x8000:
        raise CodecError("a step that was not to be escaped, or one of more than 32768")
    last = -1
    for start in range(0, count, _BLOCK):
        part = slice(start, min(start + _BLOCK, count))
        gaps, pages = _with_escapes(page[part], pages)
        gaps = (gaps << 8) + low[part]
        places = np.cumsum(gaps + 1) + last
        last = int(places[-1])
        if last >= len(run):
            raise CodecError("a change behind the end of the run")
        steps, magnitudes = _with_escapes(magnitude[part], magnitudes)
        signs = np.unpackbits(sign[start // 8 : -(-part.stop // 8)], count=len(places), bitorder="little")
        codes = steps * 2 + 2 - signs
        if codes.max() > 0xFFFF:
            raise CodecError("a change of 32768 up, which is said as one down")
        run[places] = unzigzag(codes.astype(np.uint16), run[places])


def _with_escapes(
    octets: _Bytes, escapes: npt.NDArray[np.unsignedinteger]
) -> tuple[_Places, npt.NDArray[np.unsignedinteger]]:
    """The values of ``octets``, those that did not fit taken from ``escapes``; and the escapes that are left."""
    values: _Places = octets.astype(np.int64)
    which = np.flatnonzero(octets == _ESCAPE)
    values[which] = escapes[: len(which)]
    return values, escapes[len(which) :]
