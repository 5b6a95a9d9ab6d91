"""Payloads that are cut short, changed in a bit, or made by hand to say what none may: refused, or the right length."""

import struct
import tracemalloc

import numpy as np
import pytest

from shipd.codecs.codec import CodecError
from shipd.codecs.duh import DUH
from shipd.codecs.f32d import F32D
from shipd.codecs.planes import PLANES
from shipd.codecs.words import unzigzag
from shipd.codecs.xph import XPH
from shipd.codecs.zstd import squeeze, squeeze_entropy
from tests.support import naive_codecs
from tests.support.runs import ENOUGH, bfloat16, decoded, like_weights, outcome, without_numba

WORDS = 96
VALUES = like_weights(WORDS)
STEPPED = VALUES * np.float32(1.002)
STEPPED[5] = -STEPPED[5]
RUNS = {
    "xph": (XPH, bfloat16(VALUES), None, 4),
    "xph of zeros": (XPH, bytes(2 * WORDS), None, 4),
    "xph of an odd number": (XPH, bfloat16(np.abs(VALUES) % np.float32(0.01) + np.float32(1))[:-2], None, 4),
    "xph of all exponents": (XPH, np.arange(0, 1 << 16, 700, dtype=np.uint16).tobytes(), None, 4),
    "duh": (DUH, bfloat16(STEPPED), bfloat16(VALUES), 4),
    "duh of nothing new": (DUH, bfloat16(VALUES), bfloat16(VALUES), 4),
    "f32d": (F32D, STEPPED.tobytes(), VALUES.tobytes(), 2),
    "planes": (PLANES, VALUES.astype(np.float64).tobytes() + b"rest", None, 1),
    "planes with a base": (PLANES, STEPPED.tobytes() + b"r", VALUES.tobytes() + b"s", 2),
    "planes of bytes": (PLANES, bytes(range(20)) * 9, bytes(180), 23),
}


@pytest.mark.parametrize("name", RUNS)
def test_truncated_anywhere_and_lengthened(name: str) -> None:
    codec, content, base, dtype = RUNS[name]
    payload = codec.encode(content, base, dtype=dtype, most=ENOUGH)
    assert payload is not None
    assert decoded(codec, payload, base, len(content)) == content
    for size in range(len(payload)):
        with pytest.raises(CodecError):
            decoded(codec, payload[:size], base, len(content))
    for more in (b"\0", b"\xff", bytes(8), payload):
        with pytest.raises(CodecError):
            decoded(codec, payload + more, base, len(content))


@pytest.mark.parametrize("name", RUNS)
def test_every_bit_changed(name: str) -> None:
    codec, content, base, dtype = RUNS[name]
    payload = codec.encode(content, base, dtype=dtype, most=ENOUGH)
    assert payload is not None
    for bit in range(8 * len(payload)):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        found = outcome(codec, bytes(changed), base, len(content))
        assert naive_codecs.outcome(codec.number, bytes(changed), base, len(content)) == found
        with without_numba():
            assert outcome(codec, bytes(changed), base, len(content)) == found


@pytest.mark.parametrize("name", RUNS)
def test_for_a_run_of_another_length(name: str) -> None:
    codec, content, base, dtype = RUNS[name]
    payload = codec.encode(content, base, dtype=dtype, most=ENOUGH)
    assert payload is not None
    for size in (0, 8, len(content) - 8, len(content) + 8, 2 * len(content)):
        assert outcome(codec, payload, None if base is None else bytes(size), size) is None


# --- made by hand ---------------------------------------------------------------------------------------------------


def refused(codec, payload: bytes, size: int, base: bytes | None = None) -> None:
    given = base if base is not None or not codec.delta else bytes(size)
    with pytest.raises(CodecError):
        decoded(codec, payload, given, size)
    assert naive_codecs.outcome(codec.number, payload, given, size) is None


def test_a_plane_is_itself_or_a_shorter_frame() -> None:
    ones, rest = b"\x01" * 100, bytes(100)
    assert decoded(XPH, b"\0" + ones + rest, None, 200) == b"\x80\x00" * 100
    assert decoded(XPH, b"\0" + squeeze(ones) + rest, None, 200) == b"\x80\x00" * 100
    tiny = b"\x01\x02\x03"
    assert len(squeeze(tiny)) > len(tiny)
    refused(XPH, b"\0" + squeeze(tiny) + bytes(3), 6)
    refused(XPH, b"\0" + squeeze(ones[:99]) + rest, 200)
    refused(XPH, b"\0" + ones[:99] + rest, 200)
    refused(XPH, b"\0" + ones, 200)
    refused(XPH, b"\0" + ones, 202)
    for kind in (2, 3, 255):
        refused(XPH, bytes((kind,)) + ones + rest, 200)


def paired(low: int, pairs: bytes, others: bytes, rest: bytes, size: int | None = None) -> bytes:
    return struct.pack("<BBI", 1, low, len(pairs) if size is None else size) + pairs + others + rest


def test_exponents_in_pairs_and_by_themselves() -> None:
    found = decoded(XPH, paired(0x70, b"\xf0\x0e", b"\xff", b"\x00\x01\x80"), None, 6)
    assert found == struct.pack("<3H", 0x70 << 7, 0x8000 | 0xFF << 7, 0x7E << 7 | 0x40)
    assert decoded(XPH, paired(241, b"\xee", b"", bytes(2)), None, 4) == struct.pack("<2H", 255 << 7, 255 << 7)
    for bad in (
        paired(0x70, b"\xf0\x1e", b"\xff", b"\x00\x01\x80"),
        paired(0x70, b"\xf0\x0e", b"", b"\x00\x01\x80"),
        paired(0x70, b"\xf0\x0e", b"\xff\xff", b"\x00\x01\x80"),
        paired(0x70, b"\xf0\x0e", b"\x70", b"\x00\x01\x80"),
        paired(0x70, b"\xf0\x0e", b"\x7e", b"\x00\x01\x80"),
        paired(0x70, b"\x00\x0e", b"\xff", b"\x00\x01\x80"),
        paired(242, b"\x00\x0e", b"", b"\x00\x01\x80"),
        *(paired(0x70, b"\xf0\x0e", b"\xff", b"\x00\x01\x80", size) for size in (0, 1, 3, 4, 7, 0xFFFFFFFF)),
        paired(0x70, b"", b"", bytes(2))[:5],
    ):
        refused(XPH, bad, 6)
        with without_numba():
            refused(XPH, bad, 6)


def steps(pairs: bytes, medium: bytes, *large: int, counts: tuple[int, int, int] | None = None) -> bytes:
    head = counts or (len(pairs), len(medium), len(large))
    return struct.pack("<3I", *head) + pairs + medium + struct.pack(f"<{len(large)}H", *large)


def test_steps_too_large_for_half_a_byte() -> None:
    base = np.arange(16_000, 16_005, dtype=np.uint16)
    expected = unzigzag(np.array([3, 15, 269, 270, 65535], dtype=np.uint16), base).tobytes()
    payload = steps(b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", 270, 65535)
    assert decoded(DUH, payload, base.tobytes(), 10) == expected
    assert decoded(DUH, payload, base.tobytes(), 10, in_place=True) == expected


@pytest.mark.parametrize(
    "payload",
    [
        steps(b"\xf3\xff\x1f", b"\x00\xfe\xff\xff", 270, 65535),
        steps(b"\xf3\xff\xff", b"\x00\xfe\xff\xff\x00", 270, 65535),
        steps(b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", 269, 65535),
        steps(b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", 270, 0),
        steps(b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", 270),
        steps(b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", 270, 270, 270),
        steps(b"\xf3\xff\x0f", b"\x00\xfe\xfd\xff", 270, 65535),
        steps(b"\xf3\xff\x0f", b"\x00\xfe\xff", 270),
        steps(b"\xf3\xff\x0e", b"\x00\xfe\xff\xff", 270, 65535),
        steps(b"\xf3\xff", b"\x00\xfe\xff\xff", 270, 65535),
        steps(b"\xf3\xff\x0f\x00", b"\x00\xfe\xff\xff", 270, 65535),
        *(
            steps(b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", 270, 65535, counts=counts)
            for counts in (
                (2, 4, 2), (4, 4, 2), (3, 3, 2), (3, 5, 2), (3, 4, 1), (3, 4, 3), (0, 4, 2), (7, 0, 2), (3, 0, 4),
                (0xFFFFFFFF, 4, 2), (3, 0xFFFFFFFF, 2), (3, 4, 0xFFFFFFFF), (3, 4, 0x80000000),
            )
        ),
    ],
)  # fmt: skip
def test_steps_that_are_not_what_they_are_marked_as(payload: bytes) -> None:
    base = np.arange(16_000, 16_005, dtype=np.uint16).tobytes()
    refused(DUH, payload, 10, base)
    with without_numba():
        refused(DUH, payload, 10, base)


def test_lengths_of_planes_add_up() -> None:
    planes = [b"\x02\x00"] + [bytes(2)] * 3
    base = np.array([1.0, -1.0], dtype=np.float32)
    one_up = (base.view(np.uint32) + np.array([1, 0], dtype=np.uint32)).tobytes()
    assert decoded(F32D, struct.pack("<4I", 2, 2, 2, 2) + b"".join(planes), base.tobytes(), 8) == one_up
    for lengths in ((2, 2, 2, 1), (2, 2, 2, 3), (1, 3, 2, 2), (0, 4, 2, 2), (0xFFFFFFFF, 2, 2, 5), (8, 0, 0, 0)):
        refused(F32D, struct.pack("<4I", *lengths) + b"".join(planes), 8)


def test_heads_of_planes() -> None:
    def payload(width: int, flags: int) -> bytes:
        return bytes((width, flags)) + struct.pack(f"<{width}I", *[8 // max(width, 1)] * width) + bytes(range(8))

    assert decoded(PLANES, payload(1, 0), None, 8) == bytes(range(8))
    assert decoded(PLANES, payload(2, 0), None, 8) == bytes((0, 4, 1, 5, 2, 6, 3, 7))
    assert decoded(PLANES, payload(4, 1), b"\xf0" * 8, 8) == bytes(b ^ 0xF0 for b in (0, 2, 4, 6, 1, 3, 5, 7))
    assert decoded(PLANES, payload(8, 0) + b"rest", None, 12) == bytes(range(8)) + b"rest"
    refused(PLANES, payload(4, 1), 8)
    for width in (0, 3, 5, 16, 255):
        refused(PLANES, payload(width, 0), 8)
    for flags in (2, 3, 128, 255):
        refused(PLANES, payload(2, flags), 8, bytes(8))


BOMBS = {
    "xph": (XPH, b"\0" + squeeze_entropy(bytes(64 << 20)) + bytes(1000), 2000),
    "xph of pairs": (XPH, paired(0, squeeze_entropy(bytes(64 << 20)), b"", bytes(1000)), 2000),
    "xph of others": (XPH, paired(0, b"\xff" * 500, squeeze_entropy(bytes(64 << 20)), bytes(1000)), 2000),
    "duh": (DUH, steps(squeeze(bytes(64 << 20)), b""), 2000),
    "duh of large steps": (DUH, steps(bytes(500), squeeze(bytes(64 << 20)), counts=(500, 1000, 0)), 2000),
    "duh of more steps than words": (DUH, steps(bytes(500), squeeze(bytes(64 << 20)), counts=(500, 64 << 20, 0)), 2000),
    "f32d": (F32D, struct.pack("<4I", *[len(squeeze(bytes(64 << 20)))] * 4) + squeeze(bytes(64 << 20)) * 4, 4000),
    "planes": (PLANES, b"\x01\x00" + struct.pack("<I", len(squeeze(bytes(64 << 20)))) + squeeze(bytes(64 << 20)), 9000),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_memory(name: str) -> None:
    codec, payload, size = BOMBS[name]
    tracemalloc.start()
    try:
        refused(codec, payload, size)
        assert tracemalloc.get_traced_memory()[1] < 100 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", [XPH, DUH, F32D, PLANES])
@pytest.mark.parametrize("numba", [True, False])
def test_memory_is_a_small_multiple_of_the_run(codec, numba: bool) -> None:
    size = 1 << 20
    content = bfloat16(like_weights(size // 2))
    base = bfloat16(like_weights(size // 2, seed=2))
    payload = codec.encode(content, base if codec.delta else None, dtype=4, most=ENOUGH)
    assert payload is not None
    decoded(codec, payload, base if codec.delta else None, size)
    out = bytearray(base)
    tracemalloc.start()
    try:
        if numba:
            codec.decode(payload, out if codec.delta else None, memoryview(out))
        else:
            with without_numba():
                codec.decode(payload, out if codec.delta else None, memoryview(out))
        assert tracemalloc.get_traced_memory()[1] < 5 * (size + len(payload))
    finally:
        tracemalloc.stop()
    assert out == content
