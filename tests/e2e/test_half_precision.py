"""Weights of one precision for a model of another: cast before they are sent, and only where that is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shipd
from tests.conftest import StartDaemon
from tests.support import checkpoints
from tests.support.bitwise import same
from tests.support.minilm import POSITION_IDS, minilm, weights
from tests.support.processes import address_of, push
from tests.support.serving_process import Attach, both

pytest_plugins = ["tests.support.serving_process", "tests.support.bitwise"]

pytestmark = pytest.mark.usefixtures("one_thread")


def local(dtype: torch.dtype) -> nn.Module:
    """MiniLM from its file, as everybody loads it and makes it smaller."""
    model = minilm()
    model.load_state_dict({name: tensor for name, tensor in weights().items() if name != POSITION_IDS})
    return model.to(dtype)


def hidden(model: Any) -> torch.Tensor:
    """What it makes of some tokens."""
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=torch.arange(1000, 1024).reshape(2, 12)).last_hidden_state
    return answer


@both
def test_minilm_is_served_in_half_precision_from_its_file(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    expected = local(torch.bfloat16)
    model = minilm().to(torch.bfloat16)
    resident = attach(model, daemon, mode=mode)
    receipt = push(address_of(daemon), checkpoints.minilm(), label="v1", cast=True)
    assert resident.verify() == receipt.digest
    assert same(model.state_dict(), expected.state_dict())
    assert torch.equal(hidden(model), hidden(expected))
    assert receipt.bytes_sent < checkpoints.minilm().stat().st_size * 0.51, "it is cast before it is sent"
    # The digest is that of what is served: cast elsewhere, it is the same version.
    assert push(address_of(daemon), expected, label="v1").already


def test_without_being_asked_for_nothing_is_cast(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    resident = attach(minilm().to(torch.bfloat16), daemon)
    before = resident.verify()
    with pytest.raises(shipd.TensorMismatch) as caught:
        push(address_of(daemon), checkpoints.minilm())
    message = str(caught.value)
    assert "float32" in message
    assert "bfloat16" in message
    assert "cast" in message
    assert (resident.label, resident.verify()) == ("initial", before)


def test_whether_casting_is_allowed_is_asked_every_time(place: Path, attach: Attach) -> None:
    """A plan is remembered, and the daemon could not tell a push that was cast from another."""

    def config(*, cast: bool) -> shipd.Config:
        models = {"model": shipd.ModelConfig(cast=cast)}
        return shipd.Config(listen="127.0.0.1:0", socket=str(place / "s"), models=models)

    async def forbid() -> None:
        daemon.server.reload(config(cast=False))

    with shipd.Daemon(config(cast=True)) as daemon:
        resident = attach(nn.Linear(7, 5).to(torch.bfloat16), daemon)
        push(address_of(daemon), nn.Linear(7, 5), label="v1")
        daemon.call(forbid())
        with pytest.raises(shipd.TensorMismatch, match="float32"):
            push(address_of(daemon), nn.Linear(7, 5), label="v2")
        assert resident.label == "v1"
        resident.detach()


def test_a_wider_model_is_served_from_a_narrow_checkpoint(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    torch.manual_seed(0)
    narrow = nn.Linear(7, 5).to(torch.bfloat16)
    model = nn.Linear(7, 5)
    resident = attach(model, daemon)
    receipt = push(address_of(daemon), narrow, cast=True)
    assert resident.verify() == receipt.digest
    assert same(model.state_dict(), narrow.to(torch.float32).state_dict())


@pytest.mark.parametrize(
    ("value", "given", "served"),
    [(1e39, torch.float64, torch.float32), (70000.0, torch.float32, torch.float16)],
    ids=["float64 to float32", "float32 to float16"],
)
def test_what_would_become_infinite_is_refused(
    start_daemon: StartDaemon, attach: Attach, value: float, given: torch.dtype, served: torch.dtype
) -> None:
    daemon = start_daemon(models={})
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(served)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resident = attach(model, daemon)
    version = {name: tensor.to(given) for name, tensor in before.items()}
    version["1.weight"][63, 5] = value
    with pytest.raises(shipd.ShipError, match=r"1\.weight") as caught:
        push(address_of(daemon), version, cast=True)
    assert str(served).removeprefix("torch.") in str(caught.value)
    assert resident.label == "initial"
    assert same(model.state_dict(), before)
    # An infinity that was one before stays one, and that is no loss.
    version["1.weight"][63, 5] = float("inf")
    receipt = push(address_of(daemon), version, cast=True)
    assert resident.verify() == receipt.digest
    assert same(model.state_dict(), {name: tensor.to(served) for name, tensor in version.items()})
