"""kill -9 of everything that takes part, at the worst moments: what is left serves one whole version, and goes on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import shipd
from shipd.service.session import Session
from tests.conftest import StartDaemon
from tests.support.exact import right_answer, state
from tests.support.frames import COMMIT, COMMITTED, DATA, FINISH, OFFER, STAGED, Way
from tests.support.processes import Background, Shipctl, ShipdProcess, address_of, push, shipctl, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Serve, Serving, Told, both, sessions

pytest_plugins = ["tests.support.serving_process"]


def in_state(daemon: shipd.Daemon, process: Serving, wanted: str) -> bool:
    """Whether the daemon waits for this process in this state."""
    return any(session.pid == process.pid and session.state == wanted for session in sessions(daemon))


# --- serving processes -----------------------------------------------------------------------------------------------


@both
def test_one_of_two_killed_while_staging(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    """The other commits; there is nobody left who could be stale."""
    daemon = start_daemon(models={})
    process, victim = (serve(daemon.config.socket, mode=mode) for _ in range(2))
    process.ask("read", ["hold", "forward", "tasks"])
    victim.stop()
    with Background(push, address_of(daemon), state(1), label="v1") as pushed:
        until(lambda: in_state(daemon, victim, "staging"), "the victim is asked to stage")
        victim.kill()
        receipt = pushed.result()
    assert (receipt.swapped, receipt.stale) == (1, ())
    assert process.ask("answer") == right_answer(1)
    assert process.ask("verify") == receipt.digest
    # Its successor is at the committed version before it serves, and takes part in what follows.
    successor = serve(daemon.config.socket, mode=mode)
    assert successor.ask("answer") == right_answer(1)
    receipt = push(address_of(daemon), state(2), label="v2")
    assert (receipt.swapped, receipt.stale) == (2, ())
    report = process.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
    assert process.ask("verify") == successor.ask("verify") == receipt.digest


@both
@pytest.mark.parametrize("pushed_before", [True, False])
def test_the_only_one_killed_while_staging(
    start_daemon: StartDaemon, serve: Serve, mode: str, pushed_before: bool
) -> None:
    """There is nobody to commit it: the push fails, and the version before stays the current one."""
    daemon = start_daemon()
    before = push(address_of(daemon), state(1), label="v1") if pushed_before else None
    victim = serve(daemon.config.socket, mode=mode)
    victim.stop()
    with Background(push, address_of(daemon), state(2), label="v2") as pushed:
        until(lambda: in_state(daemon, victim, "staging"), "the victim is asked to stage")
        victim.kill()
        error = pushed.error()
    assert isinstance(error, shipd.StageFailed), error
    assert f"process {victim.pid} died while staging" in str(error)
    (told,) = status(address_of(daemon)).models
    assert told.digest == (before.digest if before else "")
    successor = serve(daemon.config.socket, mode=mode, version=3)
    assert successor.ask("answer") == right_answer(1 if pushed_before else 3)
    receipt = push(address_of(daemon), state(2), label="v2")
    assert receipt.swapped == 1
    assert successor.ask("verify") == receipt.digest


@both
def test_killed_while_swapping(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    """COMMIT has been asked for and nobody says no: the version is committed."""
    daemon = start_daemon(models={})
    process, victim = (serve(daemon.config.socket, mode=mode) for _ in range(2))
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=COMMIT)
        with Background(push, proxy.address, state(1), label="v1") as pushed:
            held.wait()
            victim.stop()
            held.release()
            until(lambda: in_state(daemon, victim, "swapping"), "the victim is asked to swap")
            victim.kill()
            receipt = pushed.result()
    assert (receipt.swapped, receipt.stale) == (1, ())
    assert process.ask("answer") == right_answer(1)
    successor = serve(daemon.config.socket, mode=mode)
    assert successor.ask("verify") == process.ask("verify") == receipt.digest


@both
def test_killed_between_staged_and_commit(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    daemon = start_daemon(models={})
    victim = serve(daemon.config.socket, mode=mode)
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=COMMIT)
        with Background(push, proxy.address, state(1), label="v1") as pushed:
            held.wait()
            victim.kill()
            until(lambda: not sessions(daemon), "the daemon has noticed")
            held.release()
            receipt = pushed.result()
    assert (receipt.swapped, receipt.stale, receipt.pause_seconds) == (0, (), None)
    successor = serve(daemon.config.socket, mode=mode)
    assert successor.ask("answer") == right_answer(1)
    assert successor.ask("verify") == receipt.digest


@both
def test_killed_while_attaching(
    start_daemon: StartDaemon, serve: Serve, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it fills the first image, which nobody may take for a version."""
    daemon = start_daemon(models={})
    victim, successor = serve(), serve()
    fill = Session.fill
    stopping = [victim]

    async def stop_and_fill(self: Any, *arguments: Any) -> None:
        while stopping:
            stopping.pop().stop()
        await fill(self, *arguments)

    monkeypatch.setattr(Session, "fill", stop_and_fill)
    victim.begin("attach", daemon.config.socket, version=1, mode=mode)
    until(lambda: not stopping, "the victim is stopped")
    successor.begin("attach", daemon.config.socket, version=2, mode=mode)
    victim.kill()
    assert successor.result() == "initial"
    assert successor.ask("answer") == right_answer(2)
    receipt = push(address_of(daemon), state(3), label="v3")
    assert receipt.swapped == 1
    assert successor.ask("verify") == receipt.digest


@both
def test_killed_while_a_push_arrives(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    daemon = start_daemon(models={})
    process, victim = (serve(daemon.config.socket, mode=mode, kind="wide") for _ in range(2))
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=DATA, nth=5)
        with Background(push, proxy.address, state(1, "wide"), label="v1") as pushed:
            held.wait()
            victim.kill()
            until(lambda: len(sessions(daemon)) == 1, "the daemon has noticed")
            held.release()
            receipt = pushed.result()
    assert (receipt.swapped, receipt.stale) == (1, ())
    assert process.ask("answer") == right_answer(1, "wide")
    assert process.ask("verify") == receipt.digest


@both
def test_processes_come_and_go_while_versions_are_pushed(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    """A process is killed and another one started every other push, without looking at what is going on."""
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, mode=mode)
    process.ask("read", ["hold", "forward", "tasks"])
    victim = serve(daemon.config.socket, mode=mode)
    for number in range(1, 21):
        with Background(push, address_of(daemon), state(number), label=f"v{number}") as pushed:
            if number % 2:
                victim.kill()
            else:
                victim = serve(daemon.config.socket, mode=mode)
            receipt = pushed.result()
        assert receipt.stale == ()
        assert receipt.swapped in (1, 2)
        assert process.ask("answer") == right_answer(number)
        if not number % 2:
            assert victim.ask("answer") in (right_answer(number - 1), right_answer(number))
            victim.ask("await_label", f"v{number}")
            assert victim.ask("verify") == receipt.digest
    report = process.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
    assert len(sessions(daemon)) == 2


# --- senders ---------------------------------------------------------------------------------------------------------


@both
def test_the_sender_killed_at_half(start_daemon: StartDaemon, serve: Serve, mode: str, tmp_path: Path) -> None:
    """The old version serves, to the bit; whoever pushes next does not wait for the dead."""
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, mode=mode, kind="wide")
    before = push(address_of(daemon), state(1, "wide"), label="v1")
    process.ask("read", ["hold", "forward"])
    path = tmp_path / "v2.safetensors"
    safetensors.torch.save_file(state(2, "wide"), path)
    with Proxy(daemon.port) as proxy:
        for kind, nth in ((DATA, 6), (FINISH, 0), (COMMIT, 0)):
            held = proxy.hold(kind=kind, nth=nth)
            with Shipctl("push", path, "--to", proxy.address, "--model", "model", "--label", "v2") as sender:
                held.wait()
                sender.kill()
            proxy.sever_all()
            proxy.forget_rules()
            assert process.ask("answer") == right_answer(1, "wide")
            assert process.ask("verify") == process.ask("digest") == before.digest
    receipt = push(address_of(daemon), state(3, "wide"), label="v3")
    assert (receipt.swapped, receipt.stale) == (1, ())
    assert process.ask("verify") == receipt.digest
    report = process.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)


# --- the daemon ------------------------------------------------------------------------------------------------------


Restart = Callable[[], ShipdProcess]


@pytest.fixture
def restart(place: Path) -> Iterator[Restart]:
    """``restart()`` starts the daemon, having killed the one before with -9."""
    running: list[ShipdProcess] = []

    def start(**settings: Any) -> ShipdProcess:
        for daemon in running:
            daemon.kill()
            daemon.__exit__()
        running[:] = [ShipdProcess(place, models={}, **settings)]
        return running[0]

    yield start
    for daemon in running:
        daemon.__exit__()


def test_the_daemon_killed_while_processes_serve(restart: Restart, serve: Serve) -> None:
    """Serving goes on; they attach again by themselves, with label and digest kept, and the next push works."""
    daemon = restart()
    processes = [serve(daemon.socket, mode=mode) for mode in ("copy", "flip")]
    for process in processes:
        process.ask("read", ["hold", "forward", "tasks"])
    for number in (1, 2):
        receipt = push(daemon.address, state(number), label=f"v{number}")
        assert (receipt.swapped, receipt.stale) == (2, ())
        daemon.kill()
        for process in processes:
            until(lambda: not process.ask("connected"), "the process has noticed")  # noqa: B023  asked at once
            before = process.ask("answers")
            until(lambda: process.ask("answers") > before + 5, "serving goes on")  # noqa: B023
            assert process.ask("answer") == right_answer(number)
            assert process.ask("verify") == receipt.digest
        daemon = restart()
        for process in processes:
            process.ask("await_label", f"v{number}")
        (told,) = status(daemon.address).models
        assert (told.label, told.digest) == (f"v{number}", receipt.digest)
        assert sorted((each.pid, each.state) for each in told.processes) == sorted(
            (process.pid, "serving") for process in processes
        )
        answer = shipctl("verify", "--to", daemon.address, "--model", "model", "--json")
        assert answer.code == 0
        assert {process["digest"] for process in answer.answer["processes"]} == {receipt.digest}
    for process in processes:
        report = process.ask("read_stop")
        assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
    assert push(daemon.address, state(9), label="v9").swapped == 2


@pytest.mark.parametrize(
    ("kind", "way", "nth"),
    [
        pytest.param(OFFER, Way.TO_DAEMON, 0, id="offer"),
        pytest.param(DATA, Way.TO_DAEMON, 0, id="first chunk"),
        pytest.param(DATA, Way.TO_DAEMON, 9, id="ninth chunk"),
        pytest.param(FINISH, Way.TO_DAEMON, 0, id="finish"),
        pytest.param(STAGED, Way.TO_SENDER, 0, id="staged"),
        pytest.param(COMMIT, Way.TO_DAEMON, 0, id="commit"),
        pytest.param(COMMITTED, Way.TO_SENDER, 0, id="committed"),
    ],
)
def test_the_daemon_killed_in_the_middle_of_a_push(
    restart: Restart, serve: Serve, kind: int, way: Way, nth: int
) -> None:
    """Everyone serves one and the same version afterwards, and the sender knows which. Once the daemon had taken it the
    push goes on with the next daemon; an OFFER that was never answered finds a daemon without the model."""
    daemon = restart()
    processes = [serve(daemon.socket, mode=mode, kind="wide") for mode in ("copy", "flip")]
    before = push(daemon.address, state(1, "wide"), label="v1")
    for process in processes:
        process.ask("read", ["hold", "forward"])
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=kind, way=way, nth=nth)
        with Background(push, proxy.address, state(2, "wide"), label="v2") as pushed:
            held.wait()
            if kind == OFFER:
                # They must not be back before the sender is.
                for process in processes:
                    process.stop()
            daemon = restart()
            proxy.upstream = daemon.port
            proxy.forget_rules()
            proxy.sever_all()
            if kind == OFFER:
                assert isinstance(pushed.error(60), shipd.UnknownModel)
                receipt = before
                for process in processes:
                    process.resume()
            else:
                receipt = pushed.result(60)
    assert receipt.stale == ()
    # By the daemon's books: a process that was stopped meanwhile does not know yet what it has lost.
    until(
        lambda: [len(model.processes) for model in status(daemon.address).models] == [len(processes)], "they come back"
    )
    digests = {process.ask("verify") for process in processes}
    labels = {process.ask("label") for process in processes}
    answers = {process.ask("answer") for process in processes}
    assert digests == {receipt.digest}
    assert labels == {receipt.label} == {"v1" if kind == OFFER else "v2"}
    assert answers == {right_answer(1 if kind == OFFER else 2, "wide")}
    receipt = push(daemon.address, state(3, "wide"), label="v3")
    assert receipt.swapped == 2
    for process in processes:
        assert process.ask("verify") == receipt.digest
        report = process.ask("read_stop")
        assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)


def test_the_daemon_stopped_by_a_signal_while_processes_serve(restart: Restart, serve: Serve) -> None:
    daemon = restart()
    process = serve(daemon.socket)
    receipt = push(daemon.address, state(1), label="v1")
    assert daemon.terminate() == 0
    until(lambda: not process.ask("connected"), "the process has noticed")
    assert process.ask("answer") == right_answer(1)
    with pytest.raises(Told, match="Is shipd running there") as caught:
        serve(daemon.socket)
    assert caught.value.kind == "ConnectError"
    daemon = restart()
    process.ask("await_label", "v1")
    assert process.ask("verify") == receipt.digest
    assert push(daemon.address, state(2), label="v2").swapped == 1


def test_a_process_detaches_while_the_daemon_is_away(restart: Restart, serve: Serve) -> None:
    daemon = restart()
    processes = [serve(daemon.socket, mode=mode) for mode in ("copy", "flip")]
    push(daemon.address, state(1), label="v1")
    daemon.kill()
    for process in processes:
        until(lambda: not process.ask("connected"), "the process has noticed")  # noqa: B023  asked at once
        process.ask("detach")
        assert process.ask("answer") == right_answer(1)
        assert [name for name in process.ask("threads") if name.startswith("shipd")] == []
        # Found here: in mode flip the model stayed in the dead daemon's image.
        assert process.ask("images") == 0
    daemon = restart()
    for process in processes:
        process.ask("reattach", str(daemon.socket))
    assert push(daemon.address, state(2), label="v2").swapped == 2
    for process in processes:
        assert process.ask("answer") == right_answer(2)
