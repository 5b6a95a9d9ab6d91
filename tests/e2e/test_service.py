"""The daemon as a service, and inside a process: readiness, signals, draining, reloading, and the files it leaves."""

import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import shipd
from tests.support.checkpoints import MIB
from tests.support.processes import TOKEN, Background, Process, ShipdProcess, memory, push, status
from tests.support.proxy import Proxy

pytest_plugins = ["tests.support.patience"]

# --- starting and stopping -------------------------------------------------------------------------------------------


def test_ready_when_both_listeners_are_open(start_shipd, small):
    service = start_shipd()
    assert service.notify.lines == ["READY=1"]
    push(service.address, small, label="tcp")
    assert status(str(service.socket)).models[0].label == "tcp"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_stops_cleanly(start_shipd, small, number):
    service = start_shipd()
    push(service.address, small)
    service.signal(number)
    service.notify.wait_for("STOPPING=1", process=service)
    assert service.wait() == 0, service.describe()
    assert not service.socket.exists()
    assert service.logged("stopped")
    assert all(entry["level"] == "info" for entry in service.logged()), service.err


def test_starts_again_at_once_on_the_same_port(start_shipd, small):
    first = start_shipd()
    push(first.address, small)
    port = first.port
    assert first.terminate() == 0
    second = start_shipd(directory=first.directory, listen=f"127.0.0.1:{port}")
    push(second.address, small)


def test_stays_small_and_loads_no_torch(start_shipd, medium):
    service = start_shipd()
    push(service.address, medium)
    used = memory(service.pid)
    assert used["RssAnon"] + used["RssFile"] < 64 * MIB, used
    maps = Path(f"/proc/{service.pid}/maps").read_text()
    assert "torch" not in maps
    assert "memfd:shipd:" in maps


def test_nothing_is_left_of_a_daemon_that_was_killed(start_shipd, medium):
    """Images are anonymous: the kernel takes them back."""
    service = start_shipd()
    push(service.address, medium)
    service.kill()
    listing = subprocess.run(["ls", str(service.directory)], capture_output=True, text=True, check=True).stdout
    assert sorted(listing.split()) == ["notify.sock", "shipd.sock", "shipd.toml"]


def test_console_scripts_are_what_is_tested_here():
    """The entry points of pyproject.toml exist and answer."""
    import tomllib

    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"shipd": "shipd.service.main:main", "shipctl": "shipd.cli.shipctl:main"}
    with Process([sys.executable, "-m", "shipd.service.main", "--help"]) as process:
        assert process.wait() == 0
        assert "Usage:" in process.out


def test_shipd_process_helper_reports_what_ended(place):
    """The helper itself: a daemon that never becomes ready fails the test with its output."""
    with pytest.raises(AssertionError, match="ended before READY=1"):
        ShipdProcess(place, listen="nonsense")


# --- draining --------------------------------------------------------------------------------------------------------


def test_sigterm_lets_the_push_under_way_finish_and_takes_no_other(start_shipd, small, medium):
    service = start_shipd(models={"model": "1GiB", "other": "1GiB"})
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        # The other one is connected already: the listener closes, what stands does not.
        with Background(push, proxy.address, medium, label="finished") as pushing:
            held.wait()
            service.signal(signal.SIGTERM)
            service.wait_for_log("draining")
            with pytest.raises(shipd.ShipError) as caught:
                push(service.address, small, model="other")
            assert isinstance(caught.value, shipd.TransferFailed | shipd.ConnectError)
            held.release()
            receipt = pushing.result()
        assert receipt.label == "finished"
        assert service.wait() == 0, service.describe()
    assert service.logged("committed")
    assert "STOPPING=1" in service.notify.lines or service.notify.wait_for("STOPPING=1") is None


def test_a_broken_connection_is_taken_up_again_while_draining(start_shipd, medium):
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium) as pushing:
            held.wait()
            service.signal(signal.SIGTERM)
            service.wait_for_log("draining")
            proxy.sever_all()
            pushing.result()
        assert service.wait() == 0, service.describe()


def test_second_sigterm_aborts(start_shipd, medium, out_of_patience):
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium) as pushing:
            held.wait()
            service.signal(signal.SIGTERM)
            service.wait_for_log("draining")
            service.signal(signal.SIGTERM)
            assert service.wait() == 0, service.describe()
            held.release()
            out_of_patience()
            error = pushing.error()
    assert isinstance(error, shipd.TransferFailed | shipd.ConnectError), error
    (ended,) = service.logged("push ended without effect")
    assert ended["code"] == "shutting-down"


def test_draining_has_an_end(start_shipd, medium, out_of_patience):
    service = start_shipd(drain_timeout=0.3)
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium) as pushing:
            held.wait()
            service.signal(signal.SIGTERM)
            assert service.wait() == 0, service.describe()
            held.release()
            out_of_patience()
            pushing.error()


def test_sender_continues_at_the_daemon_that_comes_next(start_shipd, medium):
    """A restart in the middle of a push: aborted, and carried on by itself."""
    first = start_shipd()
    with Proxy(first.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium, label="over-two-daemons") as pushing:
            held.wait()
            proxy.refuse()
            first.signal(signal.SIGTERM)
            first.wait_for_log("draining")
            first.signal(signal.SIGTERM)
            assert first.wait() == 0
            proxy.forget_rules()
            second = start_shipd()
            proxy.upstream = second.port
            proxy.accept()
            pushing.result()
    assert status(second.address).models[0].label == "over-two-daemons"


# --- reloading -------------------------------------------------------------------------------------------------------


def test_reload_takes_over_what_can_change(start_shipd, small, medium):
    service = start_shipd(models={"model": "1MB"})
    with pytest.raises(shipd.MemoryLimit):
        push(service.address, medium)
    service.write_config(models={"model": "1GiB", "more": "1GiB"}, memory_limit="2GiB")
    service.reload()
    assert any(line.startswith("MONOTONIC_USEC=") for line in service.notify.lines)
    assert "RELOADING=1" in service.notify.lines
    assert service.logged("configuration reloaded")
    push(service.address, medium)
    push(service.address, small, model="more")
    answer = status(service.address)
    assert answer.memory_limit == 2 << 30
    assert [model.name for model in answer.models] == ["model", "more"]


def test_reload_names_what_needs_a_restart(start_shipd):
    service = start_shipd()
    service.write_config(listen="127.0.0.1:7999", drain_timeout=5)
    service.reload()
    (entry,) = service.logged("configuration reloaded")
    assert sorted(entry["needs_restart"]) == ["drain_timeout", "listen"]
    assert status(service.address)


@pytest.mark.parametrize(
    "text",
    ["no toml [", 'listen = "127.0.0.1:0"\ntypo = 1\n', 'memory_limit = "-1"\n', 'token_file = "/nowhere"\n'],
)
def test_reload_of_a_wrong_configuration_changes_nothing(start_shipd, small, text):
    service = start_shipd()
    service.config.write_text(text)
    service.reload()
    (entry,) = service.logged("the configuration was not reloaded")
    assert entry["level"] == "error"
    assert entry["why"]
    push(service.address, small)
    service.write_config(models={"model": "1GiB", "more": "1GiB"})
    service.reload()
    push(service.address, small, model="more")


def test_reload_of_a_token(start_shipd, small):
    service = start_shipd()
    token = service.directory / "token"
    token.write_text(TOKEN)
    push(service.address, small, label="v1")
    service.write_config(token_file=str(token))
    service.reload()
    with pytest.raises(shipd.AuthError):
        push(service.address, small, label="v2")
    push(service.address, small, label="v2", token=TOKEN)
    token.write_text(TOKEN + " and another")
    service.reload()
    with pytest.raises(shipd.AuthError):
        push(service.address, small, label="v3", token=TOKEN)


def test_reload_takes_no_token_away_beyond_loopback(start_shipd, small):
    """Valid by itself, but not together with the address that is being listened on."""
    directory = Path(start_shipd().directory)
    token = directory / "token"
    token.write_text(TOKEN)
    service = start_shipd(listen="0.0.0.0:0", token_file=str(token))
    service.write_config(listen="127.0.0.1:0")
    service.reload()
    (entry,) = service.logged("the configuration was not reloaded")
    assert "reachable from other hosts" in entry["why"]
    with pytest.raises(shipd.AuthError):
        status(service.address)


def test_reload_forgets_a_model_that_has_nothing(start_shipd, small):
    service = start_shipd(models={"used": "1GiB", "unused": "1GiB"})
    push(service.address, small, model="used")
    service.write_config(models={"other": "1GiB"})
    service.reload()
    assert [model.name for model in status(service.address).models] == ["other", "used"]
    with pytest.raises(shipd.UnknownModel):
        push(service.address, small, model="unused")


def test_reload_during_a_push(start_shipd, medium):
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium) as pushing:
            held.wait()
            service.reload()
            held.release()
            pushing.result()
        assert proxy.connections == 1


def test_reload_of_the_log_level(start_shipd, small):
    service = start_shipd()
    service.write_config(log_level="error")
    service.reload()
    before = len(service.logged())
    push(service.address, small)
    assert len(service.logged()) == before


# --- the Unix socket's file ------------------------------------------------------------------------------------------


def test_the_socket_is_for_its_group_only(start_shipd):
    service = start_shipd()
    mode = service.socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_a_stale_socket_is_replaced(start_shipd, small):
    first = start_shipd()
    first.kill()
    assert first.socket.exists(), "kill -9 leaves it"
    second = start_shipd(directory=first.directory)
    push(str(second.socket), small)


def test_a_socket_that_somebody_listens_on_is_left_alone(start_shipd, place, small):
    first = start_shipd()
    directory = place / "second"
    directory.mkdir()
    with pytest.raises(AssertionError, match=r"ended with 78[\s\S]*another daemon is listening"):
        start_shipd(directory=directory, socket=str(first.socket))
    push(str(first.socket), small)


def test_what_is_no_socket_is_not_removed(start_shipd, place):
    directory = place / "own"
    directory.mkdir()
    path = directory / "shipd.sock"
    path.write_text("precious")
    with pytest.raises(AssertionError, match=r"ended with 78[\s\S]*shipd\.sock"):
        start_shipd(directory=directory)
    assert path.read_text() == "precious"


def test_the_socket_of_a_newer_daemon_is_not_removed(start_shipd, small):
    """Its file was removed by hand and another daemon has put its own there: that one stays."""
    first = start_shipd()
    first.socket.unlink()
    second = start_shipd(socket=str(first.socket))
    assert first.terminate() == 0
    push(str(first.socket), small)
    assert second.terminate() == 0
    assert not first.socket.exists()


# --- the daemon inside a process -------------------------------------------------------------------------------------


def test_embedded_daemon_says_what_is_wrong(place):
    with shipd.Daemon(shipd.Config(listen="127.0.0.1:0", socket=str(place / "s"))) as daemon:
        taken = shipd.Config(listen=f"127.0.0.1:{daemon.port}", socket=str(place / "other"))
        with pytest.raises(shipd.ConfigError, match="cannot listen"):
            shipd.Daemon(taken).start()
        with pytest.raises(shipd.ConfigError, match="another daemon is listening"):
            shipd.Daemon(shipd.Config(listen="127.0.0.1:0", socket=str(place / "s"))).start()
    assert not (place / "s").exists()


def test_embedded_daemon_starts_and_stops_again_and_again(place, small):
    config = shipd.Config(
        listen="127.0.0.1:0", socket=str(place / "s"), models={"model": shipd.ModelConfig(max_bytes="1GiB")}
    )
    daemon = shipd.Daemon(config)
    for _ in range(5):
        with daemon:
            push(f"127.0.0.1:{daemon.port}", small)


def test_embedded_daemon_that_stops_during_a_push(start_daemon, medium, out_of_patience):
    daemon = start_daemon()
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium) as pushing:
            held.wait()
            daemon.stop()
            held.release()
            out_of_patience()
            error = pushing.error()
    assert isinstance(error, shipd.TransferFailed | shipd.ConnectError), error
