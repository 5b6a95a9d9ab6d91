"""The frame: a 32-byte prelude with a check of its own, a msgpack header and a payload, each with CRC32C.

     0               4       5       6               8
    +---------------+-------+-------+---------------+
    | magic "SHPD"  | type  | flags | header length |
    +---------------+-------+-------+---------------+
    | payload length                | header CRC32C |   8 .. 15
    +-------------------------------+---------------+
    | sequence number                               |  16 .. 23
    +-------------------------------+---------------+
    | payload CRC32C                | prelude CRC32C|  24 .. 31
    +-------------------------------+---------------+

All integers are big-endian. The prelude's CRC covers its first 28 bytes: no length is believed before it.
CRC32C: RFC 3720, appendix B.4 (Castagnoli polynomial, reflected); the CRC of no bytes is 0.
"""

import struct
from typing import Final, NamedTuple

from crc32c import crc32c

from shipproto.errors import BadPrelude, ForeignPeer, LimitExceeded
from shipproto.limits import MAX_HEADER, MAX_PAYLOAD

MAGIC: Final = b"SHPD"
PRELUDE_SIZE: Final = 32
FLAG_MORE: Final = 0x01
"""The message's body goes on in BODY frames."""
KNOWN_FLAGS: Final = FLAG_MORE

_PRELUDE: Final = struct.Struct("!4sBBHIIQII")
_CHECKED: Final = PRELUDE_SIZE - 4

Buffer = bytes | bytearray | memoryview


class Prelude(NamedTuple):
    """A prelude that passed its check. Lengths are in bytes and within the limits."""

    type: int
    flags: int
    header_length: int
    payload_length: int
    header_crc: int
    sequence: int
    payload_crc: int


def encode_frame(
    kind: int, flags: int, sequence: int, header: bytes, payload: Buffer, payload_crc: int | None = None
) -> bytes:
    """Prelude and header, ready to be followed by ``payload`` itself: the payload is read, never copied.

    ``payload_crc`` is its CRC32C, where that is known already.
    """
    if len(header) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise LimitExceeded(f"a frame of {len(header)} + {len(payload)} bytes; at most {MAX_HEADER} + {MAX_PAYLOAD}")
    if payload_crc is None:
        payload_crc = crc32c(payload)
    checked = _PRELUDE.pack(MAGIC, kind, flags, len(header), len(payload), crc32c(header), sequence, payload_crc, 0)[
        :_CHECKED
    ]
    return b"".join((checked, crc32c(checked).to_bytes(4, "big"), header))


def decode_prelude(raw: Buffer, expected_sequence: int) -> Prelude:
    """The prelude in the first 32 bytes of ``raw``.

    Raises ForeignPeer when the very first frame of a connection does not start with the magic, BadPrelude
    when the check fails or the sequence number is not the next, LimitExceeded for lengths beyond limits.
    """
    magic, kind, flags, header_length, payload_length, header_crc, sequence, payload_crc, check = _PRELUDE.unpack_from(
        raw
    )
    if magic != MAGIC and expected_sequence == 0:
        raise ForeignPeer("the peer does not speak the shipd protocol", bytes(raw[:PRELUDE_SIZE]))
    if crc32c(raw[:_CHECKED]) != check or magic != MAGIC:
        raise BadPrelude(f"the prelude of frame {expected_sequence} is damaged")
    if sequence != expected_sequence:
        raise BadPrelude(f"frame {sequence} arrived where frame {expected_sequence} was due")
    if header_length > MAX_HEADER or payload_length > MAX_PAYLOAD:
        raise LimitExceeded(
            f"frame {sequence} announces {header_length} + {payload_length} bytes; at most {MAX_HEADER} + {MAX_PAYLOAD}"
        )
    return Prelude(kind, flags, header_length, payload_length, header_crc, sequence, payload_crc)
