"""Payloads of codecs written element by element, from the words of SPEC.md, annex A: true ones, and ones that lie.

For golden vectors and tests. zstd frames are of blocks that need no compressor, so that their bytes never change.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

ESCAPE = 31
MAGIC = b"\x28\xb5\x2f\xfd"


# --- what the codecs have in common ------------------------------------------------------------------------------


def number(value: int) -> bytes:
    """7 bits a byte, the lowest first."""
    out = b""
    while value > 127:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def bit_string(bits: Sequence[int]) -> bytes:
    """Bits in bytes, filled up with zeros."""
    out = bytearray(-(-len(bits) // 8))
    for at, bit in enumerate(bits):
        out[at // 8] |= bit << at % 8
    return bytes(out)


def little(width: int, *words: int) -> bytes:
    """Words of so many bytes."""
    return b"".join(word.to_bytes(width, "little") for word in words)


def block(content: bytes, *, times: int = 0) -> bytes:
    """The last block of a frame: ``content`` as it is, or one byte so many ``times``."""
    size, kind = (times, 1) if times else (len(content), 0)
    return struct.pack("<I", size << 3 | kind << 1 | 1)[:3] + content


def frame(content: bytes, *, times: int = 0, declared: int | None = None) -> bytes:
    """A frame that is one segment, of at most 255 bytes or 256 to 65791, and has one block."""
    size = (times or len(content)) if declared is None else declared
    header = b"\x20" + bytes((size,)) if size < 256 else b"\x60" + little(2, size - 256)
    return MAGIC + header + block(content, times=times)


# --- each codec by its parts ---------------------------------------------------------------------------------------


def xph(first: int, codes: bytes, others: bytes, rest: bytes, *, size: int | None = None) -> bytes:
    """With exponents as codes from ``first`` on; ``size``: what it says of ``codes``."""
    return struct.pack("<BBI", 1, first, len(codes) if size is None else size) + codes + others + rest


def gz(
    low: Sequence[int],
    high: Sequence[int],
    signs: Sequence[int],
    steps: Sequence[int],
    far: Sequence[int] = (),
    large: Sequence[int] = (),
    *,
    changes: int | None = None,
) -> bytes:
    """``signs`` as bits; ``changes``: what the head says."""
    frames = [frame(bytes(stream)) for stream in (low, high, bit_string(signs), steps)]
    head = [number(len(low) if changes is None else changes), *(number(len(one)) for one in frames)]
    return b"".join((*head, *frames)) + little(4, *far) + little(2, *large)


def duh(codes: bytes, plane: bytes, *large: int, said: tuple[int, int, int] | None = None) -> bytes:
    """``said``: what the head says of the three parts."""
    return struct.pack("<3I", *(said or (len(codes), len(plane), len(large)))) + codes + plane + little(2, *large)


def packed_planes(*planes: bytes, said: Sequence[int] | None = None) -> bytes:
    """Lengths and planes, as F32D and PLANES have them; ``said``: these lengths."""
    return little(4, *(map(len, planes) if said is None else said)) + b"".join(planes)


@dataclass
class Class:
    """One class of EGR. What is left None follows from the lists; what is not is what the head claims."""

    gaps: list[int]
    signs: list[int]
    r: int = 0
    kind: int = 0
    lists: list[tuple[list[int], int]] = field(default_factory=list)
    """(values, parameter) of the one list of kind 1, or of the two of kind 2."""
    changes: int | None = None
    rare: int | None = None


def egr(
    shift: int,
    top: int,
    classes: dict[int, Class],
    *,
    unary_size: int | None = None,
    low_after: Sequence[int] = (),
    signs_after: Sequence[int] = (),
    escapes: bytes | None = None,
) -> bytes:
    """By number of the class. ``..._after``: bits behind those that are due; ``escapes``: instead of the due ones."""
    head = bytes((shift, top)) + sum(1 << k for k in classes).to_bytes(3, "little")
    unary: list[int] = []
    low: list[int] = []
    signs: list[int] = []
    due = b""
    for _, one in sorted(classes.items()):
        head += number(len(one.gaps) if one.changes is None else one.changes) + bytes((one.r | one.kind << 5,))
        if one.kind == 2:
            head += number(len(one.lists[0][0]) if one.rare is None else one.rare)
        head += bytes(r for _, r in one.lists)
        for values, r in [(one.gaps, one.r), *one.lists]:
            for value in values:
                quotient = value >> r
                if quotient >= ESCAPE:
                    due += little(4, quotient)
                unary += [0] * min(quotient, ESCAPE) + [1]
                low += [value >> bit & 1 for bit in range(r)]
        signs += one.signs
    size = len(bit_string(unary)) if unary_size is None else unary_size
    parts = (bit_string(unary), bit_string([*low, *low_after]), bit_string([*signs, *signs_after]))
    return head + number(size) + b"".join(parts) + (due if escapes is None else escapes)
