"""Planes in payloads: a run as whole words, and each plane of their bytes as it is or as a zstd frame.

A packed plane is its own bytes, or one zstd frame of them that is shorter. How long the plane is follows from the run,
so that the length alone says which it is.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs.codec import CodecError
from shipd.codecs.plane_kernels import AnyWord, Bytes, plane_kernels
from shipd.codecs.zstd import squeeze, squeeze_entropy, unsqueeze
from shipproto.frame import Buffer

_SAMPLE: Final = 16 * 1024
"""Bytes of a plane that are packed both ways to see which is shorter; what is not twice as long is packed whole."""

_LENGTH: Final = np.dtype("<u4")
"""Of a packed plane."""

_PIECE: Final = 128 * 1024
"""Bytes of a base that are copied at a time: they are still in the cache when they are changed."""


def pack_entropy(plane: Bytes) -> Buffer:
    """A plane that is known to have bytes of uneven frequency and no repetitions."""
    return _shorter(plane, squeeze_entropy(plane.data))


def pack_best(plane: Bytes) -> Buffer:
    """A plane of which nothing is known: the better setting of zstd, or none."""
    if len(plane) < 2 * _SAMPLE:
        return _shorter(plane, min(squeeze_entropy(plane.data), squeeze(plane.data), key=len))
    middle = len(plane) // 2
    sample = plane[middle : middle + _SAMPLE].data
    # Of noise the first is done in no time, so noise needs no test of its own.
    better = squeeze_entropy if len(squeeze_entropy(sample)) <= len(squeeze(sample)) else squeeze
    return _shorter(plane, better(plane.data))


def _shorter(plane: Bytes, frame: bytes) -> Buffer:
    return frame if len(frame) < len(plane) else plane.data


def unpack(section: memoryview, size: int) -> Bytes:
    """The plane of ``size`` bytes that ``section`` is. May be a view of it, and read-only. Raises CodecError."""
    if len(section) > size:
        raise CodecError(f"a packed plane of {len(section)} bytes where {size} do")
    return np.frombuffer(section if len(section) == size else unsqueeze(section, size), dtype=np.uint8)


def pack_planes(planes: Bytes, most: int) -> list[Buffer] | None:
    """The packed planes of [planes, words] and, before them, their lengths; None beyond ``most`` bytes."""
    parts: list[Buffer] = [b""]
    left = most - _LENGTH.itemsize * len(planes)
    for plane in planes:
        parts.append(pack_best(plane))
        left -= len(parts[-1])
        if left < 0:
            return None
    parts[0] = np.array([len(part) for part in parts[1:]], dtype=_LENGTH).tobytes()
    return parts


def unpack_planes(payload: memoryview, planes: int, size: int) -> list[Bytes]:
    """The ``planes`` planes of ``size`` bytes that pack_planes has made ``payload`` of. Raises CodecError."""
    at = _LENGTH.itemsize * planes
    if len(payload) < at:
        raise CodecError(f"{len(payload)} bytes cannot hold the lengths of {planes} planes")
    lengths: list[int] = np.frombuffer(payload, dtype=_LENGTH, count=planes).tolist()
    if sum(lengths) != len(payload) - at:
        raise CodecError(f"planes of {sum(lengths)} bytes in {len(payload) - at}")
    unpacked = []
    for length in lengths:
        unpacked.append(unpack(payload[at : at + length], size))
        at += length
    return unpacked


def room_for_codes(words: int) -> Bytes:
    """A byte for each word, and zeros up to a whole number of eight."""
    codes = np.empty(-(-words // 8) * 8, dtype=np.uint8)
    codes[words:] = 0
    return codes


def pack_codes(codes: Bytes, words: int) -> Buffer:
    """A packed plane of ``words`` codes below 16, two to a byte; ``codes`` of room_for_codes."""
    pairs = np.empty((words + 1) // 2, dtype=np.uint8)
    halves = codes.view(np.uint16)[: len(pairs)]
    plane_kernels(halves).pair_codes(halves, pairs)
    return pack_entropy(pairs)


def unpack_codes(section: memoryview, words: int) -> Bytes:
    """The codes that pack_codes has made ``section`` of, as room_for_codes gives. Raises CodecError."""
    pairs = unpack(section, (words + 1) // 2)
    codes = room_for_codes(words)
    halves = codes.view(np.uint16)[: len(pairs)]
    plane_kernels(halves).part_codes(pairs, halves)
    if codes[words:].any():
        raise CodecError("a code after the last word")
    return codes


def whole_words(run: Buffer, word: type[AnyWord]) -> npt.NDArray[AnyWord]:
    """A run, or as much of one as is whole, as words: a view, writable where ``run`` is."""
    return np.frombuffer(run, dtype=word, count=len(run) // np.dtype(word).itemsize)


def base_of(base: Buffer | None, size: int) -> Buffer:
    """The base of a run of ``size`` bytes. Raises ValueError where it is none: that is the caller's mistake."""
    if base is None or len(base) != size:
        raise ValueError(f"a delta of {size} bytes needs a base of as many")
    return base


def lay_base(base: npt.NDArray[AnyWord], out: npt.NDArray[AnyWord]) -> None:
    """Copy ``base`` into ``out``, unless it is the same memory."""
    if not _same(base, out):
        np.copyto(out, base)


def onto_base(base: npt.NDArray[AnyWord], out: npt.NDArray[AnyWord]) -> Iterator[slice]:
    """lay_base piece by piece, each of which may be changed as soon as it is given: it is in the cache then."""
    if _same(base, out):
        yield slice(0, len(out))
        return
    step = _PIECE // out.itemsize
    for start in range(0, len(out), step):
        piece = slice(start, start + step)
        out[piece] = base[piece]
        yield piece


def _same(one: npt.NDArray[AnyWord], other: npt.NDArray[AnyWord]) -> bool:
    return bool(one.__array_interface__["data"][0] == other.__array_interface__["data"][0])
