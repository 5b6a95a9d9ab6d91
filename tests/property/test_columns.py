"""What is done for all tensors at once, against the same done tensor by tensor: structures, rows, chunks, headers."""

import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from shipd.checkpoints import known, plain_header
from shipd.checkpoints.safetensors_file import SafetensorsFile
from shipd.checkpoints.source import join, open_source
from shipd.client.chunks import ChunkReader
from shipd.errors import CheckpointError, UnsupportedTensor
from shipd.matching.differences import mismatches
from shipproto.digests import LeafDigests
from shipproto.errors import MalformedMessage
from shipproto.layout import Layout
from shipproto.sender import Sender
from shipproto.sources import sources
from shipproto.structure import Structure, alike, rows_in, same_shapes
from tests.property.strategies import LEAF, dtypes, examples, models, names, shapes
from tests.support import naive
from tests.support.models import build, contents, leaves_of, make_image
from tests.support.naive import Tensor
from tests.support.safetensors_files import packed

# --- structures --------------------------------------------------------------------------------------------------


@examples(100)
@given(models())
def test_of_columns_is_build(rows: list[Tensor]) -> None:
    ordered = sorted(rows, key=lambda row: row.name)
    ties = {row.name: row.tied_to for row in rows if row.tied_to is not None}
    structure = Structure.of_columns(
        [row.name for row in ordered], [row.dtype for row in ordered], [row.shape for row in ordered], ties
    )
    assert structure.encoded == naive.encode_structure(rows)
    decoded = Structure.decode(structure.encoded)
    del vars(decoded)["encoded"]
    assert decoded.encoded == structure.encoded, "and not only because it was kept"


@examples(100)
@given(st.lists(st.tuples(models(), st.randoms()), min_size=1, max_size=4))
def test_what_was_pushed_before_is_known_again_and_nothing_else_is(pushed) -> None:
    for _ in range(2):
        for rows, random in pushed:
            shuffled = random.sample(rows, len(rows))
            ties = {row.name: row.tied_to for row in rows if row.tied_to is not None}
            structure, order = known.structure_of(
                [row.name for row in shuffled], [row.dtype for row in shuffled], [row.shape for row in shuffled], ties
            )
            assert structure.encoded == naive.encode_structure(rows)
            places = range(len(rows)) if order is None else order
            assert tuple(shuffled[at].name for at in places) == structure.names


@examples(100)
@given(models(), models(), st.data())
def test_rows_that_are_alike(rows: list[Tensor], more: list[Tensor], data: st.DataObject) -> None:
    one, other = build(rows), build(more)
    if not len(one) or not len(other):
        return
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(one) - 1), st.integers(0, len(other) - 1)), max_size=9))
    own = torch.tensor([row for row, _ in pairs], dtype=torch.int64).numpy()
    its = torch.tensor([row for _, row in pairs], dtype=torch.int64).numpy()
    shaped = [one.shape(row) == other.shape(at) for row, at in pairs]
    assert same_shapes(one, own, other, its).tolist() == shaped
    typed = [one.dtype(row) == other.dtype(at) for row, at in pairs]
    assert alike(one, own, other, its).tolist() == [a and b for a, b in zip(shaped, typed, strict=True)]
    assert rows_in(one.names, other).tolist() == [other.index.get(name, -1) for name in one.names]


# --- what one side has and the other wants -----------------------------------------------------------------------


@st.composite
def variants(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A model, another with some of its tensors changed, tied otherwise, missing or new, and transient ones."""
    resident = draw(models())
    offered: list[Tensor] = []
    for row in resident:
        match draw(st.sampled_from(("same", "same", "same", "apart", "gone", "dtype", "shape"))):
            case "same" | "apart":
                offered.append(Tensor(row.name, row.dtype, row.shape))
            case "dtype":
                offered.append(Tensor(row.name, draw(dtypes), row.shape))
            case "shape":
                offered.append(Tensor(row.name, row.dtype, draw(shapes)))
    there = {row.name for row in offered}
    transient = [Tensor(name, draw(dtypes), draw(shapes)) for name in draw(st.lists(names, unique=True, max_size=3))]
    offered += [row for row in transient if row.name not in there and draw(st.booleans())]
    there = {row.name for row in offered}
    offered += [
        Tensor(name, draw(dtypes), draw(shapes))
        for name in draw(st.lists(names, unique=True, max_size=2))
        if name not in there
    ]
    return resident, offered, transient


def naive_mismatches(offered: list[Tensor], resident: list[Tensor], transient: list[Tensor]) -> list[str]:
    """Row by row, from what the messages say."""
    given = {row.name: row for row in offered}
    wanted = {row.name: row for row in resident}
    spare = {row.name: (row.dtype, row.shape) for row in transient}
    first = naive.roots(resident)
    groups = {first[name] for name in given if name in wanted}
    missing, wrong = [], []
    for row in sorted(resident, key=lambda row: row.name):
        if row.name not in given:
            if first[row.name] not in groups:
                missing.append(f"missing: {row.name} ({row.dtype} {list(row.shape)})")
            continue
        found = given[row.name]
        has = f"the resident model has {list(row.shape)}"
        if found.shape != row.shape:
            wrong.append(f"shape: {row.name} is {list(found.shape)}, {has}")
        if found.dtype != row.dtype:
            wrong.append(f"dtype: {row.name} is {found.dtype}, the resident model has {row.dtype}")
    unexpected = [
        f"unexpected: {row.name} ({row.dtype} {list(row.shape)})"
        for row in sorted(offered, key=lambda row: row.name)
        if row.name not in wanted and spare.get(row.name) != (row.dtype, row.shape)
    ]
    return missing + unexpected + wrong


@examples(200)
@given(variants())
def test_mismatches(drawn) -> None:
    resident, offered, transient = drawn
    assert mismatches(build(offered), build(resident), build(transient)) == naive_mismatches(
        offered, resident, transient
    )


def naive_sources(offered: Structure, wanted: Structure) -> tuple[list[int], list[tuple[int, int]]] | str:
    """Row by row: the offered rows and the pairs that must be equal, or the tensor that stands in the way."""
    rows: list[int] = []
    chosen: dict[int, int] = {}
    equal = []
    for row, name in enumerate(wanted.names):
        at = offered.index.get(name, -1)
        rows.append(at)
        if at < 0:
            continue
        if (offered.dtype(at), offered.shape(at)) != (wanted.dtype(row), wanted.shape(row)):
            return name
        source = int(offered.primary[at])
        if chosen.setdefault(int(wanted.primary[row]), source) != source:
            equal.append((chosen[int(wanted.primary[row])], source))
    for row, name in enumerate(wanted.names):
        if rows[row] < 0:
            rows[row] = chosen.get(int(wanted.primary[row]), -1)
            if rows[row] < 0:
                return name
    return rows, equal


@examples(200)
@given(variants())
def test_where_the_receivers_tensors_come_from(drawn) -> None:
    resident, offering, _ = drawn
    offered, wanted = build(offering), build(resident)
    expected = naive_sources(offered, wanted)
    if isinstance(expected, str):
        with pytest.raises(MalformedMessage, match="the receiver wants tensor") as caught:
            sources(offered, wanted)
        assert f"tensor {expected!r}" in str(caught.value)
        return
    rows, equal = sources(offered, wanted)
    assert (rows.tolist(), equal) == expected


# --- chunks ------------------------------------------------------------------------------------------------------


@examples(100)
@given(models(), st.randoms(), st.lists(st.integers(0, 1 << 20), max_size=3))
def test_places_gaps_and_changes_of_packed_chunks(rows: list[Tensor], random, flips: list[int]) -> None:
    with leaves_of(LEAF):
        layout = Layout(build(rows))
        image = memoryview(make_image(layout, contents(layout.structure)))
        digests = LeafDigests(layout)
        for chunk in range(layout.chunks):
            start, size = layout.chunk(chunk)
            content = image[start : start + size]
            if chunk >= layout.large_chunks:
                parts = [bytes(content[place]) for place in layout.packed_places(chunk)]
                gaps = layout.packed_gaps(chunk)
                assert gaps is None or any(gaps)
                assert join(parts, gaps) == content
            assert digests.record(chunk, content) is None
        if not layout.chunks:
            return
        # Some bytes of one chunk change: the first tensor of which one did is named, as each says for itself.
        chunk = random.randrange(layout.chunks)
        start, size = layout.chunk(chunk)
        before = bytes(image[start : start + size])
        for flip in flips:
            image[start + flip % size] ^= 1 << flip % 8
        after = image[start : start + size]
        changed = [
            row
            for row in layout.chunk_tensors(chunk).tolist()
            for begin in [max(0, int(layout.offsets[row]) - start)]
            for end in [int(layout.offsets[row]) - start + int(layout.structure.nbytes[row])]
            if before[begin:end] != bytes(after[begin:end])
        ]
        assert digests.record(chunk, after) == (changed[0] if changed else None)
        assert digests.record(chunk, after) is None, "known from now on"


def test_chunks_are_recorded_by_several_threads_at_once() -> None:
    with leaves_of(LEAF):
        layout = Layout(build([Tensor(f"t{at:04}", "uint8", (at % 90,)) for at in range(3000)]))
        data = contents(layout.structure)
        image = memoryview(make_image(layout, data))
        digests = LeafDigests(layout)
        together = threading.Barrier(4)

        def record(first: int) -> None:
            together.wait(10)
            for chunk in range(first, layout.chunks, 4):
                start, size = layout.chunk(chunk)
                digests.record(chunk, image[start : start + size])

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(record, range(4)))
        expected = [naive.digest(data[name]) for name in layout.structure.names]
        assert [row.tobytes() for row in digests.tensor_digests()] == expected


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Small tensors of any dtype, some of them tied or not contiguous."""
    found: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(names, unique=True, max_size=8)):
        shape = draw(shapes)
        dtype = getattr(torch, draw(dtypes))
        count = torch.Size(shape).numel()
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        raw = torch.randint(0, 256, (max(1, count) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensor = raw.view(dtype)[:count].view(shape)
        if len(shape) > 1 and draw(st.booleans()):
            tensor = tensor.transpose(0, 1)
        if found and draw(st.integers(0, 3)) == 0:
            tensor = found[draw(st.sampled_from(sorted(found)))]
        found[name] = tensor
    return found


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@examples(100)
@given(state_dicts())
def test_chunks_read_from_memory_are_those_of_the_image(state: dict[str, torch.Tensor]) -> None:
    with leaves_of(LEAF):
        source = open_source(state)
        sizes = source.structure.nbytes.tolist()
        data = {
            name: bytes(source.read(row, 0, size))
            for row, (name, size) in enumerate(zip(source.structure.names, sizes, strict=True))
        }
        for row, name in enumerate(source.structure.names):
            assert source.structure.shape(row) == tuple(state[name].shape)
        sender = Sender(
            transfer=bytes([1] * 16),
            model="m",
            structure=source.structure,
            label="v",
            make_label=lambda digest: digest.hex(),
        )
        image = make_image(sender.layout, data)
        reader = ChunkReader(sender, source)
        for chunk in range(sender.layout.chunks):
            start, size = sender.layout.chunk(chunk)
            assert reader.read(chunk) == image[start : start + size]


# --- headers of safetensors files --------------------------------------------------------------------------------

_FORMAT = {"float32": "F32", "bool": "BOOL", "int16": "I16", "bfloat16": "BF16"}


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Files, most of them sound; their headers as text: with odd spacing, escapes, keys twice, and other small sins."""
    entries = []
    at = 0
    tensors = draw(st.lists(st.tuples(names, st.sampled_from(sorted(_FORMAT)), shapes), max_size=5))
    for name, dtype, shape in tensors:
        size = Tensor(name, dtype, shape).nbytes
        entries.append((name, _FORMAT[dtype], list(shape), [at, at + size]))
        at += size
    entries = draw(st.permutations(entries))
    parts = []
    if draw(st.booleans()):
        pairs = draw(st.lists(st.tuples(st.sampled_from(("format", "dtype", "shape", "k")), names), max_size=3))
        parts.append('"__metadata__": {' + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs) + "}")
    for name, dtype, sizes, offsets in entries:
        fields = [f'"dtype":"{dtype}"', f'"shape":{sizes}', f'"data_offsets":{offsets}']
        sin = draw(st.sampled_from((None,) * 12 + ("twice", "escape", "float", "gap", "absent", "bool", "new", "null")))
        if sin == "twice":
            fields.append(draw(st.sampled_from(fields)))
        elif sin == "escape":
            fields[0] = f'"dt\\u0079pe":"{dtype}"'
        elif sin == "float":
            fields[1] = f'"shape":{[float(size) for size in sizes]}'
        elif sin == "gap":
            fields[2] = f'"data_offsets":{[offsets[0] + 1, offsets[1] + 1]}'
        elif sin == "absent":
            del fields[draw(st.integers(0, 2))]
        elif sin == "bool":
            fields[2] = '"data_offsets":[false,true]'
        elif sin == "new":
            fields.append('"more":1')
        elif sin == "null":
            fields = ["null"]
        parts.append(f"{json.dumps(name, ensure_ascii=draw(st.booleans()))}:{{{','.join(fields)}}}")
    header = "{" + ",".join(parts) + "}" + " " * draw(st.integers(0, 3))
    return packed(header, bytes(at + draw(st.sampled_from((0, 0, 0, 0, 1)))))


def read_header(path: Path) -> object:
    """What a file's header says, or what is wrong with it."""
    plain_header._read.clear()
    try:
        source = open_source(path)
    except (CheckpointError, UnsupportedTensor) as error:
        return str(error)
    assert isinstance(source, SafetensorsFile)
    found = source.structure.encoded, source._starts, dict(source.metadata)
    source.close()
    return found


@examples(250)
@given(files())
def test_a_header_says_the_same_however_it_is_read(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w"
        path.write_bytes(raw)
        quickly = read_header(path)
        with mock.patch("shipd.checkpoints.safetensors_file.read_plain", return_value=None):
            assert read_header(path) == quickly


def test_most_headers_are_plain(tmp_path: Path) -> None:
    tensors = {f"layer.{at}.weight": torch.full((at % 5, 3), float(at)) for at in range(50)}
    safetensors.torch.save_file(tensors, tmp_path / "w", metadata={"format": "pt"})
    with mock.patch("shipd.checkpoints.safetensors_file._read_each", side_effect=AssertionError):
        for _ in range(2):
            source = open_source(tmp_path / "w")
            assert dict(source.metadata) == {"format": "pt"}  # type: ignore[attr-defined]
            assert source.structure.digest == open_source(tensors).structure.digest
            source.close()
