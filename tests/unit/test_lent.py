"""shipproto.lent and shipd.transfer.lent_files: where chunks lie in lent files, and reading them from there."""

import os

import numpy as np
import pytest

from shipd.transfer.lent_files import CutShort, LentFiles
from shipproto.errors import MalformedMessage
from shipproto.layout import Layout
from shipproto.lent import ENTRY, NOT_LENT, Lent, Read, runs
from shipproto.rangeset import RangeSet
from shipproto.structure import Structure, TensorSpec
from tests.support.naive import LEAF


def layout_of(*tensors: tuple[str, int]) -> Layout:
    """Tensors of bytes, by name and size."""
    return Layout(Structure.build(TensorSpec(name, "uint8", (size,)) for name, size in tensors))


LAYOUT = layout_of(("a", 2 * LEAF + 5), ("b", LEAF), ("p", 100), ("q", 64), ("r", 0), ("s", 7))
"""Chunks 0 to 2 of a, 3 of b, and 4 with the small ones, with 28 bytes of zeros behind p."""


def lent(**places: tuple[int, int]) -> Lent:
    """A table of LAYOUT in which tensors that are not named are not lent."""
    files = np.full(6, NOT_LENT, dtype=np.uint8)
    offsets = np.zeros(6, dtype=np.int64)
    for name, (file, offset) in places.items():
        row = LAYOUT.structure.names.index(name)
        files[row], offsets[row] = file, offset
    return Lent(LAYOUT, files, offsets)


def test_chunks_are_lent_where_all_their_tensors_are() -> None:
    assert lent(a=(0, 8)).chunks == [0, 1, 2]
    assert lent(b=(0, 0), p=(0, 9), s=(0, 1)).chunks == [3], "q is missing, so chunk 4 travels"
    assert lent(p=(0, 9), q=(1, 0), s=(0, 1)).chunks == [4], "r has no bytes"
    assert lent().chunks == []


def test_chunks_come_in_the_order_of_the_files() -> None:
    assert lent(a=(1, 0), b=(0, 5000), p=(0, 10), q=(0, 200), s=(0, 300)).chunks == [4, 3, 0, 1, 2]
    assert runs([4, 3, 0, 1, 2], 2, 4) == [range(4, 5), range(3, 4), range(2), range(2, 3)]
    everything = lent(a=(0, 0), b=(0, 2 * LEAF + 5), p=(1, 0), q=(1, 100), s=(1, 164))
    assert everything.runs(9) == [range(4), range(4, 5)], "packed ones apart"
    assert everything.runs(9, RangeSet([(0, 2), (3, 4)])) == [range(2), range(3, 4)]


def test_what_is_read_for_a_chunk() -> None:
    table = lent(a=(2, 1000), p=(0, 10), q=(0, 110), s=(1, 0))
    assert table.reads(1) == [Read(2, 1000 + LEAF, [slice(0, LEAF)])]
    assert table.reads(2) == [Read(2, 1000 + 2 * LEAF, [slice(0, 5)])]
    # p and q follow each other in the file, and not in the chunk.
    assert table.reads(4) == [Read(0, 10, [slice(0, 100), slice(128, 192)]), Read(1, 0, [slice(192, 199)])]
    assert table.ends(4) == [174, 7, 1000 + 2 * LEAF + 5, 0]


def test_the_body() -> None:
    table = lent(a=(0, 1 << 40), q=(1, 77))
    body = table.encode()
    assert body == bytes((0, 255, 255, 1, 255, 255)) + b"".join(
        offset.to_bytes(8, "little") for offset in (1 << 40, 0, 0, 77, 0, 0)
    )
    again = Lent.decode(body, LAYOUT, 2)
    assert again.encode() == body
    assert again.chunks == table.chunks


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "LEND of 0 bytes for 6 names"),
        (bytes(6 * ENTRY + 1), "LEND of 55 bytes for 6 names"),
        (b"\2" + bytes(53), "a file that is none of its 2"),
        (b"\xfe" + bytes(53), "a file that is none of its 2"),
        (bytes(13) + b"\x40" + bytes(40), ""),
        (bytes(12) + b"\1\x40" + bytes(40), "where no file can reach"),
        (bytes(13) + b"\xff" + bytes(40), "where no file can reach"),
        (b"\xff" + bytes(5) + b"\1" + bytes(47), "a place for a tensor that is in no file"),
    ],
)
def test_other_bodies_are_refused(body: bytes, what: str) -> None:
    if not what:
        # 2^62, and no more.
        assert Lent.decode(body, LAYOUT, 2).offsets[0] == 1 << 62
        return
    with pytest.raises(MalformedMessage, match=what):
        Lent.decode(body, LAYOUT, 2)


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Two open files of a hundred and a few bytes."""
    fds = []
    for name, size in (("one", 700), ("two", 64)):
        path = tmp_path / name
        path.write_bytes(bytes(at % 251 for at in range(size)))
        fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    yield fds
    for fd in fds:
        os.close(fd)


def test_a_packed_chunk_has_zeros_between_its_tensors(files) -> None:
    place = memoryview(bytearray(b"\xaa" * LAYOUT.chunk(4)[1]))
    LentFiles(lent(p=(0, 10), q=(1, 0), s=(0, 600)), files).read(4, place)
    first, second = bytes(at % 251 for at in range(700)), bytes(range(64))
    assert place == first[10:110] + bytes(28) + second + first[600:607]


@pytest.mark.parametrize("offset", [601, 700, 1 << 40])
def test_a_file_that_ends_too_early(files, offset) -> None:
    place = memoryview(bytearray(LAYOUT.chunk(4)[1]))
    with pytest.raises(CutShort):
        LentFiles(lent(p=(0, offset), q=(1, 0), s=(1, 0)), files).read(4, place)


def test_more_tensors_in_a_chunk_than_one_call_takes(tmp_path) -> None:
    layout = layout_of(*((f"{at:04}", 3) for at in range(3000)))
    content = bytes(at % 253 for at in range(9001))
    (tmp_path / "file").write_bytes(content)
    table = Lent(layout, np.zeros(3000, dtype=np.uint8), np.arange(3000, dtype=np.int64) * 3 + 1)
    place = memoryview(bytearray(layout.chunk(0)[1]))
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_CLOEXEC)
    try:
        LentFiles(table, [fd]).read(0, place)
    finally:
        os.close(fd)
    assert b"".join(place[at : at + 3] for at in range(0, len(place), 64)) == content[1:]
    assert len(table.reads(0)) == 1
