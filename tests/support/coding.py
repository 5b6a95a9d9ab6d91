"""Two codecs that are as simple as codecs can be, for tests of how coded runs travel: no codec of shipd is in them.

PLAIN   the bytes themselves
DIFF    the exclusive or of content and base, each run of equal bytes as its length (1 to 255) and the byte
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Final

from shipproto.agreement import Ability
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from shipproto.messages import SAME
from shipproto.outcomes import RunToDecode

PLAIN: Final = 200
DIFF: Final = 201
CODECS: Final[Mapping[int, int]] = {SAME: 0, PLAIN: 300, DIFF: 20}
DELTAS: Final = frozenset({DIFF})


class Undecodable(ValueError):
    """A payload that is none."""


def ability(base: bytes = b"", digests: LeafDigests | None = None, codecs: Mapping[int, int] = CODECS) -> Ability:
    """A receiver that has these codecs and, perhaps, this base."""
    return Ability(base=base, digests=digests, codecs=codecs, deltas=DELTAS)


def encode(codec: int, content: bytes, base: bytes) -> bytes:
    """The payload of ``content``."""
    if codec == PLAIN:
        return content
    assert codec == DIFF
    assert len(content) == len(base)
    payload = bytearray()
    for byte, group in groupby(left ^ right for left, right in zip(content, base, strict=True)):
        left = len(list(group))
        while left:
            payload += bytes((min(left, 255), byte))
            left -= min(left, 255)
    return bytes(payload)


def decode(codec: int, payload: bytes, base: bytes, size: int) -> bytes:
    """``size`` bytes of content."""
    if codec == SAME:
        return base
    if codec == PLAIN:
        difference = payload
    elif codec != DIFF:
        raise Undecodable(f"codec {codec}")
    elif len(payload) % 2:
        raise Undecodable("half a pair")
    else:
        difference = b"".join(bytes((byte,)) * count for count, byte in zip(payload[::2], payload[1::2], strict=True))
    if len(difference) != size:
        raise Undecodable(f"{len(difference)} bytes where {size} are due")
    return bytes(a ^ b for a, b in zip(difference, base, strict=True)) if codec == DIFF else difference


def decode_into(run: RunToDecode, layout: Layout, image: memoryview, base: memoryview | None) -> None:
    """What a shell does with a run. Raises Undecodable."""
    start, end = layout.span(run.chunks)
    before = bytes(base[start:end]) if base is not None else b""
    image[start:end] = decode(run.codec, bytes(run.payload), before, end - start)
