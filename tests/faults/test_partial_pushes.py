"""A part of a model on its way, and everything that can go wrong: the old version serves on, and no memory is lost."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

import shipd
from shipd.service.composing import Composing
from shipd.serving.copy_swap import CopySwap
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, right_answer, state
from tests.support.frames import COMMITTED, DATA, FINISH, STAGED, Way
from tests.support.partial import PartialPush, patched, push_part
from tests.support.processes import Background, ShipdProcess, address_of, push, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Attach, Serve

pytest_plugins = ["tests.support.serving_process", "tests.support.upgrades", "tests.support.patience"]

pytestmark = pytest.mark.usefixtures("short_backoff", "short_goodbye")

WHOLE = state(1, "wide")
PART = {name: tensor for name, tensor in state(2, "wide").items() if "layers.1." in name or "layers.3." in name}
CHUNKS = 5
"""Two layers of 1 MiB in two chunks each, and their biases in one."""


class Served:
    """A daemon in this process with an attached model, and a proxy before it."""

    def __init__(self, daemon: shipd.Daemon, resident: "shipd.Resident", model: Exact, proxy: Proxy) -> None:
        self.daemon = daemon
        self.resident = resident
        self.model = model
        self.proxy = proxy
        self.digest = resident.digest
        self._used = daemon.server.images.budget.used

    def is_as_before(self) -> None:
        """Nothing has happened."""
        model = self.daemon.server.models["model"]
        until(lambda: model.incoming is None, "the push is over")
        assert self.resident.verify() == self.digest
        assert ask(self.model, "wide") == right_answer(1, "wide")
        self.lost_nothing()

    def lost_nothing(self) -> None:
        """All that was taken for a push has been given back."""
        budget = self.daemon.server.images.budget
        until(lambda: budget.used == self._used, "all of it is back, a moment after the sender has heard of the end")

    def has_the_part(self, tensors: dict[str, Tensor] = PART) -> None:
        """The part is live, and everything else is what it was."""
        for name, tensor in self.model.state_dict().items():
            assert tensor.equal(patched(WHOLE, tensors)[name]), name
        assert self.resident.verify() == self.resident.digest
        self.lost_nothing()


@pytest.fixture
def served(start_daemon: StartDaemon, attach: Attach) -> Iterator[Served]:
    daemon = start_daemon(models={})
    model = Exact(1, "wide")
    resident = attach(model, daemon)
    with Proxy(daemon.port) as proxy:
        yield Served(daemon, resident, model, proxy)


class Halted:
    """Composing that stands still, on its thread, after the first piece that it has copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self._let_go = threading.Event()
        copy = Composing._copy

        def halt(composing: Composing, target: Any, source: Any) -> None:
            copy(composing, target, source)
            self.reached.set()
            assert self._let_go.wait(30)

        monkeypatch.setattr(Composing, "_copy", halt)

    def wait(self) -> None:
        """Until it stands still."""
        assert self.reached.wait(30)

    def release(self) -> None:
        """Let it go on."""
        self._let_go.set()


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Halted]:
    found = Halted(monkeypatch)
    yield found
    found.release()


# --- on the way ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["payload", "header"])
@pytest.mark.parametrize("nth", [0, CHUNKS - 1])
def test_damaged_frames_come_again(served: Served, where: Any, nth: int) -> None:
    served.proxy.flip(where, nth=nth)
    receipt, live = push_part(served.proxy.address, PART, "part")
    assert receipt.frames_resent == 1
    assert served.proxy.count(DATA) == CHUNKS + 1
    assert served.resident.digest == live
    served.has_the_part()


def test_a_broken_connection_costs_only_what_had_not_arrived(served: Served) -> None:
    # Closed and not reset: that would throw away what the daemon had not read yet.
    served.proxy.cut(nth=3, how="fin")
    push_part(served.proxy.address, PART, "part")
    assert served.proxy.connections == 2
    assert served.proxy.count(DATA, connection=1) == CHUNKS - 3
    served.has_the_part()


def test_a_lost_answer_is_heard_again(served: Served) -> None:
    served.proxy.cut(kind=COMMITTED, way=Way.TO_SENDER, nth=0)
    receipt, live = push_part(served.proxy.address, PART, "part")
    assert (receipt.label, receipt.swapped, served.proxy.connections) == ("part", 1, 2)
    assert served.resident.digest == live
    served.has_the_part()


@pytest.mark.parametrize("kind", [DATA, FINISH])
def test_a_sender_that_is_told_to_stop(served: Served, kind: int) -> None:
    held = served.proxy.hold(kind=kind, nth=0)
    with PartialPush(served.proxy.address, PART) as pushing:
        held.wait()
        pushing.cancel()
        held.release()
        with pytest.raises(shipd.Interrupted):
            _ = pushing.receipt
    served.is_as_before()


def test_a_sender_that_does_not_come_back(
    start_daemon: StartDaemon, attach: Attach, out_of_patience: Callable[[], None]
) -> None:
    daemon = start_daemon(models={}, resume_window=0.2)
    model = Exact(1, "wide")
    resident = attach(model, daemon)
    with Proxy(daemon.port) as proxy:
        here = Served(daemon, resident, model, proxy)
        held = proxy.hold(nth=2)
        with PartialPush(proxy.address, PART) as pushing:
            held.wait()
            proxy.refuse()
            proxy.sever_all()
            out_of_patience()
            with pytest.raises(shipd.ShipError):
                _ = pushing.receipt
        here.is_as_before()


# --- while it is composed --------------------------------------------------------------------------------------------


def test_nothing_is_given_back_while_it_is_written_to(served: Served, halted: Halted) -> None:
    used = served.daemon.server.images.budget.used
    with PartialPush(served.proxy.address, PART) as pushing:
        halted.wait()
        during = served.daemon.server.images.budget.used
        assert during > used, "what is received is counted"
        pushing.cancel()
        with pytest.raises(shipd.Interrupted):
            _ = pushing.receipt
        model = served.daemon.server.models["model"]
        assert model.incoming is not None
        until(lambda: model.incoming is not None and model.incoming.receiver.ended, "it has been told")
        assert served.daemon.server.images.budget.used == during
        halted.release()
    served.is_as_before()
    push_part(served.proxy.address, PART)
    served.has_the_part()


def test_a_sender_that_is_lost_and_comes_back(served: Served, halted: Halted) -> None:
    with PartialPush(served.proxy.address, PART) as pushing:
        halted.wait()
        served.proxy.sever_all()
        served.proxy.wait_until_connections(2)
        halted.release()
        assert pushing.receipt.swapped == 1
    assert served.proxy.count(DATA) == CHUNKS, "it had arrived"
    served.has_the_part()


def test_a_daemon_that_shuts_down(served: Served, halted: Halted, out_of_patience: Callable[[], None]) -> None:
    model = served.daemon.server.models["model"]
    with PartialPush(served.proxy.address, PART) as pushing:
        halted.wait()
        with Background(served.daemon.stop) as stopping:
            until(lambda: model.incoming is not None and model.incoming.receiver.ended, "the push has been ended")
            assert not stopping.done, "the thread that composes is waited for"
            halted.release()
        stopping.result()
        out_of_patience()
        with pytest.raises(shipd.ShipError):
            _ = pushing.receipt
    assert served.resident.verify() == served.digest
    assert ask(served.model, "wide") == right_answer(1, "wide")


def test_a_process_that_attaches_meanwhile(served: Served, halted: Halted, serve: Serve) -> None:
    with PartialPush(served.proxy.address, PART, "part") as pushing:
        halted.wait()
        other = serve(served.daemon.config.socket, version=9, kind="wide", mode="flip")
        assert other.ask("verify") == served.digest
        halted.release()
        assert pushing.receipt.swapped == 2
        assert other.ask("verify") == pushing.live
    assert served.resident.verify() == served.resident.digest


def test_a_model_whose_first_version_is_on_its_way(
    start_daemon: StartDaemon, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to keep yet, but there will be: the push waits for it."""
    reached, let_go = threading.Event(), threading.Event()
    fill = CopySwap.fill

    def late(swapper: CopySwap, image: memoryview) -> None:
        reached.set()
        assert let_go.wait(30)
        fill(swapper, image)

    monkeypatch.setattr(CopySwap, "fill", late)
    daemon = start_daemon(models={})
    with Background(attach, Exact(1, "wide"), daemon) as attaching:
        assert reached.wait(30)
        with PartialPush(address_of(daemon), PART) as pushing:
            until(lambda: daemon.server.models["model"].incoming is not None, "the push has come")
            let_go.set()
            assert pushing.receipt.swapped == 1
            assert attaching.result().verify() == pushing.live


# --- a daemon that is killed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FINISH, STAGED])
def test_a_daemon_that_is_killed(start_shipd: Callable[..., ShipdProcess], serve: Serve, kind: int) -> None:
    """Between the last byte and the answer it composes; and once it is staged, nothing has been swapped."""
    first = start_shipd(models={})
    process = serve(first.socket, version=1, kind="wide")
    digest = process.ask("digest")
    with Proxy(first.port) as proxy:
        held = proxy.hold(kind=kind, way=Way.TO_SENDER if kind == STAGED else Way.TO_DAEMON)
        with PartialPush(proxy.address, PART, "part") as pushing:
            held.wait()
            proxy.refuse()
            if kind == FINISH:
                held.release()
            first.kill()
            assert process.ask("verify") == digest
            proxy.forget_rules()
            second = start_shipd(directory=first.directory, models={})
            proxy.upstream = second.port
            proxy.accept()
            assert pushing.receipt.swapped == 1
            assert process.ask("verify") == pushing.live
    (told,) = status(second.address).models
    assert (told.label, told.digest) == ("part", pushing.live)


def test_a_whole_push_in_between(served: Served, out_of_patience: Callable[[], None]) -> None:
    """The part of a sender that is gone gives way, with all that it has taken."""
    held = served.proxy.hold(nth=2)
    with PartialPush(served.proxy.address, PART) as pushing:
        held.wait()
        served.proxy.refuse()
        served.proxy.sever_all()
        incoming = served.daemon.server.models["model"].incoming
        assert incoming is not None
        until(lambda: not incoming.receiver.attended, "the daemon sees that the sender is gone")
        receipt = push(address_of(served.daemon), state(5, "wide"), label="whole")
        out_of_patience()
        with pytest.raises(shipd.ShipError):
            _ = pushing.receipt
    assert served.resident.verify() == receipt.digest
    served.lost_nothing()
