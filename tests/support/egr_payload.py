"""EGR payloads written element by element and bit by bit, from the words of SPEC.md: true ones, and ones that lie."""

from dataclasses import dataclass, field

K = 24
ESCAPE = 31


@dataclass
class Class:
    """One class's lists. What is left None follows from them; what is not is what the head claims."""

    gaps: list[int]
    signs: list[int]
    r: int = 0
    kind: int = 0
    lists: list[tuple[list[int], int]] = field(default_factory=list)
    """(values, parameter) of the one list of kind 1, or of the two of kind 2."""
    changes: int | None = None
    rare: int | None = None


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def bit_string(bits: list[int]) -> bytes:
    out = bytearray(-(-len(bits) // 8))
    for at, bit in enumerate(bits):
        out[at // 8] |= bit << at % 8
    return bytes(out)


def payload(shift: int, top: int, classes: dict[int, Class], *, unary_size: int | None = None) -> bytes:
    head = bytes((shift, top)) + sum(1 << k for k in classes).to_bytes(3, "little")
    unary: list[int] = []
    low: list[int] = []
    signs: list[int] = []
    escapes = b""
    for _, one in sorted(classes.items()):
        head += number(len(one.gaps) if one.changes is None else one.changes) + bytes((one.r | one.kind << 5,))
        if one.kind == 2:
            head += number(len(one.lists[0][0]) if one.rare is None else one.rare)
        head += bytes(r for _, r in one.lists)
        for values, r in [(one.gaps, one.r), *one.lists]:
            for value in values:
                quotient = value >> r
                if quotient >= ESCAPE:
                    escapes += quotient.to_bytes(4, "little")
                unary += [0] * min(quotient, ESCAPE) + [1]
                low += [value >> bit & 1 for bit in range(r)]
        signs += one.signs
    size = len(bit_string(unary)) if unary_size is None else unary_size
    return head + number(size) + bit_string(unary) + bit_string(low) + bit_string(signs) + escapes


def key(word: int) -> int:
    return word + 0x8000 if word < 0x8000 else 0xFFFF - word


def class_of(word: int, shift: int, top: int) -> int:
    return min(max((word & 0x7FFF) >> shift, top - K + 1), top) - top + K - 1


def changes(content: list[int], base: list[int], shift: int, top: int) -> dict[int, tuple[list[int], list[int]]]:
    """For each class its gaps and its steps, of which none is 0."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    since = [0] * K
    for new, old in zip(content, base, strict=True):
        k = class_of(old, shift, top)
        if new == old:
            since[k] += 1
            continue
        step = (key(new) - key(old) + 0x8000) % 0x10000 - 0x8000
        gaps, steps = found.setdefault(k, ([], []))
        gaps.append(since[k])
        steps.append(step)
        since[k] = 0
    return found
