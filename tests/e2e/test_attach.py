"""Joining and leaving: which version a process gets, when, and why it may be refused."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shipd
from shipd.service.session import Session
from shipd.serving.copy_swap import CopySwap
from shipd.serving.flip import FlipSwap
from shipproto.limits import MAX_PROCESSES
from tests.conftest import StartDaemon
from tests.support.exact import CROWD, Exact, ask, question, right_answer, state
from tests.support.frames import COMMIT, DATA
from tests.support.processes import Background, address_of, push, shipctl, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Attach, Serve, Told, both

pytest_plugins = ["tests.support.serving_process"]


def attaching(daemon: shipd.Daemon, name: str = "model") -> bool:
    """Whether a process is in the middle of attaching."""
    return name in daemon.server.models and daemon.server.models[name].attaching > 0


# --- which version ---------------------------------------------------------------------------------------------------


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
def test_attach_to_a_declared_model_whose_first_push_fails(start_daemon: StartDaemon, serve: Serve, mode: str) -> None:
    """Then the process's own version is the first one."""
    daemon = start_daemon(resume_window=0.2)
    process = serve()
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=DATA, nth=5)
        with Background(push, proxy.address, state(1, "wide"), label="v1", timeout=2.0) as pushed:
            held.wait()
            process.begin("attach", daemon.config.socket, kind="wide", version=3, mode=mode)
            until(lambda: attaching(daemon), "the process asks to be attached")
            proxy.refuse()
            proxy.sever_all()
            assert process.result() == "initial"
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


# --- refused ---------------------------------------------------------------------------------------------------------


def test_another_model_under_the_same_name_is_refused_with_the_differences(
    start_daemon: StartDaemon, serve: Serve, attach: Attach
) -> None:
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket)
    other = Exact(0)
    other.layers[1] = nn.Linear(16, 8, bias=False).half()
    other.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(shipd.TensorMismatch, match="another name") as caught:
        attach(other, daemon)
    assert set(caught.value.problems) == {
        "missing: layers.1.bias (float32 [16])",
        "unexpected: extra (float32 [3])",
        "shape: layers.1.weight is [8, 16], the resident model has [16, 16]",
        "dtype: layers.1.weight is float16, the resident model has float32",
    } or set(caught.value.problems) == {
        "missing: extra (float32 [3])",
        "unexpected: layers.1.bias (float32 [16])",
        "shape: layers.1.weight is [16, 16], the resident model has [8, 16]",
        "dtype: layers.1.weight is float32, the resident model has float16",
    }
    attach(other, daemon, "another")
    assert process.ask("answer") == right_answer(0)
    assert push(address_of(daemon), state(1), label="v1").swapped == 1


def test_a_model_that_was_pushed_is_no_other_one_either(start_daemon: StartDaemon, attach: Attach) -> None:
    """Nothing is attached, but the committed version is of another layout than the process's model."""
    daemon = start_daemon()
    push(address_of(daemon), state(1), label="v1")
    with pytest.raises(shipd.TensorMismatch, match="committed as 'model'") as caught:
        attach(nn.Linear(3, 3), daemon)
    assert len(caught.value.problems) == 9 + len(CROWD)
    model = Exact(0)
    attach(model, daemon)
    assert ask(model) == right_answer(1)


def test_nobody_listens(place: Path) -> None:
    with pytest.raises(shipd.ConnectError, match="Is shipd running there") as caught:
        quickly(place / "nothing.sock")
    assert caught.value.peer == str(place / "nothing.sock")


def test_the_socket_of_a_daemon_that_has_gone(place: Path) -> None:
    path = place / "left-behind.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(shipd.ConnectError, match="Is shipd running there"):
        quickly(path)


def test_what_is_no_socket_at_all(place: Path) -> None:
    (place / "file").write_text("no socket")
    for path in (place / "file", place, place / "file" / "below", place / ("x" * 200)):
        with pytest.raises(shipd.ConnectError) as caught:
            quickly(path)
        assert str(path) in str(caught.value)


def quickly(path: Path, **options: Any) -> None:
    """Attach, and take care that it does not take long to fail and leaves nothing."""
    model = Exact(0)
    started = time.monotonic()
    try:
        shipd.attach(model, "model", socket=path, **options)
    finally:
        assert time.monotonic() - started < 5
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("shipd")]
        assert not model._forward_pre_hooks
        assert ask(model) == right_answer(0)


@pytest.fixture
def listener(place: Path) -> Iterator[socket.socket]:
    """A Unix socket that somebody else listens on."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "foreign.sock"))
        sock.listen()
        yield sock


def test_what_listens_there_is_no_shipd(place: Path, listener: socket.socket) -> None:
    def answer() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + bytes(64))
            while peer.recv(65536):
                pass

    with pytest.raises(shipd.PeerError, match="HTTP"), Background(answer):
        quickly(place / "foreign.sock")


def test_what_listens_there_says_nothing(place: Path, listener: socket.socket) -> None:
    with pytest.raises(shipd.Stalled, match=r"did not attach model 'model' within"):
        quickly(place / "foreign.sock", timeout=0.2)


def test_ctrl_c_while_attaching(place: Path, listener: socket.socket, serve: Serve) -> None:
    """Nothing of the attempt is left: else a session without hooks would swap under everyone's feet later."""
    process = serve()
    before = process.ask("threads"), process.ask("sockets")
    process.begin("attach", str(place / "foreign.sock"))
    peer, _ = listener.accept()
    with peer:
        process.signal(2)
        with pytest.raises(Told) as caught:
            process.result()
        assert caught.value.kind == "KeyboardInterrupt"
        assert (process.ask("threads"), process.ask("sockets")) == before
        # And the daemon's side is closed.
        peer.settimeout(20)
        while peer.recv(65536):
            pass


def test_images_that_do_not_fit(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={}, memory_limit="10MiB")
    with pytest.raises(shipd.MemoryLimit, match=r"needs 12\.6 MB .*memory_limit of 10\.5 MB") as caught:
        attach(Exact(0, "wide"), daemon)
    assert caught.value.model == "model"
    # The daemon is fit for what fits.
    model = Exact(0)
    attach(model, daemon)
    assert push(address_of(daemon), state(1), label="v1").swapped == 1
    assert ask(model) == right_answer(1)
    assert daemon.server.images.budget.used < 1 << 20


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a\0b"], ids=["empty", "long", "line break", "nul"])
def test_what_is_no_name(place: Path, name: str) -> None:
    with pytest.raises(ValueError, match="model name"):
        shipd.attach(Exact(0), name, socket=place / "nothing.sock")


def test_models_that_cannot_be_resident(place: Path) -> None:
    class State(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

        def set_extra_state(self, _state: Any) -> None:
            pass

    def buffer(tensor: torch.Tensor) -> nn.Module:
        module = nn.Module()
        module.register_buffer("odd", tensor)
        return module

    with pytest.raises(shipd.AttachError, match="no parameters or buffers"):
        shipd.attach(nn.ReLU(), "model", socket=place / "nothing.sock")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        frozen = torch.jit.freeze(torch.jit.trace(Exact(0), question()))
    with pytest.raises(shipd.AttachError, match="frozen ScriptModule"):
        shipd.attach(frozen, "model", socket=place / "nothing.sock")
    with pytest.raises(shipd.UnsupportedTensor, match="extra state"):
        shipd.attach(State(), "model", socket=place / "nothing.sock")
    for tensor, why in (
        (torch.zeros(3, 3).to_sparse(), "not dense"),
        (torch.empty(3, device="meta"), "meta device"),
        (torch.zeros(3).expand(5, 3), "share one place"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "conjugate"),
    ):
        with pytest.raises(shipd.UnsupportedTensor, match=why) as caught:
            shipd.attach(buffer(tensor), "model", socket=place / "nothing.sock")
        assert caught.value.tensor == "odd"
    with pytest.raises(shipd.AttachError, match="unknown mode 'swap'"):
        shipd.attach(Exact(0), "model", socket=place / "nothing.sock", mode="swap")


def test_a_model_is_attached_once(start_daemon: StartDaemon, attach: Attach) -> None:
    """Two sessions would each swap under the other's holds."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    with pytest.raises(shipd.AttachError, match=r"attached already.*'model'.*detach"):
        attach(model, daemon)
    with pytest.raises(shipd.AttachError, match="attached already"):
        # A part of it, under another name.
        attach(model.layers[0], daemon, "part")
    assert push(address_of(daemon), state(1), label="v1").swapped == 1
    resident.detach()
    attach(model, daemon)
    assert ask(model) == right_answer(1)


# --- leaving ---------------------------------------------------------------------------------------------------------


@both
def test_detach_and_attach_again(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon()
    model = Exact(0)
    for number in range(1, 4):
        resident = attach(model, daemon, mode=mode)
        receipt = push(address_of(daemon), state(number), label=f"v{number}")
        assert resident.verify() == receipt.digest
        resident.detach()
        resident.detach()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("shipd model")]
        assert not model._forward_pre_hooks
        assert not model._forward_hooks
        assert not resident.connected
        until(lambda: not daemon.server.models["model"].sessions, "the session ends")
        assert (resident.label, ask(model)) == (f"v{number}", right_answer(number))
    # Others go on, and what has detached does not follow.
    assert push(address_of(daemon), state(4), label="v4").swapped == 0
    assert ask(model) == right_answer(3)
    resident = attach(model, daemon, mode=mode)
    assert (resident.label, ask(model)) == ("v4", right_answer(4))


@both
def test_detach_inside_a_hold(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    other = Exact(0)
    attach(other, daemon, mode=mode)
    push(address_of(daemon), state(1), label="v1")
    started = time.monotonic()
    with resident.hold() as version:
        resident.detach()
        assert version.label == "v1"
        assert ask(model) == right_answer(1)
    assert time.monotonic() - started < 5
    for number in range(2, 6):
        assert push(address_of(daemon), state(number), label=f"v{number}").swapped == 1
        assert (ask(model), ask(other)) == (right_answer(1), right_answer(number))


def test_what_detached_in_flip_keeps_its_weights(start_daemon: StartDaemon, serve: Serve) -> None:
    """Also what the user has kept of them, which may lie in the daemon's images."""
    daemon = start_daemon(models={})
    leaving = serve(daemon.config.socket, kind="wide", mode="flip")
    staying = serve(daemon.config.socket, kind="wide", mode="flip")
    push(address_of(daemon), state(1, "wide"), label="v1")
    leaving.ask("keep_tensors")
    leaving.ask("detach")
    for number in range(2, 8):
        push(address_of(daemon), state(number, "wide"), label=f"v{number}")
        assert leaving.ask("answer") == right_answer(1, "wide")
        assert leaving.ask("kept_are_whole")
    assert staying.ask("answer") == right_answer(7, "wide")


def test_a_version_that_nobody_pushed_goes_with_its_last_process(start_daemon: StartDaemon, serve: Serve) -> None:
    """The next process may bring a newer one; a version that was pushed stays."""
    daemon = start_daemon(models={})
    first = serve(daemon.config.socket, version=1)
    first.kill()
    until(lambda: not daemon.server.models, "the daemon forgets the model")
    assert daemon.server.images.budget.used == 0
    second = serve(daemon.config.socket, version=2)
    assert second.ask("answer") == right_answer(2)
    receipt = push(address_of(daemon), state(3), label="v3")
    second.kill()
    until(lambda: not daemon.server.models["model"].sessions, "the daemon has noticed")
    third = serve(daemon.config.socket, version=4)
    assert third.ask("answer") == right_answer(3)
    assert (third.ask("label"), third.ask("verify")) == ("v3", receipt.digest)
    answer = shipctl("verify", "--to", address_of(daemon), "--model", "model", "--json")
    assert answer.code == 0


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
