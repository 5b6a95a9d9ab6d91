"""shipproto.layout, against the row-by-row one of tests.support.naive."""

import random

import numpy as np
import pytest

from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE, PAGE_SIZE, TENSOR_ALIGNMENT
from tests.support import naive
from tests.support.models import SMALL, build, floats, leaves_of
from tests.support.naive import Tensor


def check(rows, leaf: int = LEAF_SIZE) -> Layout:
    """The layout of ``rows``, compared in every respect."""
    layout = Layout(build(rows))
    names = layout.structure.names
    expected = naive.picture(rows, leaf)
    assert {name: int(layout.offsets[row]) for row, name in enumerate(names)} == expected.offsets
    assert layout.size == expected.size
    assert [(*layout.chunk(chunk), layout.chunk_names(chunk)) for chunk in range(layout.chunks)] == expected.chunks
    assert layout.wire_bytes == sum(size for _, size, _ in expected.chunks)
    carriers: dict[str, list[int]] = {}
    for at, (_, _, carried) in enumerate(expected.chunks):
        for name in carried:
            carriers.setdefault(name, []).append(at)
    for row, name in enumerate(names):
        first, stop = layout.tensor_chunks(row)
        if layout.structure.nbytes[row]:
            assert list(range(first, stop)) == carriers[names[int(layout.structure.primary[row])]], name
        else:
            assert first == stop
    leaf_rows = layout.leaf_rows().tolist()
    assert len(leaf_rows) == layout.leaves
    first_leaves, counts = layout.tensor_leaves()
    for row in range(len(names)):
        root = int(layout.structure.primary[row])
        start, count = int(first_leaves[row]), int(counts[row])
        assert leaf_rows[start : start + count] == [root] * count
        size = int(layout.structure.nbytes[row])
        assert count == (-(-size // leaf) if size >= leaf else 1)
    for chunk in range(layout.large_chunks, layout.chunks):
        first, stop = layout.packed_leaves(chunk)
        assert leaf_rows[first:stop] == layout.chunk_tensors(chunk).tolist()
    check_runs(layout, expected)
    return layout


def check_runs(layout: Layout, expected: naive.Picture) -> None:
    """What is said of chunks that follow each other, of every first one."""
    rows, leaf_rows = layout.chunk_tensors, layout.leaf_rows().tolist()
    for first in range(layout.chunks):
        for count in range(1, min(6, layout.chunks - first + 1)):
            parts = expected.chunks[first : first + count]
            ends = [start + size for start, size, _ in parts]
            run = range(first, first + count)
            assert layout.span(run) == (parts[0][0], ends[-1])
            between = zip(ends, (start for start, _, _ in parts[1:]), strict=False)
            assert layout.gaps(run) == [(end, start) for end, start in between if end < start]
            assert all(0 < start - end < TENSOR_ALIGNMENT for end, start in layout.gaps(run))
            leaf, stop = layout.run_leaves(run)
            assert leaf_rows[leaf:stop] == [row for chunk in run for row in rows(chunk).tolist()]


@pytest.mark.parametrize(
    "rows",
    [
        (),
        SMALL,
        (floats("x"),),
        (floats("x", 0),),
        (floats("x", 0), floats("y", 0, 4)),
        (floats("a", 0), floats("b", 1), floats("c", 0)),
        [
            Tensor(name, "uint8", (size,))
            for name, size in (("a", LEAF_SIZE - 1), ("b", LEAF_SIZE), ("c", LEAF_SIZE + 1))
        ],
        [Tensor("a", "uint8", (LEAF_SIZE // 2,)), Tensor("b", "uint8", (LEAF_SIZE // 2,)), Tensor("c", "uint8", (0,))],
        [Tensor(f"t{at}", dtype, (5,)) for at, dtype in enumerate(reversed(naive.ITEMSIZE))],
        [Tensor("in", "float16", (600, 1024)), Tensor("out", "float16", (600, 1024), tied_to="in")],
    ],
)
def test_the_naive_layout(rows) -> None:
    layout = check(rows)
    assert layout.size % PAGE_SIZE == 0
    assert layout.size >= PAGE_SIZE
    assert not np.any(layout.offsets % TENSOR_ALIGNMENT)


def test_random_layouts() -> None:
    rng = random.Random(6)
    dtypes = list(naive.ITEMSIZE)
    with leaves_of(512):
        for _ in range(150):
            rows: list[Tensor] = []
            for at in range(rng.randrange(14)):
                dtype = rng.choice(dtypes)
                shape = tuple(rng.choice((0, 1, 1, 2, 3, 7, 20)) for _ in range(rng.randrange(4)))
                tie = rng.choice(rows) if rows and rng.random() < 0.2 else None
                if tie is not None:
                    tie = next(row for row in rows if row.name == (tie.tied_to or tie.name))
                    rows.append(Tensor(f"{rng.randrange(1000)}.{at}", tie.dtype, tie.shape, tie.name))
                else:
                    rows.append(Tensor(f"{rng.randrange(1000)}.{at}", dtype, shape))
            check(rows, 512)


def test_tiny_tensors_cost_no_frame_each() -> None:
    layout = check([Tensor(f"t{at:05}", "uint8", (1,)) for at in range(20_000)])
    assert layout.chunks == -(-20_000 * TENSOR_ALIGNMENT // LEAF_SIZE) == 3
    assert layout.leaves == 20_000


def test_empty_tensors_cost_nothing() -> None:
    layout = check([Tensor(f"t{at}", "uint8", (0,)) for at in range(1000)])
    assert (layout.chunks, layout.wire_bytes, layout.size) == (0, 0, PAGE_SIZE)


def test_both_sides_compute_the_same() -> None:
    here, there = Layout(build(SMALL)), Layout(build(tuple(reversed(SMALL))))
    assert here.structure.encoded == there.structure.encoded
    assert here.offsets.tolist() == there.offsets.tolist()
    assert here.chunk_starts.tolist() == there.chunk_starts.tolist()


def test_a_terabyte_is_laid_out_without_a_terabyte() -> None:
    layout = Layout(build([floats("a", 1 << 30, 256), floats("b", 3)]))
    assert layout.chunks == (1 << 40) // LEAF_SIZE + 1
    assert layout.chunk(layout.chunks - 1) == (1 << 40, 12)
