from pathlib import Path

import numpy as np
import pytest
import torch

from shipd.bases.base import BaseLost
from shipd.bases.checkpoint import CheckpointBases
from shipd.bases.store import VersionStore
from shipd.errors import CheckpointError
from shipproto.layout import Layout
from shipproto.sources import sources
from shipproto.structure import Structure, TensorSpec
from tests.support import checkpoints
from tests.support.bases import Version, assert_reads, read
from tests.support.checkpoints import Content, as_state_dict, edge_cases, medium, minilm, write_safetensors
from tests.support.models import build, floats, make_image
from tests.support.naive import Tensor


def version_of(content: Content) -> Version:
    """The same version, laid out."""
    layout = Layout.of(build(content.rows))
    return Version(layout, bytes(make_image(layout, {name: bytes(data) for name, data in content.data.items()})))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "old.safetensors"


def test_a_file(path: Path) -> None:
    content = medium()
    bases = CheckpointBases.of(write_safetensors(path, content))
    expected = version_of(content)
    assert bases.digests("m", expected.layout.structure) == (expected.digest,)
    base = bases.open("m", expected.layout, expected.digest)
    assert_reads(base, expected)
    assert bases.open("m", expected.layout, bytes(16)) is None
    assert base is not None
    base.close()
    base.close()
    with pytest.raises(BaseLost, match="closed"):
        read(base, 0, 1, expected.layout)
    bases.close()
    bases.close()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_state_dict_with_every_dtype_and_shape() -> None:
    content = edge_cases()
    bases = CheckpointBases.of(as_state_dict(content))
    expected = version_of(content)
    assert bases.digests("m", expected.layout.structure) == (expected.digest,)
    base = bases.open("m", expected.layout, expected.digest)
    assert base is not None
    chunks = expected.layout.chunks
    for first, count in ((0, chunks), *((chunk, 1) for chunk in range(chunks))):
        assert read(base, first, count, expected.layout) == expected.run(first, count)
    bases.close()


def test_more_than_the_layout_has() -> None:
    """A receiver rules, and has no place for some of it; one pass over the source serves every layout."""
    rows = [floats("a", 200, 3), floats("b", 5), floats("c", 200, 3)]
    whole = Version.of(build(rows))
    part = Version.of(build(rows[1:]))
    state = {
        row.name: torch.frombuffer(bytearray(whole.image[start : start + row.nbytes]), dtype=torch.float32).reshape(
            row.shape
        )
        for row, start in zip(rows, whole.layout.offsets.tolist(), strict=True)
    }
    bases = CheckpointBases.of(state)
    assert bases.digests("m", whole.layout.structure) == (whole.digest,)
    assert_reads(bases.open("m", part.layout, part.digest), part)
    assert_reads(bases.open("m", whole.layout, whole.digest), whole)
    other = build([*rows, floats("d", 1)])
    assert bases.digests("m", other) == ()
    assert bases.open("m", Layout.of(other), whole.digest) is None
    for row in (floats("b", 6), Tensor("b", "int32", (5,))):
        assert bases.digests("m", build([row])) == ()
    bases.close()


def test_tied_by_the_receiver_alone() -> None:
    rows = [floats("a", 30), floats("b", 30, tied_to="a")]
    tied = Version.of(build(rows))
    values = torch.frombuffer(bytearray(tied.chunk(0)), dtype=torch.float32)
    # Two tensors with the same values each: the same as one.
    bases = CheckpointBases.of({"a": values.clone(), "b": values.clone()})
    assert_reads(bases.open("m", tied.layout, tied.digest), tied)
    bases.close()
    # Where the values differ there is no version of the tied structure.
    bases = CheckpointBases.of({"a": values, "b": values + 1})
    assert bases.digests("m", tied.layout.structure) == ()
    bases.close()


def test_a_file_that_changes(path: Path) -> None:
    content = medium()
    bases = CheckpointBases.of(write_safetensors(path, content))
    expected = version_of(content)
    base = bases.open("m", expected.layout, expected.digest)
    assert base is not None
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(BaseLost, match="was cut from"):
        read(base, 0, 1, expected.layout)
    assert bases.open("m", expected.layout, expected.digest) is None
    bases.close()
    with pytest.raises(BaseLost, match="is closed"):
        read(base, 0, 1, expected.layout)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        CheckpointBases.of(tmp_path / "absent.safetensors")


def test_a_tensor_given_other_memory() -> None:
    state = {"a": torch.zeros(1000)}
    bases = CheckpointBases.of(state)
    expected = version_of(Content((floats("a", 1000),), {"a": bytes(4000)}))
    base = bases.open("m", expected.layout, expected.digest)
    assert base is not None
    state["a"].data = torch.ones(1000)
    with pytest.raises(BaseLost, match="other memory"):
        read(base, 0, 1, expected.layout)
    bases.close()


# --- a real model ----------------------------------------------------------------------------------------------------


def real_versions(count: int) -> list[dict[str, torch.Tensor]]:
    """MiniLM in bfloat16 and successors: in each one element of 200 is a unit in the last place away."""
    generator = np.random.default_rng(11)
    content = checkpoints.read_safetensors(minilm())
    state = {
        name: tensor.to(torch.bfloat16) for name, tensor in as_state_dict(content).items() if tensor.is_floating_point()
    }
    found = [state]
    for _ in range(count - 1):
        state = {name: tensor.clone() for name, tensor in state.items()}
        for tensor in state.values():
            words = tensor.view(torch.int16).reshape(-1).numpy()
            places = np.unique(generator.integers(0, len(words), round(len(words) * 0.005)))
            words[places] += np.where(generator.random(len(places)) < 0.5, 1, -1).astype(np.int16)
        found.append(state)
    return found


def test_versions_of_a_real_model() -> None:
    """Each is a checkpoint, the last four in memory as well: both read the same, and memory is what it should be."""
    store = VersionStore(versions=4)
    expected = []
    for state in real_versions(5):
        structure = Structure.build(TensorSpec(name, "bfloat16", tuple(tensor.shape)) for name, tensor in state.items())
        layout = Layout.of(structure)
        data = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}
        version = Version(layout, bytes(make_image(layout, data)))
        bases = CheckpointBases.of(state)
        assert bases.digests("minilm", structure) == (version.digest,)
        rows, equal = sources(structure, structure)
        assert (rows.tolist(), equal) == (list(range(len(structure))), [])
        base = bases.open("minilm", layout, version.digest)
        assert base is not None
        assert read(base, 0, layout.chunks, layout) == version.run(0, layout.chunks)
        assert store.keep("minilm", version.digests, version.chunk) is None
        bases.close()
        expected.append(version)
    for version in expected[1:]:
        base = store.open("minilm", version.layout, version.digest)
        assert base is not None
        assert read(base, 0, version.layout.chunks, version.layout) == version.run(0, version.layout.chunks)
    elements = expected[0].layout.structure.total_bytes // 2
    patches = store.memory_used - expected[0].layout.size - len(expected[0].digests.encoded)
    # Three older versions, four bytes for each of 0.5 % of the elements, and the heads of the patches.
    assert 3 * 4 * 0.0049 * elements < patches < 3 * (4 * 0.0051 * elements + 12 * expected[0].layout.chunks)
