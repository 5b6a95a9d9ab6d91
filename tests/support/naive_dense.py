"""Second decoders of the dense codecs, from the words of SPEC.md, annex A, alone: one word after the other.

They share no code with shipd; zstd is a library for both.
"""

import zstandard


class Refused(Exception):
    """SPEC.md says that a decoder must refuse this."""


def must(condition: bool) -> None:
    """What a payload has to be."""
    if not condition:
        raise Refused


def frame(data: bytes, size: int) -> bytes:
    """The content of one zstd frame, which says its size."""
    try:
        must(size > 0 and zstandard.frame_content_size(data) == size)
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 23).decompressobj()
        content = reader.decompress(data)
    except zstandard.ZstdError as error:
        raise Refused from error
    must(reader.eof and not reader.unused_data and len(content) == size)
    return content


def plane(packed: bytes, size: int) -> bytes:
    """A.2: a packed plane."""
    must(len(packed) <= size)
    return packed if len(packed) == size else frame(packed, size)


def key(word: int, bits: int) -> int:
    """A.5: grows with the float."""
    top = 1 << (bits - 1)
    return word | top if word < top else word ^ (2 * top - 1)


def step(word: int, code: int, bits: int) -> int:
    """A.5: the word that is a step from another."""
    top = 1 << (bits - 1)
    by = code // 2 if code % 2 == 0 else -(code + 1) // 2
    found = (key(word, bits) + by) % (2 * top)
    return found ^ top if found >= top else found ^ (2 * top - 1)


def words(data: bytes, width: int) -> list[int]:
    """Little-endian."""
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


def codes_of(packed: bytes, n: int) -> list[int]:
    """A.2: packed codes."""
    codes = []
    for pair in plane(packed, (n + 1) // 2):
        codes += [pair % 16, pair // 16]
    must(n % 2 == 0 or codes.pop() == 0)
    return codes


def xph(payload: bytes, base: bytes | None, size: int) -> bytes:
    """A.2."""
    must(size % 2 == 0)
    n = size // 2
    must(len(payload) >= 1 + n and payload[0] in (0, 1))
    end = len(payload) - n
    if payload[0] == 0:
        exponents = list(plane(payload[1:end], n))
    else:
        must(end >= 6 and payload[1] <= 241)
        low, middle = payload[1], 6 + int.from_bytes(payload[2:6], "little")
        must(middle <= end)
        exponents = codes_of(payload[6:middle], n)
        others = list(plane(payload[middle:end], exponents.count(15)))
        must(not any(low <= other < low + 15 for other in others))
        exponents = [others.pop(0) if code == 15 else low + code for code in exponents]
    out = b""
    for exponent, rest in zip(exponents, payload[end:], strict=True):
        rotated = exponent << 8 | rest
        out += (rotated >> 1 | (rotated & 1) << 15).to_bytes(2, "little")
    return out


def duh(payload: bytes, base: bytes | None, size: int) -> bytes:
    """A.5."""
    assert base is not None
    must(size % 2 == 0 and len(payload) >= 12)
    n = size // 2
    s, m, large_count = words(payload[:12], 4)
    must(len(payload) >= 12 + s + 2 * large_count and m <= n)
    end = len(payload) - 2 * large_count
    codes = codes_of(payload[12 : 12 + s], n)
    middle, large = list(plane(payload[12 + s : end], m)), words(payload[end:], 2)
    must(codes.count(15) == m and middle.count(255) == large_count and all(value >= 270 for value in large))
    out = b""
    for word, code in zip(words(base, 2), codes, strict=True):
        taken = code
        if taken == 15:
            taken += middle.pop(0)
        if taken == 270:
            taken = large.pop(0)
        out += step(word, taken, 16).to_bytes(2, "little")
    return out


def planes_of(payload: bytes, at: int, count: int, size: int, after: int) -> list[bytes]:
    """A.6 and A.7: lengths, and packed planes of these lengths, ``after`` bytes before the payload's end."""
    must(len(payload) >= at + 4 * count)
    lengths = words(payload[at : at + 4 * count], 4)
    at += 4 * count
    must(len(payload) == at + sum(lengths) + after)
    found = []
    for length in lengths:
        found.append(plane(payload[at : at + length], size))
        at += length
    return found


def f32d(payload: bytes, base: bytes | None, size: int) -> bytes:
    """A.6."""
    assert base is not None
    must(size % 4 == 0)
    four = planes_of(payload, 0, 4, size // 4, 0)
    out = b""
    for at, word in enumerate(words(base, 4)):
        out += step(word, sum(four[k][at] << 8 * k for k in range(4)), 32).to_bytes(4, "little")
    return out


def planes(payload: bytes, base: bytes | None, size: int) -> bytes:
    """A.7."""
    must(len(payload) >= 2)
    w, flags = payload[0], payload[1]
    must(w in (1, 2, 4, 8) and (flags == 0 or (flags == 1 and base is not None)))
    tail = size % w
    parts = planes_of(payload, 2, w, size // w, tail)
    out = bytearray()
    for at in range(size // w):
        out += bytes(part[at] for part in parts)
    out += payload[len(payload) - tail :]
    if flags:
        assert base is not None
        for at in range(size):
            out[at] ^= base[at]
    return bytes(out)


DECODERS = {"xph": xph, "duh": duh, "f32d": f32d, "planes": planes}
