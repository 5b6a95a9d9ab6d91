"""shipctl interrupted and killed: what it says then, and what becomes of the push."""

import contextlib
import signal
import socket
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.checkpoints import assert_installed
from tests.support.fake_daemon import FakeDaemon, speaking
from tests.support.frames import COMMITTED, HELLO, STAGED, Way
from tests.support.processes import Shipctl, address_of, push
from tests.support.proxy import Proxy, until


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_halfway(daemon, small, medium, number):
    push(address_of(daemon), small, label="old")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Shipctl("push", medium, "--to", proxy.address, "--model", "model", "--json") as pushing:
            held.wait()
            pushing.signal(number)
            # Released any sooner, the push might be over before the signal has been seen.
            assert pushing.wait() == 130, pushing.describe()
            held.release()
            assert "nothing was swapped" in pushing.err
            assert "Traceback" not in pushing.err
            assert pushing.answer["type"] == "error"
            assert pushing.answer["exit_code"] == 130
    assert_installed(daemon, checkpoints.tiny(), label="old")
    push(address_of(daemon), medium, label="new")
    assert_installed(daemon, checkpoints.medium(), label="new")


def test_the_daemon_hears_of_an_interruption_at_once(daemon, medium):
    """Not only when its resume window closes."""
    with Proxy(daemon.port) as proxy:
        # The sender waits for this, between frames, so that its ABORT can be said; and cannot go on to commit.
        held = proxy.hold(kind=STAGED, way=Way.TO_SENDER)
        with Shipctl("push", medium, "--to", proxy.address, "--model", "model") as pushing:
            held.wait()
            incoming = daemon.server.models["model"].incoming
            pushing.signal(signal.SIGINT)
            until(lambda: daemon.server.models["model"].incoming is None, "the transfer is over")
            held.release()
            assert pushing.wait() == 130, pushing.describe()
    assert incoming.receiver.error.code == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_while_the_commit_is_under_way(daemon, small, medium, number):
    """It is too late then, and shipctl must not say that nothing was swapped."""
    push(address_of(daemon), small, label="old")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)
        with Shipctl("push", medium, "--to", proxy.address, "--model", "model", "--label", "new") as pushing:
            held.wait()
            pushing.signal(number)
            held.release()
            code = pushing.wait()
            assert "nothing was swapped" not in pushing.err
            assert code == 0, pushing.describe()
            assert pushing.out.startswith("model is at new\n")
            assert "too late" in pushing.err
    assert_installed(daemon, checkpoints.medium(), label="new")


def test_interrupted_when_the_outcome_is_not_known(daemon, small, medium):
    push(address_of(daemon), small, label="old")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)
        with Shipctl("push", medium, "--to", proxy.address, "--model", "model", "--stall", "3") as pushing:
            held.wait()
            pushing.signal(signal.SIGINT)
            proxy.refuse()
            proxy.sever_all()
            assert pushing.wait() == 1, pushing.describe()
            assert "nothing was swapped" not in pushing.err
            assert "either live or not" in pushing.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_while_connecting(daemon, small, number):
    with Proxy(daemon.port) as proxy:
        rule = proxy.stall(kind=HELLO, way=Way.TO_SENDER)
        with Shipctl("push", small, "--to", proxy.address, "--model", "model") as pushing:
            rule.wait()
            pushing.signal(number)
            assert pushing.wait(10) == 130, pushing.describe()
            assert "Traceback" not in pushing.err


def test_interrupted_while_nobody_answers(small):
    """A host that drops what it is sent: here a listener whose queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        # Each of these is taken by the kernel until there is no room; from then on nothing is answered.
        while True:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.3)
            try:
                filler.connect(listener.getsockname())
            except TimeoutError:
                break
        with Shipctl("push", small, "--to", f"127.0.0.1:{listener.getsockname()[1]}", "--model", "model") as pushing:
            until(lambda: _connecting(pushing.pid), "it connects")
            pushing.signal(signal.SIGINT)
            assert pushing.wait(8) == 130, pushing.describe()
            assert "Traceback" not in pushing.err


def _connecting(pid):
    """Whether the process has a socket that has sent SYN."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(link.readlink()))
    waiting = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(fields[3] == "02" and f"socket:[{fields[9]}]" in inodes for fields in waiting)


def test_killed_leaves_nothing_on_the_senders_side(daemon, medium, tmp_path):
    before = sorted(tmp_path.iterdir())
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Shipctl("push", medium, "--to", proxy.address, "--model", "model") as pushing:
            held.wait()
            pushing.kill()
            held.release()
    assert sorted(tmp_path.iterdir()) == before


def test_question_to_what_never_answers_can_be_interrupted():
    with FakeDaemon(speaking(b"")) as fake, Shipctl("status", "--to", fake.address) as asking:
        until(lambda: fake.connections > 0, "a connection")
        assert asking.wait(20) == 1, asking.describe()
        assert "closed the connection" in asking.err
