import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipd.bases.patch import SPAN, apply_patch, make_patch
from shipproto.limits import LEAF_SIZE
from tests.property.strategies import examples

BLOCK = 2 * 65536
"""Bytes of the words that one block of a patch numbers."""


def padded(content: bytes) -> np.ndarray:
    """u8, with zeros up to a multiple of SPAN."""
    return np.frombuffer(content + bytes(-len(content) % SPAN), dtype=np.uint8).copy()


def there_and_back(newer: bytes, older: bytes, *, offset: int = 0) -> bytes | None:
    """The patch, applied at an address that is ``offset`` bytes beside a multiple of SPAN."""
    patch = make_patch(padded(newer), padded(older), len(newer))
    memory = np.full(len(newer) + 32, 0xA5, dtype=np.uint8)
    place = memory[8 + offset : 8 + offset + len(newer)]
    place[:] = np.frombuffer(newer, dtype=np.uint8)
    if patch is not None:
        apply_patch(patch, place)
    assert place.tobytes() == older
    # And nothing beside it.
    assert set(memory[: 8 + offset].tolist()) == set(memory[8 + offset + len(newer) :].tolist()) == {0xA5}
    return patch


@examples(300)
@given(st.data())
def test_every_patch_leads_back(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from((1, 2, 7, 8, 9, 63, 64, 65, 200, BLOCK - 1, BLOCK + 3, LEAF_SIZE - 5, LEAF_SIZE)))
    seed = data.draw(st.integers(0, 1 << 16))
    changes = data.draw(st.sampled_from((0, 1, 2, 5, 30, 1000, size)))
    generator = np.random.default_rng(seed)
    newer = generator.bytes(size)
    older = bytearray(newer)
    for place in generator.integers(0, size, changes).tolist():
        older[place] ^= 1 + place % 255
    there_and_back(newer, bytes(older), offset=data.draw(st.integers(0, 7)))


def test_what_is_the_same_needs_none() -> None:
    assert there_and_back(b"same" * 100, b"same" * 100) is None


@pytest.mark.parametrize("place", [0, BLOCK - 2, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK, LEAF_SIZE - 1])
def test_a_change_at_the_border_of_a_block(place: int) -> None:
    newer = bytes(LEAF_SIZE)
    older = bytearray(newer)
    older[place] = 1
    patch = there_and_back(newer, bytes(older))
    assert patch is not None
    assert len(patch) == 16  # three counts, a position, a word


def test_changed_words_cost_four_bytes_each() -> None:
    newer = np.zeros(LEAF_SIZE // 2, dtype=np.uint16)
    older = newer.copy()
    older[::200] = 7
    patch = there_and_back(newer.tobytes(), older.tobytes())
    assert patch is not None
    assert len(patch) == 12 + 4 * np.count_nonzero(older)


def test_the_older_chunk_itself_where_that_is_shorter() -> None:
    newer, older = bytes(1000), bytes([1, 0] * 500)
    assert there_and_back(newer, older) == older
    # A patch is as long as the chunk only where it is the chunk.
    for changed in range(1, 40):
        words = np.zeros(40, dtype=np.uint16)
        words[:changed] = 9
        patch = there_and_back(bytes(80), words.tobytes())
        assert patch is not None
        assert len(patch) == min(80, 12 + 4 * changed)


def test_the_last_byte_of_an_odd_chunk() -> None:
    newer = bytes(101)
    there_and_back(newer, newer[:-1] + b"\xff")
    there_and_back(newer, b"\x01" + newer[1:-1] + b"\xff")
