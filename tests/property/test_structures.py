"""Structures and layouts: any model, against the naive ones, and everything that must hold of every layout."""

import random

from hypothesis import given
from hypothesis import strategies as st

from shipproto.digests import LeafDigests, digest_image
from shipproto.errors import LimitExceeded, MalformedMessage
from shipproto.layout import Layout
from shipproto.limits import PAGE_SIZE, TENSOR_ALIGNMENT
from shipproto.structure import Structure
from tests.property.strategies import LEAF, examples, models, mutate, mutations, names, untied
from tests.support import naive
from tests.support.models import build, contents, leaves_of, make_image, read_image, rows_of
from tests.support.naive import Tensor


@examples(150)
@given(models())
def test_there_is_one_encoding(rows: list[Tensor]) -> None:
    structure = build(rows)
    assert structure.encoded == naive.encode_structure(rows)
    again = Structure.decode(structure.encoded)
    assert again.encoded == structure.encoded
    assert again.specs() == structure.specs()
    assert build(rows_of(again)).digest == structure.digest


@examples(400)
@given(models(most=5), mutations)
def test_what_is_accepted_is_canonical(rows: list[Tensor], changes: list[tuple[str, int, int]]) -> None:
    body = mutate(build(rows).encoded, changes)
    try:
        structure = Structure.decode(body)
    except (MalformedMessage, LimitExceeded):
        return
    assert structure.encoded == body
    assert Layout(structure).size >= PAGE_SIZE


@examples(150)
@given(models())
def test_the_naive_layout(rows: list[Tensor]) -> None:
    with leaves_of(LEAF):
        layout = Layout(build(rows))
        expected = naive.picture(rows, LEAF)
        names_ = layout.structure.names
        assert {name: int(layout.offsets[row]) for row, name in enumerate(names_)} == expected.offsets
        assert [(*layout.chunk(at), layout.chunk_names(at)) for at in range(layout.chunks)] == expected.chunks
        assert layout.size == expected.size


@examples(150)
@given(models())
def test_what_holds_of_every_layout(rows: list[Tensor]) -> None:
    with leaves_of(LEAF):
        structure = build(rows)
        layout = Layout(structure)
        # Tensors: aligned, inside, and apart unless tied.
        taken: dict[int, int] = {}
        for row in range(len(structure)):
            start, size = int(layout.offsets[row]), int(structure.nbytes[row])
            assert start % TENSOR_ALIGNMENT == 0
            assert start + size <= layout.size
            root = int(structure.primary[row])
            assert start == layout.offsets[root]
            if root == row:
                for at in range(start, start + size):
                    assert taken.setdefault(at, row) == row
        # Chunks: of at most a leaf, in order, apart, and every byte of every tensor in exactly one.
        covered: dict[int, int] = {}
        before = 0
        for chunk in range(layout.chunks):
            start, size = layout.chunk(chunk)
            assert 1 <= size <= LEAF
            assert start >= before
            before = start + size
            assert before <= layout.size
            covered.update(dict.fromkeys(range(start, before), chunk))
        assert taken.keys() <= covered.keys()
        for row in range(len(structure)):
            start, size = int(layout.offsets[row]), int(structure.nbytes[row])
            carrying = {covered[at] for at in range(start, start + size)}
            assert carrying == set(range(*layout.tensor_chunks(row)))
            # A large tensor's chunks are its leaves; a small tensor lies whole in one.
            if size < LEAF:
                assert len(carrying) <= 1
            else:
                starts = [layout.chunk(chunk)[0] - start for chunk in sorted(carrying)]
                assert starts == list(range(0, size, LEAF))


@examples(100)
@given(models(), st.integers(0, 1 << 32), st.integers(0, 3))
def test_the_digest_is_of_the_content_alone(rows: list[Tensor], seed: int, version: int) -> None:
    with leaves_of(LEAF):
        structure = build(rows)
        data = contents(structure, version)
        expected = naive.version_digest(rows, data, LEAF)
        for form in (rows, untied(rows), list(reversed(rows))):
            layout = Layout(build(form))
            image = memoryview(make_image(layout, data))
            assert read_image(layout, image) == data
            digests = LeafDigests(layout)
            order = list(range(layout.chunks))
            random.Random(seed).shuffle(order)
            for chunk in order:
                start, size = layout.chunk(chunk)
                digests.record(chunk, image[start : start + size])
            assert digests.version_digest() == expected


@examples(100)
@given(models(), names, st.data())
def test_every_tensor_counts(rows: list[Tensor], name: str, data: st.DataObject) -> None:
    with leaves_of(LEAF):
        structure = build(rows)
        layout = Layout(structure)
        content = contents(structure)
        image = make_image(layout, content)
        digests = digest_image(layout, memoryview(image))
        before = digests.tensor_digests()
        filled = [row for row in range(len(structure)) if structure.nbytes[row]]
        if filled:
            row = data.draw(st.sampled_from(filled))
            at = data.draw(st.integers(0, int(structure.nbytes[row]) - 1))
            image[int(layout.offsets[row]) + at] ^= 1 << data.draw(st.integers(0, 7))
            changed = digest_image(layout, memoryview(image)).tensor_digests()
            differing = (before != changed).any(axis=1).nonzero()[0].tolist()
            group = [at for at in range(len(structure)) if structure.primary[at] == structure.primary[row]]
            assert differing == group
        # Tensors beside it, and how they are packed, do not change a tensor's own digest.
        if name not in structure.index:
            wider = build([*rows, Tensor(name, "uint8", (3,))])
            more = {**content, name: b"abc"}
            wide = digest_image(Layout(wider), memoryview(make_image(Layout(wider), more)))
            for row, own in enumerate(structure.names):
                assert wide.tensor_digests()[wider.index[own]].tobytes() == before[row].tobytes()
