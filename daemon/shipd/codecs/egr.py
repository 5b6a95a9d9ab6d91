"""EGR, for sparse deltas of 16-bit floats through a thin channel: where a change lies is said relative to the base.

Both sides have the base, and a float changes the more rarely the larger it is: by one step of its mantissa, which is
as large as its exponent says, where an optimiser moves all weights alike. So the words of a run are put into classes by
the exponent that they have in the base, and positions are counted in each class by itself. In one optimiser step of a
sentence encoder at a learning rate of 1e-6 that takes 6.1 bits for the position of a change; gaps in the whole run take
9.1. Layout: SPEC.md, annex A.4; the head: egr_format; the work: egr_compiled, egr_numpy.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.codecs import egr_format, egr_numpy
from shipd.codecs.bits import MAX_NUMBER
from shipd.codecs.codec import Codec, CodecError
from shipd.codecs.compiled import kernels
from shipd.codecs.egr_format import Engine, Frame, Words
from shipproto.dtypes import BY_NAME
from shipproto.frame import Buffer

_FLOAT16: Final = BY_NAME["float16"].code
_BFLOAT16_SHIFT, _FLOAT16_SHIFT = egr_format.SHIFTS

_SAMPLES: Final = 1 << 14
_OUTLIERS: Final = 1 << 10
"""One word in so many may lie above the highest class: a few large ones shall not push all others down."""

_LEAST_BITS: Final = 2
"""Of any change: the end of its gap's quotient and its sign."""


def engine() -> Engine:
    """The compiled one where there is one, else numpy's."""
    found = kernels()
    return egr_numpy if found is None else found.egr


class _ExponentGroupedRice:
    """See Codec."""

    number = 4
    name = "egr"
    word = 2
    delta = True

    def encode(self, content: Buffer, base: Buffer | None, *, dtype: int, most: int) -> bytes | None:
        """See Codec."""
        if base is None or len(base) != len(content):
            raise ValueError("a delta is made from a base of the same size")
        if len(content) % self.word or len(content) // self.word > MAX_NUMBER:
            return None
        return encode(engine(), _words(content), _words(base), dtype, most)

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """See Codec."""
        if base is None or len(base) != len(out):
            raise ValueError("a delta is applied to a base of the same size")
        if len(out) % self.word or len(out) // self.word > MAX_NUMBER:
            raise CodecError(f"a run of {len(out)} bytes is not coded in words")
        words: npt.NDArray[np.uint8] = np.frombuffer(out, dtype=np.uint8)
        if words.ctypes.data % self.word:
            # Nobody keeps words at odd places, and no loop could work on them there.
            aligned = words.copy().view(np.uint16)
            decode(engine(), payload, _words(base), aligned)
            words[:] = aligned.view(np.uint8)
        else:
            decode(engine(), payload, _words(base), words.view(np.uint16))


EGR: Final[Codec] = _ExponentGroupedRice()


def encode(by: Engine, content: Words, base: Words, dtype: int, most: int) -> bytes | None:
    """The payload as that engine makes it; see Codec."""
    frame = frame_of(base, dtype)
    changes = by.scan(content, base, frame, max(0, 8 * most // _LEAST_BITS))
    if changes is None:
        return None
    lists = by.plan(changes)
    head = egr_format.head(frame, lists)
    if len(head) + egr_format.size(lists) > most:
        return None
    return head + by.pack(lists)


def decode(by: Engine, payload: Buffer, base: Words, out: Words) -> None:
    """Decode as that engine does; see Codec."""
    frame, table, parts = egr_format.read(memoryview(payload).cast("B"), len(out))
    if not by.apply(by.unpack(table, parts, len(out)), base, out, frame):
        raise CodecError("changes that have no place: the base is another one")


def frame_of(base: Words, dtype: int) -> Frame:
    """Where the exponents of ``base`` lie and which is the highest that gets a class of its own."""
    shift = _FLOAT16_SHIFT if dtype == _FLOAT16 else _BFLOAT16_SHIFT
    if not len(base):
        return Frame(shift, 0)
    # An odd step, so that no column of a matrix is all that is seen.
    sample = base[:: len(base) // _SAMPLES | 1]
    exponents = (sample & np.uint16(0x7FFF)) >> np.uint16(shift)
    above = np.cumsum(np.bincount(exponents)[::-1])
    return Frame(shift, len(above) - 1 - int(np.argmax(above > len(sample) // _OUTLIERS)))


def _words(content: Buffer) -> Words:
    """The words of ``content``, copied only where they lie at an odd place."""
    octets: npt.NDArray[np.uint8] = np.frombuffer(content, dtype=np.uint8)
    return (octets if octets.ctypes.data % 2 == 0 else octets.copy()).view(np.uint16)
