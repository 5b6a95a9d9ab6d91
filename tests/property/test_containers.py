"""Whatever a container holds and however it is damaged: what is read is right, or a typed error says what is wrong."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shipd.checkpoints.nested import state_dict_in
from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, TensorChanged, UnsupportedTensor
from tests.support.checkpoints import content
from tests.support.containers import CONTAINERS
from tests.support.naive import Tensor
from tests.support.reading import digest_of

VERSION = content([Tensor("a.w", "float32", (20, 5)), Tensor("a.b", "int16", (7,)), Tensor("c", "float64", ())])

PARTS = st.sampled_from(["model", "ema", "rng_state", "a.b", "0", "_extra_state", "state", "param_groups"])

NAMES = PARTS | st.sampled_from(["optimizer", ".", ""])

TENSORS = st.sampled_from([torch.ones(2, 3), torch.tensor(1.0), torch.arange(5)])

PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=3)

OBJECTS = st.recursive(
    TENSORS | PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=4)
        | st.dictionaries(st.integers(0, 3), inner, max_size=2)
    ),
    max_leaves=12,
)


def told(error: Exception) -> bool:
    return str(error).isprintable() and len(str(error)) < 2000


@pytest.mark.parametrize("container", ["npz", "npz, compressed", "HDF5", "HDF5, compressed", "index"])
@given(data=st.data())
def test_no_damage_is_worse_than_an_error(container: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = CONTAINERS[container](Path(folder) / "w", VERSION)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        del raw[data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw)))) :]
        path.write_bytes(raw)
        try:
            source = open_source(path)
        except (CheckpointError, UnsupportedTensor) as error:
            assert told(error)  # noqa: PT017 - not refusing is fine as well
            return
        try:
            digest_of(source)
        except TensorChanged as error:
            assert told(error)  # noqa: PT017 - as above
        finally:
            source.close()


@given(OBJECTS, st.none() | st.lists(NAMES, max_size=3).map(".".join))
def test_of_any_object_a_state_dict_is_found_or_it_is_told_why_not(loaded: object, key: str | None) -> None:
    try:
        found = state_dict_in(loaded, "'path'", key)
    except CheckpointError as error:
        assert told(error)  # noqa: PT017 - not refusing is fine as well
        return
    values: dict[str, object] = dict(found)
    for name, value in values.items():
        assert isinstance(value, torch.Tensor) or name.split(".")[-1] == "_extra_state"


@given(st.lists(PARTS, min_size=1, max_size=4), TENSORS | PLAIN)
def test_the_path_to_a_state_dict_is_a_key(path: list[str], beside: object) -> None:
    state = {"w": torch.ones(3)}
    loaded: object = state
    for name in reversed(path):
        loaded = {name: loaded, "beside": beside}
    assert state_dict_in(loaded, "'path'", ".".join(path)) == state
