"""Streams of frames as a fuzzer sees them: checks and numbers are put right later, so that mutations get past them."""

import struct
from collections.abc import Iterator
from typing import Final

from shipproto.frame import PRELUDE_SIZE, encode_frame
from shipproto.limits import MAX_HEADER
from tests.support import naive

_RECORD: Final = struct.Struct(">BBHHB")
"""A frame as the fuzzer sees it: type, flags, lengths of header and payload, and what is wrong with it. The sequence
number and the checks are put right, so that mutations get past them."""


def records(stream: bytes) -> bytes:
    """A stream of frames as records."""
    return b"".join(
        _RECORD.pack(frame.kind, frame.flags, len(frame.header), len(frame.payload), 0) + frame.header + frame.payload
        for frame in naive.frames(stream)
    )


def framed(data: bytes) -> Iterator[bytes]:
    """The frames that records stand for. Bits of the last byte: damage the header, or the payload, or skip a number."""
    sequence = at = 0
    while at + _RECORD.size <= len(data):
        kind, flags, head, body, wrong = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        raw_header, payload = data[at : at + head][:MAX_HEADER], data[at + head : at + head + body]
        at += head + body
        frame = bytearray(encode_frame(kind, flags, sequence, raw_header, payload) + payload)
        if wrong & 1 and raw_header:
            frame[PRELUDE_SIZE] ^= 0x40
        if wrong & 2 and payload:
            frame[-1] ^= 0x40
        sequence += 2 if wrong & 4 else 1
        yield bytes(frame)
