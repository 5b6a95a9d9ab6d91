"""XPH, DUH, F32D and PLANES, which say something of every word (A.2, A.5 to A.7)."""

from tests.support.naive_codecs.parts import (
    Payload,
    bytes_of,
    moved,
    step_of,
    unpack_codes,
    unpack_plane,
    words_of,
)


def decode_xph(payload: bytes, _base: bytes | None, size: int) -> bytes:
    """Exponents apart from the rest."""
    n = size // 2
    parts = Payload(payload)
    form = parts.u8()
    if form == 0:
        exponents = list(unpack_plane(parts.take(parts.left - n), n))
    elif form == 1:
        c = parts.u8()
        if c > 241:
            raise ValueError(f"codes from {c} on")
        codes = unpack_codes(parts.take(parts.u32()), n)
        others = iter(unpack_plane(parts.take(parts.left - n), codes.count(15)))
        exponents = []
        for code in codes:
            exponent = next(others) if code == 15 else c + code
            if code == 15 and c <= exponent <= c + 14:
                raise ValueError(f"the exponent {exponent} has a code, and is written out")
            exponents.append(exponent)
    else:
        raise ValueError(f"the first byte is {form}")
    rest = parts.take(n)
    rotated = [exponent << 8 | low for exponent, low in zip(exponents, rest, strict=True)]
    return bytes_of([word >> 1 | (word & 1) << 15 for word in rotated], 2)


def decode_duh(payload: bytes, base: bytes | None, size: int) -> bytes:
    """Steps of all words, by how large they are."""
    assert base is not None
    n = size // 2
    parts = Payload(payload)
    s, m, large_count = parts.u32(), parts.u32(), parts.u32()
    if m > n:
        raise ValueError(f"{m} of {n} steps are not small")
    codes = unpack_codes(parts.take(s), n)
    if codes.count(15) != m:
        raise ValueError(f"{codes.count(15)} steps are not small, and {m} are said to be")
    plane = unpack_plane(parts.take(parts.left - 2 * large_count), m)
    if plane.count(255) != large_count:
        raise ValueError(f"{plane.count(255)} steps are large, and {large_count} are said to be")
    others, large = iter(plane), iter(words_of(parts.take(2 * large_count), 2))
    words = []
    for word, code in zip(words_of(base, 2), codes, strict=True):
        z = code
        if code == 15:
            z = next(others) + 15
            if z == 270:
                z = next(large)
                if z < 270:
                    raise ValueError(f"{z} is not large")
        words.append(moved(word, step_of(z), 16))
    return bytes_of(words, 2)


def decode_f32d(payload: bytes, base: bytes | None, size: int) -> bytes:
    """Steps of words of 32 bits, in planes of their bytes."""
    assert base is not None
    n = size // 4
    parts = Payload(payload)
    sizes = [parts.u32() for _ in range(4)]
    planes = [unpack_plane(parts.take(packed), n) for packed in sizes]
    parts.end()
    words = []
    for index, word in enumerate(words_of(base, 4)):
        z = sum(planes[k][index] << 8 * k for k in range(4))
        words.append(moved(word, step_of(z), 32))
    return bytes_of(words, 4)


def decode_planes(payload: bytes, base: bytes | None, size: int) -> bytes:
    """Planes of bytes, XORed with the base or not."""
    parts = Payload(payload)
    w, flags = parts.u8(), parts.u8()
    if w not in (1, 2, 4, 8):
        raise ValueError(f"words of {w} bytes")
    if flags not in (0, 1):
        raise ValueError(f"flags {flags}")
    if flags == 1 and base is None:
        raise ValueError("XORed with a base, and there is none")
    n, tail = divmod(size, w)
    sizes = [parts.u32() for _ in range(w)]
    planes = [unpack_plane(parts.take(packed), n) for packed in sizes]
    content = bytes(planes[k][index] for index in range(n) for k in range(w)) + parts.take(tail)
    parts.end()
    if flags == 1:
        assert base is not None
        return bytes(byte ^ other for byte, other in zip(content, base, strict=True))
    return content
