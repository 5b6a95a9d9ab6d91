"""What is called when a version has been swapped in: when, under which version, and what it may do."""

import contextlib
import logging
import threading
from typing import NoReturn

import pytest

import shipd
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.processes import Background, address_of, push
from tests.support.proxy import until
from tests.support.serving_process import Attach, both

pytest_plugins = ["tests.support.serving_process"]


@both
def test_callbacks_run_between_the_swap_and_the_next_hold(
    start_daemon: StartDaemon, attach: Attach, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    called: list[tuple[str, str, str]] = []

    def holding(version: shipd.Version) -> None:
        with resident.hold() as held:
            called.append((version.label, held.label, ask(model)))

    def raising(version: shipd.Version) -> None:
        called.append((version.label, "raising", ""))
        raise ValueError("the callback's own problem")

    def remembering(version: shipd.Version) -> None:
        called.append((version.label, "last", version.digest))

    removed = resident.on_swap(lambda version: called.append((version.label, "removed", "")))
    handles = [resident.on_swap(callback) for callback in (holding, raising, remembering)]
    removed.remove()
    removed.remove()
    with caplog.at_level(logging.ERROR, "shipd.serving"):
        receipt = push(address_of(daemon), state(1), label="v1")
    assert receipt.swapped == 1
    assert called == [("v1", "v1", right_answer(1)), ("v1", "raising", ""), ("v1", "last", receipt.digest)]
    assert any("callback" in record.message and record.exc_info for record in caplog.records)
    for handle in handles:
        handle.remove()
    push(address_of(daemon), state(2), label="v2")
    assert len(called) == 3
    assert ask(model) == right_answer(2)


def test_a_callback_belongs_to_the_pause(start_daemon: StartDaemon, attach: Attach) -> None:
    """Readers get in when it is done, and the pause that is reported has it in."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    running, finish = threading.Event(), threading.Event()

    def callback(_version: shipd.Version) -> None:
        running.set()
        assert finish.wait(20)

    resident.on_swap(callback)
    with Background(push, address_of(daemon), state(1), label="v1") as pushed:
        assert running.wait(20)
        with Background(ask, model) as reader:
            until(lambda: len(resident._gate._waiting) == 1, "the reader waits for the callback")
            assert not reader.done
            finish.set()
            assert reader.result() == right_answer(1)
        assert (pushed.result().pause_seconds or 0) > 0


def test_a_callback_may_detach(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    resident.on_swap(lambda _version: resident.detach())
    receipt = push(address_of(daemon), state(1), label="v1")
    assert receipt.label == "v1"
    until(lambda: not daemon.server.models["model"].sessions, "the session ends")
    assert ask(model) == right_answer(1)


def test_a_callback_may_detach_while_another_thread_does(start_daemon: StartDaemon, attach: Attach) -> None:
    """That one waits for the swap, and so for the callback, which must not wait for it."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    running = threading.Event()

    def callback(_version: shipd.Version) -> None:
        running.set()
        until(lambda: resident._link._stopping, "the other thread detaches")
        resident.detach()

    resident.on_swap(callback)
    with Background(push, address_of(daemon), state(1), label="v1") as pushed:
        assert running.wait(20)
        resident.detach()
        assert pushed.result().label == "v1"
    assert not resident.connected
    assert ask(model) == right_answer(1)


def test_a_swap_is_settled_when_its_daemon_is_lost_at_once(
    start_daemon: StartDaemon, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what it has replaced would be kept until there is a daemon again."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode="flip")
    link, follower = resident._link, resident._follower
    with_a_session: list[bool] = []
    settle = follower.settle

    def watch() -> bool:
        with_a_session.append(link._lane is not None)
        return settle()

    def lose(_version: shipd.Version) -> None:
        def pump() -> NoReturn:
            raise shipd.ConnectError("injected")

        assert link._lane is not None
        monkeypatch.setattr(link._lane, "pump", pump)

    monkeypatch.setattr(follower, "settle", watch)
    handle = resident.on_swap(lose)
    # Whether the daemon counts this process is not what is asked here.
    with contextlib.suppress(shipd.ShipError):
        push(address_of(daemon), state(1), label="v1")
    until(lambda: bool(with_a_session), "the swap is settled")
    assert with_a_session[0] is False
    handle.remove()
    until(lambda: resident.connected, "the session is back")
    assert ask(model) == right_answer(1)
    monkeypatch.undo()
