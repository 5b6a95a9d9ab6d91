"""Failures inside a swap, the session or a callback: undone, or fenced until the process has the new version."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import shipd
from shipd.images.memory import ImageMapping
from shipd.serving.copy_swap import CopySwap
from shipd.serving.model_follower import ModelFollower
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.processes import Background, address_of, push
from tests.support.proxy import until
from tests.support.serving_process import Attach, both, sessions

pytest_plugins = ["tests.support.serving_process"]


@both
def test_a_swap_that_fails_halfway_is_undone(
    start_daemon: StartDaemon, attach: Attach, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    receipt = push(address_of(daemon), state(1), label="v1")
    broken = break_swaps(monkeypatch, mode, times=1)
    with pytest.raises(shipd.SwapFailed, match="undone; the old version serves"):
        push(address_of(daemon), state(2), label="v2")
    assert broken == []
    assert resident.stale is None
    assert (resident.label, resident.verify()) == ("v1", receipt.digest)
    assert ask(model) == right_answer(1)
    push(address_of(daemon), state(2), label="v2")
    assert ask(model) == right_answer(2)


@both
def test_a_swap_that_cannot_be_undone_fences(
    start_daemon: StartDaemon, attach: Attach, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees the mix. What cannot serve the old version may as well get the new one: the process is named as
    stale, attaches again and has it."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    push(address_of(daemon), state(1), label="v1")
    refused: list[str] = []
    answers: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                answers.append(ask(model))
            except shipd.Fenced as error:
                refused.append(str(error))

    with Background(read):
        try:
            broken = break_swaps(monkeypatch, mode, times=2)
            receipt = push(address_of(daemon), state(2), label="v2")
            assert broken == []
            assert (receipt.swapped, receipt.stale) == (0, (str(os.getpid()),))
            until(lambda: resident.stale is None and resident.connected, "it has got the committed version")
        finally:
            stop.set()
    assert set(answers) <= {right_answer(1), right_answer(2)}
    assert all("mix of two versions" in reason or "given up" in reason for reason in refused)
    assert (resident.label, resident.verify()) == ("v2", receipt.digest)
    assert ask(model) == right_answer(2)
    push(address_of(daemon), state(3), label="v3")
    assert ask(model) == right_answer(3)


def break_swaps(monkeypatch: pytest.MonkeyPatch, mode: str, *, times: int) -> list[int]:
    """Make the next ``times`` attempts to write a version into the model, undoing included, stop in the middle."""
    left = list(range(times))
    if mode == "copy":
        write = CopySwap._write

        def write_half(self: CopySwap, mapping: ImageMapping) -> None:
            if not left:
                return write(self, mapping)
            left.pop()
            singles, self._singles = self._singles, self._singles[:3]
            sources = self._sources_of(mapping)
            self._sources[mapping] = sources._replace(views=sources.views[:3], parts=[])
            try:
                write(self, mapping)
            finally:
                self._singles, self._sources[mapping] = singles, sources
            raise MemoryError("in the middle")

        monkeypatch.setattr(CopySwap, "_write", write_half)
        return left
    import shipd.serving.flip

    rebind = shipd.serving.flip.rebind

    def rebind_some(lives: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        if not left:
            return rebind(lives, values)
        left.pop()
        rebind(lives[:2], values[:2])
        raise MemoryError("in the middle")

    monkeypatch.setattr("shipd.serving.flip.rebind", rebind_some)
    return left


def test_an_unexpected_failure_of_the_session_is_survived(
    start_daemon: StartDaemon, attach: Attach, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of mappings, say: the process tries again, instead of serving an old version for ever."""
    daemon = start_daemon(models={}, socket=str(place / "one.sock"))
    model = Exact(0)
    resident = attach(model, daemon)
    push(address_of(daemon), state(1), label="v1")
    failing = [1, 2]
    make = ModelFollower.map

    def fail_at_first(self: Any, *arguments: Any) -> Any:
        if failing:
            raise OSError(12, f"Cannot allocate memory ({failing.pop()})")
        return make(self, *arguments)

    monkeypatch.setattr("shipd.serving.model_follower.ModelFollower.map", fail_at_first)
    daemon.stop()
    daemon = start_daemon(models={}, socket=str(place / "one.sock"))
    until(lambda: resident.connected, "it is attached again")
    assert failing == []
    assert resident.label == "v1"
    assert push(address_of(daemon), state(2), label="v2").swapped == 1
    assert ask(model) == right_answer(2)


@pytest.mark.parametrize("failure", [SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_callback_that_wants_to_exit(start_daemon: StartDaemon, attach: Attach, failure: BaseException) -> None:
    """It does not end the thread that follows the daemon."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)

    def callback(_version: shipd.Version) -> None:
        handle.remove()
        raise failure

    handle = resident.on_swap(callback)
    push(address_of(daemon), state(1), label="v1")
    until(lambda: resident.connected and resident.label == "v1", "it follows")
    until(lambda: len(sessions(daemon)) == 1, "the daemon knows")
    assert push(address_of(daemon), state(2), label="v2").swapped == 1
    assert ask(model) == right_answer(2)


def test_a_callback_that_goes_on_holding(start_daemon: StartDaemon, attach: Attach) -> None:
    """A swap cannot wait for its own thread: the push fails and says so."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    handle = resident.on_swap(lambda _version: resident.hold().__enter__())
    push(address_of(daemon), state(1), label="v1")
    handle.remove()
    with pytest.raises(shipd.SwapFailed, match="the swapping thread holds the gate itself"):
        push(address_of(daemon), state(2), label="v2")
    assert ask(model) == right_answer(1)
    assert (resident.label, resident.stale) == ("v1", None)
