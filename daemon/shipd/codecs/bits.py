"""Numbers and bits inside payloads: how a codec writes what is not a whole number of words. numpy alone.

    number      7 bits a byte, lowest first, the high bit set in every byte but the last; no longer than it must be
    bit string  bit i is bit i % 8 of byte i // 8, the lowest being bit 0; the last byte is filled up with zeros
    unary       the value v as v zeros and a one, in a bit string
    fields      values of the same few bits each, in a bit string, the lowest bit of each first

All of it is normative, in SPEC.md, annex A.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs.codec import CodecError

MAX_NUMBER: Final = (1 << 28) - 1
"""Four bytes' worth: above anything that a run has to count."""

_SLICE: Final = 1 << 16
"""Bytes of a bit string that are looked at at once: its bits and their places take up to 72 times as many."""


def put_number(into: bytearray, value: int) -> None:
    """Append ``value``, 0 to MAX_NUMBER."""
    while value > 0x7F:
        into.append((value & 0x7F) | 0x80)
        value >>= 7
    into.append(value)


def number_size(value: int) -> int:
    """Bytes that ``put_number`` would append."""
    return max(1, -(-value.bit_length() // 7))


class Reader:
    """Takes the head of a payload apart; CodecError where it ends too early or is not in its only form."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._at = 0

    def byte(self) -> int:
        """One byte."""
        if self._at >= len(self._payload):
            raise CodecError("a payload ends inside its head")
        self._at += 1
        return self._payload[self._at - 1]

    def number(self, most: int) -> int:
        """One number, at most ``most``."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift >= MAX_NUMBER.bit_length():
                raise CodecError("a number is longer than any that can be meant")
        if shift and not byte:
            raise CodecError("a number is longer than it must be")
        if value > most:
            raise CodecError(f"{value} where at most {most} can be")
        return value

    def rest(self) -> memoryview:
        """Everything that has not been taken."""
        return self._payload[self._at :]


def put_unary(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The bit string of ``values``, one after the other; u8[bytes]."""
    ends = np.cumsum(values, dtype=np.int64)
    ends += np.arange(len(values))
    bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    bits[ends] = 1
    return np.packbits(bits, bitorder="little")


def take_unary(part: npt.NDArray[np.uint8], count: int, most: int) -> npt.NDArray[np.uint8]:
    """The ``count`` values of a bit string of nothing else, each at most ``most``; u8[count]. Raises CodecError."""
    if count > 8 * len(part):
        raise CodecError(f"{len(part)} bytes cannot have {count} values")
    if len(part) and not part[-1]:
        raise CodecError("a unary part is longer than it must be")
    values = np.empty(count, dtype=np.uint8)
    done, before = 0, -1
    for start in range(0, len(part), _SLICE):
        ends = np.flatnonzero(np.unpackbits(part[start : start + _SLICE], bitorder="little"))
        if not len(ends):
            continue
        ends += 8 * start
        if done + len(ends) > count:
            raise CodecError(f"a unary part has more than {count} values")
        zeros = np.diff(ends, prepend=before)
        if zeros.max() > most + 1:
            raise CodecError(f"a unary value is above {most}")
        zeros -= 1
        values[done : done + len(ends)] = zeros
        done, before = done + len(ends), int(ends[-1])
    if done != count:
        raise CodecError(f"a unary part has {done} values where {count} are due")
    return values


def put_fields(values: npt.NDArray[np.uint32], width: int) -> npt.NDArray[np.uint8]:
    """The lowest ``width`` bits of each value as u8[len(values) * width] of 0 and 1, not packed yet."""
    places = np.arange(width, dtype=np.uint32)
    return ((values[:, None] >> places) & np.uint32(1)).astype(np.uint8).reshape(-1)


def take_fields(bits: npt.NDArray[np.uint8], count: int, width: int) -> npt.NDArray[np.uint32]:
    """The ``count`` values whose ``width`` bits each lie unpacked in ``bits``; u32."""
    values = np.zeros(count, dtype=np.uint32)
    for place in range(width):
        values |= bits[place::width].astype(np.uint32) << np.uint32(place)
    return values


def check_padding(part: memoryview, bits: int) -> None:
    """That what fills up the last byte of a bit string of ``bits`` bits is zeros. Raises CodecError."""
    if bits % 8 and part[-1] >> (bits % 8):
        raise CodecError("what fills up the last byte of a part is not zero")
