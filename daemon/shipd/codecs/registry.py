"""Every codec there is, by the number that it has on the wire and by the name that it has in messages."""

from types import MappingProxyType
from typing import Final

from shipd.codecs.codec import Codec
from shipd.codecs.duh import DUH
from shipd.codecs.egr import EGR
from shipd.codecs.f32d import F32D
from shipd.codecs.gz import GZ
from shipd.codecs.planes import PLANES
from shipd.codecs.xph import XPH

RAW: Final = 0
"""The bytes themselves, which travel as DATA: no codec, and no number of one on the wire. What it is called here."""

SAME: Final = 1
"""The run equals its base: no payload, and nothing to decode."""

CODECS: Final[tuple[Codec, ...]] = (
    XPH,
    GZ,
    EGR,
    DUH,
    F32D,
    PLANES,
)

BY_NUMBER: Final = MappingProxyType({codec.number: codec for codec in CODECS})
BY_NAME: Final = MappingProxyType({codec.name: codec for codec in CODECS})

DECODABLE: Final = (SAME, *sorted(BY_NUMBER))
"""What can be decoded here, ascending: what a receiver names in WANT."""

_FLOATS_OF_16_BITS: Final = frozenset((3, 4))
_FLOAT32: Final = 2
"""Numbers of dtypes (shipproto.dtypes): of float16 and bfloat16, and of float32."""


def suited(dtype: int, *, base: bool) -> tuple[Codec, ...]:
    """Codecs worth a try for a run of this dtype, 0 for a run of several; those that need a base only with one."""
    if dtype in _FLOATS_OF_16_BITS:
        found: tuple[Codec, ...] = (XPH, PLANES, GZ, EGR, DUH)
    elif dtype == _FLOAT32:
        found = (PLANES, F32D)
    else:
        found = (PLANES,)
    return tuple(codec for codec in found if base or not codec.delta)


NAMES: Final = MappingProxyType({RAW: "raw", SAME: "same"} | {codec.number: codec.name for codec in CODECS})
"""What each number is called in messages, those that are no codecs included."""
