"""A second implementation of every codec's decoder, from the words of SPEC.md, annex A, alone: slow and obvious.

It goes element by element, shares no code with shipd, and raises ValueError exactly where the annex has a decoder
refuse. It checks the fast decoders and stands behind the golden vectors of codecs. Only zstd is a library for both, and
what the annex asks of a frame's header is read here byte by byte.
"""

from collections.abc import Callable
from typing import Final

from tests.support.naive_codecs.dense import decode_duh, decode_f32d, decode_planes, decode_xph
from tests.support.naive_codecs.egr import decode_egr
from tests.support.naive_codecs.gz import decode_gz

Decoder = Callable[[bytes, bytes | None, int], bytes]

_CODECS: Final[dict[int, tuple[bool, int, Decoder]]] = {
    2: (False, 2, decode_xph),
    3: (True, 2, decode_gz),
    4: (True, 2, decode_egr),
    5: (True, 2, decode_duh),
    6: (True, 4, decode_f32d),
    7: (False, 1, decode_planes),
}
"""By number: whether it needs the base, bytes of a word, decoder."""


def decode(codec_number: int, payload: bytes, base: bytes | None, size: int) -> bytes:
    """The run of ``size`` bytes that ``payload`` stands for. ``base``: the same range of the base, or None without one.

    Raises ValueError if the annex has the payload refused, or no codec has this number.
    """
    if codec_number not in _CODECS:
        raise ValueError(f"no codec of the annex has the number {codec_number}")
    needs_base, word, decoder = _CODECS[codec_number]
    if size % word:
        raise ValueError(f"a run of {size} bytes is not one of words of {word} bytes")
    if base is not None and len(base) != size:
        raise ValueError(f"the base has {len(base)} bytes, and the run {size}")
    if base is None and needs_base:
        raise ValueError("this codec needs a base")
    content = decoder(payload, base, size)
    assert len(content) == size
    return content


def outcome(codec_number: int, payload: bytes, base: bytes | None, size: int) -> bytes | None:
    """What ``decode`` makes of a payload, or None where it is refused."""
    try:
        return decode(codec_number, payload, base, size)
    except ValueError:
        return None
