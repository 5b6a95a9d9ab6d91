"""Senders and daemons that are killed or stopped in the middle of a push."""

import signal

import pytest

import shipd
from tests.support import checkpoints
from tests.support.checkpoints import assert_installed
from tests.support.frames import COMMITTED, DATA, Way
from tests.support.patience import reconfigure
from tests.support.processes import Background, Helper, Shipctl, push, status
from tests.support.proxy import Proxy, until
from tests.support.upgrades import CHUNKS, NEW, OLD

pytest_plugins = ["tests.support.upgrades", "tests.support.patience"]

pytestmark = pytest.mark.usefixtures("short_backoff", "short_goodbye")


# --- senders that die ------------------------------------------------------------------------------------------------


def _push_slowly(report, address, path, label):
    import asyncio

    import shipd

    async def main():
        async with shipd.connect(address) as client:
            report("connected")
            await client.push(path, model="model", label=label)

    asyncio.run(main())


def test_sender_killed_halfway(daemon, proxy, new, tmp_path):
    held = proxy.hold(nth=12)
    other = checkpoints.medium(2)
    with Helper(_push_slowly, proxy.address, new, "killed") as sender:
        held.wait()
        until(lambda: daemon.server.models["model"].incoming.receiver.held, "chunks that are held")
        sender.kill()
        held.release()
        proxy.sever_all()
        incoming = daemon.server.models["model"].incoming
        until(lambda: not incoming.receiver.attended, "the daemon sees that the sender is gone")
    transfer = status(f"127.0.0.1:{daemon.port}").models[0].transfer
    assert not transfer.connected
    assert transfer.stage == "receiving"
    assert 0 < transfer.bytes_held < transfer.bytes_total, "what has arrived is kept for a sender that comes back"
    assert_installed(daemon, OLD, label="old")
    path = checkpoints.write_safetensors(tmp_path / "other", other)
    push(f"127.0.0.1:{daemon.port}", path, label="newer")
    assert incoming.receiver.error.code == "superseded"
    assert_installed(daemon, other, label="newer")


def test_a_sender_that_does_not_come_back_is_forgotten(start_daemon, tmp_path):
    daemon = start_daemon(resume_window=0.3)
    path = checkpoints.write_safetensors(tmp_path / "new", NEW)
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Helper(_push_slowly, proxy.address, path, "killed") as sender:
            held.wait()
            sender.kill()
            held.release()
            proxy.sever_all()
        until(lambda: daemon.server.models["model"].incoming is None, "the transfer is given up")
    assert daemon.server.images.budget.used == 0
    assert status(f"127.0.0.1:{daemon.port}").models[0].label == ""
    push(f"127.0.0.1:{daemon.port}", path)
    assert_installed(daemon, NEW)


def test_a_sender_that_was_stopped_finds_itself_superseded(start_daemon, tmp_path, monkeypatch):
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon()
    paths = [checkpoints.write_safetensors(tmp_path / f"{at}", checkpoints.medium(at)) for at in range(2)]
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Shipctl("push", paths[0], "--to", proxy.address, "--model", "model", "--json") as sender:
            held.wait()
            sender.signal(signal.SIGSTOP)
            incoming = daemon.server.models["model"].incoming
            # Only now: until then nobody was to be taken for silent.
            reconfigure(daemon, stall=0.3)
            until(lambda: not incoming.receiver.attended, "the daemon has closed the silent connection")
            reconfigure(daemon, stall=30.0)
            push(f"127.0.0.1:{daemon.port}", paths[1], label="newer")
            held.release()
            sender.signal(signal.SIGCONT)
            assert sender.wait() == 1, sender.describe()
            assert sender.answer["error"] == "Superseded"
            assert sender.answer["transfer_id"] == incoming.transfer_id
    assert_installed(daemon, checkpoints.medium(1), label="newer")


# --- daemons that die ------------------------------------------------------------------------------------------------


def test_daemon_killed_halfway_and_restarted(start_shipd, new):
    first = start_shipd()
    push(first.address, new, label="before")
    with Proxy(first.port) as proxy:
        held = proxy.hold(nth=12)
        # The daemon has all of it under another label, and it would be left out.
        with Background(push, proxy.address, new, label="new", base=False) as pushing:
            held.wait()
            proxy.refuse()
            first.kill()
            proxy.forget_rules()
            second = start_shipd(directory=first.directory)
            proxy.upstream = second.port
            proxy.accept()
            receipt = pushing.result()
        assert proxy.count(DATA, connection=1) == CHUNKS, "a daemon keeps nothing on disk: everything travels again"
    model = status(second.address).models[0]
    assert (model.label, model.digest) == ("new", NEW.digest)
    assert receipt.digest == NEW.digest


def test_daemon_killed_halfway_and_gone(start_shipd, new, out_of_patience):
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, new, label="new") as pushing:
            held.wait()
            proxy.refuse()
            service.kill()
            held.release()
            out_of_patience()
            error = pushing.error(10)
    assert isinstance(error, shipd.ConnectError), error
    assert error.transfer_id is not None


def test_daemon_restarted_without_the_model(start_shipd, new, out_of_patience):
    first = start_shipd()
    with Proxy(first.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, new, label="new") as pushing:
            held.wait()
            proxy.refuse()
            first.kill()
            proxy.forget_rules()
            second = start_shipd(models={"another": "1GiB"})
            proxy.upstream = second.port
            proxy.accept()
            proxy.wait_until_connections(2)
            out_of_patience()
            error = pushing.error(20)
    assert isinstance(error, shipd.UnknownModel), error


def test_daemon_killed_after_commit(start_shipd, new, out_of_patience):
    """Nobody can say whether it was committed: a new daemon knows nothing of it."""
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)
        with Background(push, proxy.address, new, label="new") as pushing:
            held.wait()
            proxy.refuse()
            service.kill()
            proxy.sever_all()
            out_of_patience()
            error = pushing.error(10)
    assert isinstance(error, shipd.OutcomeUnknown), error
