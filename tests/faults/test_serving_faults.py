"""What goes wrong in serving processes: the old version serves, whole; the error says why; the next push works."""

import copy
import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import shipd
from shipd.images.memory import ImageMapping
from shipd.service.session import Session
from shipd.serving.copy_swap import CopySwap
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, question, right_answer, state
from tests.support.frames import COMMIT, DATA, NACK, Way
from tests.support.processes import Background, Shipctl, ShipdProcess, address_of, push, shipctl, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Attach, Serve, Told, both, serves, sessions

pytest_plugins = ["tests.support.serving_process"]


@pytest.fixture
def impatient(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> shipd.Daemon:
    """A daemon that waits for nobody longer than half a second."""
    monkeypatch.setattr("shipd.service.rollout.SWAP_GRACE", 0.3)
    monkeypatch.setattr("shipd.service.attaching.SWAP_GRACE", 0.3)
    return start_daemon(models={}, stage_timeout=0.5, commit_timeout=0.3)


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
    with pytest.raises(shipd.StageFailed, match=rf"process {process.pid} was not ready to swap within 0\.5 s"):
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


# --- images that are not released ------------------------------------------------------------------------------------


def test_kept_tensors_of_one_version_cost_one_image(impatient: shipd.Daemon, serve: Serve) -> None:
    """In flip a slice of a parameter keeps its version's memory; the other images go round."""
    process = serve(impatient.config.socket, mode="flip")
    push(address_of(impatient), state(1), label="v1")
    process.ask("keep_tensors")
    (session,) = sessions(impatient)
    for number in range(2, 10):
        receipt = push(address_of(impatient), state(number), label=f"v{number}")
        assert receipt.swapped == 1
        assert process.ask("kept_are_whole")
        assert sessions(impatient) == [session], "it was evicted"
        serves(impatient, process, receipt, number)


def test_kept_tensors_of_every_version(impatient: shipd.Daemon, serve: Serve) -> None:
    """Past the deadline the process is evicted and the memory replaced: nothing that is read is overwritten."""
    process = serve(impatient.config.socket, mode="flip", kind="wide")
    other = serve(impatient.config.socket, mode="copy", kind="wide")
    other.ask("read", ["hold", "forward"])
    evictions = 0
    attached = sessions(impatient)
    for number in range(1, 9):
        receipt = push(address_of(impatient), state(number, "wide"), label=f"v{number}")
        process.ask("await_label", receipt.label)
        assert process.ask("answer") == right_answer(number, "wide")
        process.ask("keep_tensors")
        assert process.ask("kept_are_whole")
        assert process.ask("verify") == other.ask("verify") == receipt.digest
        evictions += attached != (attached := sessions(impatient))
    assert 1 <= evictions <= 4
    assert process.ask("kept_are_whole")
    report = other.ask("read_stop")
    assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
    # The images of one model are bounded by its slots; what was abandoned does not add up without end.
    size = impatient.server.models["model"].pool.size  # type: ignore[union-attr]
    assert impatient.server.images.budget.used <= 2 * size
    process.kill()
    other.kill()
    until(lambda: not sessions(impatient), "both are gone")


def test_kept_tensors_and_no_memory_for_more(start_daemon: StartDaemon, serve: Serve) -> None:
    """The push is refused; the old version serves."""
    daemon = start_daemon(models={}, stage_timeout=0.3, memory_limit="20MiB")
    process = serve(daemon.config.socket, mode="flip", kind="wide")
    for number in range(1, 3):
        push(address_of(daemon), state(number, "wide"), label=f"v{number}")
        process.ask("keep_tensors")
    receipt = push(address_of(daemon), state(3, "wide"), label="v3")
    with pytest.raises(shipd.MemoryLimit, match=rf"process {process.pid} does not release"):
        push(address_of(daemon), state(4, "wide"), label="v4")
    assert process.ask("kept_are_whole")
    process.ask("await_label", "v3")
    assert process.ask("answer") == right_answer(3, "wide")
    assert process.ask("verify") == receipt.digest


# --- the model changes behind shipd's back ---------------------------------------------------------------------------


def halve(model: Exact) -> None:
    model.half()


def rebind(model: Exact) -> None:
    model.layer(1).bias.data = torch.zeros(16)


def replace(model: Exact) -> None:
    model.layer(1).bias = nn.Parameter(torch.zeros(16))


def add(model: Exact) -> None:
    model.register_buffer("surprise", torch.zeros(3))


def remove(model: Exact) -> None:
    model.layer(1).register_parameter("bias", None)


@both
@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(halve, r"'crowd[\w.]*' was float32 .* on cpu and is float16.* and 43 more", id="half"),
        pytest.param(rebind, r"'layers\.1\.bias' has other memory", id="data"),
        pytest.param(replace, r"'layers\.1\.bias' has other memory", id="parameter"),
        pytest.param(add, r"'surprise' is new", id="new"),
        pytest.param(remove, r"'layers\.1\.bias' is gone", id="gone"),
    ],
)
def test_a_model_that_was_changed(
    start_daemon: StartDaemon, attach: Attach, mode: str, change: Any, named: str
) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    receipt = push(address_of(daemon), state(1), label="v1")
    change(model)
    with pytest.raises(shipd.StageFailed, match=named) as caught:
        push(address_of(daemon), state(2), label="v2")
    assert "Detach before moving or converting" in str(caught.value)
    assert (resident.label, resident.digest) == ("v1", receipt.digest)
    with pytest.raises(shipd.AttachError, match=named):
        resident.verify()
    (process,) = shipctl("verify", "--to", address_of(daemon), "--model", "model", "--json").answer["processes"]
    assert not process["matches"]
    assert "the model was changed after it was attached" in process["error"]
    # The old model again, and everything is as it was.
    resident.detach()
    model = Exact(0)
    attach(model, daemon, mode=mode)
    assert ask(model) == right_answer(1)
    push(address_of(daemon), state(2), label="v2")
    assert ask(model) == right_answer(2)


@both
def test_a_model_that_was_changed_brings_no_version(
    start_daemon: StartDaemon, attach: Attach, place: Path, mode: str
) -> None:
    """A daemon that was restarted asks for what is live; half of it would be numbers of another kind."""
    daemon = start_daemon(models={}, socket=str(place / "one.sock"))
    model = Exact(0)
    attach(model, daemon, mode=mode)
    push(address_of(daemon), state(1), label="v1")
    model.half()
    daemon.stop()
    again = start_daemon(models={}, socket=str(place / "one.sock"))
    until(lambda: bool(again.server._sessions), "it asks to be attached")
    until(lambda: not again.server._sessions, "it has been refused, or has refused")
    assert not [each for each in again.server.models.values() if each.version is not None]


@both
def test_a_tensor_that_changes_while_it_is_pushed(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0, "wide")
    resident = attach(model, daemon, mode=mode)
    version = state(1, "wide")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=DATA, nth=4)
        with Background(push, proxy.address, version, label="v1") as pushed:
            held.wait()
            version["layers.5.weight"].add_(1)
            held.release()
            error = pushed.error()
    assert isinstance(error, shipd.TensorChanged), error
    assert error.tensor == "layers.5.weight"
    assert "changed while it was being sent" in str(error)
    assert ask(model, "wide") == right_answer(0, "wide")
    assert resident.label == "initial"
    assert resident.verify() == resident.digest
    assert push(address_of(daemon), state(2, "wide"), label="v1").swapped == 1
    assert ask(model, "wide") == right_answer(2, "wide")


def test_a_change_that_leaves_no_trace_shows_in_the_digest(start_daemon: StartDaemon, attach: Attach) -> None:
    """Fused optimisers count no versions; a chunk that is read twice has to be the same twice."""
    daemon = start_daemon(models={})
    model = Exact(0, "wide")
    resident = attach(model, daemon)
    version = state(1, "wide")
    with Proxy(daemon.port) as proxy:
        proxy.flip("payload", kind=DATA, nth=0)
        asked_again = proxy.hold(kind=NACK, way=Way.TO_SENDER)
        with Background(push, proxy.address, version, label="v1") as pushed:
            asked_again.wait()
            before = version["layers.0.weight"]._version
            version["layers.0.weight"].data[0, 0] += 1
            assert version["layers.0.weight"]._version == before
            asked_again.release()
            error = pushed.error()
    assert isinstance(error, shipd.TensorChanged), error
    assert error.tensor == "layers.0.weight"
    assert resident.verify() == resident.digest
    assert ask(model, "wide") == right_answer(0, "wide")


def test_a_snapshot_may_change(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Exact(0, "wide")
    attach(model, daemon)
    version = state(1, "wide")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=DATA, nth=4)
        with Background(push, proxy.address, version, label="v1", snapshot=True) as pushed:
            held.wait()
            for tensor in version.values():
                tensor.zero_()
            held.release()
            assert pushed.result().swapped == 1
    assert ask(model, "wide") == right_answer(1, "wide")


# --- forwards that do not end as they should -------------------------------------------------------------------------


class Fragile(Exact):
    """Raises in the middle of a forward what it is told to."""

    failure: BaseException | None = None

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        return super().forward(numbers)


@both
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(3), ValueError("no"), GeneratorExit()], ids=repr)
def test_a_forward_that_raises(start_daemon: StartDaemon, attach: Attach, mode: str, failure: BaseException) -> None:
    """Also what skips torch's hooks, in a thread that lives on."""
    daemon = start_daemon(models={}, commit_timeout=5.0)
    model = Fragile(0)
    attach(model, daemon, mode=mode)
    raised, leave = threading.Event(), threading.Event()
    answers: list[str] = []

    def work() -> None:
        model.failure = failure
        with pytest.raises(type(failure)):
            model(question())
        model.failure = None
        raised.set()
        assert leave.wait(20)
        answers.append(ask(model))

    with Background(work) as worker:
        assert raised.wait(20)
        receipt = push(address_of(daemon), state(1), label="v1")
        leave.set()
        worker.result()
    assert receipt.swapped == 1
    assert answers == [right_answer(1)]


def test_ctrl_c_in_the_middle_of_forwards(start_daemon: StartDaemon, serve: Serve) -> None:
    daemon = start_daemon(models={}, commit_timeout=5.0)
    process = serve(daemon.config.socket)
    for number in range(1, 6):
        process.begin("forward_until_interrupted")
        push(address_of(daemon), state(2 * number - 1), label=f"v{2 * number - 1}")
        process.signal(signal.SIGINT)
        assert process.result() == "KeyboardInterrupt"
        receipt = push(address_of(daemon), state(2 * number), label=f"v{2 * number}")
        serves(daemon, process, receipt, 2 * number)


@both
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_a_users_hook_that_raises(start_daemon: StartDaemon, attach: Attach, mode: str, early: bool) -> None:
    """Registered before the model was attached, or after."""
    daemon = start_daemon(models={}, commit_timeout=5.0)
    model = Exact(0)
    failing = True

    def hook(*_: object) -> None:
        if failing:
            raise ValueError("the user's own")

    def register() -> None:
        model.register_forward_pre_hook(hook)
        model.register_forward_pre_hook(hook, prepend=True)
        model.register_forward_hook(hook)

    if early:
        register()
    attach(model, daemon, mode=mode)
    if not early:
        register()
    raised, leave = threading.Event(), threading.Event()

    def work() -> None:
        with pytest.raises(ValueError, match="the user's own"):
            ask(model)
        raised.set()
        assert leave.wait(20)

    with Background(work):
        assert raised.wait(20)
        assert push(address_of(daemon), state(1), label="v1").swapped == 1
        leave.set()
    failing = False
    assert ask(model) == right_answer(1)


# --- copies ----------------------------------------------------------------------------------------------------------


@both
def test_a_copy_of_the_model_is_a_plain_model(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """deepcopy and torch.save: it keeps its version, follows no pushes and holds nobody up."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    push(address_of(daemon), state(1), label="v1")
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    weights.seek(0)
    for number in range(2, 6):
        push(address_of(daemon), state(number), label=f"v{number}")
        assert (ask(copied), ask(loaded)) == (right_answer(1), right_answer(1))
        assert ask(model) == right_answer(number)
    saved = torch.load(weights, weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state(1).items())
    with resident.hold(), Background(ask, copied) as answer:
        assert answer.result() == right_answer(1)
    # A copy can be attached itself.
    attach(copied, daemon, "copied", mode=mode)
    push(address_of(daemon), state(7), model="copied", label="v7")
    assert (ask(copied), ask(model)) == (right_answer(7), right_answer(5))


# --- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@both
def test_a_fork_of_a_serving_process(impatient: shipd.Daemon, serve: Serve, mode: str, keep: bool) -> None:
    """In copy the child goes on with the version it has; in flip its weights belong to the daemon, so it must not. The
    parent is not disturbed. It makes no difference whether anybody kept what attach() returned."""
    parent = serve(impatient.config.socket, mode=mode, keep=keep)
    receipt = push(address_of(impatient), state(1), label="v1")
    child = serve(fork_of=parent)
    for number in range(2, 8):
        receipt = push(address_of(impatient), state(number), label=f"v{number}")
        assert (receipt.swapped, receipt.stale) == (1, ())
        assert parent.ask("answer") == right_answer(number)
        if mode == "copy":
            assert child.ask("answer") == right_answer(1)
        else:
            with pytest.raises(Told, match="forked from one that serves in mode 'flip'") as caught:
                child.ask("answer")
            assert caught.value.kind == "Fenced"
    assert [each.pid for each in status(address_of(impatient)).models[0].processes] == [parent.pid]
    if keep:
        assert not child.ask("connected")
        if mode == "copy":
            assert child.ask("label") == "v1"
            assert child.ask("verify") != receipt.digest
        # The child may join in its own right.
        child.ask("detach")
        child.ask("reattach", impatient.config.socket, mode=mode)
        assert child.ask("answer") == right_answer(7)
        assert push(address_of(impatient), state(8), label="v8").swapped == 2


@both
def test_the_parent_of_a_fork_is_killed(impatient: shipd.Daemon, serve: Serve, mode: str) -> None:
    """The daemon notices, although the child lives and has inherited every descriptor."""
    parent = serve(impatient.config.socket, mode=mode)
    receipt = push(address_of(impatient), state(1), label="v1")
    child = serve(fork_of=parent)
    parent.kill()
    until(lambda: not sessions(impatient), "the daemon has noticed")
    assert child.running
    if mode == "copy":
        assert child.ask("answer") == right_answer(1)
    receipt = push(address_of(impatient), state(2), label="v2")
    assert (receipt.swapped, receipt.stale) == (0, ())
    serves(impatient, serve(impatient.config.socket, mode=mode), receipt, 2)


def test_a_child_process_inherits_no_image(impatient: shipd.Daemon, serve: Serve) -> None:
    """What a forked child has mapped is its parent's; descriptors of images it has none, nor of the session."""
    parent = serve(impatient.config.socket)
    child = serve(fork_of=parent)
    # Its own talk with the test, and the copy of its parent's.
    assert child.ask("sockets") == 2
    assert parent.ask("sockets") == 2


# --- shipd's own failures --------------------------------------------------------------------------------------------


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
    make = shipd.serving.resident._ModelFollower.map

    def fail_at_first(self: Any, *arguments: Any) -> Any:
        if failing:
            raise OSError(12, f"Cannot allocate memory ({failing.pop()})")
        return make(self, *arguments)

    monkeypatch.setattr("shipd.serving.resident._ModelFollower.map", fail_at_first)
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


def test_a_callback_that_goes_on_holding(impatient: shipd.Daemon, attach: Attach) -> None:
    """A swap cannot wait for its own thread: the push fails and says so."""
    model = Exact(0)
    resident = attach(model, impatient)
    handle = resident.on_swap(lambda _version: resident.hold().__enter__())
    push(address_of(impatient), state(1), label="v1")
    handle.remove()
    with pytest.raises(shipd.SwapFailed, match="the swapping thread holds the gate itself"):
        push(address_of(impatient), state(2), label="v2")
    assert ask(model) == right_answer(1)
    assert (resident.label, resident.stale) == ("v1", None)


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
