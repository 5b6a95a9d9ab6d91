"""Copies of an attached model and forks of a serving process: they stay as they are, and disturb nobody."""

import copy
import io

import pytest
import torch

import shipd
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.processes import Background, address_of, push, status
from tests.support.proxy import until
from tests.support.serving_process import Attach, Serve, Told, both, serves, sessions

pytest_plugins = ["tests.support.serving_process"]


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> shipd.Daemon:
    """With nothing in it, and in no hurry."""
    return start_daemon(models={})


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
def test_a_fork_of_a_serving_process(daemon: shipd.Daemon, serve: Serve, mode: str, keep: bool) -> None:
    """In copy the child goes on with the version it has; in flip its weights belong to the daemon, so it must not. The
    parent is not disturbed. It makes no difference whether anybody kept what attach() returned."""
    parent = serve(daemon.config.socket, mode=mode, keep=keep)
    receipt = push(address_of(daemon), state(1), label="v1")
    child = serve(fork_of=parent)
    for number in range(2, 8):
        receipt = push(address_of(daemon), state(number), label=f"v{number}")
        assert (receipt.swapped, receipt.stale) == (1, ())
        assert parent.ask("answer") == right_answer(number)
        if mode == "copy":
            assert child.ask("answer") == right_answer(1)
        else:
            with pytest.raises(Told, match="forked from one that serves in mode 'flip'") as caught:
                child.ask("answer")
            assert caught.value.kind == "Fenced"
    assert [each.pid for each in status(address_of(daemon)).models[0].processes] == [parent.pid]
    if keep:
        assert not child.ask("connected")
        if mode == "copy":
            assert child.ask("label") == "v1"
            assert child.ask("verify") != receipt.digest
        # The child may join in its own right.
        child.ask("detach")
        child.ask("reattach", daemon.config.socket, mode=mode)
        assert child.ask("answer") == right_answer(7)
        assert push(address_of(daemon), state(8), label="v8").swapped == 2


@both
def test_the_parent_of_a_fork_is_killed(daemon: shipd.Daemon, serve: Serve, mode: str) -> None:
    """The daemon notices, although the child lives and has inherited every descriptor."""
    parent = serve(daemon.config.socket, mode=mode)
    receipt = push(address_of(daemon), state(1), label="v1")
    child = serve(fork_of=parent)
    parent.kill()
    until(lambda: not sessions(daemon), "the daemon has noticed")
    assert child.running
    if mode == "copy":
        assert child.ask("answer") == right_answer(1)
    receipt = push(address_of(daemon), state(2), label="v2")
    assert (receipt.swapped, receipt.stale) == (0, ())
    serves(daemon, serve(daemon.config.socket, mode=mode), receipt, 2)


def test_a_child_process_inherits_no_image(daemon: shipd.Daemon, serve: Serve) -> None:
    """What a forked child has mapped is its parent's; descriptors of images it has none, nor of the session."""
    parent = serve(daemon.config.socket)
    child = serve(fork_of=parent)
    # Its own talk with the test, and the copy of its parent's.
    assert child.ask("sockets") == 2
    assert parent.ask("sockets") == 2
