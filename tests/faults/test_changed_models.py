"""What users do to an attached model and its tensors: keep them, replace them, change them while they are pushed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shipd
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.frames import DATA, NACK, Way
from tests.support.patience import reconfigure
from tests.support.processes import Background, address_of, push, shipctl
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Attach, Serve, both, serves, sessions

pytest_plugins = ["tests.support.serving_process"]


# --- images that are not released ------------------------------------------------------------------------------------


def test_kept_tensors_of_one_version_cost_one_image(start_daemon: StartDaemon, serve: Serve) -> None:
    """In flip a slice of a parameter keeps its version's memory; the other images go round."""
    daemon = start_daemon(models={}, stage_timeout=10.0)
    process = serve(daemon.config.socket, mode="flip")
    push(address_of(daemon), state(1), label="v1")
    process.ask("keep_tensors")
    (session,) = sessions(daemon)
    for number in range(2, 10):
        receipt = push(address_of(daemon), state(number), label=f"v{number}")
        assert receipt.swapped == 1
        assert process.ask("kept_are_whole")
        assert sessions(daemon) == [session], "it was evicted"
        serves(daemon, process, receipt, number)


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
    daemon = start_daemon(models={}, memory_limit="20MiB")
    process = serve(daemon.config.socket, mode="flip", kind="wide")
    for number in range(1, 3):
        push(address_of(daemon), state(number, "wide"), label=f"v{number}")
        process.ask("keep_tensors")
    receipt = push(address_of(daemon), state(3, "wide"), label="v3")
    reconfigure(daemon, stage_timeout=0.3)
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
def test_a_model_that_is_changed_as_soon_as_it_is_swapped(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """In the callback: the first moment at which a user can, and before the session goes on."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    resident.on_swap(lambda version: rebind(model) if version.label == "v1" else None)
    push(address_of(daemon), state(1), label="v1")
    with pytest.raises(shipd.StageFailed, match=r"'layers\.1\.bias' has other memory"):
        push(address_of(daemon), state(2), label="v2")
    with pytest.raises(shipd.AttachError, match=r"'layers\.1\.bias' has other memory"):
        resident.verify()


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
