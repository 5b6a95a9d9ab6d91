import ctypes
import json
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, UnsupportedTensor
from shipproto.digests import digest_image
from shipproto.dtypes import BY_NAME
from shipproto.layout import Layout
from shipproto.names import CONTROL

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

NOT_IN_SAFETENSORS = {"complex128", "complex32"}
OLD = sorted(name for name in BY_NAME if getattr(torch, name) not in torch.storage._new_dtypes())


def names():
    letters = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])
    # Among the rest are characters that turn text around, which no name may have either.
    usable = st.text(letters, min_size=1, max_size=20).filter(lambda name: not CONTROL.search(name))
    return usable.filter(lambda name: not name.endswith("_extra_state"))


@st.composite
def tensors(draw, dtypes=tuple(BY_NAME)):
    """A tensor of noise: any dtype, contiguous or seen through one of torch's views."""
    name = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 7), max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    count = max(1, torch.Size(shape).numel()) * BY_NAME[name].itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(getattr(torch, name))
    tensor = raw[: torch.Size(shape).numel()].view(shape)
    if shape and draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if shape and draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        size = tensor.shape[dim]
        start = draw(st.integers(0, size))
        tensor = tensor[(slice(None),) * dim + (slice(start, draw(st.integers(start, size)), draw(st.integers(1, 3))),)]
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 4)), *tensor.shape)
    return tensor


@st.composite
def state_dicts(draw, dtypes=tuple(BY_NAME)):
    """Some tensors by name, some of them tied to one another."""
    found = draw(st.dictionaries(names(), tensors(dtypes), max_size=6))
    for name in draw(st.lists(names(), max_size=2)) if found else ():
        found[name] = found[draw(st.sampled_from(sorted(found)))]
    return found


def plain(tensor):
    """A contiguous copy, byte for byte (a bool's too)."""
    if tensor.dtype is torch.bool:
        return tensor.view(torch.uint8).clone(memory_format=torch.contiguous_format).view(torch.bool)
    return tensor.clone(memory_format=torch.contiguous_format)


def reference(tensor):
    whole = plain(tensor)
    return ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()) if whole.numel() else b""


def digest(structure, contents):
    layout = Layout(structure)
    image = bytearray(layout.size)
    for row, raw in enumerate(contents):
        image[layout.offsets[row] : layout.offsets[row] + len(raw)] = raw
    return digest_image(layout, memoryview(image)).version_digest()


def digest_of(source):
    sizes = source.structure.nbytes.tolist()
    found = digest(source.structure, [bytes(source.read(row, 0, size)) for row, size in enumerate(sizes)])
    source.close()
    return found


def expected_digest(state):
    structure = open_source(state).structure
    return digest(structure, [reference(state[name]) for name in structure.names])


@given(state_dicts())
def test_in_memory_and_copied(state):
    expected = expected_digest(state)
    assert digest_of(open_source(state)) == expected
    assert digest_of(open_source(state, snapshot=True)) == expected


@given(state_dicts())
def test_saved_by_torch(state):
    expected, structure = expected_digest(state), open_source(state).structure
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "w")
        source = open_source(Path(folder) / "w")
        assert source.structure.digest == structure.digest
        assert digest_of(source) == expected


@given(state_dicts(OLD))
def test_saved_by_torch_in_the_old_format(state):
    expected = expected_digest(state)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "w", _use_new_zipfile_serialization=False)
        assert digest_of(open_source(Path(folder) / "w")) == expected


@given(state_dicts(tuple(name for name in BY_NAME if name not in NOT_IN_SAFETENSORS)))
def test_saved_as_safetensors(state):
    state.pop("__metadata__", None)
    expected = expected_digest(state)
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file({name: plain(tensor) for name, tensor in state.items()}, Path(folder) / "w")
        assert digest_of(open_source(Path(folder) / "w")) == expected


@given(tensors(), st.data())
def test_any_slice_is_that_of_the_contiguous_copy(tensor, data):
    expected = reference(tensor)
    with_file = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        if with_file:
            torch.save({"w": tensor}, Path(folder) / "w")
        source = open_source(Path(folder) / "w" if with_file else {"w": tensor})
        for _ in range(5):
            start = data.draw(st.integers(0, len(expected)))
            stop = data.draw(st.integers(start, len(expected)))
            assert bytes(source.read(0, start, stop)) == expected[start:stop]
        source.close()


@given(st.dictionaries(names(), tensors(("float32", "uint8", "bool")), min_size=1, max_size=3), st.data())
def test_no_damage_to_a_safetensors_file_is_worse_than_an_error(state, data):
    whole = safetensors.torch.save({name: plain(tensor) for name, tensor in state.items() if name != "__metadata__"})
    header = 8 + int.from_bytes(whole[:8], "little")
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw)))) :]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "w").write_bytes(raw)
        try:
            digest_of(open_source(Path(folder) / "w"))
        except (CheckpointError, UnsupportedTensor) as error:
            assert str(error).isprintable()  # noqa: PT017 - not refusing is fine as well


@given(state_dicts(("float32", "uint8", "bool")), st.booleans(), st.data())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_damage_to_a_file_of_torch_is_worse_than_an_error(state, old_format, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w"
        torch.save(state, path, _use_new_zipfile_serialization=not old_format)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        del raw[data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw)))) :]
        path.write_bytes(raw)
        try:
            digest_of(open_source(path))
        except (CheckpointError, UnsupportedTensor) as error:
            assert str(error).isprintable()  # noqa: PT017 - not refusing is fine as well


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(names() | st.just("__metadata__"), inner, max_size=3)
        ),
    )
)
def test_any_other_json_in_the_header_is_refused(header):
    raw = json.dumps({"w": header, "data_offsets": header}).encode()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "w").write_bytes(len(raw).to_bytes(8, "little") + raw)
        with pytest.raises((CheckpointError, UnsupportedTensor)):
            open_source(Path(folder) / "w")
