"""LoRA adapters as peft saves them, pushed alone into a model that has the base: only the adapter changes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

import shipd
from tests.conftest import StartDaemon
from tests.support.adapters import adapted, is_adapter, loaded
from tests.support.bitwise import same
from tests.support.decoder import generate, still_tied
from tests.support.processes import address_of, push
from tests.support.serving_process import Attach, both

pytest_plugins = ["tests.support.serving_process", "tests.support.bitwise"]

pytestmark = pytest.mark.usefixtures("one_thread")


def save(folder: Path, seed: int, modules_to_save: Sequence[str] = ()) -> Path:
    """What a trainer leaves: adapter_model.safetensors, adapter_config.json, README.md."""
    adapted(seed, modules_to_save=modules_to_save).save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
    return folder


@both
@pytest.mark.parametrize("modules_to_save", [(), ("ln_f",)], ids=["LoRA alone", "with a module"])
def test_only_the_adapter_changes(
    start_daemon: StartDaemon, attach: Attach, tmp_path: Path, mode: str, modules_to_save: Sequence[str]
) -> None:
    daemon = start_daemon(models={})
    first, second = (save(tmp_path / f"step-{seed}", seed, modules_to_save) for seed in (1, 2))
    model = adapted(0, modules_to_save=modules_to_save)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resident = attach(model, daemon, mode=mode)
    lives = []
    for folder in (first, second, first):
        receipt = push(address_of(daemon), folder / "adapter_model.safetensors", policy="subset")
        local = loaded(folder)
        assert receipt.live_digest == resident.digest == resident.verify() != receipt.digest
        assert receipt.tensors == sum(map(is_adapter, before))
        assert {*receipt.kept} == {name for name in before if not is_adapter(name)}
        assert same(model.state_dict(), local.state_dict())
        assert generate(model) == generate(local)
        kept = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
        assert same(kept, {name: before[name] for name in kept})
        lives.append((receipt.digest, receipt.live_digest))
    assert still_tied(model.base_model.model)
    assert lives[0] == lives[2] != lives[1]


def test_the_adapter_may_have_another_name_where_it_serves(
    start_daemon: StartDaemon, attach: Attach, tmp_path: Path
) -> None:
    """The files that peft writes do not say what it was called. They are pushed by their directory, too."""
    daemon = start_daemon(models={})
    model = adapted(0, names=["writer"])
    resident = attach(model, daemon)
    receipt = push(address_of(daemon), save(tmp_path / "saved", 1), policy="subset")
    assert resident.verify() == receipt.live_digest
    assert same(model.state_dict(), loaded(tmp_path / "saved", name="writer").state_dict())


def test_without_the_policy_the_base_is_missed(start_daemon: StartDaemon, attach: Attach, tmp_path: Path) -> None:
    daemon = start_daemon(models={})
    model = adapted(0)
    resident = attach(model, daemon)
    with pytest.raises(shipd.TensorMismatch, match="subset") as caught:
        push(address_of(daemon), save(tmp_path / "saved", 1))
    assert "base_layer.weight" in str(caught.value)
    assert resident.label == "initial"
    assert same(model.state_dict(), adapted(0).state_dict())


def test_of_two_adapters_one_has_to_be_named(start_daemon: StartDaemon, attach: Attach, tmp_path: Path) -> None:
    daemon = start_daemon(models={})
    model = adapted(0, names=["default", "second"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resident = attach(model, daemon)
    folder = save(tmp_path / "saved", 1)
    with pytest.raises(shipd.TensorMismatch, match=r"(?s)'default'.*'second'"):
        push(address_of(daemon), folder, policy="subset")
    assert resident.label == "initial"

    rule = r"(lora_[AB])=\1.second"
    receipt = push(address_of(daemon), folder, policy="subset", renames=[rule])
    assert resident.verify() == receipt.live_digest
    expected = loaded(folder, name="second").state_dict()
    assert same(model.state_dict(), before | {name: expected[name] for name in expected if ".second." in name})


def test_an_adapter_of_another_rank_is_refused(start_daemon: StartDaemon, attach: Attach, tmp_path: Path) -> None:
    """Whatever the policy, a shape is an error."""
    import safetensors.torch

    daemon = start_daemon(models={})
    model = adapted(0)
    resident = attach(model, daemon)
    folder = save(tmp_path / "saved", 1)
    state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    narrow = {name: (tensor[:2] if "lora_A" in name else tensor[:, :2]).clone() for name, tensor in state.items()}
    safetensors.torch.save_file(narrow, folder / "adapter_model.safetensors")
    with pytest.raises(shipd.TensorMismatch, match=r"lora_A.*\[2, 32\]"):
        push(address_of(daemon), folder, policy="subset")
    assert resident.label == "initial"
    assert same(model.state_dict(), adapted(0).state_dict())
