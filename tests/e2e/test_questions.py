"""What people ask about PyTorch models and networks, answered as they would do it: one command, or a few lines."""

import asyncio
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import shipd
from tests.support.bitwise import bits, same
from tests.support.checkpoints import MIB
from tests.support.processes import Helper, ShipdProcess, push, shipctl

pytest_plugins = ["tests.support.successive", "tests.support.bitwise"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def service(start_shipd: Callable[..., ShipdProcess]) -> ShipdProcess:
    """The daemon of the other machine, a process of its own, that has never heard of any model."""
    return start_shipd(models={})


Serve = Callable[[nn.Module], "shipd.Resident"]


@pytest.fixture
def serve(service: ShipdProcess) -> Iterator[Serve]:
    """``serve(model)``: what a serving process does to be sent new versions of "net"."""
    attached: list[shipd.Resident] = []

    def start(model: nn.Module) -> "shipd.Resident":
        attached.append(shipd.attach(model, "net", socket=service.socket))
        return attached[-1]

    yield start
    for resident in attached:
        resident.detach()
    attached.clear()


# --- How can a PyTorch model be transferred and loaded across a network? ---------------------------------------------


class CustomModule(nn.Module):
    """What only the two ends have the code of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


class ComplexModel(nn.Module):
    """With a custom module in it, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.custom = CustomModule()
        self.norm = nn.BatchNorm1d(5)
        self.linear = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.custom(x)))


def test_a_model_of_custom_modules_goes_over_the_network(service: ShipdProcess, serve: Serve, tmp_path: Path) -> None:
    x = torch.rand(7, 5)
    trained = ComplexModel()
    trained(x)  # the running mean is no longer that of a new model
    torch.save(trained.eval().state_dict(), tmp_path / "model.pth")

    model = ComplexModel().eval()
    resident = serve(model)
    finished = shipctl("push", tmp_path / "model.pth", "--to", service.address, "--model", "net", "--json")

    assert finished.code == 0, finished
    assert finished.answer["swapped"] == 1
    assert resident.verify() == finished.answer["digest"]
    assert bits([model(x)]) == bits([trained(x)])
    assert "torch" not in Path(f"/proc/{service.pid}/maps").read_text(), "what is in between needs no code of either"


def test_a_model_in_memory_goes_without_any_file(service: ShipdProcess, serve: Serve) -> None:
    trained, model = ComplexModel().eval(), ComplexModel().eval()
    resident = serve(model)

    async def ship_it() -> shipd.Receipt:
        async with shipd.connect(service.address) as client:
            return await client.push(trained, model="net")

    receipt = asyncio.run(ship_it())
    assert resident.digest == receipt.digest == resident.verify()
    assert same(model.state_dict(), trained.state_dict())


# --- How can PyTorch weights be incrementally transferred over a limited channel? ------------------------------------


@pytest.mark.usefixtures("fresh_bases")
def test_over_a_limited_channel_only_what_has_changed_travels(service: ShipdProcess, serve: Serve) -> None:
    torch.manual_seed(0)
    trainer = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)).bfloat16()
    optimizer = torch.optim.SGD(trainer.parameters(), lr=1e-3)
    model = copy.deepcopy(trainer)
    resident = serve(model)

    async def train() -> list[shipd.Receipt]:
        receipts = []
        async with shipd.connect(service.address) as client:
            for limit in ("100Mbit", "2Mbit"):
                trainer(torch.randn(8, 256, dtype=torch.bfloat16)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                receipts.append(await client.push(trainer, model="net", limit=limit))
        return receipts

    first, second = asyncio.run(train())
    assert second.base == first.digest
    assert second.bytes_sent < second.bytes_total / 50
    assert resident.verify() == second.digest
    assert same(model.state_dict(), trainer.state_dict()), "nothing is lost: it is no quantisation"


def test_a_frozen_backbone_stays_at_home(service: ShipdProcess, serve: Serve, tmp_path: Path) -> None:
    """From files, against the checkpoint that is known to be there."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 8))
    torch.save(network.state_dict(), tmp_path / "step-1.pth")
    model = copy.deepcopy(network)
    serve(model)
    push(service.address, tmp_path / "step-1.pth", model="net")
    with torch.no_grad():
        network.get_parameter("2.weight").add_(0.5)
    torch.save(network.state_dict(), tmp_path / "step-2.pth")

    base = tmp_path / "step-1.pth"
    receipt = push(service.address, tmp_path / "step-2.pth", model="net", base=base, limit="2Mbit")
    assert receipt.bytes_sent < receipt.bytes_total / 20
    assert same(model.state_dict(), network.state_dict())


# --- How can PyTorch model loading be optimized? ---------------------------------------------------------------------


def _push_then_load(report, path, address):
    """Runs in a process of its own: by how much its anonymous memory grows when it pushes, and when it loads."""
    import asyncio
    from pathlib import Path

    import torch

    import shipd
    import shipd.checkpoints.torch_file
    import shipd.client.client

    def anonymous():
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    most = before = anonymous()

    def watch(_progress):
        nonlocal most
        most = max(most, anonymous())

    async def send():
        async with shipd.connect(address) as client:
            await client.push(path, model="net", on_progress=watch)

    asyncio.run(send())
    watch(None)
    report(most - before)
    rest = anonymous()
    state = torch.load(path, weights_only=True)
    report(anonymous() - rest)
    del state


def test_a_large_file_is_loaded_without_a_copy_at_the_sender(
    service: ShipdProcess, serve: Serve, tmp_path: Path
) -> None:
    """Its pages are what the socket sends; to load it takes its size in memory."""
    path = tmp_path / "large.pth"
    trained = nn.Linear(4096, 8192, bias=False)
    torch.save(trained.state_dict(), path)
    model = nn.Linear(4096, 8192, bias=False)
    serve(model)
    with Helper(_push_then_load, path, service.address) as sender:
        pushing, loading = sender.next(), sender.next()
        assert sender.wait() == 0
    assert loading > 120 * MIB
    assert pushing < loading / 10
    assert same(model.state_dict(), trained.state_dict())


# --- How can a PyTorch YOLOv3 DataParallel model be loaded on a different machine after saving? ----------------------


def save_as_on_a_gpu(state: dict[str, torch.Tensor], path: Path, *, device: str, zipped: bool) -> None:
    """What torch.save writes of tensors that are on ``device``; this machine has none like it."""
    with mock.patch("torch.serialization.location_tag", return_value=device):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_devices_of_the_machine_that_trained_do_not_matter(
    service: ShipdProcess, serve: Serve, tmp_path: Path, zipped: bool
) -> None:
    """There is nothing like map_location to be thought of."""
    path = tmp_path / "yolo.pth"
    trained = ComplexModel()
    save_as_on_a_gpu(trained.state_dict(), path, device="cuda:7", zipped=zipped)
    model = ComplexModel().eval()
    resident = serve(model)
    receipt = push(service.address, path, model="net")
    assert resident.verify() == receipt.digest
    assert same(model.state_dict(), trained.state_dict())


def test_a_checkpoint_of_data_parallel_from_a_machine_with_gpus(
    service: ShipdProcess, serve: Serve, tmp_path: Path
) -> None:
    """Neither the prefix nor the devices have to be thought of."""
    path = tmp_path / "yolo_v3_weights.pth"
    trained = nn.DataParallel(ComplexModel())
    save_as_on_a_gpu(trained.state_dict(), path, device="cuda:7", zipped=True)
    model = ComplexModel().eval()
    resident = serve(model)
    finished = shipctl("push", path, "--to", service.address, "--model", "net", "--json")
    assert finished.code == 0, finished
    assert resident.verify() == finished.answer["digest"]
    assert same(model.state_dict(), trained.module.state_dict())


class LaterModel(ComplexModel):
    """The next architecture: another head, with a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.linear
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(self.norm(self.custom(x)))
        return answer


def test_what_fits_of_another_architecture_s_checkpoint(service: ShipdProcess, serve: Serve) -> None:
    """As strict=False, but it says what it did, and nothing is half new."""
    trained, model = ComplexModel(), LaterModel().eval()
    head = copy.deepcopy(model.head.state_dict())
    resident = serve(model)
    with pytest.raises(shipd.TensorMismatch, match=r"head\.weight"):
        push(service.address, trained, model="net")
    receipt = push(service.address, trained, model="net", policy="partial")
    assert {*receipt.kept} == {"head.weight", "head.bias"}
    assert resident.verify() == receipt.live_digest
    assert same(model.custom.state_dict(), trained.custom.state_dict())
    assert same(model.head.state_dict(), head)
