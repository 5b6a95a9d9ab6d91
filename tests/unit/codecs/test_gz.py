"""GZ: known bytes, sizes around its blocks, and payloads that are cut, flipped or lie."""

import tracemalloc

import numpy as np
import pytest

from shipd.codecs import gz
from shipd.codecs.bits import put_number
from shipd.codecs.codec import CodecError
from shipd.codecs.gz import GZ
from shipd.codecs.zstd import squeeze
from tests.support import naive_codecs, sparse
from tests.support.sparse import BFLOAT16, ENOUGH, decoded, encoded, weights

BASE = np.arange(0x3F00, 0x3F00 + 100, dtype=np.uint16)


def payload(
    low: list[int], high: list[int], signs: bytes, steps: list[int], escapes: bytes = b"", *, changes: int | None = None
) -> bytes:
    """A payload of the given streams, as SPEC.md lays it out."""
    frames = [squeeze(bytes(stream)) for stream in (low, high, signs, steps)]
    head = bytearray()
    put_number(head, len(low) if changes is None else changes)
    for frame in frames:
        put_number(head, len(frame))
    return bytes(head) + b"".join(frames) + escapes


def refused(some: bytes, base: np.ndarray = BASE) -> None:
    with pytest.raises(CodecError):
        decoded(GZ, some, base)
    with pytest.raises(ValueError, match=r"\S"):
        naive_codecs.decode(GZ.number, some, base.tobytes(), base.nbytes)


def test_known_streams() -> None:
    run = decoded(GZ, payload([5, 10], [0, 0], b"\x02", [0, 2]), BASE)
    assert np.flatnonzero(run != BASE).tolist() == [5, 16]
    assert (run[5], run[16]) == (BASE[5] + 1, BASE[16] - 3)


def test_nothing_changed() -> None:
    assert encoded(GZ, BASE, BASE) == b"\0"
    assert (decoded(GZ, b"\0", BASE) == BASE).all()
    refused(b"\0\0")
    refused(b"")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 31, 32, 33, 127, 129, 1000, 1001])
def test_every_size(monkeypatch: pytest.MonkeyPatch, size: int, share: float) -> None:
    monkeypatch.setattr(gz, "_BLOCK", 128)
    content, base = weights(size, share, seed=size + 1, step=40_000)
    assert (decoded(GZ, encoded(GZ, content, base), base) == content).all()


def test_gaps_and_steps_that_are_escaped() -> None:
    """Gaps around what one byte, two bytes and no two bytes hold; steps around what a byte holds."""
    gaps = [0, 255, 256, 65_279, 65_280, 65_281, 70_000, 0]
    steps = [1, 255, 256, 257, -256, -257, -32_768, 32_767]
    base = np.zeros(sum(gaps) + 2 * len(gaps), dtype=np.uint16) + np.uint16(0x8000)
    content = base.copy()
    places = np.cumsum(np.array(gaps) + 1) - 1
    base[places] = np.where(np.array(steps) < 0, 0x7FFF, 0xFFFF).astype(np.uint16)
    content[places] = [_moved(int(base[place]), by) for place, by in zip(places, steps, strict=True)]
    some = encoded(GZ, content, base)
    assert some.endswith(
        b"".join(gap.to_bytes(4, "little") for gap in (255, 255, 273))
        + b"".join(size.to_bytes(2, "little") for size in (255, 256, 255, 256, 32_767, 32_766))
    )
    assert (decoded(GZ, some, base) == content).all()


def _moved(word: int, by: int) -> int:
    """The word that is ``by`` steps of a key further, one at a time in the mind."""
    key = (word + 0x8000 if word < 0x8000 else 0xFFFF - word) + by
    assert 0 <= key <= 0xFFFF
    return key - 0x8000 if key >= 0x8000 else 0xFFFF - key


RICH = encoded(GZ, *weights(400, 0.3, step=40_000)), weights(400, 0.3, step=40_000)[1]


def test_every_cut() -> None:
    some, base = RICH
    for size in range(len(some)):
        refused(some[:size], base)
    refused(some + b"\0", base)


def test_every_flipped_bit() -> None:
    some, base = RICH
    for bit in range(8 * len(some)):
        flipped = bytearray(some)
        flipped[bit // 8] ^= 1 << bit % 8
        found = sparse.outcome(lambda this, on: decoded(GZ, this, on), bytes(flipped), base)
        assert found == naive_codecs.outcome(GZ.number, bytes(flipped), base.tobytes(), base.nbytes), bit


LIES = {
    "more changes than words": payload([0] * 101, [0] * 101, b"\0" * 13, [0] * 101),
    "changes that the streams do not have": payload([0], [0], b"\0", [0], changes=2),
    "a huge claim": payload([0], [0], b"\0", [0], changes=(1 << 28) - 1),
    "streams of different lengths": payload([0, 0], [0], b"\0", [0, 0]),
    "signs that are too long": payload([0], [0], b"\0\0", [0]),
    "signs that are not filled up with zeros": payload([0], [0], b"\x02", [0]),
    "a change behind the end": payload([100], [0], b"\0", [0]),
    "changes behind the end": payload([50, 49], [0, 0], b"\0", [0, 0]),
    "a gap beyond the run": payload([0], [255], b"\0", [0], (255).to_bytes(4, "little")),
    "a gap beyond everything": payload([0], [255], b"\0", [0], b"\xff\xff\xff\xff"),
    "a gap that needed no escape": payload([0], [255], b"\0", [0], bytes(4)),
    "no escape of a gap": payload([0], [255], b"\0", [0]),
    "an escape more": payload([0], [0], b"\0", [0], b"\xff\0"),
    "a step that needed no escape": payload([0], [0], b"\0", [255], b"\xfe\0"),
    "no escape of a step": payload([0], [0], b"\0", [255]),
    "a step beyond every word": payload([0], [0], b"\x01", [255], b"\x00\x80"),
    "32768 up": payload([0], [0], b"\0", [255], b"\xff\x7f"),
}


@pytest.mark.parametrize("which", LIES)
def test_lies(which: str) -> None:
    refused(LIES[which])


def test_what_is_only_just_allowed() -> None:
    run = decoded(GZ, payload([50, 48], [0, 0], b"\x02", [0, 255], b"\xff\x7f"), BASE)
    assert np.flatnonzero(run != BASE).tolist() == [50, 99]


def test_what_lies_at_odd_addresses() -> None:
    content, base = weights(1000, 0.1)
    shifted = [memoryview(b"\0" + words.tobytes())[1:] for words in (content, base)]
    some = GZ.encode(*shifted, dtype=BFLOAT16, most=ENOUGH)
    assert some == encoded(GZ, content, base)
    out = memoryview(bytearray(1 + 2 * len(base)))[1:]
    GZ.decode(memoryview(b"\0" + some)[1:], shifted[1], out)
    assert out == shifted[0]


def test_what_is_no_run_of_words() -> None:
    assert GZ.encode(b"abc", b"abd", dtype=BFLOAT16, most=100) is None
    with pytest.raises(CodecError, match="words"):
        GZ.decode(b"\0", b"abc", memoryview(bytearray(3)))
    with pytest.raises(ValueError, match="same size"):
        GZ.encode(b"abcd", None, dtype=BFLOAT16, most=100)
    with pytest.raises(ValueError, match="same size"):
        GZ.decode(b"\0", b"ab", memoryview(bytearray(4)))


@pytest.mark.parametrize("share", [0.005, 1.0])
def test_memory_is_a_small_multiple_of_the_run(share: float) -> None:
    content, base = weights(1 << 21, share)
    some = encoded(GZ, content, base)
    run = bytearray(base.tobytes())
    tracemalloc.start()
    try:
        GZ.encode(content.tobytes(), base.tobytes(), dtype=BFLOAT16, most=ENOUGH)
        _, encoding = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        GZ.decode(some, run, memoryview(run))
        _, decoding = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(share, encoding / base.nbytes, decoding / base.nbytes)
    assert encoding < 30 * base.nbytes
    assert decoding < 30 * base.nbytes
