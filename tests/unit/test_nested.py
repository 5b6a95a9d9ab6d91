import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shipd.bases.checkpoint import CheckpointBases
from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, UnsupportedTensor
from tests.support.checkpoints import as_state_dict, tiny, write_safetensors
from tests.support.reading import digest_of


def weights() -> dict[str, torch.Tensor]:
    return as_state_dict(tiny())


def other() -> dict[str, torch.Tensor]:
    return as_state_dict(tiny(1))


def optimizer() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    adam.step()
    return adam.state_dict()


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[object], Path]:
    def save_one(obj: object) -> Path:
        torch.save(obj, tmp_path / "model.pt", _use_new_zipfile_serialization=not request.param)
        return tmp_path / "model.pt"

    return save_one


def digest(path: Path, key: str | None = None) -> str:
    source = open_source(path, key=key)
    try:
        return digest_of(source)
    finally:
        source.close()


def refused(path: object, message: str, key: str | None = None) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path, key=key)  # type: ignore[arg-type]  # objects of every kind
    told = str(caught.value)
    assert told.isprintable()
    assert len(told) < 900
    return told


# --- one state dict --------------------------------------------------------------------------------------------------

NAMES = ("state_dict", "model", "model_state_dict", "module", "ema", "net", "anything else")


def under(name: str) -> dict[str, Any]:
    return {name: weights()}


ONE: dict[str, Callable[[], object]] = {
    **{name: functools.partial(under, name) for name in NAMES},
    "two deep": lambda: {"state": {"model": weights()}, "epoch": 3},
    "list": lambda: [weights()],
    "lists of lists": lambda: {"models": [[weights()]]},
    "tuple": lambda: ({"epoch": 3}, weights()),
    "ordered": lambda: {"model": collections.OrderedDict(weights())},
    "training": lambda: {"epoch": 3, "model": weights(), "optimizer": optimizer(), "args": {"lr": 0.1}, "best": None},
    "optimizer first": lambda: {"optimizer": optimizer(), "model": weights()},
    "optimizers": lambda: {"optimizer_states": [optimizer(), optimizer()], "state_dict": weights()},
    "optimizer by any name": lambda: {"adam": optimizer(), "net": weights()},
    "optimizer of another kind": lambda: {"model": weights(), "last_optim": {"momentum": other()}},
    "measurements": lambda: {"model": weights(), "best_loss": torch.tensor(0.3), "losses": {"a": torch.tensor(0.2)}},
    "random generators": lambda: {
        "model": weights(),
        "rng_state": torch.get_rng_state(),
        "cuda_rng_states": [torch.get_rng_state()],
        "random": torch.ones(3),
    },
    "beside other things": lambda: {**weights(), "epoch": 3, "args": {"lr": 0.1, "betas": (0.9, 0.99)}, "done": True},
    "nested beside other things": lambda: {"model": {**weights(), "version": "1.0", "shapes": [1, 2]}},
    "an optimal model": lambda: {"optimal_model": weights(), "optimizer": optimizer()},
    "lightning": lambda: {
        "epoch": 1,
        "pytorch-lightning_version": "2.5",
        "state_dict": weights(),
        "callbacks": {
            "ModelCheckpoint": {"best_model_score": torch.tensor(0.1), "best_k_models": {"a": torch.ones(())}}
        },
        "optimizer_states": [optimizer()],
        "lr_schedulers": [{"last_lr": [0.1]}],
        "loops": {"fit_loop": {"state_dict": {}}},
    },
}


@pytest.mark.parametrize("case", ONE)
def test_the_only_state_dict_is_found(save: Callable[[object], Path], case: str) -> None:
    assert digest(save(ONE[case]())) == tiny().digest


def test_scalars_alone_are_a_model_where_there_is_nothing_else(save: Callable[[object], Path]) -> None:
    source = open_source(save({"model": {"scale": torch.tensor(2.0)}, "epoch": 1}))
    assert source.structure.names == ("scale",)
    source.close()


def test_ties_inside_are_kept(save: Callable[[object], Path]) -> None:
    shared = torch.ones(3)
    source = open_source(save({"model": {"a": shared, "b": shared}}))
    assert source.structure.spec(1).tied_to == "a"
    source.close()


def test_what_contains_itself_is_searched_once(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"model": weights()}
    loop["self"] = loop
    loop["again"] = [loop["model"], loop]
    torch.save(loop, tmp_path / "w")
    assert digest(tmp_path / "w") == tiny().digest
    deep: Any = weights()
    for _ in range(7):
        deep = {"in": deep}
    torch.save(deep, tmp_path / "w")
    refused(tmp_path / "w", r"holds no state dict, .* but 'in' \(mapping of 1\)")
    assert digest(tmp_path / "w", "in.in") == tiny().digest
    wide: Any = weights()
    for _ in range(6):
        wide = [wide] * 100
    torch.save(wide, tmp_path / "w")
    assert digest(tmp_path / "w") == tiny().digest


# --- several ---------------------------------------------------------------------------------------------------------


def several() -> dict[str, Any]:
    return {
        "epoch": 3,
        "model": {"ema": weights(), "net": other()},
        "optimizer": optimizer(),
        "a b": [{"x": weights()}],
    }


def test_several_are_listed_with_what_to_type(save: Callable[[object], Path]) -> None:
    path = save(several())
    told = refused(path, "holds 3 state dicts: ")
    assert told == (
        f"{str(path)!r} holds 3 state dicts: 'model.ema' (2 tensors, 168 B), 'model.net' (2 tensors, 168 B), "
        "'a b.0.x' (2 tensors, 168 B). Choose the one that is to be served, as in key='model.ema' or --key model.ema "
        "(of a base: base_key, --base-key)"
    )
    told = refused(path, "holds 2 state dicts under 'model': 'model.ema' .*, 'model.net' ", "model")
    assert "--key 'a b.0.x'" in refused(save({"a b": several()["a b"], "c": other()}), "holds 2 state dicts")


@pytest.mark.parametrize(
    ("key", "version"), [("model.ema", 0), ("model.net", 1), ("a b.0.x", 0), ("a b", 0), ("a b.0", 0)]
)
def test_a_key_chooses(save: Callable[[object], Path], key: str, version: int) -> None:
    assert digest(save(several()), key) == tiny(version).digest
    source = open_source(several(), key=key)
    assert digest_of(source) == tiny(version).digest
    bases = CheckpointBases.of(save(several()), key=key)
    (found,) = bases.digests("model", source.structure)
    assert found.hex() == tiny(version).digest
    bases.close()
    source.close()


def test_names_with_dots_in_them_can_be_chosen(save: Callable[[object], Path]) -> None:
    path = save({"model.ema": weights(), "model": {"ema.a": other()}})
    assert digest(path, "model.ema") == tiny(0).digest
    assert digest(path, "model.ema.a") == tiny(1).digest
    assert digest(path, "model") == tiny(1).digest


def test_tensors_around_a_state_dict_are_one_of_their_own(save: Callable[[object], Path]) -> None:
    """Whether they or those inside are what is served, nobody but the user can know."""
    path = save({**other(), "ema": weights(), "epoch": 1})
    refused(path, r"holds 2 state dicts: 'ema' \(2 tensors, 168 B\), '\.' \(2 tensors, 168 B\)")
    assert digest(path, ".") == tiny(1).digest
    assert digest(path, "ema") == tiny(0).digest
    path = save({"model": {**other(), "ema": weights()}})
    assert digest(path, "model") == tiny(1).digest
    assert digest(path, "model.ema") == tiny(0).digest


def test_a_key_may_name_what_would_be_found_anyway(save: Callable[[object], Path]) -> None:
    assert digest(save({"model": weights()}), "model") == tiny().digest
    assert digest(save(weights()), ".") == tiny().digest


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modl", r"has no state dict under the key 'modl'; the state dicts in it: 'model.ema' .*, 'a b.0.x' \("),
        ("model.ema.w", "has no state dict under the key 'model.ema.w'; the state dicts"),
        ("model.", r"has no state dict under the key 'model\.'"),
        ("", "has no state dict under the key ''"),
        (".", r"has no state dict under the key '\.'; the state dicts in it: 'model.ema'"),
        ("a b.1", "has no state dict under the key 'a b.1'"),
        ("epoch", ", under the key 'epoch', holds a value of type int and no state dict"),
        ("model.ema.bias", ", under the key 'model.ema.bias', holds a value of type Tensor and no state dict"),
        ("optimizer", r", under the key 'optimizer', holds the state of an optimizer \('optimizer'\), which is never"),
    ],
)
def test_keys_that_lead_nowhere_are_told(save: Callable[[object], Path], key: str, message: str) -> None:
    refused(save(several()), message, key)


# --- none ------------------------------------------------------------------------------------------------------------

NONE: dict[str, tuple[Callable[[], object], str]] = {
    "optimizer alone": (
        lambda: {"optim": {"state": {}}},
        r"holds the state of an optimizer \('optim'\), which is never",
    ),
    "optimizer itself": (optimizer, r"holds the state of an optimizer \('\.'\), which is never shipped, and no state"),
    "many": (
        lambda: {str(at): at for at in range(100)},
        r"holds no state dict, which is a mapping of names to tensors, but '0' \(int\), .*'7' \(int\) and 92 more;",
    ),
    "numbered": (lambda: {0: torch.ones(1)}, r"holds no state dict, .* but '0' \(Tensor\)"),
    "partly numbered": (lambda: {0: torch.ones(1), "w": torch.ones(1)}, r"but '0' \(Tensor\), 'w' \(Tensor\); save"),
    "nothing inside": (lambda: {"model": {}}, r"holds no state dict, .* but 'model' \(mapping of 0\)"),
    "tensor": (lambda: torch.ones(1), "holds a value of type Tensor and no state dict; save torch.save"),
    "list": (lambda: [torch.ones(1), 3], "holds no state dict, .* but a list of Tensor, int; save"),
    "empty list": (list, "holds no state dict, .* but a list of nothing; save"),
    "nothing": (lambda: None, "holds a value of type NoneType and no state"),
}


@pytest.mark.parametrize("case", NONE)
def test_what_holds_none_is_refused_with_what_it_holds(save: Callable[[object], Path], case: str) -> None:
    make, message = NONE[case]
    told = refused(save(make()), message)
    assert told.endswith("save torch.save(model.state_dict(), other_path), or a safetensors file, and push that")


def test_a_key_into_what_holds_none_is_told(save: Callable[[object], Path]) -> None:
    refused(save({"epoch": 3}), r"has no state dict under the key 'model'; it holds 'epoch' \(int\)", "model")
    refused(save(3), "has no state dict under the key 'model'; it holds a value of type int", "model")


def test_extra_state_inside_is_refused_by_name(save: Callable[[object], Path]) -> None:
    path = save({"model": {"w": torch.ones(1), "norm._extra_state": {"scale": torch.ones(2)}}})
    with pytest.raises(UnsupportedTensor, match=r"tensor 'norm\._extra_state' of .* is the extra state of a module"):
        open_source(path)


def test_only_names_that_mean_it_are_extra_state(save: Callable[[object], Path]) -> None:
    assert digest(save({"my_extra_state": weights()})) == tiny().digest
    assert digest(save({**weights(), "my_extra_state": {"scale": 1}})) == tiny().digest


def test_a_mapping_in_memory_is_searched_only_where_it_is_told() -> None:
    with pytest.raises(UnsupportedTensor, match=r"'model' of state dict is a builtins.dict .*, with key='model'$"):
        open_source({"model": weights()})  # type: ignore[dict-item]  # what the test is about
    source = open_source({"model": weights()}, key="model")  # type: ignore[dict-item]  # as above
    assert digest_of(source) == tiny().digest
    source.close()


@pytest.mark.parametrize("key", ["model", "."])
def test_what_has_no_parts_takes_no_key(tmp_path: Path, key: str) -> None:
    write_safetensors(tmp_path / "w", tiny())
    for path in (tmp_path, tmp_path / "w"):
        refused(path, f"is a safetensors file, which has no parts to choose from: push it without key='{key}'", key)
    refused(nn.Linear(2, 2), f"a module has no parts to choose from: push it without key='{key}'", key)
