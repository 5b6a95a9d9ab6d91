"""No more threads, descriptors or mappings, at one moment and for one party: an error that says so, and nothing kept.

What is left behind by a failed attempt is found by the check that every test ends with.
"""

import asyncio
import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import shipd
from shipd.checkpoints.source import open_source
from shipd.images.memory import ImageMapping
from shipd.images.slots import ImageMemory
from shipd.transfer.lane import ConnectionLost, Lane
from shipd.transfer.waker import Waker
from tests.conftest import StartDaemon
from tests.support.file_servers import FileServer, quick
from tests.support.processes import status
from tests.support.proxy import until

pytest_plugins = ["tests.support.file_server_fixtures"]

FailThreads = Callable[..., list[str]]


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> shipd.Daemon:
    """With nothing in it."""
    return start_daemon()


@pytest.fixture
def fail_threads(monkeypatch: pytest.MonkeyPatch) -> FailThreads:
    """``fail_threads("shipd lane")``: no thread of such a name can be started. The names of all that were to be."""
    start = threading.Thread.start

    def fail(*prefixes: str, after: int = 0) -> list[str]:
        tried: list[str] = []

        def limited(self: threading.Thread) -> None:
            if self.name.startswith(prefixes):
                tried.append(self.name)
                if len(tried) > after:
                    raise RuntimeError("can't start new thread")
            start(self)

        monkeypatch.setattr(threading.Thread, "start", limited)
        return tried

    return fail


def _model(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(96, 64).eval()


def _weights(seed: int) -> dict[str, torch.Tensor]:
    return _model(seed).state_dict()


def _push(daemon: shipd.Daemon, weights: dict[str, torch.Tensor], label: str, **options: Any) -> shipd.Receipt:
    async def main() -> shipd.Receipt:
        async with shipd.connect(f"127.0.0.1:{daemon.port}") as client:
            return await client.push(weights, model="model", label=label, **options)

    return asyncio.run(main())


def _serves(model: torch.nn.Module, resident: shipd.Resident, seed: int, label: str) -> bool:
    """In full: what is called so is what was pushed."""
    live = model.state_dict()
    return (
        resident.label == label
        and resident.verify() == resident.digest
        and all(torch.equal(live[name], tensor) for name, tensor in _weights(seed).items())
    )


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1], ids=["to connect", "to push"])
def test_a_client_without_a_thread(daemon: shipd.Daemon, fail_threads: FailThreads, after: int) -> None:
    fail_threads("shipd-client", after=after)
    with pytest.raises(shipd.ConnectError, match=r"no further thread for this process \(ulimit -u"):
        _push(daemon, _weights(1), "new")


@pytest.mark.parametrize("name", ["shipd base", "shipd encoder"])
def test_a_push_without_a_thread_to_code_with(daemon: shipd.Daemon, fail_threads: FailThreads, name: str) -> None:
    _push(daemon, _weights(1), "old")
    fail_threads(name)
    with pytest.raises(shipd.TransferFailed, match="no further thread"):
        _push(daemon, _weights(2), "new", prefer="bytes", base=_weights(1))
    assert status(f"127.0.0.1:{daemon.port}").models[0].label == "old"
    assert _push(daemon, _weights(2), "new", base=False).label == "new"


def test_a_push_without_a_thread_to_compile_on(daemon: shipd.Daemon, fail_threads: FailThreads) -> None:
    """numpy does it then."""
    _push(daemon, _weights(1), "old")
    tried = fail_threads("shipd compiler")
    assert _push(daemon, _weights(2), "new", prefer="bytes", base=_weights(1)).label == "new"
    assert tried


def test_fetching_without_a_thread(fail_threads: FailThreads, server: FileServer) -> None:
    fail_threads("shipd fetching")
    with pytest.raises(shipd.TransferFailed, match="nothing can be fetched: the system has no further thread"):
        open_source(server.serve("/model.safetensors", b"content"), fetching=quick())


def test_attaching_without_a_thread(daemon: shipd.Daemon, fail_threads: FailThreads) -> None:
    fail_threads("shipd model")
    with pytest.raises(shipd.AttachError, match="'model' cannot be attached: the system has no further thread"):
        shipd.attach(_model(), "model", socket=daemon.config.socket)


def test_images_are_prepared_only_where_there_is_a_thread(daemon: shipd.Daemon, fail_threads: FailThreads) -> None:
    """Else the first swap takes longer, and the process follows the daemon all the same."""
    _push(daemon, _weights(1), "old")
    tried = fail_threads("shipd model prepare")
    model = _model()
    resident = shipd.attach(model, "model", socket=daemon.config.socket)
    assert tried
    assert _serves(model, resident, 1, "old")
    _push(daemon, _weights(2), "new")
    assert _serves(model, resident, 2, "new")
    resident.detach()


def test_a_running_daemon_needs_no_further_threads_for_its_work(
    daemon: shipd.Daemon, fail_threads: FailThreads
) -> None:
    """Work that waits for a thread would be done at some later time, into images that are others' by then."""
    tried = fail_threads("shipd-work", "shipd-populate")
    model = _model()
    resident = shipd.attach(model, "model", socket=daemon.config.socket)
    _push(daemon, _weights(1), "whole")
    _push(daemon, {"bias": _weights(2)["bias"]}, "part", policy="subset")
    assert resident.label == "part"
    assert resident.verify() == resident.digest
    assert tried == []
    resident.detach()


@pytest.mark.parametrize("after", [0, 2])
def test_a_daemon_without_threads_does_not_start(
    start_daemon: StartDaemon, fail_threads: FailThreads, after: int
) -> None:
    fail_threads("shipd-work", after=after)
    with pytest.raises(shipd.ConfigError, match="no further thread"):
        start_daemon()


def test_a_daemon_stops_without_a_further_thread(place: Path, fail_threads: FailThreads) -> None:
    daemon = shipd.Daemon(shipd.Config(listen="127.0.0.1:0", socket=str(place / "shipd.sock")))
    daemon.start()
    resident = shipd.attach(_model(), "model", socket=daemon.config.socket)
    fail_threads("")
    resident.detach()
    daemon.stop()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_daemon_without_memory_for_a_message_ends_that_connection(
    daemon: shipd.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the Unix socket as over TCP: nobody waits for an answer that will never come."""

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("shipd.service.server.Session", fail)
        with pytest.raises(ConnectionLost, match="it closed the connection"):
            shipd.attach(_model(), "model", socket=daemon.config.socket, timeout=60.0)
    shipd.attach(_model(), "model", socket=daemon.config.socket).detach()


# --- descriptors and mappings ----------------------------------------------------------------------------------------


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def fail_dup(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``fail_dup(n)``: the n-th duplicate of a descriptor from now on cannot be made."""
    dup = os.dup

    def fail(nth: int) -> None:
        made = 0

        def limited(fd: int) -> int:
            nonlocal made
            made += 1
            if made == nth:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return dup(fd)

        monkeypatch.setattr(os, "dup", limited)

    return fail


def test_a_waker_without_descriptors() -> None:
    with no_more_descriptors(), pytest.raises(shipd.ConnectError, match=r"Too many open files.*ulimit -n"):
        Waker()


@pytest.mark.parametrize("lacking", ["a read-only descriptor", "a mapping"])
def test_an_image_that_cannot_be_made_is_given_back(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no")

    if lacking == "a mapping":
        monkeypatch.setattr(ImageMapping, "shared", fail)
    else:
        monkeypatch.setattr("shipd.images.slots.open_read_only", fail)
    with pytest.raises(OSError, match="no"):
        ImageMemory("model", 4096)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_daemon_without_descriptors_for_who_attaches(
    daemon: shipd.Daemon, fail_dup: Callable[[int], None], nth: int
) -> None:
    _push(daemon, _weights(1), "old")
    fail_dup(nth)
    with pytest.raises(shipd.Busy, match=r"Too many open files\. Let it have more descriptors"):
        shipd.attach(_model(), "model", socket=daemon.config.socket)
    model = _model()
    resident = shipd.attach(model, "model", socket=daemon.config.socket)
    assert _serves(model, resident, 1, "old")
    resident.detach()


def test_a_daemon_without_descriptors_for_who_is_attached(
    daemon: shipd.Daemon, fail_dup: Callable[[int], None]
) -> None:
    """It serves on, and gets its images when it has attached again: it must not stay with those that it had."""
    _push(daemon, _weights(1), "old")
    model, other = _model(), _model()
    resident = shipd.attach(model, "model", socket=daemon.config.socket, mode="copy")
    first = daemon.server.models["model"].sessions[0]
    # Mode flip takes one more image, of which the first process is told before the second has any.
    fail_dup(1)
    flipped = shipd.attach(other, "model", socket=daemon.config.socket, mode="flip")
    assert first.lost
    assert _serves(model, resident, 1, "old")
    until(lambda: len(daemon.server.models["model"].sessions) == 2, "the first is back")
    _push(daemon, _weights(2), "new")
    until(lambda: _serves(model, resident, 2, "new"), "the first follows")
    assert _serves(other, flipped, 2, "new")
    resident.detach()
    flipped.detach()


def test_descriptors_that_a_process_has_no_room_for() -> None:
    """The kernel drops them, and the peer takes them for delivered."""
    near, far = socket.socketpair(socket.AF_UNIX)
    lane = Lane(near, "peer", with_fds=True)
    with far:
        socket.send_fds(far, [b"x"], [far.fileno(), far.fileno()])
        with no_more_descriptors(), pytest.raises(ConnectionLost, match="more descriptors than this process may open"):
            lane.exchange(time.monotonic() + 10)
    lane.close()
