"""A decoder that generates while it is swapped: each generation is wholly of one version. And what is saved of it."""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import shipd
from tests.conftest import StartDaemon
from tests.support.bitwise import same
from tests.support.decoder import STEPS, TIED, generate, gpt2, still_tied, untied
from tests.support.processes import DEADLINE, Background, address_of, push
from tests.support.serving_process import Attach, both

pytest_plugins = ["tests.support.serving_process", "tests.support.bitwise"]

pytestmark = pytest.mark.usefixtures("one_thread")

SWAPS: Final = 6
BETWEEN: Final = 5
"""Generations from one swap to the next, at least."""


@functools.cache
def said(version: int) -> list[int]:
    """What a local model with the weights of a version generates."""
    return generate(gpt2(version))


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, and no longer than the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.0005)


class Speaker:
    """Generates under ``hold()`` without a pause, and notes under which label it said what.

    Once it is told to ``linger``, it does so in the middle of the next generation until a swap waits for its end.
    """

    def __init__(self, model: Any, resident: shipd.Resident) -> None:
        self._model = model
        self._resident = resident
        self._stop = threading.Event()
        self._linger = threading.Event()
        self.halfway = threading.Event()
        self.lingered = 0
        self.given: list[tuple[str, list[int]]] = []

    def run(self) -> None:
        while not self._stop.is_set():
            with self._resident.hold() as version:
                self.given.append((version.label, generate(self._model, self._watch)))

    def linger(self) -> None:
        """Come to the middle of a generation, and have a swap find it there."""
        self.halfway.clear()
        self._linger.set()
        assert self.halfway.wait(DEADLINE)

    def stop(self) -> None:
        self._stop.set()

    def _watch(self, tokens: int) -> None:
        if tokens == STEPS // 2 and self._linger.is_set():
            self._linger.clear()
            self.halfway.set()
            until(lambda: self._resident._gate.shut)
            self.lingered += 1


@both
def test_each_generation_is_wholly_of_one_version(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = gpt2(0)
    resident = attach(model, daemon, mode=mode)
    speaker = Speaker(model, resident)
    with Background(speaker.run) as speaking:
        try:
            for version in range(1, SWAPS + 1):
                speaker.linger()
                receipt = push(address_of(daemon), gpt2(version), label=f"v{version}")
                assert receipt.swapped == 1
                enough = len(speaker.given) + BETWEEN
                until(lambda: len(speaker.given) >= enough or speaking.done)  # noqa: B023  called before the next
        finally:
            speaker.stop()
        speaking.result()
    assert speaker.lingered == SWAPS, "every swap found it in the middle of a generation"
    assert len(speaker.given) >= SWAPS * BETWEEN >= 30
    expected = {"initial": said(0)} | {f"v{version}": said(version) for version in range(1, SWAPS + 1)}
    assert [(label, tokens) for label, tokens in speaker.given if tokens != expected[label]] == []
    order = [label for at, (label, _) in enumerate(speaker.given) if label not in dict(speaker.given[:at])]
    assert order == list(expected)
    assert resident.verify() == resident.digest
    assert still_tied(model)


def test_versions_differ_from_the_first_half_to_the_last_token() -> None:
    """Or the tests here would not see a mixture."""
    told = [said(version) for version in range(SWAPS + 1)]
    for half in (slice(0, STEPS // 2), slice(STEPS // 2, STEPS)):
        assert len({tuple(tokens[half]) for tokens in told}) == len(told)


@both
def test_without_hold_it_would_be_of_two(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """Single forwards are held by themselves, so a swap comes between two tokens: this is what ``hold()`` is for."""
    daemon = start_daemon(models={})
    model = gpt2(0)
    attach(model, daemon, mode=mode)

    def swap(tokens: int) -> None:
        if tokens == STEPS // 2:
            push(address_of(daemon), gpt2(1), label="v1")

    mixed = generate(model, swap)
    assert mixed[: STEPS // 2] == said(0)[: STEPS // 2]
    assert mixed not in (said(0), said(1))
    assert generate(model) == said(1)


# --- the files that such models are saved in -------------------------------------------------------------------------


def _saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def _sharded(model: Any, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def _tied(model: Any, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def _copies(model: Any, path: Path) -> Path:
    import safetensors.torch

    safetensors.torch.save_file(untied(model), path)
    return path


FORMS: Final[Mapping[str, tuple[Callable[[Any, Path], Path], set[str]]]] = {
    "save_pretrained": (_saved, {TIED[1]}),
    "save_pretrained, sharded": (_sharded, {TIED[1]}),
    "torch.save": (_tied, {*TIED}),
    "safetensors with copies": (_copies, {*TIED}),
}
"""How it is saved, and which of the tied names are in there."""


@pytest.fixture
def quiet() -> Iterator[None]:
    """save_pretrained draws its progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def names_in(path: Path) -> set[str]:
    """The names in a checkpoint, as their libraries tell them."""
    import safetensors.torch

    if path.is_dir():
        return {name for file in path.glob("*.safetensors") for name in safetensors.torch.load_file(file)}
    if path.read_bytes()[:2] == b"PK":
        return {*torch.load(path, weights_only=True)}
    return {*safetensors.torch.load_file(path)}


@pytest.mark.parametrize("form", FORMS)
def test_it_follows_what_was_saved_of_it(
    start_daemon: StartDaemon, attach: Attach, tmp_path: Path, quiet: None, form: str
) -> None:
    """transformers leaves the head out; others save it as it is, tied to the embedding, or as a copy of it."""
    daemon = start_daemon(models={})
    model, trained = gpt2(0), gpt2(1)
    save, names = FORMS[form]
    path = save(trained, tmp_path / "saved")
    assert names_in(path) & {*TIED} == names
    resident = attach(model, daemon)
    receipt = push(address_of(daemon), path, label="v1")
    assert resident.verify() == receipt.digest
    assert generate(model) == said(1)
    assert still_tied(model)
    assert same(model.state_dict(), trained.state_dict())
    # Whatever it was saved in, it is the same version.
    assert push(address_of(daemon), trained, label="v1").already


def test_the_file_of_the_model_without_its_head_is_enough(
    start_daemon: StartDaemon, attach: Attach, tmp_path: Path, quiet: None
) -> None:
    """The head is the embedding, and transformers' own names differ by a prefix: so does the file of gpt2 itself."""
    daemon = start_daemon(models={})
    model, trained = gpt2(0), gpt2(1)
    trained.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in names_in(tmp_path)
    resident = attach(model, daemon)
    receipt = push(address_of(daemon), tmp_path)
    assert resident.verify() == receipt.digest
    assert generate(model) == said(1)
    assert still_tied(model)


def test_a_file_whose_head_is_not_its_embedding_is_refused(
    start_daemon: StartDaemon, attach: Attach, tmp_path: Path
) -> None:
    daemon = start_daemon(models={})
    model = gpt2(0)
    resident = attach(model, daemon)
    state = untied(gpt2(1))
    state[TIED[0]][-1, -1] += 1
    torch.save(state, tmp_path / "untied.pth")
    with pytest.raises(shipd.TensorMismatch, match=r"ties 'lm_head\.weight' and 'transformer\.wte\.weight'"):
        push(address_of(daemon), tmp_path / "untied.pth", label="v1")
    assert resident.label == "initial"
    assert generate(model) == said(0)
