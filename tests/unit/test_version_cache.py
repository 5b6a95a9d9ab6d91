import errno
import fcntl
import logging
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from shipd.bases.base import BaseLost
from shipd.bases.cache import VersionCache
from shipd.bases.cache_file import file_size
from shipd.bases.cache_folder import MAX_FILES, file_name
from shipd.errors import TensorChanged
from shipproto.layout import Layout
from shipproto.limits import PAGE_SIZE
from tests.support.bases import Version, assert_reads, model, raising, read
from tests.support.models import SMALL, build, leaves_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "versions"


@pytest.fixture
def cache(folder: Path) -> VersionCache:
    return VersionCache(folder)


def keep(cache: VersionCache, version: Version, name: str = "m") -> str | None:
    return cache.keep(name, version.digests, version.chunk)


def assert_kept(cache: VersionCache, version: Version, name: str = "m") -> None:
    """That this and no other version of its structure is found, and is what it was."""
    assert cache.digests(name, version.layout.structure) == (version.digest,)
    base = cache.open(name, version.layout, version.digest)
    assert_reads(base, version)
    assert base is not None
    base.close()


def files(folder: Path) -> list[str]:
    """What lies there besides the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_the_last_version_is_kept(cache: VersionCache, folder: Path) -> None:
    generator = np.random.default_rng(1)
    with leaves_of(512):
        version = Version.of(build(SMALL))
        assert cache.digests("m", version.layout.structure) == ()
        assert cache.open("m", version.layout, version.digest) is None
        for _ in range(3):
            assert keep(cache, version) is None
            assert_kept(cache, version)
            assert cache.open("m", version.layout, bytes(16)) is None
            assert len(files(folder)) == 1
            version = version.next(generator, 0.01)
        assert_kept(VersionCache(folder), Version(version.layout, read_image(folder, version)))
        assert cache.digests("another", version.layout.structure) == ()
        assert cache.open("another", version.layout, version.digest) is None


def read_image(folder: Path, version: Version) -> bytes:
    """The image in the one file, which begins on a page and ends with the file."""
    (name,) = files(folder)
    content = (folder / name).read_bytes()
    assert (len(content) - version.layout.size) % PAGE_SIZE == 0
    assert len(content) == file_size("m", version.layout)
    return content[-version.layout.size :]


@pytest.mark.parametrize("sizes", [(), (0, 0), (1,), (1 << 20, 77)])
def test_models_of_every_size(cache: VersionCache, sizes: tuple[int, ...]) -> None:
    version = Version.of(model(*sizes))
    assert keep(cache, version) is None
    assert_kept(cache, version)


def test_padding_is_zeros(cache: VersionCache) -> None:
    """Behind the last chunk of each large tensor, which are not full, and between packed ones."""
    with leaves_of(512):
        version = Version.of(model(1301, 1001, 77, 600, 33))
        assert keep(cache, version) is None
        assert_kept(cache, version)


def test_a_receiver_that_lacks_what_is_offered(cache: VersionCache) -> None:
    ruling, offered = build([row for row in SMALL if row.name != "steps"]), build(SMALL)
    version = Version.of(ruling)
    keep(cache, version)
    assert cache.digests("m", offered) == (version.digest,)
    assert cache.open("m", Layout.of(offered), version.digest) is None
    more = Version.of(offered)
    keep(cache, more)
    os.utime(cache.folder / file_name("m", ruling), ns=(1, 1))  # type: ignore[operator]  # the fixture's has a folder
    assert cache.digests("m", offered) == (more.digest, version.digest)
    assert cache.digests("m", ruling) == (version.digest,)


def test_a_base_outlives_its_file(cache: VersionCache) -> None:
    first = Version.of(model(5000))
    second = first.next(np.random.default_rng(1), 0.1)
    keep(cache, first)
    base = cache.open("m", first.layout, first.digest)
    keep(cache, second)
    assert_reads(base, first)
    assert_kept(cache, second)
    assert base is not None
    base.close()
    base.close()
    with pytest.raises(BaseLost, match="closed"):
        read(base, 0, 1, first.layout)


def test_the_same_version_is_not_written_again(cache: VersionCache, folder: Path) -> None:
    version = Version.of(model(5000))
    keep(cache, version)
    (name,) = files(folder)
    os.utime(folder / name, ns=(1, 1))
    before = (folder / name).stat().st_ino
    assert cache.keep("m", version.digests, raising(version, 0, AssertionError("was read"))) is None
    after = (folder / name).stat()
    assert (after.st_ino, after.st_mtime_ns > 1) == (before, True)


def test_a_short_file_is_written_again(cache: VersionCache, folder: Path) -> None:
    version = Version.of(model(5000))
    keep(cache, version)
    (name,) = files(folder)
    os.truncate(folder / name, 4096)
    assert cache.open("m", version.layout, version.digest) is None
    assert keep(cache, version) is None
    assert_kept(cache, version)


# --- where ------------------------------------------------------------------------------------------------------------


def test_places(tmp_path: Path) -> None:
    def folder(**environment: str) -> Path | None:
        return VersionCache.default(environment).folder

    assert folder(SHIPD_CACHE="/somewhere", XDG_CACHE_HOME="/elsewhere") == Path("/somewhere")
    assert folder(SHIPD_CACHE="", XDG_CACHE_HOME="/elsewhere") is None
    assert folder(XDG_CACHE_HOME="/elsewhere") == Path("/elsewhere/shipd/versions")
    for home in ("", "relative"):
        assert folder(XDG_CACHE_HOME=home) == Path.home() / ".cache/shipd/versions"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert VersionCache.default({}).folder is None


def test_switched_off() -> None:
    off = VersionCache(None)
    version = Version.of(model(100))
    assert keep(off, version) is None
    assert off.digests("m", version.layout.structure) == ()
    assert off.open("m", version.layout, version.digest) is None


def test_nobody_else_can_read(cache: VersionCache, folder: Path) -> None:
    keep(cache, Version.of(model(100)))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_links_are_not_followed(cache: VersionCache, folder: Path, tmp_path: Path) -> None:
    version = Version.of(model(100))
    keep(cache, version)
    (name,) = files(folder)
    victim = tmp_path / "victim"
    (folder / name).rename(victim)
    (folder / name).symlink_to(victim)
    content = victim.read_bytes()
    assert cache.digests("m", version.layout.structure) == ()
    assert cache.open("m", version.layout, version.digest) is None
    following = version.next(np.random.default_rng(1), 0.5)
    assert keep(cache, following) is None
    assert not (folder / name).is_symlink()
    assert victim.read_bytes() == content
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(victim)
    reason = keep(cache, version)
    assert reason is not None
    assert "symbolic links" in reason
    assert victim.read_bytes() == content


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    reason = keep(VersionCache(tmp_path / "link"), Version.of(model(100)))
    assert reason is not None
    assert "is a link or no folder" in reason
    assert list(real.iterdir()) == []
    (tmp_path / "file").write_text("")
    reason = keep(VersionCache(tmp_path / "file"), Version.of(model(100)))
    assert reason is not None
    assert "File exists" in reason


def test_a_folder_of_others(cache: VersionCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = Version.of(model(100))
    keep(cache, version)
    folder.chmod(0o777)
    reason = keep(cache, version)
    assert reason is not None
    assert "can be written to by others" in reason
    assert cache.digests("m", version.layout.structure) == ()
    folder.chmod(0o700)
    mine = os.geteuid()
    monkeypatch.setattr("shipd.bases.cache_folder.os.geteuid", lambda: mine + 1)
    assert cache.open("m", version.layout, version.digest) is None
    for there in (folder, folder.parent / "new" / "versions"):
        reason = keep(VersionCache(there), version)
        assert reason is not None
        assert "belongs to another user" in reason
    monkeypatch.undo()
    assert_kept(cache, version)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_nothing_is_made_in_the_home_of_others(tmp_path: Path) -> None:
    """As with sudo, whose home is often still that of the caller."""
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 1000, -1)
    reason = keep(VersionCache(home / ".cache" / "shipd" / "versions"), Version.of(model(100)))
    assert reason is not None
    assert f"{home} belongs to another user" in reason
    assert list(home.iterdir()) == []


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    versions = {name: Version.of(model(100_000 + at)) for at, name in enumerate("abcd")}
    size = file_size("a", versions["a"].layout)
    cache = VersionCache(folder, limit=3 * size)
    for at, name in enumerate("abc"):
        assert keep(cache, versions[name], name) is None
        os.utime(folder / file_name(name, versions[name].layout.structure), ns=(at, at))
    # Opening counts as use.
    assert_kept(cache, versions["a"], "a")
    assert keep(cache, versions["d"], "d") is None
    assert files(folder) == sorted(file_name(name, versions[name].layout.structure) for name in "acd")
    reason = keep(VersionCache(folder, limit=size - 1), versions["a"].next(np.random.default_rng(1), 0.1), "a")
    assert reason is not None
    assert reason.startswith("it has 1")
    assert_kept(cache, versions["a"], "a")


def test_the_number_of_files_is_bounded(cache: VersionCache, folder: Path) -> None:
    version = Version.of(model(10))
    keep(cache, version, "first")
    (name,) = files(folder)
    for at in range(MAX_FILES):
        (folder / f"{at:016x}{name[16:]}").write_bytes(b"")
    keep(cache, version, "second")
    assert len(files(folder)) == MAX_FILES
    assert_kept(cache, version, "second")


def test_what_else_lies_there_is_left_alone(cache: VersionCache, folder: Path) -> None:
    version = Version.of(model(10))
    keep(cache, version)
    (folder / "notes.txt").write_text("mine")
    (folder / f"{file_name('m', version.layout.structure)}-{'0' * 16}.partial").write_bytes(bytes(100))
    tight = VersionCache(folder, limit=file_size("other", version.layout))
    assert keep(tight, version, "other") is None
    assert files(folder) == sorted(["notes.txt", file_name("other", version.layout.structure)])


def test_a_full_disk_is_left_some_room(cache: VersionCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = Version.of(model(100_000))
    monkeypatch.setattr(
        "shipd.bases.cache_folder.CacheFolder.free", lambda _: file_size("m", version.layout) * 100 // 96
    )
    reason = keep(cache, version)
    assert reason is not None
    assert "left" in reason
    assert files(folder) == []


# --- two at once -----------------------------------------------------------------------------------------------------


def test_who_comes_second_does_not_write(cache: VersionCache, folder: Path) -> None:
    first = Version.of(model(5000))
    second = first.next(np.random.default_rng(1), 0.1)
    keep(cache, first)
    lock = os.open(folder / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert keep(cache, second) == f"another process is writing to {folder}"
        # Reading needs no lock.
        assert_kept(cache, first)
    finally:
        os.close(lock)
    assert keep(cache, second) is None
    assert_kept(cache, second)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_every_damaged_byte_is_found(cache: VersionCache, folder: Path) -> None:
    """In the header, between tensors, in tensors, behind the last one: what is opened is what was kept, or nothing."""
    with leaves_of(512):
        version = Version.of(build(SMALL))
        keep(cache, version)
        (name,) = files(folder)
        path = folder / name
        sound = path.read_bytes()
        start = len(sound) - version.layout.size
        opened = 0
        for place in [*range(0, start, 7), *range(start, len(sound), 31)]:
            damaged = bytearray(sound)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            base = cache.open("m", version.layout, version.digest)
            if base is not None:
                assert_reads(base, version)
                base.close()
                opened += 1
        # What is behind the header, up to the next page, means nothing.
        assert 0 < opened < start // 7
        for length in (0, 5, 31, 40, start, start + 1, len(sound) - 1):
            path.write_bytes(sound[:length])
            assert cache.open("m", version.layout, version.digest) is None
            assert cache.digests("m", version.layout.structure) in ((), (version.digest,))
        path.write_bytes(sound + b"\0")
        assert cache.open("m", version.layout, version.digest) is None
        path.write_bytes(sound)
        assert_kept(cache, version)


def test_the_file_of_another_version_in_its_place(cache: VersionCache, folder: Path) -> None:
    version, other = Version.of(model(5000)), Version.of(model(5001))
    keep(cache, version)
    keep(cache, other)
    names = [file_name("m", kept.layout.structure) for kept in (version, other)]
    (folder / names[0]).replace(folder / names[1])
    assert cache.open("m", other.layout, other.digest) is None
    assert cache.open("m", other.layout, version.digest) is None
    # A file under the name of a model that is not the one inside it.
    (folder / names[1]).rename(folder / file_name("n", version.layout.structure))
    assert cache.digests("n", version.layout.structure) == ()


def test_a_file_that_is_cut_while_it_is_read(cache: VersionCache, folder: Path) -> None:
    version = Version.of(model(500_000))
    keep(cache, version)
    base = cache.open("m", version.layout, version.digest)
    assert base is not None
    (name,) = files(folder)
    os.truncate(folder / name, 100_000)
    with pytest.raises(BaseLost, match="cut short"):
        read(base, 0, 1, version.layout)
    base.close()


def test_a_disk_that_fails(cache: VersionCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = Version.of(model(5000))
    keep(cache, version)
    base = cache.open("m", version.layout, version.digest)

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("shipd.bases.cache_file.os.preadv", fails)
    assert cache.open("m", version.layout, version.digest) is None
    assert base is not None
    with pytest.raises(BaseLost, match="Input/output error"):
        read(base, 0, 1, version.layout)
    base.close()


@pytest.mark.parametrize("error", [TensorChanged("moved"), OSError(errno.EIO, "Input/output error")])
def test_what_cannot_be_read_is_a_reason(cache: VersionCache, folder: Path, error: Exception) -> None:
    with leaves_of(512):
        first = Version.of(build(SMALL))
        second = first.next(np.random.default_rng(1), 0.1)
    keep(cache, first)
    reason = cache.keep("m", second.digests, raising(second, 2, error))
    assert reason is not None
    assert "moved" in reason or "Input/output error" in reason
    assert len(files(folder)) == 1
    assert_kept(cache, first)
    with pytest.raises(KeyError):
        cache.keep("m", second.digests, raising(second, 2, KeyError("a bug")))
    assert len(files(folder)) == 1
    assert_kept(cache, first)


def test_a_tensor_that_has_changed_is_not_kept(cache: VersionCache, folder: Path) -> None:
    first = Version.of(model(5000))
    other = first.next(np.random.default_rng(1), 0.1)
    assert cache.keep("m", first.digests, other.chunk) == "tensor 't00' has changed since it was sent"
    assert files(folder) == []


def test_what_is_wrong_with_files_is_logged(
    cache: VersionCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = Version.of(model(5000))
    with caplog.at_level(logging.DEBUG, "shipd.bases"):
        assert cache.open("m", version.layout, version.digest) is None
        assert caplog.records == []
        keep(cache, version)
        (folder / file_name("m", version.layout.structure)).write_bytes(b"something else entirely, and not short")
        assert cache.open("m", version.layout, version.digest) is None
    (record,) = caplog.records
    assert record.__dict__["why"] == "another format"
