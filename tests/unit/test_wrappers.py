import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch._inductor import config as inductor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shipd.errors import AttachError, UnsupportedTensor
from shipd.serving.gate import Gate
from shipd.serving.hooks import Hooks, find_calls
from shipd.serving.tensors import ModelTensors
from shipd.serving.version import Version
from shipd.serving.wrappers import described_class, layers, unwrapped
from tests.support.swapping import Rigs, encoder, perturbed

pytest_plugins = ["tests.support.swapping"]

Wrap = Callable[[nn.Module], nn.Module]


class Counting:
    """A backend of torch.compile that runs what it is given, and counts how often it is asked to compile."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.compiled += 1
        return graph.forward


COUNTING = Counting()


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """Compiled, without code being generated."""
    wrapper: object = torch.compile(model, backend=COUNTING, **options)
    assert isinstance(wrapper, nn.Module)
    return wrapper


def compiled_inside(model: nn.Module) -> nn.Module:
    """One of its submodules is compiled, and another one is wrapped twice."""
    model.add_module("block", compiled(model.get_submodule("block")))
    model.add_module("norm", DataParallel(checkpoint_wrapper(model.get_submodule("norm"))))
    return model


def traced(model: nn.Module) -> nn.Module:
    """The model as a ScriptModule, which has the same names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated", DeprecationWarning)
        made: nn.Module = torch.jit.trace(model, torch.zeros(1, 4))
    return made


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one, which is all that the wrappers of torch.distributed ask for."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPS: dict[str, Wrap] = {
    "compiled": compiled,
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "checkpointed": checkpoint_wrapper,
    "compiled and DistributedDataParallel": lambda model: DistributedDataParallel(compiled(model)),
    "inside": compiled_inside,
}
every_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


# --- names -----------------------------------------------------------------------------------------------------------


@every_wrap
def test_a_wrapped_model_has_the_tensors_of_the_plain_one(wrap: Wrap, group: None) -> None:
    plain, wrapped = ModelTensors(encoder()), ModelTensors(wrap(encoder()))
    assert wrapped.structure.encoded == plain.structure.encoded
    assert wrapped.transient == plain.transient
    assert wrapped.changed() == []
    assert all(torch.equal(one, other) for one, other in zip(wrapped.live, plain.live, strict=True))


@every_wrap
def test_what_was_changed_is_called_by_its_canonical_name(wrap: Wrap, group: None) -> None:
    model = encoder()
    tensors = ModelTensors(wrap(model))
    model.positions.half()
    (problem,) = tensors.changed()
    assert problem.startswith("'positions.weight' was float32 [8, 16] on cpu and is float16")


class Named(nn.Module):
    """Calls its submodules what wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self._orig_mod = nn.Sequential(nn.Linear(2, 2))


def test_names_do_not_make_a_wrapper() -> None:
    own = {"module.weight", "module.bias", "_orig_mod.0.weight", "_orig_mod.0.bias"}
    assert set(ModelTensors(Named()).structure.names) == own
    assert set(ModelTensors(compiled(DataParallel(Named()))).structure.names) == own


class Extended(DataParallel[nn.Module]):
    """A wrapper with a parameter of its own, called like one of what it wraps."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2))
        self.weight = nn.Parameter(torch.zeros(1))


def test_names_stay_what_they_are_where_they_would_not_be_unique() -> None:
    assert set(ModelTensors(Extended()).structure.names) == {"weight", "module.weight", "module.bias"}


def test_a_script_module_may_be_wrapped() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    assert list(ModelTensors(DataParallel(traced(plain))).structure.names) == ["0.bias", "0.weight"]


# --- classes ---------------------------------------------------------------------------------------------------------


@every_wrap
def test_the_class_that_is_reported_is_that_of_the_model(wrap: Wrap, group: None) -> None:
    assert described_class(wrap(encoder())) == "tests.support.swapping.Tiny"


def test_of_a_script_module_the_class_is_the_one_that_it_was_made_from() -> None:
    assert described_class(compiled(traced(nn.Linear(4, 4)))) == "Linear"
    assert described_class(object()) == "builtins.object"


# --- what cannot be resident -----------------------------------------------------------------------------------------


def test_sharded_parameters_are_refused_and_the_way_out_is_named(group: None) -> None:
    way_out = r"Attach an object whose load_weights\(weights\) copies this process's part out of every whole tensor"
    sharded = encoder()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedTensor, match=rf"tensor 'embed.weight' .* \(DTensor\).* {way_out}") as caught:
        ModelTensors(sharded)
    assert caught.value.tensor == "embed.weight"
    with warnings.catch_warnings():
        # That it is the older of the two ways, and slow without CUDA.
        warnings.simplefilter("ignore")
        older = nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")))
    with pytest.raises(UnsupportedTensor, match=rf"module '0' .* \(FullyShardedDataParallel\).* {way_out}"):
        ModelTensors(older)


def test_weights_that_torch_compile_makes_constants_of_are_refused() -> None:
    with inductor.patch(freezing=True):
        ModelTensors(encoder())
        with pytest.raises(AttachError, match=r"torch\._inductor\.config\.freezing is set"):
            ModelTensors(compiled_inside(encoder()))


# --- calls -----------------------------------------------------------------------------------------------------------


class Watching(nn.Module):
    """Notes in each forward whether the gate is held."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gate = gate
        self.held: list[bool] = []

    @torch.compiler.disable
    def look(self) -> None:
        slot = self.gate.hold()
        self.held.append(slot.owned() or slot.forward.owned())

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        self.look()
        return self.linear(numbers)


@pytest.fixture
def gate() -> Gate:
    return Gate(Version("old", "00" * 16), calls=find_calls)


@pytest.fixture
def watching(gate: Gate) -> Iterator[Watching]:
    """A module without hooks yet; at the end nobody may hold, however it was called."""
    model = Watching(gate).eval()
    yield model
    assert model.held
    assert all(model.held)
    gate.swap(lambda: Version("new", "11" * 16), commit_timeout=0.2, max_hold=0.2)


def call(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.ones(2, 4))


OUTER = {name: wrap for name, wrap in WRAPS.items() if name != "inside"}
every_outer = pytest.mark.parametrize("wrap", OUTER.values(), ids=OUTER)


@every_outer
def test_calls_of_the_wrapper_and_of_what_it_wraps_are_held(
    wrap: Wrap, gate: Gate, watching: Watching, group: None
) -> None:
    wrapper = wrap(watching)
    Hooks(wrapper, gate)
    for layer in layers(wrapper):
        call(layer)
    assert unwrapped(wrapper) is watching
    assert len(watching.held) == len(list(layers(wrapper)))


@every_outer
def test_calls_of_a_wrapper_made_of_the_attached_module_are_held(
    wrap: Wrap, gate: Gate, watching: Watching, group: None
) -> None:
    Hooks(watching, gate)
    call(wrap(watching))


def test_hooks_neither_break_a_compiled_graph_nor_compile_it_again(gate: Gate) -> None:
    model = encoder()
    whole = compiled(model, fullgraph=True)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        whole(ids)
        compilations = COUNTING.compiled
        hooks = Hooks(whole, gate)
        whole(ids)
        model(ids)
        hooks.remove()
        whole(ids)
    assert COUNTING.compiled == compilations > 0


def test_a_module_that_is_compiled_in_place_is_held(gate: Gate, watching: Watching) -> None:
    watching.compile(backend="eager")
    call(watching)
    watching.held.clear()
    Hooks(watching, gate)
    call(watching)


def test_what_happens_before_the_wrapped_module_is_called_is_held(gate: Gate, watching: Watching) -> None:
    """DistributedDataParallel broadcasts buffers there, and DataParallel copies parameters to other devices."""

    class Early(DataParallel[nn.Module]):
        def forward(self, *inputs: Any, **kwargs: Any) -> Any:
            watching.look()
            return super().forward(*inputs, **kwargs)

    wrapper = Early(watching)
    Hooks(wrapper, gate)
    call(wrapper)
    assert watching.held == [True, True]


def test_copies_that_data_parallel_makes_for_other_devices_do_not_wait(gate: Gate) -> None:
    """The call that they are made for holds, and waits for them: they must not wait for a swap that waits for it."""
    wrapper = DataParallel(nn.Linear(4, 4))
    Hooks(wrapper, gate)
    replica = wrapper.module._replicate_for_data_parallel()
    replica.weight, replica.bias = wrapper.module.weight, wrapper.module.bias
    gate.fence("nobody may come in")
    call(replica)


# --- swaps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["copy", "flip"])
@every_wrap
def test_a_swap_reaches_a_wrapped_model_and_compiles_nothing_again(
    wrap: Wrap, mode: str, rig: Rigs, group: None
) -> None:
    model = wrap(encoder())
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        before = model(ids)
        compilations = COUNTING.compiled
        swapping = rig(model, mode)
        swapping.adopt()
        for by in (1.0, 2.0):
            state = perturbed(encoder(), by)
            swapping.to(state)
            expected = encoder()
            expected.load_state_dict(state)
            assert torch.equal(model(ids), expected(ids))
        assert not torch.equal(model(ids), before)
    assert COUNTING.compiled == compilations
