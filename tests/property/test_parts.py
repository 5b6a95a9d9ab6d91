"""A part of a version over the current one: any model, any part of it, against tensors put together by name."""

from hypothesis import given
from hypothesis import strategies as st

from shipd.service.composing import Part
from shipproto.digests import LeafDigests, digest_image
from shipproto.layout import Layout
from tests.property.strategies import LEAF, examples, models
from tests.support import naive
from tests.support.models import build, content_of, contents, leaves_of, make_image
from tests.support.naive import Tensor


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    """A model, and some of its tensors as they are offered: what it ties is offered tied, or apart."""
    rows = draw(models())
    first = naive.roots(rows)
    sent = [row for row in rows if draw(st.booleans())]
    groups: dict[str, str] = {}
    offered = []
    for row in sorted(sent, key=lambda row: row.name.encode()):
        root = groups.setdefault(first[row.name], row.name)
        tied = root != row.name and draw(st.booleans())
        offered.append(Tensor(row.name, row.dtype, row.shape, root if tied else None))
    return rows, offered


def digested(layout: Layout, data: dict[str, bytes]) -> LeafDigests:
    """The digests of a version with these bytes."""
    return digest_image(layout, memoryview(make_image(layout, data)))


@examples(150)
@given(parts())
def test_the_next_version(drawn: tuple[list[Tensor], list[Tensor]]) -> None:
    rows, offered = drawn
    with leaves_of(LEAF):
        part = Part(Layout(build(offered)), Layout(build(rows)))
        first = naive.roots(rows)
        sizes = {row.name: row.nbytes for row in rows}
        base = contents(part.resident.structure)
        sent = {row.name: content_of(first[row.name], sizes[row.name], 1) for row in offered}
        of_group = {first[name]: data for name, data in sent.items()}
        expected = {name: of_group.get(first[name], base[name]) for name in base}
        was, came = digested(part.resident, base), digested(part.offered, sent)
        assert part.unequal(came) == []
        assert part.composed(was, came).version_digest() == naive.version_digest(rows, expected, LEAF)
        image, received = make_image(part.resident, base), make_image(part.offered, sent)
        for start, source, size in part.moves():
            image[start : start + size] = received[source : source + size]
        assert image == make_image(part.resident, expected)
        replaced = part.replaced()
        for chunk in range(part.resident.chunks):
            assert replaced[chunk] == any(name in of_group for name in part.resident.chunk_names(chunk))
        current = part.current(was)
        assert current is not None
        assert current.version_digest() == naive.version_digest(offered, base, LEAF)


@examples(150)
@given(parts())
def test_what_the_model_ties_must_be_equal(drawn: tuple[list[Tensor], list[Tensor]]) -> None:
    rows, offered = drawn
    with leaves_of(LEAF):
        part = Part(Layout(build(offered)), Layout(build(rows)))
        first = naive.roots(rows)
        sent = contents(build(offered))
        apart = {row.name: row for row in offered if row.tied_to is None and row.nbytes}
        groups: dict[str, list[str]] = {}
        for name in sorted(apart, key=str.encode):
            groups.setdefault(first[name], []).append(name)
        # Each row's content is of its own name, so that every group of two has different ones.
        found = part.unequal(digested(part.offered, sent))
        tied = {row.name: row.tied_to for row in offered if row.tied_to is not None}
        expected = [(group[0], name) for group in groups.values() for name in group[1:]]
        expected += [
            (groups[first[name]][0], name)
            for name, root in tied.items()
            if root in apart and groups[first[name]][0] != root
        ]
        assert sorted(found) == sorted(expected)


@examples(100)
@given(models(), st.data())
def test_one_tensor_for_what_the_model_has_apart(rows: list[Tensor], data: st.DataObject) -> None:
    """It cannot be what is sent while the model has two values for it; afterwards it has one."""
    pairs = [
        (one.name, other.name)
        for one in rows
        for other in rows
        if one.tied_to is other.tied_to is None
        and one.name.encode() < other.name.encode()
        and (one.dtype, one.shape) == (other.dtype, other.shape)
    ]
    if not pairs:
        return
    one, other = data.draw(st.sampled_from(pairs))
    by_name = {row.name: row for row in rows}
    offered = [by_name[one], Tensor(other, by_name[other].dtype, by_name[other].shape, one)]
    with leaves_of(LEAF):
        part = Part(Layout(build(offered)), Layout(build(rows)))
        base = contents(part.resident.structure)
        was = digested(part.resident, base)
        assert (part.current(was) is None) == (base[one] != base[other])
        came = digested(part.offered, {one: base[one], other: base[one]})
        after = part.composed(was, came)
        current = part.current(after)
        assert current is not None
        assert current.version_digest() == came.version_digest()
