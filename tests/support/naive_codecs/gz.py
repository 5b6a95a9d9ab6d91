"""GZ: which words have changed, as gaps, and by which steps (A.3)."""

from tests.support.naive_codecs.parts import Payload, bit_string, bytes_of, moved, words_of, zstd_content


def decode_gz(payload: bytes, base: bytes | None, size: int) -> bytes:
    """Changed words by gaps, with their steps."""
    assert base is not None
    words = words_of(base, 2)
    parts = Payload(payload)
    changes = parts.number()
    if changes > len(words):
        raise ValueError(f"{changes} of {len(words)} words have changed")
    if changes == 0:
        parts.end()
        return base
    sizes = [parts.number() for _ in range(4)]
    low = zstd_content(parts.take(sizes[0]), changes)
    high = zstd_content(parts.take(sizes[1]), changes)
    signs = bit_string(zstd_content(parts.take(sizes[2]), (changes + 7) // 8), changes)
    steps = zstd_content(parts.take(sizes[3]), changes)
    far = iter(words_of(parts.take(4 * high.count(255)), 4))
    large = iter(words_of(parts.take(2 * steps.count(255)), 2))
    parts.end()
    at = -1
    for index in range(changes):
        h = high[index]
        if h == 255:
            h = next(far)
            if h < 255:
                raise ValueError(f"{h} in `far`")
        m = steps[index]
        if m == 255:
            m = next(large)
            if not 255 <= m <= 32767:
                raise ValueError(f"{m} in `large`")
        if m == 32767 and not signs[index]:
            raise ValueError("no step is 32768")
        at += low[index] + 256 * h + 1
        if at >= len(words):
            raise ValueError("a change behind the end of the run")
        words[at] = moved(words[at], -(m + 1) if signs[index] else m + 1, 16)
    return bytes_of(words, 2)
