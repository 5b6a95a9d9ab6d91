"""What a swap writes: tensors of every kind to the bit, proved afterwards, or none of them where one does not fit."""

import contextlib

import pytest
import torch
from torch import nn

import shipd
from tests.conftest import StartDaemon
from tests.support import naive
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.frames import DATA
from tests.support.naive import Tensor
from tests.support.processes import Finished, address_of, push, shipctl
from tests.support.proxy import Proxy
from tests.support.serving_process import Attach, both

pytest_plugins = ["tests.support.serving_process"]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


# --- every kind of tensor --------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Every dtype, and every oddity that must work."""

    def __init__(self, *, inference: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        with torch.inference_mode() if inference else contextlib.nullcontext():
            for dtype in naive.ITEMSIZE:
                value = raw(generator, getattr(torch, dtype), 3, 5)
                if value.is_floating_point() and value.element_size() > 1:
                    self.register_parameter(f"of_{dtype}", nn.Parameter(value, requires_grad=dtype != "float16"))
                else:
                    self.register_buffer(f"of_{dtype}", value)
            self.register_buffer("empty", torch.empty(0, 4))
            self.empty_parameter = nn.Parameter(torch.empty(3, 0))
            self.scalar = nn.Parameter(torch.tensor(1.5))
            self.register_buffer("scalar_step", torch.tensor(7))
            self.channels_last = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
            self.transposed = nn.Parameter(torch.zeros(700, 300).t())
            self.strided_complex = nn.Parameter(torch.zeros(6, 4, dtype=torch.complex128).t())
            self.large = nn.Parameter(torch.zeros(1100, 513))
            self.odd_flags = nn.Buffer(torch.zeros(1023, dtype=torch.bool))
            self.embedding = nn.Parameter(torch.zeros(40, 8))
            self.head = nn.Linear(8, 40, bias=False)
            self.head.weight = self.embedding
            # Tied without being one object.
            self.again = nn.Parameter(self.embedding.detach(), requires_grad=False)
            self.norm = nn.BatchNorm1d(4)
        self.norm.eval()


def raw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of random bytes: NaNs with payloads, bools that are neither 0 nor 1, denormals."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = size
    for length in shape:
        count *= length
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def logical_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in their order, whatever the strides, without any conversion."""
    if tensor.dtype is torch.bool:
        # To copy a bool makes 1 of whatever is not 0.
        tensor = tensor.view(torch.uint8)
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def random_version(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random bits for every tensor, each of other strides than the model's; tied where the model is."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    roots: dict[int, torch.Tensor] = {}
    for at, (name, live) in enumerate(model.state_dict(keep_vars=True).items()):
        if live.numel() and live.data_ptr() in roots:
            made[name] = roots[live.data_ptr()]
            continue
        if live.dim() >= 2 and at % 2:
            made[name] = raw(generator, live.dtype, *reversed(live.shape)).permute(*reversed(range(live.dim())))
        else:
            made[name] = raw(generator, live.dtype, *live.shape)
        assert made[name].shape == live.shape
        roots[live.data_ptr()] = made[name]
    # The corner cases by name: minus zero, and NaNs whose payload says something.
    words = torch.tensor([-(2**31), 0x7FC0DEAD, -0x3F2153, 0x7F800001], dtype=torch.int32)
    made["of_float32"][0, :4] = words.view(torch.float32)
    made["odd_flags"] = (torch.arange(1023) % 256).to(torch.uint8).view(torch.bool)
    return made


def naive_digest(version: dict[str, torch.Tensor]) -> str:
    """The version digest by the second implementation, ties taken from the tensors themselves."""
    first: dict[int, str] = {}
    rows = []
    for name in sorted(version):
        tensor = version[name]
        root = first.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append(Tensor(name, dtype, tuple(tensor.shape), root if root != name else None))
    return naive.version_digest(rows, {name: logical_bytes(tensor) for name, tensor in version.items()}).hex()


@both
@pytest.mark.parametrize("inference", [False, True], ids=["ordinary", "inference"])
def test_every_kind_of_tensor_arrives_to_the_bit(
    start_daemon: StartDaemon, attach: Attach, mode: str, inference: bool
) -> None:
    daemon = start_daemon(models={})
    model = Zoo(inference=inference)
    before = model.state_dict(keep_vars=True)
    objects = {name: id(tensor) for name, tensor in before.items()}
    strides = {name: tensor.stride() for name, tensor in before.items()}
    needs = {name: tensor.requires_grad for name, tensor in before.items()}
    training = {name: module.training for name, module in model.named_modules()}
    initial = {name: logical_bytes(tensor) for name, tensor in before.items()}
    resident = attach(model, daemon, mode=mode)
    assert resident.label == "initial"
    assert resident.digest == resident.verify()
    for name, tensor in model.state_dict().items():
        assert logical_bytes(tensor) == initial[name], name

    places = {name: tensor.data_ptr() for name, tensor in before.items()}
    for seed in range(1, 5):
        version = random_version(model, seed)
        receipt = push(address_of(daemon), version, label=f"v{seed}")
        assert (receipt.label, receipt.swapped, receipt.stale) == (f"v{seed}", 1, ())
        assert receipt.digest == resident.digest == resident.verify() == naive_digest(version)
        live = model.state_dict(keep_vars=True)
        for name, tensor in live.items():
            assert logical_bytes(tensor) == logical_bytes(version[name]), name
            moved = tensor.data_ptr() != places[name]
            # An empty tensor has no memory that could move.
            assert moved == (mode == "flip" and tensor.numel() > 0), name
        assert {name: id(tensor) for name, tensor in live.items()} == objects
        assert {name: tensor.stride() for name, tensor in live.items()} == strides
        assert {name: tensor.requires_grad for name, tensor in live.items()} == needs
        assert {name: module.training for name, module in model.named_modules()} == training
        assert model.head.weight is model.embedding
        assert model.again.data_ptr() == model.embedding.data_ptr()
        places = {name: tensor.data_ptr() for name, tensor in live.items()}
    resident.detach()
    last = random_version(model, 4)
    for name, tensor in model.state_dict().items():
        assert logical_bytes(tensor) == logical_bytes(last[name]), name


@both
def test_a_version_without_the_tied_names_will_do(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Zoo()
    resident = attach(model, daemon, mode=mode)
    whole = random_version(model, 1)
    fewer = {name: tensor for name, tensor in whole.items() if name not in ("head.weight", "embedding")}
    receipt = push(address_of(daemon), fewer)
    assert receipt.digest == resident.verify() == naive_digest(whole)
    assert logical_bytes(model.head.weight) == logical_bytes(whole["again"])


@both
def test_copies_of_what_the_model_ties_must_be_equal(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Zoo()
    resident = attach(model, daemon, mode=mode)
    tied = random_version(model, 1)
    untied = {name: tensor.clone() for name, tensor in tied.items()}
    receipt = push(address_of(daemon), untied)
    assert receipt.digest == resident.verify()
    assert model.head.weight is model.embedding
    assert logical_bytes(model.again) == logical_bytes(tied["again"])

    untied["head.weight"][3, 3] += 1
    with pytest.raises(shipd.TensorMismatch, match=r"ties .*different values") as caught:
        push(address_of(daemon), untied)
    assert caught.value.tensor in ("head.weight", "embedding", "again")
    assert resident.digest == receipt.digest == resident.verify()


@both
def test_a_hundred_megabytes(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """In two tensors and many chunks; the third push uses images that have been used before."""
    daemon = start_daemon(models={})
    model = nn.Sequential(nn.Linear(5000, 5000), nn.Linear(5, 3))
    resident = attach(model, daemon, mode=mode)
    for seed in range(1, 4):
        version = {name: raw_like(tensor, seed) for name, tensor in model.state_dict().items()}
        receipt = push(address_of(daemon), version, label=f"v{seed}")
        assert receipt.bytes_total > 100_000_000
        assert (receipt.swapped, receipt.digest) == (1, resident.verify())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.int32), version[name].view(torch.int32)), name


def raw_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Random bits, made faster than by ``raw``."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, tensor.shape, dtype=torch.int64, generator=generator)
    return bits.to(torch.int32).view(torch.float32)


# --- proof -----------------------------------------------------------------------------------------------------------


@both
def test_verify_finds_what_somebody_has_scribbled(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    receipt = push(address_of(daemon), state(1), label="v1")
    assert verify(daemon).code == 0
    with torch.no_grad():
        model.layer(1).bias.view(torch.uint8)[2] ^= 1
    with pytest.raises(shipd.IntegrityError, match=r"(?s)'v1'.*written to them") as caught:
        resident.verify()
    assert caught.value.model == "model"
    assert receipt.digest in str(caught.value)
    answer = verify(daemon)
    assert answer.code == 13
    (process,) = answer.answer["processes"]
    assert not process["matches"]
    assert process["digest"] not in ("", receipt.digest)
    # The next push puts it right.
    receipt = push(address_of(daemon), state(2), label="v2")
    assert resident.verify() == receipt.digest
    assert verify(daemon).code == 0


def verify(daemon: shipd.Daemon) -> Finished:
    """``shipctl verify``."""
    return shipctl("verify", "--to", address_of(daemon), "--model", "model", "--json")


@both
def test_what_the_model_writes_itself_is_found_and_replaced(
    start_daemon: StartDaemon, attach: Attach, mode: str
) -> None:
    """BatchNorm in training mode changes its buffers with every forward, in flip on pages of its own."""
    daemon = start_daemon(models={})
    model = nn.BatchNorm1d(8).train()
    resident = attach(model, daemon, mode=mode)
    # So many that every image is used again.
    for step in range(1, 8):
        version = nn.BatchNorm1d(8)
        nn.init.constant_(version.running_mean, float(step))  # type: ignore[arg-type]  # a buffer that is there
        receipt = push(address_of(daemon), version, label=f"v{step}")
        assert resident.verify() == receipt.digest
        assert torch.equal(model.running_mean, torch.full((8,), float(step)))  # type: ignore[arg-type]
        model(torch.randn(5, 8))
        assert model.training
        with pytest.raises(shipd.IntegrityError):
            resident.verify()


def test_flip_maps_each_image_once(start_daemon: StartDaemon, attach: Attach) -> None:
    """As long as the model writes nothing itself: the pages of a gigabyte take tens of milliseconds."""
    daemon = start_daemon(models={})
    model = nn.Linear(8, 8)
    resident = attach(model, daemon, mode="flip")
    places = []
    for step in range(12):
        version = nn.Linear(8, 8)
        receipt = push(address_of(daemon), version, label=f"v{step}")
        assert resident.verify() == receipt.digest
        assert torch.equal(model.weight, version.weight)
        places.append(model.weight.data_ptr())
    assert len(set(places)) <= 3


# --- mismatches ------------------------------------------------------------------------------------------------------


@both
def test_every_mismatch_is_listed_before_a_byte_travels(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    wrong = state(1)
    del wrong["layers.0.weight"], wrong["layers.2.bias"]
    wrong["layers.1.weight"] = torch.zeros(16, 17)
    wrong["layers.1.bias"] = torch.zeros(16, dtype=torch.float16)
    wrong["shift"] = torch.zeros(3, dtype=torch.int32)
    wrong["surprise"] = torch.zeros(2, 2)
    with Proxy(daemon.port) as proxy:
        with pytest.raises(shipd.TensorMismatch) as caught:
            push(proxy.address, wrong)
        assert proxy.count(DATA) == 0
    assert set(caught.value.problems) == {
        "missing: layers.0.weight (float32 [16, 16])",
        "missing: layers.2.bias (float32 [16])",
        "unexpected: surprise (float32 [2, 2])",
        "shape: layers.1.weight is [16, 17], the resident model has [16, 16]",
        "dtype: layers.1.bias is float16, the resident model has float32",
        "shape: shift is [3], the resident model has [16]",
        "dtype: shift is int32, the resident model has int64",
    }
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    assert resident.label == "initial"
    assert ask(model) == right_answer(0)
    assert push(address_of(daemon), state(1), label="v1").swapped == 1
    assert ask(model) == right_answer(1)
