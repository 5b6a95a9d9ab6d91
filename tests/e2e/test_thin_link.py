"""The thin link carries bytes, at the rate that the kernel was told; nothing of it is left, however its user ends."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import thin_link
from tests.support.processes import DEADLINE, ROOT, Background, Helper, ShipdProcess, push
from tests.support.thin_link import MBIT, Host, NoThinLink, ThinLink, processes_in, wait_until_empty


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if why := thin_link.why_not():
        pytest.skip(f"no thin link here: {why}")


@pytest.fixture
def link() -> Iterator[ThinLink]:
    """At 100 Mbit/s."""
    with ThinLink(100 * MBIT) as made:
        yield made


def serve(host: Host) -> socket.socket:
    """A listening socket on that host, used from outside of it."""
    with host.entered():
        return socket.create_server((host.address, 0))


def carried(link: ThinLink, listener: socket.socket, data: bytes) -> bytes:
    """What arrives of what the sender sends."""

    def receive() -> bytes:
        connection, (address, _) = listener.accept()
        with connection:
            assert address == link.sender.address
            return b"".join(iter(lambda: connection.recv(65536), b""))

    listener.settimeout(DEADLINE)
    with Background(receive) as receiving:
        with link.sender.entered(), socket.create_connection(listener.getsockname(), timeout=DEADLINE) as sending:
            sending.sendall(data)
        return receiving.result()


def current() -> int:
    """The network namespace of this thread."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def devices(host: Host | None = None) -> set[str]:
    """The network devices of a host, or of where the tests run."""
    command = ["ip", "-brief", "link"]
    text = host.run(command) if host else subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {re.split(r"[@ ]", line)[0] for line in text.splitlines()}


def test_bytes_cross(link):
    data = os.urandom(200_000)
    with serve(link.receiver) as listener:
        assert carried(link, listener, data) == data


def test_a_push_crosses(link, place):
    token = place / "token"
    token.write_text("a token of sixteen or more characters")
    listen = f"{link.receiver.address}:0"
    with contextlib.ExitStack() as running:
        with link.receiver.entered():
            daemon = running.enter_context(ShipdProcess(place, listen=listen, token_file=str(token)))
        assert daemon.pid in link.receiver.processes()
        import torch

        with link.sender.entered():
            address = f"{link.receiver.address}:{daemon.port}"
            receipt = push(address, {"weight": torch.ones(1000)}, token=token.read_text())
    assert receipt.bytes_total == 4000


def test_the_rate_is_what_the_kernel_says_each_way(link):
    assert (link.sender.rate(), link.receiver.rate()) == (100 * MBIT, 100 * MBIT)
    for rate in (10 * MBIT, 1000 * MBIT):
        link.set_rate(rate)
        assert (link.sender.rate(), link.receiver.rate()) == (rate, rate)


def test_a_thread_comes_back_from_a_host_also_after_a_failure(link):
    def fail() -> None:
        with link.sender.entered():
            assert current() == link.sender.inode
            raise RuntimeError("inside")

    here = current()
    assert here not in (link.sender.inode, link.receiver.inode)
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert current() == here


def test_two_links_beside_one_another_are_two(link):
    data = os.urandom(1000)
    with ThinLink(10 * MBIT) as other:
        assert other.sender.address == link.sender.address
        assert len({host.inode for one in (link, other) for host in (one.sender, one.receiver)}) == 4
        with serve(link.receiver) as listener:
            assert carried(link, listener, data) == data
            # The same address, and nobody listens there.
            with other.sender.entered(), pytest.raises(ConnectionRefusedError):
                socket.create_connection(listener.getsockname(), timeout=DEADLINE)
    assert link.sender.rate() == 100 * MBIT


def test_nothing_is_left_at_the_end_of_the_block_stragglers_included():
    before = devices()
    with contextlib.suppress(RuntimeError), ThinLink(10 * MBIT) as link:
        assert devices() == before
        assert devices(link.sender) == {"lo", "cable"}
        with link.receiver.entered():
            straggler = subprocess.Popen(["sleep", "600"])
        inodes = (link.sender.inode, link.receiver.inode)
        assert straggler.pid in processes_in(inodes[1])
        raise RuntimeError("while it was in use")
    assert straggler.wait(DEADLINE) == -signal.SIGKILL
    assert [processes_in(inode) for inode in inodes] == [[], []]
    assert devices() == before


def hold(report, repository):
    """A link, until told to end."""
    import sys

    sys.path.insert(0, repository)
    from tests.support.thin_link import MBIT, ThinLink

    with ThinLink(10 * MBIT) as link:
        report([link.sender.inode, link.receiver.inode])
        sys.stdin.readline()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_is_left_of_a_user_that_is_stopped(how):
    with Helper(hold, str(ROOT)) as helper:
        inodes = helper.next()
        assert all(processes_in(inode) for inode in inodes)
        helper.signal(how)
        assert helper.wait() != 0
    for inode in inodes:
        wait_until_empty(inode)


def test_a_command_that_fails_says_what_it_said(link):
    with pytest.raises(NoThinLink, match="no-such-device"):
        link.sender.run(["ip", "link", "show", "no-such-device"])
    with pytest.raises(NoThinLink, match="no-such-tool"):
        link.sender.run(["no-such-tool"])


def test_without_a_tool_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/{tool}")
    assert thin_link.why_not() == "there is no tc here"
