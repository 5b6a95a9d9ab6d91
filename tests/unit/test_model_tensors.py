from pathlib import Path

import pytest
import silero_vad
import torch
from torch import nn

from shipd.errors import AttachError, UnsupportedTensor
from shipd.serving.tensors import ModelTensors, Transient
from tests.support.swapping import channels_last

SUB_BYTE: torch.dtype = vars(torch)["uint4"]
"""torch's annotations do not know it."""


class Holding(nn.Module):
    """A module with these tensors as buffers, beside an ordinary layer."""

    def __init__(self, **buffers):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def refused(model, match, tensor, kind=UnsupportedTensor):
    with pytest.raises(kind, match=match) as caught:
        ModelTensors(model)
    assert caught.value.tensor == tensor


def test_what_a_version_consists_of():
    model = nn.Sequential(nn.Embedding(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    model[0].register_buffer("position_ids", torch.arange(3), persistent=False)
    tensors = ModelTensors(model)
    assert list(tensors.structure.names) == sorted(model.state_dict())
    specs = {spec.name: spec for spec in tensors.structure.specs()}
    assert specs["2.weight"].tied_to == "0.weight"
    assert specs["0.weight"].tied_to is None
    assert (specs["1.num_batches_tracked"].dtype, specs["1.num_batches_tracked"].shape) == ("int64", ())
    assert tensors.transient == (Transient("0.position_ids", "int64", (3,)),)
    assert [id(tensor) for tensor in tensors.live] == [
        id(value) for _, value in sorted(model.state_dict(keep_vars=True).items())
    ]
    assert tensors.device == torch.device("cpu")
    assert tensors.changed() == []
    assert tensors.sharing_transients() == []


def test_ties_need_not_be_the_same_object():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = nn.Parameter(first.weight.detach())
    second.bias = nn.Parameter(first.bias.detach().view(3))
    specs = {spec.name: spec.tied_to for spec in ModelTensors(nn.Sequential(first, second)).structure.specs()}
    assert specs == {"0.bias": None, "0.weight": None, "1.bias": "0.bias", "1.weight": "0.weight"}


def test_empty_tensors_are_tied_to_nothing():
    model = Holding(a=torch.empty(0, 3), b=torch.empty(0, 3))
    assert {spec.tied_to for spec in ModelTensors(model).structure.specs()} == {None}


def test_tensors_side_by_side_in_one_storage_are_apart():
    flat = torch.arange(24.0)
    model = Holding(first=flat[:12].view(3, 4), second=flat[12:].view(3, 4))
    assert all(spec.tied_to is None for spec in ModelTensors(model).structure.specs())
    whole = torch.arange(24.0).view(4, 6)
    model = Holding(left=whole[:, :2], right=whole[:, 2:], real=torch.view_as_real(torch.ones(3, dtype=torch.cfloat)))
    assert len(ModelTensors(model).structure) == 5


def test_channels_last_and_transposed_tensors_are_fine():
    model = nn.Sequential(channels_last(nn.Conv2d(3, 8, 3)))
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    tensors = ModelTensors(model)
    assert tensors.structure.shape(tensors.structure.index["turned"]) == (3, 2)


def overlapping():
    base = torch.arange(12.0)
    return Holding(a=base[:8].view(2, 4), b=base[4:].view(2, 4))


def tied_and_transposed():
    base = torch.arange(12.0).view(3, 4)
    return Holding(a=base, b=base.t())


@pytest.mark.parametrize("model", [overlapping, tied_and_transposed])
def test_tensors_that_overlap_without_being_tied_are_refused(model):
    refused(model(), r"share parts of their memory.*'a', 'b'", "a")


def test_tensors_that_overlap_themselves_are_refused():
    refused(Holding(wide=torch.zeros(1).expand(4)), r"'wide'.*share one place", "wide")
    refused(Holding(window=torch.arange(6.0).as_strided((3, 3), (1, 1))), r"share parts.*'window'", "window")


def test_a_dimension_of_one_may_have_any_stride():
    ModelTensors(Holding(one=torch.zeros(3).as_strided((1, 3), (0, 1))))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.eye(3).to_sparse(), "not dense"),
        (torch.zeros(3, device="meta"), "meta device"),
        (torch.zeros(2, dtype=SUB_BYTE), "dtype is uint4"),
        (torch.ones(2, dtype=torch.cfloat).conj(), "lazy conjugate"),
        (torch.ones(2, dtype=torch.cfloat).conj().imag, "lazy conjugate or negative"),
    ],
    ids=["sparse", "meta", "sub-byte", "conjugate", "negative"],
)
def test_tensors_without_plain_bytes_are_refused(value, match):
    refused(Holding(odd=value), f"'odd'.*{match}", "odd")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_and_nested_tensors_are_refused():
    refused(Holding(odd=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)), "'odd'.*quantised", "odd")
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    refused(Holding(odd=nested), "'odd'.*not dense", "odd")


def test_subclasses_are_refused_and_buffers_are_not():
    class Special(torch.Tensor):
        pass

    refused(Holding(odd=torch.ones(3).as_subclass(Special)), "'odd'.*subclass Special", "odd")
    refused(nn.LazyLinear(3), "'weight'.*Uninitialized", "weight")
    ModelTensors(Holding(fine=nn.Buffer(torch.ones(3))))


def test_extra_state_is_refused():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return torch.ones(3)

        def set_extra_state(self, state):
            pass

    refused(nn.Sequential(Extra(2, 2)), r"'0\._extra_state'.*extra state", "0._extra_state")


def test_what_is_no_tensor_is_refused():
    class Odd(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {**super().state_dict(*args, **kwargs), "epoch": 3}

    refused(Odd(2, 2), "'epoch'.*no tensor but int", "epoch")


def test_a_state_dict_of_copies_is_refused():
    class Copying(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {name: value.detach().clone() for name, value in super().state_dict(*args, **kwargs).items()}

    refused(Copying(2, 2), "'bias'.*gives a copy", "bias")


def test_names_that_cannot_travel_are_refused():
    model = nn.Module()
    model.register_buffer("bad\nname", torch.ones(1))
    with pytest.raises(UnsupportedTensor, match="control character"):
        ModelTensors(model)


def test_a_model_without_tensors_cannot_be_attached():
    with pytest.raises(AttachError, match="no parameters or buffers"):
        ModelTensors(nn.ReLU())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_modules():
    model = torch.jit.load(Path(silero_vad.__file__).parent / "data" / "silero_vad.jit").eval()
    tensors = ModelTensors(model)
    assert len(tensors.structure) == len(model.state_dict())
    assert tensors.changed() == []
    frozen = torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval()))
    with pytest.raises(AttachError, match="frozen ScriptModule"):
        ModelTensors(frozen)


def test_inference_tensors_can_be_resident():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    assert len(ModelTensors(model).structure) == 2


def test_transients_that_share_memory_with_a_shipped_tensor_are_found():
    model = nn.Linear(4, 4)
    model.register_buffer("first", model.weight.detach()[0], persistent=False)
    model.register_buffer("own", torch.ones(3), persistent=False)
    assert ModelTensors(model).sharing_transients() == ["first"]


def replace(model):
    model[0].weight = nn.Parameter(torch.zeros(3, 2))


def move(model):
    model[0].weight.data = model[0].weight.data.clone()


def convert(model):
    model.half()


def add(model):
    model.register_buffer("extra", torch.ones(1))


def remove(model):
    model[0].bias = None


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (replace, ["'0.weight' has other memory"]),
        (move, ["'0.weight' has other memory"]),
        (
            convert,
            [
                "'0.bias' was float32 [3] on cpu and is float16 [3] on cpu",
                "'0.weight' was float32 [3, 2] on cpu and is float16 [3, 2] on cpu",
            ],
        ),
        (add, ["'extra' is new"]),
        (remove, ["'0.bias' is gone"]),
    ],
)
def test_what_the_user_changes_is_noticed(how, expected):
    layer = nn.Linear(2, 3)
    model = nn.Sequential(layer)
    tensors = ModelTensors(model)
    with torch.no_grad():
        layer.weight.add_(1)
    model.eval().requires_grad_(requires_grad=False)
    assert tensors.changed() == []
    how(model)
    assert tensors.changed() == expected
