"""shipproto.digests, against the words of DESIGN.md as tests.support.naive has them."""

import random

import numpy as np
import pytest
import xxhash

from shipproto.digests import EMPTY, LeafDigests, digest_image, version_digest
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE
from tests.support import naive
from tests.support.models import SMALL, build, contents, floats, leaves_of, make_image, rows_of
from tests.support.naive import Tensor

LARGE = (
    floats("a", LEAF_SIZE // 4 + 1),
    Tensor("b", "uint8", (LEAF_SIZE,)),
    Tensor("c", "int8", (5,)),
    Tensor("d", "int8", (0,)),
    floats("e", LEAF_SIZE // 4 + 1, tied_to="a"),
)


def fresh(rows, version: int = 0) -> tuple[Layout, memoryview, dict[str, bytes]]:
    structure = build(rows)
    layout = Layout(structure)
    data = contents(structure, version)
    return layout, memoryview(make_image(layout, data)), data


@pytest.mark.parametrize("rows", [SMALL, LARGE, (), (floats("x", 0),), (floats("x"),)])
def test_the_naive_digests(rows) -> None:
    layout, image, data = fresh(rows)
    digests = digest_image(layout, image)
    assert digests.complete
    assert digests.version_digest() == naive.version_digest(rows, data)
    tensors = digests.tensor_digests()
    assert tensors.shape == (len(rows), 16)
    for name, row in zip(layout.structure.names, tensors, strict=True):
        assert row.tobytes() == naive.tensor_digest(data[name])


def test_every_byte_and_every_bit_of_meaning_counts() -> None:
    rows = [Tensor("a", "uint8", (3,)), Tensor("b", "uint8", (3,))]
    seen = set()
    for shape, dtype, name, data in (
        ((3,), "uint8", "b", b"abc"),
        ((3,), "uint8", "b", b"abd"),
        ((3,), "int8", "b", b"abc"),
        ((3, 1), "uint8", "b", b"abc"),
        ((1, 3), "uint8", "b", b"abc"),
        ((3,), "uint8", "c", b"abc"),
    ):
        layout = Layout(build([rows[0], Tensor(name, dtype, shape)]))
        image = make_image(layout, {"a": b"xyz", name: data})
        seen.add(digest_image(layout, memoryview(image)).version_digest())
    assert len(seen) == 6


def test_ties_order_packing_and_leaf_do_not_count() -> None:
    apart = [Tensor(row.name, row.dtype, row.shape) for row in SMALL]
    expected = digest_image(*fresh(SMALL)[:2]).version_digest()
    data = contents(build(SMALL))
    for rows in (apart, list(reversed(apart))):
        layout = Layout(build(rows))
        assert digest_image(layout, memoryview(make_image(layout, data))).version_digest() == expected


def test_a_digest_depends_on_the_leaf_size_only_above_it() -> None:
    with leaves_of(256):
        layout, image, data = fresh(SMALL)
        assert layout.large_chunks > 1
        assert digest_image(layout, image).version_digest() == naive.version_digest(SMALL, data, 256)


def test_any_order_of_chunks() -> None:
    with leaves_of(256):
        layout, image, data = fresh(SMALL)
        order = list(range(layout.chunks))
        random.Random(3).shuffle(order)
        digests = LeafDigests(layout)
        for at, chunk in enumerate(order):
            assert not digests.knows(chunk)
            assert not digests.complete
            start, size = layout.chunk(chunk)
            assert digests.record(chunk, image[start : start + size]) is None
            assert digests.knows(chunk)
            assert digests.complete == (at == len(order) - 1)
        assert digests.version_digest() == naive.version_digest(SMALL, data, 256)


def test_a_change_is_found_and_named() -> None:
    with leaves_of(256):
        layout, image, _ = fresh(SMALL)
        digests = digest_image(layout, image)
        names = layout.structure.names
        for row in range(len(names)):
            first, stop = layout.tensor_chunks(row)
            if first == stop:
                continue
            start, size = layout.chunk(stop - 1)
            at = int(layout.offsets[row]) + int(layout.structure.nbytes[row]) - 1
            image[at] ^= 1
            changed = digests.record(stop - 1, image[start : start + size])
            assert changed == layout.structure.primary[row]
            assert digests.record(stop - 1, image[start : start + size]) is None, "known from now on"
            image[at] ^= 1
            assert digests.record(stop - 1, image[start : start + size]) == layout.structure.primary[row]


def test_the_first_of_several_changed_tensors_is_named() -> None:
    layout, image, _ = fresh([Tensor(name, "uint8", (4,)) for name in "abcd"])
    digests = digest_image(layout, image)
    image[64] ^= 1
    image[128] ^= 1
    assert digests.record(0, image[: layout.chunk(0)[1]]) == 1


@pytest.mark.parametrize("rows", [SMALL, LARGE, (), (floats("x", 0),), (floats("x"),)])
def test_the_naive_digests_of_chunks(rows) -> None:
    for leaf in (256, LEAF_SIZE):
        with leaves_of(leaf):
            layout, image, data = fresh(rows)
            digests = digest_image(layout, image)
            expected = naive.chunk_digests(rows, data, leaf)
            assert [digests.chunk_digest(chunk) for chunk in range(layout.chunks)] == expected
            assert digests.chunk_digests().shape == (layout.chunks, 16)
            assert digests.chunk_digests().tobytes() == b"".join(expected)


def test_digests_of_chunks_that_are_not_known() -> None:
    layout, _image, _ = fresh(SMALL)
    with pytest.raises(ValueError, match="not known"):
        LeafDigests(layout).chunk_digests()


def test_digests_can_be_those_of_another_version() -> None:
    with leaves_of(256):
        layout, image, data = fresh(SMALL)
        other = digest_image(*fresh(SMALL, version=1)[:2])
        digests = digest_image(layout, image)
        middle = range(1, layout.chunks - 1)
        digests.adopt(middle, other)
        ones = [range(chunk, chunk + 1) for chunk in range(layout.chunks)]
        assert [one.start for one in ones if digests.of_chunks(one) == other.of_chunks(one)] == list(middle)
        for chunk in middle:
            start, size = layout.chunk(chunk)
            digests.forget(chunk)
            digests.record(chunk, image[start : start + size])
        assert digests.version_digest() == naive.version_digest(rows_of(layout.structure), data, 256)


def test_forgetting() -> None:
    with leaves_of(256):
        layout, image, data = fresh(SMALL)
        digests = digest_image(layout, image)
        for chunk in range(layout.chunks):
            digests.forget(chunk)
            assert not digests.knows(chunk)
            assert not digests.complete
            with pytest.raises(ValueError, match="not known"):
                digests.tensor_digests()
            start, size = layout.chunk(chunk)
            assert digests.record(chunk, image[start : start + size]) is None
        assert digests.version_digest() == naive.version_digest(rows_of(layout.structure), data, 256)


def test_padding_is_nobodys_content() -> None:
    layout, image, data = fresh([Tensor("a", "uint8", (5,)), Tensor("b", "uint8", (5,))])
    image[20] = 0xFF
    assert digest_image(layout, image).version_digest() == naive.version_digest(rows_of(layout.structure), data)


def test_empty_tensors_are_known_from_the_start() -> None:
    layout = Layout(build([floats("x", 0), floats("y", 3, 0, 2)]))
    digests = LeafDigests(layout)
    assert digests.complete
    assert digests.tensor_digests().tobytes() == EMPTY * 2
    assert xxhash.xxh3_128_digest(b"") == EMPTY


def test_version_digest_of_given_tensor_digests() -> None:
    layout, image, data = fresh(LARGE)
    tensors = digest_image(layout, image).tensor_digests()
    expected = naive.version_digest(LARGE, data)
    assert version_digest(layout, tensors) == expected
    assert version_digest(layout, np.asfortranarray(tensors)) == expected
