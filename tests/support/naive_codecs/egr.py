"""EGR: the same by classes of exponents, in Rice code (A.4)."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.naive_codecs.parts import Payload, bit_string, bytes_of, moved, words_of


@dataclass
class Group:
    """What the head says of a class, and then its lists."""

    changes: int
    kind: int
    counts: list[int]
    """How many numbers are in each list."""
    parameters: list[int]
    """r of each list."""
    lists: list[list[int]]


def read_group(head: Payload) -> Group:
    """A class that is present."""
    changes = head.number()
    if changes == 0:
        raise ValueError("a class is present and has no change")
    how = head.u8()
    kind = how >> 5 & 3
    if how >> 7 or kind == 3:
        raise ValueError(f"reserved bits in {how:#x}")
    counts, parameters = [changes], [how & 31]
    if kind == 1:
        counts.append(changes)
        parameters.append(head.u8())
    elif kind == 2:
        rare = head.number()
        if not 1 <= rare <= changes:
            raise ValueError(f"{rare} of {changes} are rare")
        counts += [rare, rare]
        parameters += [head.u8(), head.u8()]
    most = [(23,), (23, 15), (23, 23, 15)][kind]
    if any(r > limit for r, limit in zip(parameters, most, strict=True)):
        raise ValueError(f"parameters {parameters}")
    return Group(changes, kind, counts, parameters, [])


def read_unary(part: bytes, count: int) -> Iterator[int]:
    """``count`` numbers, each as so many zeros and a one."""
    if part and part[-1] == 0:
        raise ValueError("the last byte of `unary` is zero")
    quotients = []
    zeros = 0
    for bit in bit_string(part, 8 * len(part)):
        if bit:
            quotients.append(zeros)
            zeros = 0
        else:
            zeros += 1
    if len(quotients) != count or max(quotients, default=0) > 31:
        raise ValueError(f"`unary` has {len(quotients)} numbers, and {count} are due, of at most 31")
    return iter(quotients)


def read_lists(groups: list[Group], unary: bytes, parts: Payload) -> list[int]:
    """Read all lists of all classes; returns the signs."""
    quotients = read_unary(unary, sum(sum(group.counts) for group in groups))
    low_bits = sum(count * r for group in groups for count, r in zip(group.counts, group.parameters, strict=True))
    low = iter(bit_string(parts.take((low_bits + 7) // 8), low_bits))
    changes = sum(group.changes for group in groups)
    signs = bit_string(parts.take((changes + 7) // 8), changes)
    if parts.left % 4:
        raise ValueError("`escapes` ends within a number")
    escapes = words_of(parts.take(parts.left), 4)
    if any(quotient < 31 for quotient in escapes):
        raise ValueError("an escape that needs none")
    escaped = iter(escapes)
    for group in groups:
        for count, r in zip(group.counts, group.parameters, strict=True):
            values = []
            for _ in range(count):
                quotient = next(quotients)
                if quotient == 31 and (quotient := next(escaped, -1)) < 0:
                    raise ValueError("too few escapes")
                values.append((quotient << r) + sum(next(low) << bit for bit in range(r)))
            group.lists.append(values)
    if next(escaped, None) is not None:
        raise ValueError("too many escapes")
    return signs


def magnitudes_of(group: Group) -> list[int]:
    """m of each change of a class."""
    if group.kind == 1:
        return group.lists[1]
    magnitudes = [0] * group.changes
    if group.kind == 2:
        at = -1
        for place, less_one in zip(group.lists[1], group.lists[2], strict=True):
            at += place + 1
            if at >= group.changes:
                raise ValueError("a place behind the last change of its class")
            magnitudes[at] = less_one + 1
    return magnitudes


def steps_of(group: Group, signs: Iterator[int]) -> list[int]:
    """The steps of a class's changes."""
    steps = []
    for m in magnitudes_of(group):
        negative = next(signs)
        if m > 32767 or (m == 32767 and not negative):
            raise ValueError(f"no step is {m + 1}")
        steps.append(-(m + 1) if negative else m + 1)
    return steps


def decode_egr(payload: bytes, base: bytes | None, size: int) -> bytes:
    """Changed words by class, as lists in Rice code."""
    assert base is not None
    words = words_of(base, 2)
    parts = Payload(payload)
    shift, top = parts.u8(), parts.u8()
    if shift not in (7, 10):
        raise ValueError(f"shift {shift}")
    highest = 255 if shift == 7 else 31
    if top > highest:
        raise ValueError(f"top {top}")
    present = int.from_bytes(parts.take(3), "little")
    groups = {number: read_group(parts) for number in range(24) if present >> number & 1}
    if sum(group.changes for group in groups.values()) > len(words):
        raise ValueError("more changes than words")
    unary = parts.take(parts.number())
    signs = iter(read_lists(list(groups.values()), unary, parts))
    if sum(gap + 1 for group in groups.values() for gap in group.lists[0]) > len(words):
        raise ValueError("the gaps are longer than the run")
    steps = {number: steps_of(group, signs) for number, group in groups.items()}

    changes_done = dict.fromkeys(groups, 0)
    counters = {number: group.lists[0][0] for number, group in groups.items()}
    for index, word in enumerate(words):
        exponent = word >> shift & highest
        number = min(max(exponent - top + 23, 0), 23)
        if number not in groups or changes_done[number] == groups[number].changes:
            continue
        if counters[number] > 0:
            counters[number] -= 1
            continue
        words[index] = moved(word, steps[number][changes_done[number]], 16)
        changes_done[number] += 1
        if changes_done[number] < groups[number].changes:
            counters[number] = groups[number].lists[0][changes_done[number]]
    if any(changes_done[number] < group.changes for number, group in groups.items()):
        raise ValueError("another base: changes are left when the run ends")
    return bytes_of(words, 2)
