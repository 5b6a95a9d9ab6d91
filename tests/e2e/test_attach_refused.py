"""Why attaching may be refused: another model, a socket with no shipd behind it, no room, a model that cannot serve."""

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
from tests.conftest import StartDaemon
from tests.support.exact import CROWD, Exact, ask, question, right_answer, state
from tests.support.processes import Background, address_of, push
from tests.support.serving_process import Attach, Serve, Told

pytest_plugins = ["tests.support.serving_process"]


# --- another model ---------------------------------------------------------------------------------------------------


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


# --- no shipd there --------------------------------------------------------------------------------------------------


def quickly(path: Path, **options: Any) -> None:
    """Attach, and take care that it does not take long to fail and leaves nothing."""
    model = Exact(0)
    started = time.monotonic()
    try:
        shipd.attach(model, "model", socket=path, **options)
    finally:
        assert time.monotonic() - started < 20
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("shipd")]
        assert not model._forward_pre_hooks
        assert ask(model) == right_answer(0)


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


# --- what cannot be resident -----------------------------------------------------------------------------------------


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
