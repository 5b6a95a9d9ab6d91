"""ModuleTree: whether a model still consists of the very same modules and tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shipd.serving.tensors import ModelTensors, Places
from shipd.serving.tree import ModuleTree


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.last = self.layers[0]
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("spare", torch.ones(2), persistent=False)


def rename(model: Model) -> None:
    weight = model.first.weight
    del model.first.weight
    model.first.other = weight


def replace_by_an_equal_one(model: Model) -> None:
    model.kept = torch.ones(2)


def make_persistent(model: Model) -> None:
    model.register_buffer("spare", model.get_buffer("spare"), persistent=True)


def drop_a_module(model: Model) -> None:
    del model.layers[1]


def add_a_module(model: Model) -> None:
    model.layers[0].more = nn.Linear(1, 1)


def swap_modules(model: Model) -> None:
    model._modules["first"], model._modules["last"] = model.last, model.first


def hook(model: Model) -> None:
    model.first._register_state_dict_hook(lambda *_: None)


def pre_hook(model: Model) -> None:
    model.layers[1].register_state_dict_pre_hook(lambda *_: None)


def give_other_dictionaries(model: Model) -> None:
    model.first._parameters = {"bias": model.first.bias, "weight": nn.Parameter(torch.zeros(2, 2))}


@pytest.mark.parametrize(
    "change",
    [
        rename,
        replace_by_an_equal_one,
        make_persistent,
        drop_a_module,
        add_a_module,
        swap_modules,
        hook,
        pre_hook,
        give_other_dictionaries,
    ],
)
def test_every_change_is_noticed(change: Callable[[Model], None]) -> None:
    model = Model()
    tree = ModuleTree.of(model)
    assert tree is not None
    model.eval().requires_grad_(requires_grad=False)
    model.first(torch.ones(1, 2))
    assert tree.unchanged()
    change(model)
    assert not tree.unchanged()


def redefined(name: str) -> nn.Module:
    def method(self: nn.Module, *args: object, **kwargs: object) -> object:
        return getattr(nn.Linear, name)(self, *args, **kwargs)

    return nn.Sequential(type("Odd", (nn.Linear,), {name: method})(2, 2))


def test_models_that_say_themselves_what_their_state_is_have_no_tree() -> None:
    for name in ("state_dict", "_save_to_state_dict", "get_extra_state"):
        assert ModuleTree.of(redefined(name)) is None
    model = Model()
    vars(model.first)["state_dict"] = lambda **_: {}
    assert ModuleTree.of(model) is None
    hooked = Model()
    hook(hooked)
    assert ModuleTree.of(hooked) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_modules_have_no_tree() -> None:
    assert ModuleTree.of(torch.jit.script(nn.Linear(2, 2))) is None


def turn(model: nn.Module) -> None:
    tensor = model.get_buffer("square")
    tensor.data = tensor.data.t()


def reinterpret(model: nn.Module) -> None:
    tensor = model.get_buffer("square")
    tensor.data = tensor.data.view(torch.int32)


def flatten(model: nn.Module) -> None:
    tensor = model.get_buffer("square")
    tensor.data = tensor.data.view(9)


def move_one_of_many(model: nn.Module) -> None:
    tensor = model.get_buffer("w300")
    tensor.data = tensor.data.clone()


def turn_back(model: nn.Module) -> None:
    tensor = model.get_buffer("turned")
    tensor.data = tensor.data.t()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (turn, ["'square' has other memory"]),
        (reinterpret, ["'square' was float32 [3, 3] on cpu and is int32 [3, 3] on cpu"]),
        (flatten, ["'square' was float32 [3, 3] on cpu and is float32 [9] on cpu"]),
        (move_one_of_many, ["'w300' has other memory"]),
        (turn_back, ["'turned' has other memory"]),
    ],
)
def test_tensors_that_were_given_other_memory_in_place(change: Callable[[nn.Module], None], expected) -> None:
    model = nn.Module()
    model.register_buffer("square", torch.zeros(3, 3))
    model.register_buffer("turned", torch.zeros(3, 3).t())
    model.register_buffer("empty", torch.zeros(0))
    for at in range(600):
        model.register_buffer(f"w{at}", torch.zeros(2))
    tensors = ModelTensors(model)
    assert tensors.changed() == []
    change(model)
    assert tensors.changed() == expected
    tensors.places = Places(tensors.live)
    assert tensors.changed() == []
