"""The daemon under systemd: the watchdog, who is notified of what, and logs for the journal."""

import os
import signal
import socket
import sys
import threading

import pytest

import shipd
from tests.support.offers import offer
from tests.support.processes import NotifySocket, Process, toml
from tests.support.proxy import until


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
        offer(str(service.socket), small, model="nobody")
    until(
        lambda: any(line.startswith("<4>warning push refused ") for line in service.err.splitlines()),
        "the refusal is in the log",
    )


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
