"""Leaving: what a process keeps that detaches, and what its going leaves behind at the daemon."""

import threading
import time

from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.processes import address_of, push, shipctl
from tests.support.proxy import until
from tests.support.serving_process import Attach, Serve, both

pytest_plugins = ["tests.support.serving_process"]


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
