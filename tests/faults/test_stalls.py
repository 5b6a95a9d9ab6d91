"""Links on which nothing moves, and links on which little does: the first end in time, the second are no stall."""

import math
import signal
import time

import pytest

import shipd
import shipd.client.client
from tests.support import checkpoints
from tests.support.checkpoints import assert_installed
from tests.support.frames import COMMIT, DATA, FINISH, HELLO, OFFER, PROGRESS, WANT, Way, name_of_way
from tests.support.processes import Background, ShipdProcess, push
from tests.support.proxy import Proxy, until
from tests.support.upgrades import NEW, OLD, assert_fit

pytest_plugins = ["tests.support.upgrades"]

pytestmark = pytest.mark.usefixtures("short_backoff", "short_goodbye")


@pytest.mark.parametrize(("kind", "way"), [(DATA, Way.TO_DAEMON), (PROGRESS, Way.TO_SENDER)], ids=name_of_way)
def test_a_stall_ends_the_push_in_time(daemon, proxy, tmp_path, kind, way):
    version = checkpoints.large(48)
    path = checkpoints.write_safetensors(tmp_path / "large", version)
    proxy.stall(kind=kind, way=way, nth=0)
    started = time.monotonic()
    with pytest.raises(shipd.Stalled) as caught:
        push(proxy.address, path, label="new", stall=0.5)
    assert time.monotonic() - started < 20
    assert caught.value.peer == proxy.address
    assert caught.value.model == "model"
    assert caught.value.transfer_id is not None
    proxy.sever_all()
    assert_installed(daemon, OLD, label="old")
    push(f"127.0.0.1:{daemon.port}", path, label="after")
    assert_installed(daemon, version, label="after")


@pytest.mark.parametrize("kind", [OFFER, FINISH])
def test_a_stall_while_nothing_is_sent(daemon, proxy, new, kind):
    proxy.stall(kind=kind)
    with pytest.raises(shipd.Stalled):
        push(proxy.address, new, stall=0.3)
    proxy.sever_all()
    assert_fit(daemon, new)


def test_a_stalled_handshake_ends_in_time(proxy, new, monkeypatch):
    monkeypatch.setattr(shipd.client.client, "CONNECT_SECONDS", 0.3)
    proxy.stall(kind=HELLO, way=Way.TO_SENDER)
    with pytest.raises(shipd.Stalled, match="not answered in time"):
        push(proxy.address, new)


def test_the_whole_push_has_a_timeout_where_it_is_asked_for(daemon, proxy, new):
    proxy.throttle(2e6)
    started = time.monotonic()
    with pytest.raises(shipd.Stalled, match="timeout"):
        push(proxy.address, new, timeout=0.5)
    assert time.monotonic() - started < 20
    proxy.sever_all()
    assert_fit(daemon, new)


def test_the_daemon_is_not_blamed_for_a_timeout_of_the_sender(daemon, proxy, new):
    proxy.hold(kind=WANT, nth=0, way=Way.TO_SENDER)
    with pytest.raises(shipd.Stalled, match="longer than its timeout"):
        push(proxy.address, new, timeout=0.5)
    books = daemon.server.models["model"]
    until(lambda: books.failed is not None, "the daemon noted the failed push")
    assert books.failed.reason == "the push took longer than its timeout of 0.5 s"


def test_a_thin_link_is_no_stall(daemon, proxy, new):
    """What moves has not stalled, although the daemon acknowledges nothing for longer than the stall deadline."""
    # Some 5 MB of it are between the sender and the link: while these are drained nothing moves at the sender.
    proxy.throttle(2e6)
    receipt = push(proxy.address, new, stall=5.0, lanes=1, base=False)
    assert receipt.seconds > 5.0, "else this has shown nothing"
    assert proxy.connections == 1
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("stall", [1e8, math.inf], ids=["years", "for ever"])
def test_whoever_has_all_the_time(daemon, new, stall, lanes):
    """More than poll(2) can wait for at once."""
    push(f"127.0.0.1:{daemon.port}", new, label="new", stall=stall, timeout=stall, lanes=lanes)
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("kind", [FINISH, COMMIT], ids=["finish", "commit"])
def test_a_daemon_that_stands_still_while_nothing_is_sent(place, new, kind, lanes):
    """What keeps the connection alive meanwhile is taken by its kernel, and must not pass for an answer."""
    with ShipdProcess(place) as daemon, Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=kind)
        with Background(push, proxy.address, new, stall=2.0, lanes=lanes) as pushing:
            held.wait()
            daemon.signal(signal.SIGSTOP)
            held.release()
            error = pushing.error()
            daemon.signal(signal.SIGCONT)
    # Where not all of what was sent is known to have arrived, it may be the connection that is given up, and the next.
    assert isinstance(error, shipd.Stalled | shipd.ConnectError if kind == FINISH else shipd.OutcomeUnknown), error


@pytest.mark.parametrize("way", Way, ids=name_of_way)
def test_pieces_of_any_size(start_daemon, tmp_path, way):
    daemon = start_daemon()
    version = checkpoints.edge_cases()
    path = checkpoints.write_safetensors(tmp_path / "edge", version)
    with Proxy(daemon.port) as proxy:
        proxy.trickle(997, way)
        push(proxy.address, path)
    assert_installed(daemon, version)


def test_byte_by_byte(start_daemon, tmp_path):
    daemon = start_daemon()
    version = checkpoints.tiny()
    path = checkpoints.write_safetensors(tmp_path / "tiny", version)
    with Proxy(daemon.port) as proxy:
        proxy.trickle(1, Way.TO_DAEMON)
        proxy.trickle(1, Way.TO_SENDER)
        push(proxy.address, path)
    assert_installed(daemon, version)


def test_a_slow_path(daemon, proxy, new):
    proxy.delay(0.01, way=Way.TO_DAEMON)
    proxy.delay(0.05, way=Way.TO_SENDER)
    push(proxy.address, new)
    assert_installed(daemon, NEW)
