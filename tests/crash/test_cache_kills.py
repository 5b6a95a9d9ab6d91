"""kill -9 and full disks while a cached version is written: what is found afterwards is the old or the new one."""

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shipd.bases.cache import VersionCache
from shipd.bases.cache_file import file_size
from tests.support.bases import Version, assert_reads, model
from tests.support.models import SMALL, build, leaves_of
from tests.unit.test_gate_forks import forking, in_child

_CALLS = ("open", "pwrite", "rename", "unlink", "close", "mkdir")
"""What writing a version asks the system for."""


@pytest.fixture
def versions() -> list[Version]:
    """Three in a row."""
    generator = np.random.default_rng(5)
    with leaves_of(512):
        found = [Version.of(build(SMALL))]
        for _ in range(2):
            found.append(found[-1].next(generator, 0.05))
    return found


def keep(cache: VersionCache, version: Version) -> str | None:
    return cache.keep("m", version.digests, version.chunk)


def found(cache: VersionCache, versions: list[Version]) -> list[Version]:
    """Which of ``versions`` can be opened; each is read in full."""
    opened = []
    for version in versions:
        base = cache.open("m", version.layout, version.digest)
        if base is not None:
            assert_reads(base, version)
            base.close()
            opened.append(version)
    return opened


def intercept(act: Callable[[int, Callable[[], Any]], Any]) -> None:
    """In a child: have ``act`` make every call, of which it is told the number."""
    numbers = iter(range(1 << 30))
    for name in _CALLS:
        real = getattr(os, name)

        def wrapped(*args: Any, _real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            return act(next(numbers), lambda: _real(*args, **kwargs))

        setattr(os, name, wrapped)


def killed_at(number: int, *, after: bool) -> Callable[[int, Callable[[], Any]], Any]:
    """Kills the process at a call, before or after it is made."""

    def act(at: int, call: Callable[[], Any]) -> Any:
        if at == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call()
        finally:
            # Also where it fails: a folder that is there already, say.
            if at == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return act


def run_child(work: Callable[[], None]) -> int:
    """How a forked child that runs ``work`` ends: 0, or the signal that killed it."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@forking
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["first", "second"])
def test_killed_at_every_call(tmp_path: Path, versions: list[Version], before: bool, after: bool) -> None:
    old, new, later = versions
    outcomes = []
    for number in range(1000):
        cache = VersionCache(tmp_path / str(number))
        if before:
            assert keep(cache, old) is None

        def child(cache: VersionCache = cache, number: int = number) -> None:
            intercept(killed_at(number, after=after))
            keep(cache, new)

        ended = run_child(child)
        present = found(cache, versions)
        assert present in ([[old], [new]] if before else [[], [new]])
        outcomes.append(present == [new])
        # Whoever comes next is not in the way of what was left behind, and clears it away.
        assert keep(cache, later) is None
        assert found(cache, versions) == [later]
        assert cache.folder is not None
        assert len(list(cache.folder.iterdir())) == 2
        if not ended:
            break
    else:
        raise AssertionError("it was killed every time")
    # It was killed before and after the new one was there, and not at all in the end; and never back again.
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 5
    assert outcomes.count(True) > 1


@forking
def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """EFBIG in the middle of writing."""
    first = Version.of(model(200_000))
    second = first.next(np.random.default_rng(1), 0.1)
    cache = VersionCache(tmp_path / "cache")
    assert keep(cache, first) is None

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        reason = keep(cache, second)
        assert reason is not None
        assert "File too large" in reason
        # Raised again, so that the proof below is not of what the limit would have hidden.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert found(cache, [first, second]) == [first]

    assert in_child(child) == ""
    assert found(cache, [first, second]) == [first]
    assert cache.folder is not None
    assert len(list(cache.folder.iterdir())) == 2


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A file system of its own, which takes root to mount."""
    path.mkdir()
    options = f"size={size},mode=0700"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC in the middle of writing: somebody else took what was free when it began."""
    first = Version.of(model(400_000))
    second = first.next(np.random.default_rng(1), 0.1)
    with small_disk(tmp_path / "disk", file_size("m", first.layout) * 3 // 2 // 4096 * 4096):
        cache = VersionCache(tmp_path / "disk")
        assert keep(cache, first) is None
        reason = keep(cache, second)
        assert reason is not None
        assert "the disk of" in reason
        monkeypatch.setattr("shipd.bases.cache_folder.CacheFolder.free", lambda _: 1 << 40)
        reason = keep(cache, second)
        assert reason is not None
        assert "No space left on device" in reason
        assert found(cache, [first, second]) == [first]
        assert len(list((tmp_path / "disk").iterdir())) == 2
