"""The daemon as a service: readiness, signals, reloading, its files, its logs, and what it refuses to start with."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import shipd
from tests.support.checkpoints import MIB
from tests.support.processes import TOKEN, Background, NotifySocket, Process, ShipdProcess, memory, push, status, toml
from tests.support.proxy import Proxy

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


def test_second_sigterm_aborts(start_shipd, medium):
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium, stall=0.4) as pushing:
            held.wait()
            service.signal(signal.SIGTERM)
            service.wait_for_log("draining")
            service.signal(signal.SIGTERM)
            assert service.wait(10) == 0, service.describe()
            held.release()
            error = pushing.error()
    assert isinstance(error, shipd.TransferFailed | shipd.ConnectError), error
    (ended,) = service.logged("push ended without effect")
    assert ended["code"] == "shutting-down"


def test_draining_has_an_end(start_shipd, medium):
    service = start_shipd(drain_timeout=0.3)
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium, stall=0.4) as pushing:
            held.wait()
            service.signal(signal.SIGTERM)
            assert service.wait(10) == 0, service.describe()
            held.release()
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


# --- what it refuses to start with -----------------------------------------------------------------------------------

WRONG = {
    "an unknown key": ("listne = 1", "listne"),
    "an unknown key of a model": ("[models.m]\nmax_bytes = 1\nmin_bytes = 1", "min_bytes"),
    "a model without a limit": ("[models.m]", "max_bytes"),
    "a model with an impossible name": ('[models."a b"]\nmax_bytes = 1', "a b"),
    "no TOML": ("listen = ", "no valid TOML"),
    "no UTF-8": (b"listen = '\xff'", "no valid TOML"),
    "a number for a text": ("listen = 7447", "listen"),
    "an address without a host": ('listen = ":7447"', "listen"),
    "a port that is none": ('listen = "127.0.0.1:70000"', "70000"),
    "an address that is not here": ('listen = "192.0.2.1:0"\ntoken_file = "TOKEN"', "cannot listen on 192.0.2.1"),
    "beyond loopback without a token": ('listen = "0.0.0.0:0"', "token_file"),
    "beyond loopback by IPv6": ('listen = "[::]:0"', "token_file"),
    "a token that is not there": ('token_file = "/nowhere/token"', "/nowhere/token"),
    "a token that is too short": ('token_file = "SHORT"', "at least 16"),
    "a size that is none": ('memory_limit = "8 elephants"', "memory_limit"),
    "no memory": ("memory_limit = 0", "memory_limit"),
    "a negative size": ("memory_limit = -1", "memory_limit"),
    "a stall of nothing": ("stall = 0", "stall"),
    "a log level of its own": ('log_level = "loud"', "log_level"),
    "a socket with too long a path": (f'socket = "/tmp/{"x" * 110}"', "socket"),
    "a socket in no directory": ('socket = "/nowhere/shipd.sock"', "/nowhere/shipd.sock"),
    "a group that is none": ('socket_group = "no-such-group"', "no-such-group"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_configuration_exits_with_78(place, what):
    text, said = WRONG[what]
    (place / "token").write_text(TOKEN)
    (place / "short").write_text("short")
    if isinstance(text, str):
        text = text.replace("TOKEN", str(place / "token")).replace("SHORT", str(place / "short"))
        first, table, rest = text.partition("[")
        given = {line.partition(" ")[0] for line in text.splitlines()}
        defaults = {"listen": "127.0.0.1:0", "socket": str(place / "shipd.sock")}
        text = toml({key: value for key, value in defaults.items() if key not in given}) + first + table + rest
    path = place / "shipd.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with Process([sys.executable, "-m", "shipd.service.main", "--config", str(path)]) as process:
        assert process.wait() == 78, process.describe()
        lines = process.err.splitlines()
        assert lines[-1].startswith("shipd: "), process.describe()
        assert said in lines[-1]
        assert "Traceback" not in process.err
    assert not (place / "shipd.sock").exists()


def test_a_configuration_that_is_not_there_exits_with_78(place):
    with Process([sys.executable, "-m", "shipd.service.main", "--config", str(place / "none.toml")]) as process:
        assert process.wait() == 78
        assert "none.toml" in process.err


def test_check_says_whether_it_would_start(place):
    path = place / "shipd.toml"
    for text, code in (('listen = "127.0.0.1:0"', 0), ("nonsense = 1", 78)):
        path.write_text(text)
        with Process([sys.executable, "-m", "shipd.service.main", "--check", "--config", str(path)]) as process:
            assert process.wait() == code, process.describe()


def test_environment_beats_the_file(start_shipd, place):
    token = place / "token"
    token.write_text(TOKEN)
    service = start_shipd(
        memory_limit="1GiB",
        env={"SHIPD_MEMORY_LIMIT": "3GiB", "SHIPD_TOKEN_FILE": str(token), "SHIPD_LISTEN": "[::1]:0"},
    )
    assert service.logged("listening")[0]["address"].startswith("[::1]:")
    assert status(str(service.socket)).memory_limit == 3 << 30
    with pytest.raises(shipd.AuthError):
        status(f"[::1]:{service.port}")


def test_wrong_environment_exits_with_78(place):
    path = place / "shipd.toml"
    path.write_text('listen = "127.0.0.1:0"')
    command = [sys.executable, "-m", "shipd.service.main", "--config", str(path)]
    with Process(command, env={"SHIPD_LOG_LEVEL": "loud"}) as process:
        assert process.wait() == 78
        assert "log_level" in process.err


def test_beyond_loopback_with_a_token(start_shipd, place, small):
    token = place / "token"
    token.write_text(TOKEN)
    service = start_shipd(listen="0.0.0.0:0", token_file=str(token))
    push(service.address, small, token=TOKEN)


def test_a_port_that_is_taken_exits_with_78(start_shipd, place):
    service = start_shipd()
    directory = place / "second"
    directory.mkdir()
    with pytest.raises(AssertionError, match=rf"ended with 78[\s\S]*cannot listen on {service.address}"):
        start_shipd(directory=directory, listen=service.address)
    assert not (directory / "shipd.sock").exists()
    assert status(service.address)


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


# --- systemd ---------------------------------------------------------------------------------------------------------


def test_the_watchdog_is_fed(start_shipd):
    service = start_shipd(env={"WATCHDOG_USEC": "300000"})
    for count in range(1, 4):
        since = (
            [at for at, line in enumerate(service.notify.lines) if line == "WATCHDOG=1"][count - 2] + 1
            if count > 1
            else 0
        )
        service.notify.wait_for("WATCHDOG=1", since=since, deadline=5, process=service)


def test_a_watchdog_for_another_process_is_not_fed(start_shipd):
    service = start_shipd(env={"WATCHDOG_USEC": "30000", "WATCHDOG_PID": "1"})
    service.terminate()
    service.notify.wait_for("STOPPING=1")
    assert "WATCHDOG=1" not in service.notify.lines


def test_a_daemon_that_is_stopped_does_not_feed_its_watchdog(start_shipd):
    service = start_shipd(env={"WATCHDOG_USEC": "60000"})
    service.notify.wait_for("WATCHDOG=1", process=service)
    service.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, service.pid, os.WSTOPPED | os.WNOWAIT)
    service.notify.drain()
    since = len(service.notify.lines)
    with pytest.raises(AssertionError):
        service.notify.wait_for("WATCHDOG=1", since=since, deadline=0.3)
    service.signal(signal.SIGCONT)
    service.notify.wait_for("WATCHDOG=1", since=since, process=service)


def test_an_abstract_notify_socket(place):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = f"shipd-test-{os.getpid()}"
    sock.bind("\0" + name)
    sock.settimeout(20)
    try:
        config = place / "shipd.toml"
        config.write_text(toml({"listen": "127.0.0.1:0", "socket": str(place / "shipd.sock")}))
        command = [sys.executable, "-m", "shipd.service.main", "--config", str(config)]
        with Process(command, env={"NOTIFY_SOCKET": "@" + name}) as process:
            assert sock.recv(4096) == b"READY=1", process.describe()
            process.signal(signal.SIGTERM)
            assert sock.recv(4096) == b"STOPPING=1"
            assert process.wait() == 0
    finally:
        sock.close()


def test_nobody_to_notify(place):
    """Started by hand: no NOTIFY_SOCKET, or one that is gone."""
    config = place / "shipd.toml"
    config.write_text(toml({"listen": "127.0.0.1:0", "socket": str(place / "shipd.sock")}))
    command = [sys.executable, "-m", "shipd.service.main", "--config", str(config)]
    for notify in (None, str(place / "gone")):
        with Process(command, env={"NOTIFY_SOCKET": notify}) as process:
            pause = threading.Event()
            while "listening" not in process.err:
                assert process.running, process.describe()
                pause.wait(0.01)
            process.signal(signal.SIGTERM)
            assert process.wait() == 0, process.describe()


def test_logs_for_the_journal_have_its_priorities_and_no_time(start_shipd, small):
    service = start_shipd(log_format="text", env={"JOURNAL_STREAM": "8:12345"})
    lines = service.err.splitlines()
    assert lines[0].startswith("<6>info listening address=127.0.0.1:")
    with pytest.raises(shipd.UnknownModel):
        push(str(service.socket), small, model="nobody")
    assert any(line.startswith("<4>warning push refused ") for line in service.err.splitlines())


def test_logs_for_people_have_the_time(start_shipd):
    service = start_shipd(log_format="text")
    (line,) = service.err.splitlines()
    assert line[:4].isdigit()
    assert " info listening " in line


def test_notify_socket_hears_each_line(place):
    """The helper itself: several lines of one message, and nothing left behind."""
    notify = NotifySocket(place / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"A=1\nB=2", str(notify.path))
    notify.wait_for("B=2", deadline=5)
    assert notify.lines == ["A=1", "B=2"]
    notify.close()
    assert not notify.path.exists()


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


def test_embedded_daemon_that_stops_during_a_push(start_daemon, medium):
    daemon = start_daemon()
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium, stall=0.4) as pushing:
            held.wait()
            daemon.stop()
            held.release()
            error = pushing.error()
    assert isinstance(error, shipd.TransferFailed | shipd.ConnectError), error


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


def test_generated_configuration_is_toml():
    import tomllib

    values = {"listen": "127.0.0.1:0", "stall": 0.5, "memory_limit": 7, "models": {"a.b": "1GiB"}}
    assert tomllib.loads(toml(values)) == {**values, "models": {"a.b": {"max_bytes": "1GiB"}}}


def test_nothing_is_left_of_a_daemon_that_was_killed(start_shipd, medium):
    """Images are anonymous: the kernel takes them back."""
    service = start_shipd()
    push(service.address, medium)
    service.kill()
    listing = subprocess.run(["ls", str(service.directory)], capture_output=True, text=True, check=True).stdout
    assert sorted(listing.split()) == ["notify.sock", "shipd.sock", "shipd.toml"]
