"""Models that people serve: silero-vad as TorchScript, MiniLM and a GPT-2 from transformers."""

import functools
import importlib.util
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shipd
from tests.conftest import StartDaemon
from tests.support import checkpoints
from tests.support.bitwise import bits, perturbed
from tests.support.decoder import TIED, gpt2, still_tied, untied
from tests.support.minilm import POSITION_IDS, minilm, weights
from tests.support.processes import Background, address_of, push, shipctl, status
from tests.support.proxy import until
from tests.support.serving_process import Attach, both

pytest_plugins = ["tests.support.serving_process", "tests.support.bitwise"]

pytestmark = pytest.mark.usefixtures("one_thread")


# --- silero-vad ------------------------------------------------------------------------------------------------------


def silero_archive() -> Path:
    """The TorchScript archive of its package."""
    found = importlib.util.find_spec("silero_vad")
    assert found is not None, "pip install --no-deps silero-vad"
    assert found.origin is not None
    return Path(found.origin).parent / "data" / "silero_vad.jit"


def silero() -> torch.jit.ScriptModule:
    """As its package loads it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        model: torch.jit.ScriptModule = torch.jit.load(str(silero_archive()))
    return model.eval()


@functools.cache
def audio(rate: int) -> list[torch.Tensor]:
    """Five frames of noise."""
    generator = torch.Generator().manual_seed(rate)
    return [torch.randn(1, rate // 1000 * 32, generator=generator) for _ in range(5)]


def listen(model: Any) -> bytes:
    """What it thinks of them. It remembers earlier frames, so it starts afresh."""
    answers = []
    with torch.no_grad():
        for rate in (16000, 8000):
            model.reset_states()
            answers += [model(frame, rate) for frame in audio(rate)]
    return bits(answers)


@functools.cache
def heard(version: int) -> bytes:
    """What a local model with the weights of a version answers."""
    model = silero()
    if version:
        model.load_state_dict(perturbed(model.state_dict(), version))
    return listen(model)


@both
def test_silero_follows_pushes(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = silero()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    resident = attach(model, daemon, mode=mode)
    # Also after the interpreter has seen it run, and has optimised what it saw.
    assert [listen(model) for _ in range(3)] == [heard(0)] * 3
    for version in range(1, 4):
        receipt = push(address_of(daemon), perturbed(original, version), label=f"v{version}")
        assert (receipt.swapped, receipt.tensors, receipt.skipped) == (1, len(original), ())
        assert receipt.digest == resident.digest == resident.verify()
        assert [listen(model) for _ in range(3)] == [heard(version)] * 3
    assert len({heard(version) for version in range(4)}) == 4
    now = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert (now == places) == (mode == "copy")
    resident.detach()
    assert listen(model) == heard(3)


def test_silero_is_pushed_from_its_archive(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = silero()
    model.load_state_dict(perturbed(model.state_dict(), 1))
    resident = attach(model, daemon)
    assert listen(model) == heard(1)
    finished = shipctl("push", silero_archive(), "--to", address_of(daemon), "--model", "model", "--json")
    assert finished.code == 0, finished
    assert finished.answer["digest"] == resident.digest == resident.verify()
    assert listen(model) == heard(0)


@both
def test_silero_listens_while_it_is_pushed(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """Hooks work on a ScriptModule, too: every single forward is of one version."""
    daemon = start_daemon(models={})
    model = silero()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resident = attach(model, daemon, mode=mode)
    frame = audio(16000)[0]

    def first(version: int) -> bytes:
        local = silero()
        local.load_state_dict(perturbed(original, version) if version else original)
        with torch.no_grad():
            return bits([local(frame, 16000)])

    expected = {first(version) for version in range(9)}
    answers: list[bytes] = []
    stop = threading.Event()

    def read() -> None:
        with torch.no_grad():
            while not stop.is_set():
                with resident.hold():
                    model.reset_states()
                    answers.append(bits([model(frame, 16000)]))

    with Background(read) as reader:
        for version in range(1, 9):
            push(address_of(daemon), perturbed(original, version), label=f"v{version}")
            before = len(answers)
            until(lambda: len(answers) > before or reader.done, "it listens")  # noqa: B023  called before the next
        stop.set()
    assert set(answers) <= expected
    assert len(set(answers)) > 1


class Detector(nn.Module):
    """A service's own module around what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.vad = silero()

    def forward(self, frame: torch.Tensor, rate: int) -> torch.Tensor:
        answer: torch.Tensor = self.vad(frame, rate)
        return answer

    def reset_states(self) -> None:
        self.vad.reset_states()


def test_silero_is_found_inside_of_a_service_s_own_module(start_daemon: StartDaemon, attach: Attach) -> None:
    """Every name there begins with one that the archive does not know."""
    daemon = start_daemon(models={})
    model = Detector()
    model.load_state_dict(perturbed(model.state_dict(), 1))
    resident = attach(model, daemon)
    assert listen(model) == heard(1)
    receipt = push(address_of(daemon), silero_archive())
    assert receipt.digest == resident.verify()
    assert listen(model) == heard(0)


def test_a_frozen_silero_is_refused(place: Path) -> None:
    """Its weights have become constants, which nobody can swap."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.freeze` is deprecated", DeprecationWarning)
        frozen = torch.jit.freeze(silero())
    with pytest.raises(shipd.AttachError, match="frozen ScriptModule keeps its weights as constants"):
        shipd.attach(frozen, "model", socket=place / "nothing.sock")


# --- MiniLM ----------------------------------------------------------------------------------------------------------


def embed(model: nn.Module) -> bytes:
    """Some tokens, embedded."""
    tokens = torch.arange(1000, 1024).reshape(2, 12)
    with torch.no_grad():
        return bits([model(input_ids=tokens).last_hidden_state])


@functools.cache
def embedded(version: int) -> bytes:
    """What a local model with the weights of a version gives."""
    model = minilm()
    state = perturbed(weights(), version) if version else dict(weights())
    state.pop(POSITION_IDS)
    model.load_state_dict(state)
    return embed(model)


@both
def test_minilm_is_pushed_before_anything_attaches(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """The model is declared; its first version waits for the process that will serve it."""
    daemon = start_daemon(models={"minilm": "200MiB"})
    first = push(address_of(daemon), checkpoints.minilm(), model="minilm", label="v0")
    assert (first.swapped, first.pause_seconds, first.skipped) == (0, None, ())
    assert first.tensors == len(weights())

    model = minilm()
    assert embed(model) != embedded(0)
    resident = attach(model, daemon, "minilm", mode=mode)
    assert resident.label == "v0"
    assert embed(model) == embedded(0)
    # position_ids is no part of what is served, and so of its digest neither.
    assert resident.verify() == resident.digest != first.digest
    (told,) = status(address_of(daemon)).models
    assert (told.digest, told.tensors) == (resident.digest, len(weights()) - 1)
    answer = shipctl("verify", "--to", address_of(daemon), "--model", "minilm", "--json")
    assert answer.code == 0
    assert [process["digest"] for process in answer.answer["processes"]] == [resident.digest]

    # The same file again is the same version, and nothing is sent.
    again = push(address_of(daemon), checkpoints.minilm(), model="minilm", label="v0")
    assert (again.already, again.digest, again.skipped) == (True, resident.digest, (POSITION_IDS,))
    assert again.bytes_sent < 100_000
    for version in (1, 2):
        receipt = push(address_of(daemon), perturbed(weights(), version), model="minilm", label=f"v{version}")
        assert (receipt.swapped, receipt.skipped, receipt.tensors) == (1, (POSITION_IDS,), len(weights()) - 1)
        assert resident.verify() == receipt.digest
        assert embed(model) == embedded(version)
    assert torch.equal(model.get_buffer(POSITION_IDS), weights()[POSITION_IDS])


def test_what_matches_no_transient_buffer_is_refused(start_daemon: StartDaemon, attach: Attach) -> None:
    """By name, dtype and shape."""
    daemon = start_daemon(models={})
    model = minilm()
    attach(model, daemon, "minilm")
    position_ids = weights()[POSITION_IDS]
    for other in (position_ids.int(), position_ids[:, :5], None):
        version = dict(weights())
        if other is None:
            version["embeddings.other_ids"] = version.pop(POSITION_IDS)
        else:
            version[POSITION_IDS] = other
        with pytest.raises(shipd.TensorMismatch) as caught:
            push(address_of(daemon), version, model="minilm")
        (problem,) = caught.value.problems
        assert problem.startswith("unexpected: embeddings.")
    assert push(address_of(daemon), checkpoints.minilm(), model="minilm").skipped == (POSITION_IDS,)
    assert embed(model) == embedded(0)


# --- a tied model ----------------------------------------------------------------------------------------------------


def next_token(model: nn.Module) -> bytes:
    """Logits for some tokens."""
    with torch.no_grad():
        return bits([model(input_ids=torch.arange(8).reshape(1, 8)).logits])


@both
def test_a_checkpoint_that_lacks_tied_names(
    start_daemon: StartDaemon, attach: Attach, mode: str, tmp_path: Path
) -> None:
    """As in every file that safetensors writes of a model: it has one name for each of the tied tensors."""
    import safetensors.torch

    daemon = start_daemon(models={})
    model, trained = gpt2(0), gpt2(1)
    safetensors.torch.save_model(trained, str(tmp_path / "model.safetensors"))
    assert len({*TIED} & {*safetensors.torch.load_file(tmp_path / "model.safetensors")}) == 1
    resident = attach(model, daemon, mode=mode)
    receipt = push(address_of(daemon), tmp_path / "model.safetensors", label="v1")
    assert resident.verify() == receipt.digest
    assert next_token(model) == next_token(trained)
    assert still_tied(model)
    # The state dict of the model itself has both names, and is the same version.
    assert push(address_of(daemon), trained, label="v1").already


@both
def test_a_checkpoint_with_copies_of_what_is_tied(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model, trained = gpt2(0), gpt2(1)
    resident = attach(model, daemon, mode=mode)
    receipt = push(address_of(daemon), untied(trained), label="v1")
    assert resident.verify() == receipt.digest
    assert next_token(model) == next_token(trained)
    assert still_tied(model)

    version = untied(gpt2(2))
    version[TIED[0]][5, 5] += 1
    with pytest.raises(shipd.TensorMismatch, match=r"ties 'lm_head\.weight' and 'transformer\.wte\.weight'"):
        push(address_of(daemon), version, label="v2")
    assert (resident.label, resident.verify()) == ("v1", receipt.digest)
    assert next_token(model) == next_token(trained)
    push(address_of(daemon), untied(gpt2(2)), label="v2")
    assert next_token(model) == next_token(gpt2(2))


@both
def test_copies_that_were_pushed_before_anything_attached(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """Nobody knew then that they would be tied. Where they differ, no model can serve both."""
    daemon = start_daemon(models={"equal": "1GiB", "different": "1GiB"})
    trained = gpt2(1)
    version = untied(trained)
    push(address_of(daemon), version, model="equal", label="v1")
    version[TIED[0]][5, 5] += 1
    push(address_of(daemon), version, model="different", label="v1")

    model = gpt2(0)
    resident = attach(model, daemon, "equal", mode=mode)
    assert resident.label == "v1"
    assert resident.verify() == resident.digest
    assert next_token(model) == next_token(trained)
    assert still_tied(model)

    other = gpt2(0)
    with pytest.raises(shipd.TensorMismatch, match=r"ties 'lm_head\.weight' and 'transformer\.wte\.weight'"):
        attach(other, daemon, "different", mode=mode)
    assert next_token(other) == next_token(gpt2(0))
    # A version that fits, and it can be attached.
    push(address_of(daemon), trained, model="different", label="v2")
    attach(other, daemon, "different", mode=mode)
    assert next_token(other) == next_token(trained)
