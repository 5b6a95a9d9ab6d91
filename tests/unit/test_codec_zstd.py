"""Frames that say another size than is due, none, or too much: none of them is read."""

import struct
import tracemalloc

import pytest
import zstandard

from shipd.codecs.codec import CodecError
from shipd.codecs.zstd import squeeze, squeeze_entropy, unsqueeze

CONTENT = bytes(range(50)) * 60
FRAME = squeeze(CONTENT)
MAGIC = b"\x28\xb5\x2f\xfd"
RAW, RLE = 0, 1


def block(kind: int, size: int, content: bytes, *, last: bool = True) -> bytes:
    return struct.pack("<I", size << 3 | kind << 1 | last)[:3] + content


def single_segment(declared: int, *blocks: bytes) -> bytes:
    return MAGIC + b"\xa0" + struct.pack("<I", declared) + b"".join(blocks)


@pytest.mark.parametrize("squeezed", [squeeze, squeeze_entropy])
@pytest.mark.parametrize("content", [b"\0", CONTENT, bytes(1 << 20), bytes(range(256)) * 4096])
def test_what_is_squeezed_comes_back(squeezed, content) -> None:
    frame = squeezed(content)
    assert unsqueeze(frame, len(content)) == content
    assert unsqueeze(memoryview(frame), len(content)) == content
    assert zstandard.get_frame_parameters(frame).content_size == len(content)


def test_made_by_hand_and_read() -> None:
    assert unsqueeze(single_segment(9, block(RLE, 9, b"x")), 9) == b"x" * 9
    blocks = (block(RLE, 4, b"x", last=False), block(RAW, 0, b"", last=False), block(RAW, 5, b"abcde"))
    several = single_segment(9, *blocks)
    assert unsqueeze(several, 9) == b"xxxxabcde"


def _skippable(size: int) -> bytes:
    return struct.pack("<II", 0x184D2A50, size) + bytes(size)


REFUSED = {
    "nothing": (b"", 3000),
    "another size declared": (FRAME, 2999),
    "no size declared": (zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT), 3000),
    "a byte after it": (FRAME + b"\0", 3000),
    "another frame after it": (FRAME + FRAME, 6000),
    "a frame of half each": (squeeze(CONTENT[:1500]) + squeeze(CONTENT[1500:]), 3000),
    "a skippable frame after it": (FRAME + _skippable(4), 3000),
    "a skippable frame before it": (_skippable(4) + FRAME, 3000),
    "a skippable frame alone": (_skippable(3000), 3000),
    "no content where none is due": (squeeze(b""), 0),
    "no content and something after it where none is due": (squeeze(b"") + b"anything", 0),
    "less than declared": (single_segment(3000, block(RLE, 2999, b"a")), 3000),
    "more than declared": (single_segment(3000, block(RLE, 3001, b"a")), 3000),
    "far more than declared": (single_segment(10, *[block(RLE, 131072, b"a", last=False)] * 1000), 10),
    "a reserved kind of block": (single_segment(3000, block(3, 3000, b"a")), 3000),
    "a reserved bit": (MAGIC + b"\xa8" + struct.pack("<I", 3000) + block(RLE, 3000, b"a"), 3000),
    "a dictionary": (MAGIC + b"\xa1\x07" + struct.pack("<I", 3000) + block(RLE, 3000, b"a"), 3000),
    "a window of 16 MiB": (MAGIC + b"\x80\x70" + struct.pack("<I", 3000) + block(RLE, 3000, b"a"), 3000),
    "a window of terabytes": (MAGIC + b"\x80\xf8" + struct.pack("<I", 3000) + block(RLE, 3000, b"a"), 3000),
    "another magic": (b"\x1e" + FRAME[1:], 3000),
    "a wrong checksum": (zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT)[:-1] + b"\0", 3000),
}  # fmt: skip


@pytest.mark.parametrize(("frame", "size"), REFUSED.values(), ids=REFUSED)
def test_refused(frame: bytes, size: int) -> None:
    with pytest.raises(CodecError):
        unsqueeze(frame, size)


def test_a_window_of_8_mib_is_read() -> None:
    frame = MAGIC + b"\x80\x68" + struct.pack("<I", 3000) + block(RLE, 3000, b"a")
    assert unsqueeze(frame, 3000) == b"a" * 3000


@pytest.mark.parametrize("size", range(len(FRAME)))
def test_truncated(size: int) -> None:
    with pytest.raises(CodecError):
        unsqueeze(FRAME[:size], len(CONTENT))


def test_a_bomb_takes_no_memory() -> None:
    bombs = [
        squeeze(bytes(64 << 20)),
        single_segment(64 << 20, *[block(RLE, 131072, b"a", last=False)] * 512),
        single_segment(1000, *[block(RLE, 131072, b"a", last=False)] * 512),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(CodecError):
                unsqueeze(bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
