"""Versions that are pushed into models that are serving: whole, and one at a time."""

import asyncio
import itertools
import os
import threading
import time

import pytest
import torch
from torch import nn

import shipd
from shipd.serving.copy_swap import CopySwap
from tests.conftest import StartDaemon
from tests.support.exact import CROWD, Exact, ask, fingerprint, question, right_answer, state
from tests.support.processes import Background, address_of, push
from tests.support.proxy import until
from tests.support.serving_process import Attach, Serve, both

pytest_plugins = ["tests.support.serving_process"]


# --- one version at a time -------------------------------------------------------------------------------------------


class Slow(Exact):
    """Stops in the middle of a forward until it is told to go on."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers = torch.remainder(self.layer(0)(numbers), 61) - 30
        self.inside.set()
        assert self.go_on.wait(20)
        for layer in itertools.islice(self.layers, 1, None):
            numbers = torch.remainder(layer(numbers), 61) - 30
        return self.last(numbers)


@both
def test_a_forward_that_is_under_way_finishes_with_its_version(
    start_daemon: StartDaemon, attach: Attach, mode: str
) -> None:
    daemon = start_daemon(models={})
    model = Slow(0)
    resident = attach(model, daemon, mode=mode)
    with Background(ask, model) as forward:
        assert model.inside.wait(20)
        with Background(push, address_of(daemon), state(1), label="v1") as pushed:
            until(lambda: resident._gate.shut, "the swap waits for the forward")
            # A newcomer waits for the swap and not for the forward.
            with Background(lambda: held_answer(resident, model)) as newcomer:
                assert resident.label == "initial"
                assert not pushed.done
                model.go_on.set()
                assert forward.result() == right_answer(0)
                assert pushed.result().swapped == 1
                assert newcomer.result() in (("v1", right_answer(1)), ("initial", right_answer(0)))
    assert ask(model) == right_answer(1)


def held_answer(resident: shipd.Resident, model: nn.Module) -> tuple[str, str]:
    """Label and answer inside one hold."""
    with resident.hold() as version, torch.inference_mode():
        return version.label, fingerprint(model.forward(question()))


@both
def test_a_hold_of_many_forwards_sees_one_version(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode, max_hold=0.05)
    holding = threading.Event()

    def push_once_held() -> shipd.Receipt:
        assert holding.wait(20)
        return push(address_of(daemon), state(1), label="v1")

    with Background(push_once_held) as pushed, resident.hold() as version:
        holding.set()
        until(lambda: resident._gate.shut, "the swap waits for the hold")
        for _ in range(10):
            # Calls and holds within a hold never wait.
            with resident.hold() as inner:
                assert inner == version == resident.version
            assert ask(model) == right_answer(0)
        assert not pushed.done
    assert pushed.result().pause_seconds is not None
    with resident.hold() as version:
        assert version.label == "v1"
        assert ask(model) == right_answer(1)


@both
def test_a_push_from_inside_a_hold_ends(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """It would wait for itself: the commit's deadline ends that, and the next one is fine."""
    daemon = start_daemon(models={}, commit_timeout=0.3)
    model = Exact(0)
    resident = attach(model, daemon, mode=mode, max_hold=0.1)

    async def push_and_hold() -> None:
        async with shipd.connect(address_of(daemon)) as client:
            async with resident.hold() as version:
                with pytest.raises(shipd.SwapFailed, match="MainThread"):
                    await client.push(state(1), model="model", label="v1")
                assert version.label == resident.label == "initial"
                assert ask(model) == right_answer(0)
            await client.push(state(1), model="model", label="v1")
        async with resident.hold() as version:
            assert version.label == "v1"
        assert ask(model) == right_answer(1)

    asyncio.run(push_and_hold())


@both
def test_a_model_is_pushed_from_where_it_is_served(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """As a checkpoint of itself: the tensors that are read are the ones that are swapped."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    for number in range(1, 4):
        with torch.no_grad():
            model.layer(1).bias.add_(1)
        receipt = push(address_of(daemon), model, label=f"v{number}")
        assert (receipt.swapped, receipt.digest) == (1, resident.verify())
        assert receipt.label == resident.label == f"v{number}"


def test_without_hooks_only_holds_are_respected(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Slow(0)
    resident = attach(model, daemon, hooks=False)
    with Background(ask, model) as forward:
        assert model.inside.wait(20)
        push(address_of(daemon), state(1), label="v1")
        model.go_on.set()
        assert forward.result() not in (right_answer(0), right_answer(1))
    assert held_answer(resident, model) == ("v1", right_answer(1))


def test_direct_in_memory_is_a_copy_under_its_own_name(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode="direct")
    # Of both ways of copying: one by one, and many small ones at once.
    swapper = resident._follower._swapper
    assert isinstance(swapper, CopySwap)
    assert sum(swapper._scatter.taken) == len(CROWD) < len(swapper._scatter.taken)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    for number in (1, 2, 3):
        receipt = push(address_of(daemon), state(number), label=f"v{number}")
        assert (receipt.swapped, receipt.digest) == (1, resident.verify())
        assert ask(model) == right_answer(number)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert resident.mode == "direct"

    async def modes() -> list[str]:
        async with shipd.connect(address_of(daemon)) as client:
            return [process.mode for served in (await client.status()).models for process in served.processes]

    assert asyncio.run(modes()) == ["direct"]


# --- under load ------------------------------------------------------------------------------------------------------


PUSHES = int(os.environ.get("SHIPD_SWAPS", "1000")) // 2
"""Each is a swap in two processes. SHIPD_SWAPS=10000 pytest -k thousand_swaps tests/e2e: ten thousand of them."""


SECONDS = max(60.0, 0.3 * PUSHES)
"""Until it is given up. Two idle cores need a small part of it."""


@pytest.mark.timeout(60 + SECONDS)
def test_a_thousand_swaps_under_eight_readers_each(start_daemon: StartDaemon, serve: Serve) -> None:
    """Real pushes to two processes, one in each mode; every answer is compared to the bit with what its version must
    answer."""
    daemon = start_daemon(models={})
    processes = [serve(daemon.config.socket, mode=mode) for mode in ("copy", "flip")]
    for process in processes:
        process.ask("read", ["hold"] * 4 + ["forward"] * 3 + ["tasks"])
    versions = {number: state(number) for number in range(1, PUSHES + 1)}

    async def push_all() -> int:
        swaps = 0
        end = time.monotonic() + SECONDS
        async with shipd.connect(address_of(daemon)) as client:
            for number, version in versions.items():
                receipt = await client.push(version, model="model", label=f"v{number}")
                assert receipt.stale == ()
                swaps += receipt.swapped
                assert time.monotonic() < end, f"only {swaps} swaps in {SECONDS:.0f} s"
        return swaps

    assert asyncio.run(push_all()) == 2 * PUSHES
    for process in processes:
        report = process.ask("read_stop")
        assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
        assert process.ask("verify") == process.ask("digest")
        # They have been reading all the time, and not only before and after.
        assert len(report["labels"]) > PUSHES // 5
        assert report["answers"] > 2 * PUSHES


def test_four_models_of_two_processes_each_pushed_at_once(start_daemon: StartDaemon, serve: Serve) -> None:
    """For some seconds, with readers in every process: models do not disturb one another."""
    daemon = start_daemon(models={})
    names = ["one", "two", "three", "four"]
    processes = {
        name: [
            serve(daemon.config.socket, name=name, version=at * 1000, mode=mode, kind="small" if at % 2 else "wide")
            for mode in ("copy", "flip")
        ]
        for at, name in enumerate(names)
    }
    for name, pair in processes.items():
        for process in pair:
            process.ask("read", ["hold", "tasks" if name == "one" else "forward"], name=name)

    async def push_for(name: str, at: int, seconds: float) -> list[shipd.Receipt]:
        kind = "small" if at % 2 else "wide"
        versions = [state(at * 1000 + number, kind) for number in range(1, 9)]
        end = time.monotonic() + seconds
        receipts: list[shipd.Receipt] = []
        async with shipd.connect(address_of(daemon)) as client:
            for number, version in enumerate(versions, 1):
                receipt = await client.push(version, model=name, label=f"v{at * 1000 + number}")
                assert (receipt.swapped, receipt.stale, receipt.frames_resent) == (2, (), 0)
                receipts.append(receipt)
                if number >= 4 and time.monotonic() > end:
                    break
        return receipts

    async def push_all() -> list[list[shipd.Receipt]]:
        return await asyncio.gather(*(push_for(name, at, 3.0) for at, name in enumerate(names)))

    for name, (*_, receipt) in zip(names, asyncio.run(push_all()), strict=True):
        for process in processes[name]:
            report = process.ask("read_stop", name=name)
            assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
            assert process.ask("verify", name=name) == receipt.digest
            assert process.ask("label", name=name) == receipt.label
