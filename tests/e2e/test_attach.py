"""Joining: which version a process gets, and when."""

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

import shipd
from shipd.service.session import Session
from shipd.serving.copy_swap import CopySwap
from shipd.serving.flip import FlipSwap
from shipproto.limits import MAX_PROCESSES
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.frames import COMMIT, DATA
from tests.support.processes import Background, address_of, push, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Attach, Serve, both

pytest_plugins = ["tests.support.serving_process", "tests.support.patience"]


def attaching(daemon: shipd.Daemon, name: str = "model") -> bool:
    """Whether a process is in the middle of attaching."""
    return name in daemon.server.models and daemon.server.models[name].attaching > 0


@both
def test_the_first_process_brings_the_first_version(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(7)
    resident = attach(model, daemon, mode=mode)
    assert (resident.name, resident.label, resident.mode) == ("model", "initial", mode)
    assert resident.connected
    assert resident.stale is None
    assert resident.digest == resident.verify()
    assert resident.version == shipd.Version("initial", resident.digest)
    assert ask(model) == right_answer(7)
    (told,) = status(address_of(daemon)).models
    assert (told.name, told.label, told.digest, told.committed_at) == ("model", "initial", resident.digest, 0.0)
    (process,) = told.processes
    assert (process.state, process.mode, process.digest) == ("serving", mode, resident.digest)


@both
def test_the_second_process_gets_the_version_of_the_first(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    daemon = start_daemon(models={})
    first = serve(daemon.config.socket, version=1, mode=mode)
    second = serve(daemon.config.socket, version=2, mode="copy" if mode == "flip" else "flip")
    assert first.ask("answer") == second.ask("answer") == right_answer(1)
    assert first.ask("digest") == second.ask("digest") == second.ask("verify")
    receipt = push(address_of(daemon), state(3), label="v3")
    assert receipt.swapped == 2
    for process in (first, second):
        assert process.ask("answer") == right_answer(3)
        assert process.ask("verify") == receipt.digest


@both
def test_a_committed_version_is_installed_before_attach_returns(
    start_daemon: StartDaemon, attach: Attach, mode: str
) -> None:
    daemon = start_daemon()
    receipt = push(address_of(daemon), state(5), label="v5")
    assert (receipt.swapped, receipt.pause_seconds) == (0, None)
    model = Exact(0)
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("forward"))
    resident = attach(model, daemon, mode=mode)
    assert ask(model) == right_answer(5)
    assert (resident.label, resident.digest, resident.verify()) == ("v5", receipt.digest, receipt.digest)


@both
def test_nobody_sees_a_mix_while_a_version_is_installed(
    start_daemon: StartDaemon, attach: Attach, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model may be serving already when it is attached: a forward that comes in between waits."""
    daemon = start_daemon()
    push(address_of(daemon), state(5), label="v5")
    model = Exact(0)
    swapper = CopySwap if mode == "copy" else FlipSwap
    apply = swapper.apply
    answers: list[str] = []
    reader = threading.Thread(target=lambda: answers.append(ask(model)))

    def apply_by_halves(self: Any) -> None:
        model.layers[0].load_state_dict({key: state(5)[f"layers.0.{key}"] for key in ("weight", "bias")})
        reader.start()
        # It waits for the swap; without a gate it would be done in no time, with an answer of no version.
        reader.join(0.3)
        apply(self)

    monkeypatch.setattr(swapper, "apply", apply_by_halves)
    attach(model, daemon, mode=mode)
    reader.join(20)
    assert answers == [right_answer(5)]


@both
def test_attach_while_a_push_is_under_way(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    """The newcomer is at the old version at once, and takes part in the swap."""
    daemon = start_daemon(models={})
    first = serve(daemon.config.socket, kind="wide", mode=mode)
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=DATA, nth=5)
        with Background(push, proxy.address, state(1, "wide"), label="v1") as pushed:
            held.wait()
            second = serve(daemon.config.socket, kind="wide", version=9, mode=mode)
            assert second.ask("label") == "initial"
            assert second.ask("answer") == right_answer(0, "wide")
            held.release()
            receipt = pushed.result()
    assert receipt.swapped == 2
    for process in (first, second):
        assert process.ask("answer") == right_answer(1, "wide")
        assert process.ask("verify") == receipt.digest


@both
def test_attach_to_a_declared_model_while_its_first_push_is_under_way(
    start_daemon: StartDaemon, serve: Serve, mode: str
) -> None:
    """What the model is will be known when the push is over: attaching waits for it."""
    daemon = start_daemon()
    process = serve()
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=DATA, nth=5)
        with Background(push, proxy.address, state(1, "wide"), label="v1") as pushed:
            held.wait()
            process.begin("attach", daemon.config.socket, kind="wide", mode=mode)
            until(lambda: attaching(daemon), "the process asks to be attached")
            assert not process.answered
            held.release()
            receipt = pushed.result()
            assert process.result() == "v1"
    assert process.ask("answer") == right_answer(1, "wide")
    assert process.ask("verify") == receipt.digest


@both
def test_attach_to_a_declared_model_whose_first_push_fails(
    start_daemon: StartDaemon, serve: Serve, mode: str, out_of_patience: Callable[[], None]
) -> None:
    """Then the process's own version is the first one."""
    daemon = start_daemon(resume_window=0.2)
    process = serve()
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=DATA, nth=5)
        with Background(push, proxy.address, state(1, "wide"), label="v1") as pushed:
            held.wait()
            process.begin("attach", daemon.config.socket, kind="wide", version=3, mode=mode)
            until(lambda: attaching(daemon), "the process asks to be attached")
            proxy.refuse()
            proxy.sever_all()
            assert process.result() == "initial"
            out_of_patience()
            assert isinstance(pushed.error(), shipd.ShipError)
    assert process.ask("answer") == right_answer(3, "wide")
    assert push(address_of(daemon), state(1, "wide"), label="v1").swapped == 1


@both
def test_attach_while_a_version_is_staged(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    """Between STAGED and COMMIT, which may be long where one push goes to many hosts."""
    daemon = start_daemon(models={})
    first = serve(daemon.config.socket, mode=mode)
    second = serve()
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=COMMIT)
        with Background(push, proxy.address, state(1), label="v1") as pushed:
            held.wait()
            second.begin("attach", daemon.config.socket, version=2, mode=mode)
            # Everyone else is at the old version, so it is, too; and takes part in the swap.
            assert second.result() == "initial"
            assert second.ask("answer") == right_answer(0)
            held.release()
            receipt = pushed.result()
    assert receipt.swapped == 2
    for process in (first, second):
        assert process.ask("answer") == right_answer(1)
        assert process.ask("verify") == receipt.digest


def test_a_push_meets_a_process_that_is_just_attaching(
    start_daemon: StartDaemon, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither lays out images behind the other's back: the push waits until the process is in, and swaps it."""
    daemon = start_daemon(stage_timeout=20.0)
    slow = serve()
    filling, go_on = threading.Event(), threading.Event()
    fill = Session.fill

    async def wait_and_fill(self: Any, *arguments: Any) -> None:
        filling.set()
        await asyncio.to_thread(go_on.wait, 20)
        await fill(self, *arguments)

    monkeypatch.setattr(Session, "fill", wait_and_fill)
    slow.begin("attach", daemon.config.socket)
    assert filling.wait(20)
    with Background(push, address_of(daemon), state(1), label="v1") as pushed:
        until(lambda: daemon.server.models["model"].incoming is not None, "the push has begun")
        go_on.set()
        receipt = pushed.result()
    assert slow.result() == "initial"
    slow.ask("await_label", "v1")
    assert slow.ask("answer") == right_answer(1)
    assert slow.ask("verify") == receipt.digest
    assert receipt.swapped == 1


def test_eight_processes_attach_at_once(start_daemon: StartDaemon, serve: Serve) -> None:
    """Each brings another version; one of them is everybody's."""
    daemon = start_daemon(models={})
    processes = [serve() for _ in range(8)]
    for at, process in enumerate(processes):
        process.begin("attach", daemon.config.socket, version=at, kind="wide", mode="flip" if at % 2 else "copy")
    assert {process.result() for process in processes} == {"initial"}
    (answer,) = {process.ask("answer") for process in processes}
    assert answer in {right_answer(at, "wide") for at in range(8)}
    (digest,) = {process.ask("verify") for process in processes}
    assert {each.digest for each in status(address_of(daemon)).models[0].processes} == {digest}
    receipt = push(address_of(daemon), state(9, "wide"), label="v9")
    assert (receipt.swapped, receipt.stale) == (8, ())
    assert {process.ask("verify") for process in processes} == {receipt.digest}


def test_a_model_has_so_many_processes_and_no_more(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    models = [Exact(at) for at in range(MAX_PROCESSES + 1)]
    residents = [attach(model, daemon) for model in models[:-1]]
    with pytest.raises(shipd.Busy, match=f"has {MAX_PROCESSES} processes attached already"):
        attach(models[-1], daemon)
    receipt = push(address_of(daemon), state(100), label="v100")
    assert (receipt.swapped, receipt.stale) == (MAX_PROCESSES, ())
    residents[0].detach()
    until(lambda: len(daemon.server.models["model"].sessions) < MAX_PROCESSES, "the session ends")
    attach(models[-1], daemon)
    assert {ask(model) for model in models} == {right_answer(100)}


def test_deadlines_may_be_whole_seconds(start_daemon: StartDaemon, attach: Attach) -> None:
    whole: Any = {"stall": 5, "resume_window": 5, "stage_timeout": 5, "commit_timeout": 5, "drain_timeout": 5}
    daemon = start_daemon(models={}, **whole)
    resident = attach(Exact(1), daemon)
    receipt = push(address_of(daemon), state(2), label="v2", stall=5, timeout=60)
    assert (receipt.swapped, receipt.stale) == (1, ())
    assert resident.verify() == receipt.digest


def test_attaching_may_take_for_ever(start_daemon: StartDaemon, attach: Attach) -> None:
    assert attach(Exact(1), start_daemon(models={}), timeout=math.inf).label == "initial"


def test_two_models_in_one_process(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    one, two = Exact(1), Exact(2)
    first, second = attach(one, daemon, "one"), attach(two, daemon, "two", mode="flip")
    with first.hold(), second.hold():
        pass
    push(address_of(daemon), state(3), model="one", label="v3")
    assert (ask(one), ask(two)) == (right_answer(3), right_answer(2))
    push(address_of(daemon), state(4), model="two", label="v4")
    assert (ask(one), ask(two)) == (right_answer(3), right_answer(4))
    assert (first.label, second.label) == ("v3", "v4")
