"""Source.read_packed: many small tensors in one call, as views where they lie side by side, and never gone memory."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from shipd.checkpoints.source import Source, join, open_source
from shipd.checkpoints.state_dict import StateDict
from shipd.errors import TensorChanged


def tensors() -> dict[str, torch.Tensor]:
    """Rows 0 to 3: a and b fill whole lines, c does not, t is not contiguous."""
    return {
        "a": torch.arange(32.0),
        "b": torch.arange(16.0) + 0.5,
        "c": torch.arange(3.0),
        "t": torch.arange(6.0).view(2, 3).t(),
    }


def whole(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def saved(folder: Path, kind: str) -> Source:
    state = {name: tensor.contiguous() for name, tensor in tensors().items()}
    if kind == "state dict":
        return open_source(tensors())
    if kind == "torch.save":
        torch.save(tensors(), folder / "w")
    else:
        safetensors.torch.save_file(state, folder / "w")
    return open_source(folder / "w")


@pytest.mark.parametrize("kind", ["state dict", "torch.save", "safetensors"])
@pytest.mark.parametrize(
    ("rows", "gaps"),
    [
        (range(4), None),
        (range(1, 3), None),
        ([3, 0], None),
        (range(4), [0, 7, 63]),
        ([2, 3, 0], [52, 0]),
        (range(2, 3), None),
        ([3], []),
    ],
)
def test_whole_tensors_with_zeros_between_them(tmp_path: Path, kind: str, rows, gaps) -> None:
    state = list(tensors().values())
    between = [*(gaps or [0] * (len(rows) - 1)), 0]
    expected = b"".join(whole(state[row]) + bytes(gap) for row, gap in zip(rows, between, strict=True))
    source = saved(tmp_path, kind)
    first = source.read_packed(rows, gaps)
    source.read_packed([0], None)
    assert first == expected, "also after the next read"
    source.close()
    assert first == expected, "also when the source is closed"


def test_what_lies_side_by_side_in_a_file_is_not_copied(tmp_path: Path) -> None:
    source = saved(tmp_path, "safetensors")
    assert source.read_packed(range(4), None).obj is source.read(0, 0, 1).obj
    assert source.read_packed([1, 0], None).obj is not source.read(0, 0, 1).obj
    assert source.read_packed(range(2), [1]).obj is not source.read(0, 0, 1).obj
    source.close()


@pytest.mark.parametrize("name", ["b", "t"])
def test_memory_that_went_away_is_not_read(name: str) -> None:
    state = tensors()
    source = StateDict(state)
    source.read_packed(range(4), None)
    state[name].untyped_storage().resize_(0)
    with pytest.raises(TensorChanged, match=f"tensor '{name}' of state dict was given other memory") as caught:
        source.read_packed(range(4), None)
    assert caught.value.tensor == name
    assert source.changed() == name


@pytest.mark.parametrize("kind", ["torch.save", "safetensors"])
def test_a_file_that_was_cut_is_not_read(tmp_path: Path, kind: str) -> None:
    source = saved(tmp_path, kind)
    os.truncate(tmp_path / "w", 100)
    with pytest.raises(TensorChanged, match="was cut from"):
        source.read_packed(range(4), None)
    source.close()


def test_one_empty_tensor_among_many_is_no_reason_to_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*_: object) -> None:
        raise AssertionError("each tensor was looked at")

    monkeypatch.setattr("shipd.checkpoints.columns._check_each", slowly)
    state = {**tensors(), "empty": torch.empty(0, 3), "x": torch.empty(0)}
    source = StateDict(state)
    assert source.changed() is None
    assert source.structure.names == ("a", "b", "c", "empty", "t", "x")


def test_only_names_that_mean_it_are_extra_state() -> None:
    state = {"my_extra_state_weight": torch.ones(2), "w": torch.ones(1)}
    assert StateDict(state).structure.names == ("my_extra_state_weight", "w")


def test_a_module_gives_its_own_tensors_unless_it_says_otherwise() -> None:
    model = torch.nn.Linear(2, 2)
    source = StateDict(model)
    assert {id(tensor) for tensor in source._tensors} == {id(model.weight), id(model.bias)}

    class Doubled(torch.nn.Linear):
        def state_dict(self):  # type: ignore[override]  # Without the arguments that torch passes.
            return {"twice": self.weight.detach() * 2}

    assert StateDict(Doubled(2, 2)).structure.names == ("twice",)


def test_joining() -> None:
    assert bytes(join([b"ab", b"c"], None)) == b"abc"
    assert bytes(join([b"ab", b"c", b"d"], [1, 0])) == b"ab\0cd"
    assert bytes(join([b"ab"], [])) == b"ab"
