"""What every codec is: a pure way to say the bytes of a run of chunks in fewer, and to get them back bit for bit.

A run is a contiguous range of an image (SPEC.md, annex A): tensors of one dtype, and the zeros between them. The base
is the same range of an older version. How each payload is laid out is normative, in SPEC.md; which codec is worth its
time is not decided here.
"""

from typing import Protocol

from shipproto.frame import Buffer


class CodecError(ValueError):
    """A payload that does not say what it must: damaged, made for another base, or made to do harm."""


class Codec(Protocol):
    """One codec. Everything is safe to call on any thread; the heavy parts let go of the GIL."""

    number: int
    """What it is called on the wire, 1 to 255."""
    name: str
    """What it is called in messages: "egr"."""
    word: int
    """Bytes; a run that is no multiple of them cannot be encoded by it."""
    delta: bool
    """Whether both sides need the base."""

    def encode(self, content: Buffer, base: Buffer | None, *, dtype: int, most: int) -> bytes | None:
        """The payload for ``content``; None where that would be longer than ``most`` bytes.

        base    as many bytes as ``content``; None where ``delta`` is not set
        dtype   number of the run's dtype (shipproto.dtypes): a hint for where the exponent lies, 0 for unknown
        """

    def decode(self, payload: Buffer, base: Buffer | None, out: memoryview) -> None:
        """Write the content into ``out``, whose length is the run's.

        base    as many bytes as ``out``, memory of its own or ``out`` itself
        Raises CodecError; ``out`` may then have been written to in part, and is no version's any more.
        Never takes memory, or time, beyond a small multiple of what the run and the payload have.
        """
