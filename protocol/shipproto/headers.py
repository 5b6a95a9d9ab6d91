"""Headers on the wire: a message's one spelling, and everything that is refused about any other.

A header is a msgpack map in canonical form: string keys in ascending order, each at most once, shortest
encodings, fields that have their default value left out. Unknown keys are ignored, unless they begin with
"!": those are critical, and a side that does not know one must refuse the message.
"""

from itertools import pairwise
from typing import Any, Final

import msgpack
import msgspec

from shipproto.errors import LimitExceeded, MalformedMessage
from shipproto.limits import MAX_HEADER, MAX_HEADER_DEPTH
from shipproto.messages import BY_TYPE, MESSAGES, Message

_encoder: Final = msgspec.msgpack.Encoder()
_decoders: Final[dict[int, msgspec.msgpack.Decoder[Message]]] = {
    message.TYPE: msgspec.msgpack.Decoder(message) for message in MESSAGES
}
_DATA_KEY: Final = b"\x81\xa5chunk"
_fields: Final = {message.TYPE: frozenset(message.__struct_fields__) for message in MESSAGES}


def encode_header(message: Message) -> bytes:
    """The canonical header of a message."""
    return _encoder.encode(message)


def encode_data_header(chunk: int) -> bytes:
    """The same of DATA, a frame of which is sent for every half megabyte: its only key, and the number."""
    return _DATA_KEY + _encoder.encode(chunk)


def decode_header(kind: int, raw: bytes | bytearray | memoryview) -> Message:
    """The message of type ``kind`` whose header is ``raw``. Raises MalformedMessage or LimitExceeded."""
    decoder = _decoders.get(kind)
    if decoder is None:
        raise MalformedMessage(f"unknown message type {kind}")
    try:
        message = decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"{BY_TYPE[kind].__name__}: {error}") from error
    if _encoder.encode(message) != raw:
        # Another spelling of known fields, which is refused, or fields of a later release, which are not.
        _check_unknown(kind, message, bytes(raw))
    if flaw := message.flaw():
        raise MalformedMessage(f"{BY_TYPE[kind].__name__}: {flaw}")
    return message


def _check_unknown(kind: int, message: Message, raw: bytes) -> None:
    name = BY_TYPE[kind].__name__
    try:
        pairs: Any = msgpack.unpackb(
            raw,
            object_pairs_hook=tuple,
            strict_map_key=False,
            max_str_len=MAX_HEADER,
            max_bin_len=MAX_HEADER,
            max_array_len=MAX_HEADER,
            max_map_len=MAX_HEADER,
            max_ext_len=0,
            ext_hook=_refuse_ext,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessage(f"{name}: not msgpack: {error}") from error
    if _deeper_than(pairs, MAX_HEADER_DEPTH):
        raise MalformedMessage(f"{name}: nested more than {MAX_HEADER_DEPTH} deep")
    keys: list[str] = [key for key, _ in pairs]  # no other keys: the decoder has refused them
    if any(key >= following for key, following in pairwise(keys)):
        raise MalformedMessage(f"{name}: keys are repeated or out of order")
    unknown = [key for key in keys if key not in _fields[kind]]
    if critical := [key for key in unknown if key.startswith("!")]:
        raise MalformedMessage(f"{name}: unknown critical field {critical[0]!r}; the peer needs a newer shipd here")
    known = _encoder.encode(message)
    # What is left once the unknown fields are cut out must be the one spelling of the known ones.
    if _without(name, raw, frozenset(unknown)) != known:
        raise MalformedMessage(f"{name}: the header is not in canonical form")


def _refuse_ext(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _deeper_than(outermost: object, limit: int) -> bool:
    """Whether containers nest more than ``limit`` deep; a map is a tuple of pairs here, an array a list."""
    level: list[object] = [outermost]
    for _ in range(limit):
        below: list[object] = []
        for container in level:
            if isinstance(container, tuple):
                below += (part for pair in container for part in pair)
            elif isinstance(container, list):
                below += container
        level = below
    return any(isinstance(container, list | tuple) for container in level)


def _without(name: str, raw: bytes, unknown: frozenset[str]) -> bytes:
    """``raw``, a msgpack map of at most 15 + unknown entries, without the entries named in ``unknown``."""
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=MAX_HEADER)
    unpacker.feed(raw)
    packer = msgpack.Packer()
    count = unpacker.read_map_header()
    if not raw.startswith(packer.pack_map_header(count)):
        raise MalformedMessage(f"{name}: the header's map is not in canonical form")
    kept: list[bytes] = []
    for _ in range(count):
        start = unpacker.tell()
        key = unpacker.unpack()
        if raw[start : unpacker.tell()] != packer.pack(key):
            raise MalformedMessage(f"{name}: the key {key!r} is not in canonical form")
        unpacker.skip()
        if key not in unknown:
            kept.append(raw[start : unpacker.tell()])
    return b"".join((packer.pack_map_header(len(kept)), *kept))


def check_body(message: Message, size: int) -> None:
    """Raise LimitExceeded where a body of ``size`` bytes is more than the message's type allows."""
    if size > message.MAX_BODY:
        raise LimitExceeded(f"{type(message).__name__} with a body of {size} bytes; at most {message.MAX_BODY}")
