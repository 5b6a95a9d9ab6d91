"""Real processes for tests: daemons that say when they are ready, shipctl, and helpers that report over a pipe.

Every wait has a deadline, and a failure shows what the processes have printed.
"""

import asyncio
import inspect
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import shipd

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0
"""Seconds until a wait is given up: on a slow machine a process that imports torch takes five."""

T = TypeVar("T")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment, with shipd on the path and without what a service manager may have set.

    Nor with PYTHONDONTWRITEBYTECODE: compiling shipd takes as long as all else of a start, and hundreds are started.
    """
    values: dict[str, str | None] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("protocol", "daemon", "")),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "TERM": "dumb",
    }
    foreign = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "FORCE_COLOR", "PYTHONWARNINGS")
    for name in (*foreign, "PYTHONDONTWRITEBYTECODE", *(name for name in values if name.startswith("SHIPD_"))):
        values[name] = None
    # Nobody's own cache is read from, or written to.
    values["SHIPD_CACHE"] = ""
    values.update(changes)
    return {name: value for name, value in values.items() if value is not None}


class Process:
    """A child process, killed at the end of the block. What it prints goes to files: no pipe can fill up."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str | None] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.command = list(command)
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=self._out if stdout is None else stdout,
            stderr=self._err if stderr is None else stderr,
            pass_fds=pass_fds,
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def out(self) -> str:
        """What it has printed."""
        return _content(self._out)

    @property
    def err(self) -> str:
        """What it has said on stderr."""
        return _content(self._err)

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def kill(self) -> int:
        """kill -9."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self, deadline: float = DEADLINE) -> int:
        """Its exit code; -N where signal N ended it."""
        try:
            return self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline:.0f} s\n{self.describe()}") from None

    def describe(self) -> str:
        """For failure messages."""
        state = "running" if self.running else f"ended with {self._process.returncode}"
        return (
            f"{' '.join(self.command)[:200]} ({state})\n--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            # Also where it was stopped.
            self._process.kill()
        self._process.wait(DEADLINE)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._out.close()
        self._err.close()


def _content(file: Any) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")


# --- systemd's side of sd_notify -------------------------------------------------------------------------------------


class NotifySocket:
    """What a service manager would hear. Every line of every message, in ``lines``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))

    def wait_for(
        self, line: str, *, since: int = 0, deadline: float = DEADLINE, process: Process | None = None
    ) -> None:
        """Until ``line`` has come, after the first ``since`` lines."""
        end = time.monotonic() + deadline
        while line not in self.lines[since:]:
            ready = select.select([self._sock], [], [], 0.1)[0]
            if ready:
                self.lines += self._sock.recv(4096).decode().splitlines()
            elif process is not None and not process.running:
                raise AssertionError(f"ended before {line}\n{process.describe()}")
            assert time.monotonic() < end, f"no {line} in {deadline:.0f} s\n{process.describe() if process else ''}"

    def drain(self) -> None:
        """Take what has come already."""
        while select.select([self._sock], [], [], 0)[0]:
            self.lines += self._sock.recv(4096).decode().splitlines()

    def close(self) -> None:
        """Remove the socket."""
        self._sock.close()
        self.path.unlink(missing_ok=True)


# --- the daemon ------------------------------------------------------------------------------------------------------


def toml(settings: Mapping[str, Any]) -> str:
    """A configuration file. ``models`` maps names to max_bytes."""
    values = dict(settings)
    models: Mapping[str, int | str] = values.pop("models", {})
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    lines += [f"[models.{json.dumps(name)}]\nmax_bytes = {json.dumps(limit)}" for name, limit in models.items()]
    return "\n".join(lines) + "\n"


class ShipdProcess(Process):
    """``shipd`` as a service manager would start it, on a free port, ready once constructed.

    Everything it needs lies in ``directory``; the same one may be used again after it has ended.
    """

    def __init__(
        self,
        directory: Path,
        *,
        models: Mapping[str, int | str] | None = None,
        env: Mapping[str, str | None] | None = None,
        await_ready: bool = True,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.socket = directory / "shipd.sock"
        self.config = directory / "shipd.toml"
        self.write_config(models=models, **settings)
        self.notify = NotifySocket(directory / "notify.sock")
        command = [sys.executable, "-m", "shipd.service.main", "--config", str(self.config)]
        super().__init__(command, env={"NOTIFY_SOCKET": str(self.notify.path), **(env or {})})
        self.port = 0
        try:
            if await_ready:
                self.await_ready()
        except BaseException:
            self.__exit__()
            raise

    def write_config(self, *, models: Mapping[str, int | str] | None = None, **settings: Any) -> None:
        """(Re)write the configuration file."""
        values = {
            "listen": "127.0.0.1:0",
            "socket": str(self.socket),
            "log_format": "json",
            "models": models if models is not None else {"model": "8GiB"},
            **settings,
        }
        self.config.write_text(toml(values))

    def await_ready(self) -> None:
        """READY=1; the port is in the log by then."""
        self.notify.wait_for("READY=1", process=self)
        listening = self.logged("listening")
        if listening:
            self.port = int(listening[0]["address"].rpartition(":")[2])

    @property
    def address(self) -> str:
        """What a sender connects to."""
        return f"127.0.0.1:{self.port}"

    def reload(self) -> None:
        """SIGHUP, and wait until it has been dealt with."""
        since = len(self.notify.lines)
        self.signal(signal.SIGHUP)
        self.notify.wait_for("READY=1", since=since, process=self)

    def terminate(self, deadline: float = DEADLINE) -> int:
        """SIGTERM; its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(deadline)

    def logged(self, message: str | None = None) -> list[dict[str, Any]]:
        """What it has logged as JSON, or the entries with this message."""
        entries = [json.loads(line) for line in self.err.splitlines() if line.startswith("{") and line.endswith("}")]
        return [entry for entry in entries if message in (None, entry["message"])]

    def wait_for_log(self, message: str, count: int = 1, deadline: float = DEADLINE) -> dict[str, Any]:
        """The ``count``-th entry with this message."""
        end = time.monotonic() + deadline
        pause = threading.Event()
        while len(found := self.logged(message)) < count:
            assert self.running, f"ended before it logged {message!r}\n{self.describe()}"
            assert time.monotonic() < end, f"never logged {message!r}\n{self.describe()}"
            pause.wait(0.005)
        return found[count - 1]

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.notify.close()


# --- shipctl ---------------------------------------------------------------------------------------------------------


class Shipctl(Process):
    """``shipctl ARGUMENTS``, running."""

    def __init__(self, *arguments: str | Path, env: Mapping[str, str | None] | None = None, **streams: Any) -> None:
        command = [sys.executable, "-m", "shipd.cli.shipctl", *map(str, arguments)]
        super().__init__(command, env=env, **streams)

    @property
    def answer(self) -> dict[str, Any]:
        """The one JSON object of --json."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.describe()
        found: dict[str, Any] = json.loads(lines[0])
        return found


class Finished:
    """A process that has ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def answer(self) -> dict[str, Any]:
        """The one JSON object of --json."""
        (line,) = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def shipctl(*arguments: str | Path, env: Mapping[str, str | None] | None = None, deadline: float = 60.0) -> Finished:
    """Run ``shipctl ARGUMENTS`` to its end."""
    with Shipctl(*arguments, env=env) as process:
        code = process.wait(deadline)
        return Finished(code, process.out, process.err)


def push_arguments(daemon: shipd.Daemon, path: Path, *more: str | Path) -> tuple[str | Path, ...]:
    """``shipctl push`` of a file to a daemon's model "model"."""
    return "push", path, "--to", address_of(daemon), "--model", "model", *more


# --- helpers ---------------------------------------------------------------------------------------------------------

_BOOTSTRAP = """
import json, os, sys

def report(value):
    os.write({fd}, json.dumps(value).encode() + b"\\n")

{source}

{name}(report, *json.loads({arguments!r}))
"""


class Helper(Process):
    """``function(report, *arguments)`` in a process of its own; what it reports comes back from ``next``.

    The function's source is all that travels: it imports what it needs itself. It hears the parent as lines on stdin.
    """

    def __init__(self, function: Callable[..., object], *arguments: Any, env: Mapping[str, str] | None = None) -> None:
        self._pending = b""
        self._reports, write = os.pipe()
        source = textwrap.dedent(inspect.getsource(function))
        code = _BOOTSTRAP.format(
            fd=write, source=source, name=function.__name__, arguments=json.dumps([_plain(part) for part in arguments])
        )
        try:
            super().__init__([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, pass_fds=[write])
        except BaseException:
            os.close(self._reports)
            raise
        finally:
            os.close(write)

    def next(self, deadline: float = DEADLINE) -> Any:
        """The next report."""
        end = time.monotonic() + deadline
        while b"\n" not in self._pending:
            ready = select.select([self._reports], [], [], max(0.0, end - time.monotonic()))[0]
            data = os.read(self._reports, 65536) if ready else b""
            assert data, f"{'no report in time' if not ready else 'ended without a report'}\n{self.describe()}"
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def say(self, text: str = "") -> None:
        """A line for its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def describe(self) -> str:
        """Without the source."""
        state = "running" if self.running else f"ended with {self._process.returncode}"
        return f"helper ({state})\n--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}"

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        os.close(self._reports)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def memory(pid: int | str = "self") -> dict[str, int]:
    """RssAnon, RssFile, RssShmem and VmHWM of a process, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found


# --- the client, from synchronous tests ------------------------------------------------------------------------------

TOKEN = "correct horse battery staple"
"""Long enough to be one."""


def address_of(daemon: shipd.Daemon) -> str:
    """What senders connect to."""
    return f"127.0.0.1:{daemon.port}"


def push(
    address: str, checkpoint: Any, *, token: str | None = None, model: str = "model", **options: Any
) -> shipd.Receipt:
    """Connect, push and close, on a loop of its own."""

    async def converse() -> shipd.Receipt:
        async with shipd.connect(address, token=token) as client:
            return await client.push(checkpoint, model=model, **options)

    return asyncio.run(converse())


def status(address: str, *, token: str | None = None) -> Any:
    """The daemon's STATUS."""

    async def converse() -> Any:
        async with shipd.connect(address, token=token) as client:
            return await client.status()

    return asyncio.run(converse())


class Background(Generic[T]):
    """``function(*arguments)`` on a thread, from the start of the block; joined at its end."""

    def __init__(self, function: Callable[..., T], *arguments: Any, **options: Any) -> None:
        self._outcome: list[T] = []
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._outcome.append(function(*arguments, **options))
            except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
                self._error = error

        self._thread = threading.Thread(target=run, name="background", daemon=True)

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def result(self, deadline: float = DEADLINE) -> T:
        """What it returned; raises what it raised."""
        self._thread.join(deadline)
        assert not self._thread.is_alive(), f"still running after {deadline:.0f} s"
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def error(self, deadline: float = DEADLINE) -> BaseException:
        """What it raised."""
        self._thread.join(deadline)
        assert not self._thread.is_alive(), f"still running after {deadline:.0f} s"
        assert self._error is not None, f"it succeeded with {self._outcome}"
        return self._error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "a background thread does not end"
