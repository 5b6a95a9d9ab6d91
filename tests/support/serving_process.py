"""Serving processes for tests: real ones, forked from a nursery that has imported torch once.

Importing torch and shipd's serving side takes four seconds, and these tests need dozens of processes to kill, stop and
fork. The nursery imports everything and forks before anything is attached; what it forks is a process like any other.

    Serving    such a process as a test sees it: ``process.ask("verify", "model")``
    Nursery    where they come from
    fixtures   ``serve`` starts and attaches processes, ``attach`` attaches a model in the test's own process
    both       has a test run in mode "copy" and in mode "flip"
    sessions   what a daemon knows of such processes; ``serves`` asks both sides

What runs on the other side is in tests.support.program; the model that it serves, in tests.support.exact.

Test modules say ``pytest_plugins = ["tests.support.serving_process"]`` and import names from here as well, so pytest
comes too late to rewrite this module's asserts, and would warn: PYTEST_DONT_REWRITE.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import shipd
from shipd.service.session import Session
from shipd.serving.deliver import LoadsWeights
from tests.support.exact import right_answer
from tests.support.processes import DEADLINE, Process, address_of, status

both = pytest.mark.parametrize("mode", ["copy", "flip"])


class Told(Exception):
    """What a serving process raised. ``kind`` is the exception's class."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"{answer['error']}: {answer['message']}\n{answer['trace']}")
        self.kind: str = answer["error"]
        self.message: str = answer["message"]
        self.details: list[str] = answer["details"]


class Serving:
    """One serving process. Killed at the end of the test."""

    def __init__(self, talk: socket.socket, nursery: Process) -> None:
        self._talk = talk
        self._lines = talk.makefile("r")
        self._nursery = nursery
        self.pid: int = self._hear(DEADLINE)["pid"]
        self._handle = os.pidfd_open(self.pid)

    def ask(self, what: str, *arguments: Any, deadline: float = DEADLINE, **options: Any) -> Any:
        """Have it do one of the things that ``Program`` can do. Raises Told."""
        self.begin(what, *arguments, **options)
        return self.result(deadline)

    def begin(self, what: str, *arguments: Any, **options: Any) -> None:
        """Ask, and do not wait for the ``result``."""
        plain = [str(part) if isinstance(part, Path) else part for part in arguments]
        self._talk.sendall(json.dumps([what, plain, options]).encode() + b"\n")

    def result(self, deadline: float = DEADLINE) -> Any:
        """The answer to ``begin``."""
        answer = self._hear(deadline)
        if "error" in answer:
            raise Told(answer)
        return answer["answer"]

    @property
    def answered(self) -> bool:
        """Whether there is a ``result``."""
        return bool(select.select([self._talk], [], [], 0)[0])

    def _hear(self, deadline: float) -> dict[str, Any]:
        self._talk.settimeout(deadline)
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise AssertionError(f"no answer in {deadline:.0f} s\n{self._nursery.describe()}") from None
        assert line, f"the serving process has ended\n{self._nursery.describe()}"
        heard: dict[str, Any] = json.loads(line)
        return heard

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP, and until it has stopped."""
        self.signal(signal.SIGSTOP)
        end = time.monotonic() + DEADLINE
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end
            threading.Event().wait(0.001)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, and until it is gone."""
        self.signal(signal.SIGKILL)
        assert select.select([self._handle], [], [], DEADLINE)[0]

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return not select.select([self._handle], [], [], 0)[0]

    def gone(self, deadline: float) -> bool:
        """Whether it has ended, or does so in time."""
        return bool(select.select([self._handle], [], [], deadline)[0])

    def close(self) -> None:
        """Make an end of it."""
        if self.running:
            self.kill()
        os.close(self._handle)
        self._lines.close()
        self._talk.close()


class Nursery(Process):
    """The process that serving processes are forked from."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shipd-")
        door = f"{self._directory.name}/door"
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(door)
        self._door.listen()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        super().__init__([sys.executable, "-m", "tests.support.program", door], env=threads, stdin=subprocess.PIPE)

    def spawn(self, program: str = "") -> Serving:
        """A new process with nothing attached. ``program`` is the class of what it can do, if not ``Program``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{program}\n".encode())
        self._process.stdin.flush()
        return self.greet()

    def greet(self) -> Serving:
        """The next process that comes to the door: one that another has forked."""
        self._door.settimeout(DEADLINE)
        try:
            talk, _ = self._door.accept()
        except TimeoutError:
            raise AssertionError(f"nobody came\n{self.describe()}") from None
        return Serving(talk, self)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._door.close()
        self._directory.cleanup()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """One for the whole session, started when the first test asks for it."""
    with Nursery() as running:
        yield running


Serve = Callable[..., Serving]


@pytest.fixture
def serve(nursery: Nursery) -> Iterator[Serve]:
    """``serve(socket, version=0, mode="copy", ...)``: a process with an attached model; see ``Program.attach``.

    ``serve()`` starts one with nothing attached, ``serve(fork_of=process)`` has one forked.
    """
    started: list[Serving] = []

    def start(place: "str | Path | None" = None, *, fork_of: Serving | None = None, **options: Any) -> Serving:
        if fork_of is not None:
            fork_of.begin("fork")
            process = nursery.greet()
            assert fork_of.result() == process.pid
        else:
            process = nursery.spawn()
        started.append(process)
        if place is not None:
            process.ask("attach", str(place), **options)
        return process

    yield start
    for process in started:
        process.close()


Attach = Callable[..., "shipd.Resident"]


@pytest.fixture
def attach() -> Iterator[Attach]:
    """``attach(model, daemon, name="model", **options)`` in this process; detached at the end."""
    attached: list[shipd.Resident] = []

    def start(
        model: "nn.Module | LoadsWeights", daemon: "shipd.Daemon", name: str = "model", **options: Any
    ) -> "shipd.Resident":
        resident = shipd.attach(model, name, socket=daemon.config.socket, **options)
        attached.append(resident)
        return resident

    yield start
    for resident in attached:
        resident.detach()
    # pytest refers to ``start`` until the very end, and this to models whose weights may lie in images.
    attached.clear()


# --- what the daemon knows of them -----------------------------------------------------------------------------------


def sessions(daemon: shipd.Daemon) -> list[Session]:
    """What is attached."""
    model = daemon.server.models.get("model")
    return list(model.sessions) if model is not None else []


def serves(daemon: shipd.Daemon, process: Serving, receipt: shipd.Receipt, version: int) -> None:
    """``process`` serves this version, by its own account and by the daemon's."""
    process.ask("await_label", receipt.label)
    assert process.ask("answer") == right_answer(version)
    assert process.ask("verify") == receipt.digest
    states = [each for each in status(address_of(daemon)).models[0].processes if each.pid == process.pid]
    assert [(each.state, each.digest) for each in states] == [("serving", receipt.digest)]
