"""Fetching itself: who waits and for how long, what it costs, and what is left of it."""

import os
import resource
import threading
import time
from collections.abc import Iterator

import pytest

from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, Interrupted, Stalled
from tests.support.checkpoints import MIB, content, large, medium
from tests.support.file_servers import FileServer, file_of, quick
from tests.support.frames import Way
from tests.support.naive import Tensor
from tests.support.processes import Background, Helper
from tests.support.proxy import Proxy
from tests.support.reading import digest_of, read_through

pytest_plugins = ["tests.support.file_server_fixtures"]

pytestmark = pytest.mark.usefixtures("no_proxies")


@pytest.fixture
def silent(no_proxies: None) -> Iterator[FileServer]:
    """A server that says nothing after five megabytes."""
    with FileServer(ranges=False, silent_at=5_000_000) as files:
        files.serve("/w", file_of(medium()))
        yield files


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_cancelling_ends_every_wait_at_once(silent):
    fetching = quick(stall=60.0)
    source = open_source(silent.url("/w"), fetching=fetching)
    with Background(digest_of, source) as reading:
        assert silent.silent.acquire(timeout=20)
        began = time.monotonic()
        fetching.cancel()
        error = reading.error()
    assert time.monotonic() - began < 30
    assert isinstance(error, Interrupted)
    assert str(error) == f"interrupted while {source.origin!r} was being fetched; nothing was swapped"
    # What is there is still there.
    first = source.structure.index["block.0.weight"]
    assert source.read(first, 0, 4) == medium().data["block.0.weight"][:4]
    source.close()
    with pytest.raises(Interrupted):
        open_source(silent.url("/w"), fetching=fetching)


def test_cancelling_ends_the_opening(silent):
    silent.silent_at = 0
    fetching = quick(stall=60.0)
    with Background(open_source, silent.url("/w"), fetching=fetching) as opening:
        assert silent.silent.acquire(timeout=20)
        fetching.cancel()
        assert isinstance(opening.error(), Interrupted)


def test_a_timeout_is_kept_to(silent):
    source = open_source(silent.url("/w"), fetching=quick(timeout=2.0))
    with pytest.raises(Stalled) as caught:
        digest_of(source)
    assert str(caught.value) == f"{source.origin!r} was still being fetched when the timeout of 2 s was over"
    source.close()


def test_to_be_asked_again_is_no_sign_of_life(silent):
    """Each time it answers, and says nothing new."""
    source = open_source(silent.url("/w"), fetching=quick(stall=1.0, pauses=(0.01,) * 100))
    with Background(digest_of, source) as reading:
        error = reading.error(20)
    assert isinstance(error, Stalled), error
    assert len(silent.asked) > 1
    source.close()


def test_what_another_server_sends_is_no_sign_of_life(silent):
    fetching = quick(stall=2.0, pauses=(0.01,) * 100)
    with FileServer() as other, Proxy(other.port) as link:
        # Half a minute of it.
        link.throttle(5e5, Way.TO_SENDER)
        other.serve("/w", file_of(medium()))
        slow = open_source(f"http://{link.address}/w", fetching=fetching)
        source = open_source(silent.url("/w"), fetching=fetching)
        with Background(digest_of, source) as reading:
            error = reading.error(20)
        assert isinstance(error, Stalled), error
        assert f"fetching {source.origin!r} has stalled" in str(error)
        source.close()
        slow.close()


def test_a_file_is_closed_while_it_is_fetched(silent):
    before = set(threading.enumerate())
    source = open_source(silent.url("/w"), fetching=quick())
    assert silent.silent.acquire(timeout=20)
    assert "shipd fetching" in {thread.name for thread in threading.enumerate()}
    source.close()
    source.close()
    ours = {thread.name for thread in set(threading.enumerate()) - before}
    assert "shipd fetching" not in ours
    with pytest.raises(ValueError, match="is closed"):
        source.read(0, 0, 4)


def test_several_threads_read_one_file(server):
    version = content(Tensor(f"t.{at}", "uint8", (MIB,)) for at in range(8))
    source = open_source(server.serve("/w", file_of(version)), fetching=quick())
    readers = [Background(source.read, row, 0, MIB) for row in (7, 3, 5, 1)]
    for reader, row in zip(readers, (7, 3, 5, 1), strict=True):
        with reader:
            assert reader.result() == version.data[f"t.{row}"]
    source.close()
    assert server.sent <= len(server.files["/w"])


def test_files_of_one_push_share_connections(server):
    fetching = quick()
    first = open_source(server.serve("/1", file_of(medium(1))), fetching=fetching)
    second = open_source(server.serve("/2", file_of(medium(2))), fetching=fetching)
    assert (digest_of(first), digest_of(second)) == (medium(1).digest, medium(2).digest)
    assert len(server.sockets) <= 4 < len(server.asked)
    first.close()
    assert digest_of(second) == medium(2).digest
    second.close()


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_fetched_file_needs_neither_memory_nor_torch(ranges):
    with FileServer(ranges=ranges) as files:
        url = files.serve("/w", file_of(large(100)))
        with Helper(read_through, url, "remote.web") as reader:
            found = reader.next(60)
            assert reader.wait() == 0
    assert found["digest"] == large(100).digest
    assert found["growth"] <= 80 * MIB
    assert not found["torch"]


def test_nothing_is_left_in_the_directory_for_temporary_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = open_source(server.serve("/w", file_of(medium())), fetching=quick())
    assert list(tmp_path.iterdir()) == []
    assert digest_of(source) == medium().digest
    source.close()


# --- where there is no room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_file_that_does_not_fit_the_disk_is_refused_at_once(ranges, tmp_path, monkeypatch):
    """By the size that the server claims, before the disk is full."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status = os.statvfs(tmp_path)
    size = status.f_bavail * status.f_frsize + (64 << 30)
    with FileServer(ranges=ranges, claims=size) as files:
        url = files.serve("/w", file_of(medium()))
        with pytest.raises(CheckpointError) as caught:
            open_source(url, fetching=quick())
        assert files.sent < 13_000_000
    told = str(caught.value)
    kept = "it is kept in a temporary file while it is pushed, which needs "
    assert told.startswith(f"{url!r} does not fit the disk: {kept}")
    assert f"{tmp_path!s}" in told
    assert " are free there. Set TMPDIR to a directory on a disk with more room" in told


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file may become longer than a megabyte, as if the disk was full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "no length"])
@pytest.mark.usefixtures("short_files")
def test_a_disk_that_fills_up_is_told(chunked, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with FileServer(ranges=False, chunked=chunked) as files, pytest.raises(CheckpointError) as caught:
        open_source(files.serve("/w", bytes(3 * MIB)), fetching=quick())
    size = MIB + 65536 if chunked else 3 * MIB
    assert str(caught.value) == (
        f"the temporary file in {str(tmp_path)!r} cannot take {size} bytes (File too large); set TMPDIR to a directory "
        "on a disk with more room"
    )


def test_a_directory_that_cannot_be_written_to_is_told(server, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/self")
    with pytest.raises(CheckpointError) as caught:
        open_source(server.url("/w"), fetching=Fetching())
    told = str(caught.value)
    assert told.startswith("what is fetched is kept in a temporary file, and none can be made (")
    assert told.endswith("): set TMPDIR to a directory that can be written to")
