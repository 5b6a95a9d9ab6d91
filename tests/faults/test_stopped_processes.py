"""Serving processes that stand still or hold on, and a daemon that hangs: the others go on, and whoever was given up
catches up."""

import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import shipd
from shipd.service.session import Session
from tests.conftest import StartDaemon
from tests.support.exact import right_answer, state
from tests.support.frames import COMMIT
from tests.support.processes import Shipctl, ShipdProcess, address_of, push, shipctl, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Serve, Told, both, serves, sessions

pytest_plugins = ["tests.support.serving_process"]


def file(directory: Path, version: int) -> Path:
    """A version as a safetensors file, which shipctl reads without torch."""
    path = directory / f"v{version}.safetensors"
    safetensors.torch.save_file(state(version), path)
    return path


# --- processes that are stopped --------------------------------------------------------------------------------------


@both
def test_stopped_in_the_middle_of_a_commit(impatient: shipd.Daemon, serve: Serve, mode: str, tmp_path: Path) -> None:
    """The push ends in time and names the process; when that goes on it catches up by itself, and answers nothing old
    after something new."""
    process = serve(impatient.config.socket, mode=mode)
    process.ask("read", ["hold", "forward", "tasks"])
    with Proxy(impatient.port) as proxy:
        held = proxy.hold(kind=COMMIT)
        with Shipctl(
            "push", file(tmp_path, 1), "--to", proxy.address, "--model", "model", "--label", "v1", "--json"
        ) as pushing:
            held.wait()
            process.stop()
            held.release()
            assert pushing.wait() == 3
            receipt = pushing.answer
            assert f"processes {process.pid} could not follow" in pushing.err
    assert receipt["stale"] == [str(process.pid)]
    assert (receipt["label"], receipt["swapped"], receipt["pause_seconds"]) == ("v1", 0, None)
    process.resume()
    until(lambda: process.ask("fenced") > 0, "its readers are refused")
    process.ask("await_label", "v1")
    assert process.ask("answer") == right_answer(1)
    assert process.ask("verify") == receipt["digest"]
    before = process.ask("answers")
    until(lambda: process.ask("answers") > before + 10, "the readers go on")
    report = process.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"]) == ([], [], [])
    serves(impatient, process, push(address_of(impatient), state(2), label="v2"), 2)


@both
def test_stopped_while_staging(impatient: shipd.Daemon, serve: Serve, mode: str) -> None:
    """The others commit; the one that was left behind is named, and catches up."""
    process, stopped = (serve(impatient.config.socket, mode=mode) for _ in range(2))
    stopped.ask("read", ["hold"])
    stopped.stop()
    receipt = push(address_of(impatient), state(1), label="v1")
    assert (receipt.swapped, receipt.stale) == (1, (str(stopped.pid),))
    serves(impatient, process, receipt, 1)
    stopped.resume()
    serves(impatient, stopped, receipt, 1)
    report = stopped.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"]) == ([], [], [])
    receipt = push(address_of(impatient), state(2), label="v2")
    assert (receipt.swapped, receipt.stale) == (2, ())
    for each in (process, stopped):
        serves(impatient, each, receipt, 2)


@both
def test_who_was_given_up_and_has_come_back_costs_no_memory(impatient: shipd.Daemon, serve: Serve, mode: str) -> None:
    """Found here: every image that it had known stayed in the budget until it attached once more."""
    process, stopped = (serve(impatient.config.socket, mode=mode) for _ in range(2))
    before = status(address_of(impatient)).memory_used
    stopped.stop()
    push(address_of(impatient), state(1), label="v1")
    stopped.resume()
    stopped.ask("await_label", "v1")
    for version in range(2, 5):
        push(address_of(impatient), state(version), label=f"v{version}")
    receipt = push(address_of(impatient), state(5), label="v5")
    assert (receipt.swapped, receipt.stale) == (2, ())
    for each in (process, stopped):
        serves(impatient, each, receipt, 5)
    assert status(address_of(impatient)).memory_used == before
    assert not impatient.server.models["model"].abandoned


@both
def test_the_only_one_stopped_while_staging(impatient: shipd.Daemon, serve: Serve, mode: str) -> None:
    process = serve(impatient.config.socket, mode=mode)
    process.stop()
    with pytest.raises(shipd.StageFailed, match=rf"process {process.pid} was not ready to swap within 3 s"):
        push(address_of(impatient), state(1), label="v1")
    process.resume()
    until(lambda: len(sessions(impatient)) == 1, "it comes back")
    process.ask("await_label", "initial")
    assert process.ask("answer") == right_answer(0)
    serves(impatient, process, push(address_of(impatient), state(1), label="v1"), 1)


@both
def test_what_was_given_up_does_not_serve_on(
    impatient: shipd.Daemon, start_daemon: StartDaemon, serve: Serve, mode: str
) -> None:
    """It was stopped, others have a new version, and then the daemon goes: it must not answer from its old one."""
    process, stopped = (serve(impatient.config.socket, mode=mode) for _ in range(2))
    stopped.stop()
    receipt = push(address_of(impatient), state(1), label="v1")
    impatient.stop()
    stopped.resume()
    until(lambda: stopped.ask("stale") is not None, "it knows that it was given up")
    for what in ("answer", "verify"):
        with pytest.raises(Told, match="the daemon has given up on this process") as caught:
            stopped.ask(what)
        assert caught.value.kind == "Fenced"
    assert process.ask("answer") == right_answer(1)
    process.kill()
    # There is nobody with a newer version: it brings its own, and serves again.
    daemon = start_daemon(models={}, socket=impatient.config.socket)
    stopped.ask("await_label", "initial")
    assert stopped.ask("answer") == right_answer(0)
    assert stopped.ask("verify") != receipt.digest
    serves(daemon, stopped, push(address_of(daemon), state(1), label="v1"), 1)


def test_stopped_while_it_brings_the_first_version(
    impatient: shipd.Daemon, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may write what it was asked to write, much later: not where another version lies by then."""
    first, second = serve(), serve()
    fill = Session.fill
    stopping = [first]

    async def stop_and_fill(self: Any, *arguments: Any) -> None:
        while stopping:
            stopping.pop().stop()
        await fill(self, *arguments)

    monkeypatch.setattr("shipd.service.session.Session.fill", stop_and_fill)
    first.begin("attach", impatient.config.socket, version=1, kind="wide")
    until(lambda: not stopping, "it is stopped")
    second.ask("attach", impatient.config.socket, version=2, kind="wide")
    digest = second.ask("digest")
    first.resume()
    with pytest.raises(Told) as caught:
        first.result()
    assert caught.value.kind in ("Stalled", "ConnectError", "ConnectionLost")
    third = serve(impatient.config.socket, version=3, kind="wide")
    assert third.ask("answer") == second.ask("answer") == right_answer(2, "wide")
    assert third.ask("verify") == digest
    first.ask("attach", impatient.config.socket, version=1, kind="wide")
    assert first.ask("answer") == right_answer(2, "wide")


# --- processes that hold on ------------------------------------------------------------------------------------------


@both
def test_a_straggler_keeps_the_old_version_for_everybody(impatient: shipd.Daemon, serve: Serve, mode: str) -> None:
    process = serve(impatient.config.socket, mode=mode, max_hold=0.1)
    process.ask("read", ["hold", "forward", "tasks"])
    assert process.ask("hold", "generation-7") == "initial"
    with pytest.raises(shipd.SwapFailed, match=rf"process {process.pid}: .*generation-7.*old version serves") as caught:
        push(address_of(impatient), state(1), label="v1")
    assert caught.value.model == "model"
    assert caught.value.transfer_id
    # Readers were not kept out for longer than max_hold, and nothing has changed for them.
    before = process.ask("answers")
    until(lambda: process.ask("answers") > before + 10, "the readers go on")
    assert process.ask("stale") is None
    assert process.ask("verify") == process.ask("digest")
    assert process.ask("let_go", "generation-7")
    serves(impatient, process, push(address_of(impatient), state(1), label="v1"), 1)
    report = process.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)


@both
def test_a_straggler_among_others_is_fenced(impatient: shipd.Daemon, serve: Serve, mode: str, tmp_path: Path) -> None:
    """The version is committed; whoever held on stops serving the old one, and comes back once it has let go."""
    process, straggler = (serve(impatient.config.socket, mode=mode) for _ in range(2))
    straggler.ask("hold", "generation-7")
    straggler.ask("read", ["hold", "forward", "tasks"])
    pushed = shipctl(
        "push", file(tmp_path, 1), "--to", address_of(impatient), "--model", "model", "--label", "v1", "--json"
    )
    assert pushed.code == 3
    receipt = pushed.answer
    assert (receipt["swapped"], receipt["stale"]) == (1, [str(straggler.pid)])
    assert f"processes {straggler.pid} could not follow" in pushed.err
    assert process.ask("answer") == right_answer(1)

    until(lambda: straggler.ask("stale") is not None, "the straggler is fenced")
    assert "generation-7" in straggler.ask("stale")
    with pytest.raises(Told, match="given up") as caught:
        straggler.ask("answer")
    assert caught.value.kind == "Fenced"
    before = straggler.ask("fenced")
    until(lambda: straggler.ask("fenced") > before + 10, "readers are refused")
    # What was going on when it was fenced has seen one version to its end.
    assert straggler.ask("let_go", "generation-7")
    straggler.ask("await_label", "v1")
    assert straggler.ask("answer") == right_answer(1)
    assert straggler.ask("verify") == process.ask("verify") == receipt["digest"]
    report = straggler.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"]) == ([], [], [])
    following = push(address_of(impatient), state(2), label="v2")
    assert (following.swapped, following.stale) == (2, ())


# --- daemons that hang -----------------------------------------------------------------------------------------------


def test_a_daemon_that_hangs(place: Path, serve: Serve) -> None:
    """Serving goes on; attaching gives up in time, and so does detaching."""
    with ShipdProcess(place, models={}) as daemon:
        process = serve(daemon.socket)
        leaving = serve(daemon.socket)
        receipt = push(daemon.address, state(1), label="v1")
        process.ask("read", ["hold", "forward"])
        daemon.signal(signal.SIGSTOP)
        newcomer = serve()
        with pytest.raises(Told, match=r"did not attach model 'model' within 0\.5 s") as caught:
            newcomer.ask("attach", str(daemon.socket), timeout=0.5)
        assert caught.value.kind == "Stalled"
        leaving.ask("detach", deadline=10.0)
        assert leaving.ask("answer") == right_answer(1)
        before = process.ask("answers")
        until(lambda: process.ask("answers") > before + 10, "serving goes on")
        daemon.signal(signal.SIGCONT)
        newcomer.ask("attach", str(daemon.socket))
        receipt = push(daemon.address, state(2), label="v2")
        assert (receipt.swapped, receipt.stale) == (2, ())
        for each in (process, newcomer):
            assert each.ask("verify") == receipt.digest
        report = process.ask("read_stop")
        assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
