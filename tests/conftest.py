"""What every test gets: a check that it leaves nothing behind, daemons to talk to, and checkpoints to push."""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import shipd
from tests.support import checkpoints
from tests.support.processes import ShipdProcess

_SETTLE_SECONDS = 5.0
"""How long what is about to go may take: a thread that has handed over its result, say."""

_failed = pytest.StashKey[bool]()

# What hypothesis finds has to be found again, and on a busy machine any example may take long.
settings.register_profile(
    "shipd", database=None, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shipd")


def pytest_configure() -> None:
    """What tests start has to hear of Ctrl-C. A shell's background jobs ignore it, and so do their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: the collector need not look through it, which takes 0.15 s with torch."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether the test itself failed: what a failed test leaves behind is no further news."""
    report = yield
    if report.when == "call":
        item.stash[_failed] = report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What a test has printed or logged may be no text. Processes that run tests side by side send it as UTF-8."""
    return _as_text((yield))


def _as_text(value: Any) -> Any:
    """The same, with escapes for whatever UTF-8 has no bytes for."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_text(key): _as_text(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_as_text, value))
    return value


# --- leaks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _one_time_descriptors() -> None:
    """libuv makes the pipe that signals arrive through once, with the first loop, and keeps it for good.

    This is all: importing torch and computing with it, msgpack, numpy and hypothesis open nothing (looked at in
    /proc/self/fd after each).
    """
    import uvloop

    uvloop.new_event_loop().close()


class Inventory:
    """What this process has at one moment."""

    def __init__(self) -> None:
        self.descriptors = _descriptors()
        self.threads = set(threading.enumerate())
        self.images = _mapped_images()
        self.children = _children()
        self.tasks = _pending_tasks()

    def leaks_since(self, before: "Inventory") -> list[str]:
        """What there is now and was not then, in words."""
        found = [
            f"descriptor {fd} is open: {target}"
            for fd, target in self.descriptors.items()
            if before.descriptors.get(fd) != target
        ]
        found += [f"thread {thread.name!r} runs" for thread in self.threads - before.threads]
        found += [f"process {child} was not waited for" for child in self.children - before.children]
        found += [f"task is pending: {task!r}" for task in self.tasks - before.tasks]
        if self.images > before.images:
            found.append(f"{self.images - before.images} more memfd mappings")
        return found


def _descriptors() -> dict[int, str]:
    found = {}
    # A list first: the descriptor of the listing itself is closed again, and readlink fails.
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
    return found


def _mapped_images() -> int:
    """Mappings of memfds; those of pytest's plugins and of torch are not called so."""
    with open("/proc/self/maps", "rb") as maps:  # noqa: PTH123
        return maps.read().count(b"/memfd:")


def _children() -> set[int]:
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            found.update(map(int, Path(f"/proc/self/task/{thread}/children").read_text().split()))
    return found


def _pending_tasks() -> "set[asyncio.Task[Any]]":
    """Of every loop, also of one that is closed: such a task will never end."""
    registered: weakref.WeakSet[asyncio.Task[Any]] = getattr(
        asyncio.tasks, "_all_tasks", getattr(asyncio.tasks, "_scheduled_tasks", weakref.WeakSet())
    )
    return {task for task in list(registered) if not task.done()}


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that leaves descriptors, threads, tasks, memfds or child processes behind."""
    cancelled: list[str] = []
    cancel_all: Callable[[asyncio.AbstractEventLoop], None] = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]

    def noting(loop: asyncio.AbstractEventLoop) -> None:
        # asyncio.run() cancels what is still pending at its end and so hides it.
        cancelled.extend(f"asyncio.run() had to cancel {task!r}" for task in asyncio.all_tasks(loop))
        cancel_all(loop)

    monkeypatch.setattr(asyncio.runners, "_cancel_all_tasks", noting)
    before = Inventory()
    yield
    if request.node.stash.get(_failed, False):
        return
    if found := _settled(before) + cancelled:
        pytest.fail("the test leaks:\n  " + "\n  ".join(found), pytrace=False)


def _settled(before: Inventory) -> list[str]:
    end = time.monotonic() + _SETTLE_SECONDS
    while (leaks := Inventory().leaks_since(before)) and time.monotonic() < end:
        for thread in set(threading.enumerate()) - before.threads:
            thread.join(0.05)
        # Again each time: what a thread that is just ending refers to is no garbage before it has ended. Collecting
        # takes milliseconds, so it is done only where it may matter.
        gc.collect()
        threading.Event().wait(0.01)
    return leaks


# --- what a process remembers ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_plans_of_others() -> None:
    """Plans are remembered by the daemon's address, and ports come again: a test's daemon may have another's."""
    planning = sys.modules.get("shipd.client.planning")
    if planning is not None:
        planning._remembered.clear()


# --- places and daemons ----------------------------------------------------------------------------------------------


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name: the path of a Unix socket has at most 107 bytes, and tmp_path's may be longer."""
    path = Path(tempfile.mkdtemp(prefix="shipd-"))
    yield path
    shutil.rmtree(path)


StartDaemon = Callable[..., shipd.Daemon]


@pytest.fixture
def start_daemon(place: Path) -> Iterator[StartDaemon]:
    """Starts daemons inside this process: ``start_daemon(models={"model": "1GiB"}, **settings)``."""
    running: list[shipd.Daemon] = []

    def start(*, models: dict[str, int | str] | None = None, **settings: Any) -> shipd.Daemon:
        declared = {"model": "8GiB"} if models is None else models
        config = shipd.Config(
            listen=settings.pop("listen", "127.0.0.1:0"),
            socket=settings.pop("socket", str(place / f"shipd-{len(running)}.sock")),
            models={name: shipd.ModelConfig(max_bytes=limit) for name, limit in declared.items()},
            **settings,
        )
        daemon = shipd.Daemon(config)
        daemon.start()
        running.append(daemon)
        return daemon

    yield start
    for daemon in running:
        daemon.stop()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> shipd.Daemon:
    """A daemon with a model called "model"."""
    return start_daemon()


@pytest.fixture
def start_shipd(place: Path) -> Iterator[Callable[..., ShipdProcess]]:
    """Starts daemons as processes, each in a directory of its own: see ``ShipdProcess``."""
    with contextlib.ExitStack() as running:

        def start(*, directory: Path | None = None, **settings: Any) -> ShipdProcess:
            if directory is None:
                directory = Path(tempfile.mkdtemp(dir=place))
            return running.enter_context(ShipdProcess(directory, **settings))

        yield start


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of one chunk: ``checkpoints.tiny()``."""
    return checkpoints.write_safetensors(tmp_path / "small.safetensors", checkpoints.tiny())


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    """A file of 25 chunks: ``checkpoints.medium()``."""
    return checkpoints.write_safetensors(tmp_path / "medium.safetensors", checkpoints.medium())
