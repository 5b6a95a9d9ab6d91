"""The folder of cached versions: whose it is, who may write to it at the moment, and what gives way.

    <model>-<structure>.version   one file for each model and structure: xxh3-64 of the name, the structure's digest
    <...>.partial                 one that is being written; under the lock, one that a killed process left behind
    lock                          held by whoever writes

Everything is opened relative to the folder's descriptor, which is the caller's own folder and no link to somebody
else's, and never through a link.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

import xxhash

from shipproto.structure import Structure

_SUFFIX: Final = ".version"
_PARTIAL: Final = ".partial"
_VERSION_NAME: Final = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.version")
_PARTIAL_NAME: Final = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.version-[0-9a-f]{16}\.partial")

MAX_FILES: Final = 256
"""Versions in a folder, however small: every push looks through their names."""


class FolderRefused(OSError):
    """The folder is not one to keep weights in: the message says why."""


class CachedFile(NamedTuple):
    """A version in the folder; ``used`` is when, in nanoseconds since 1970."""

    name: str
    size: int
    used: int


def file_name(model: str, structure: Structure) -> str:
    """The name of a model's file."""
    return f"{_model_part(model)}-{structure.digest.hex()}{_SUFFIX}"


def _model_part(model: str) -> str:
    return xxhash.xxh3_64_hexdigest(model.encode())


class CacheFolder:
    """An open folder. ``with`` closes it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> Self:
        """Open the folder. Raises OSError, FolderRefused where it belongs to or can be changed by somebody else."""
        if create:
            _require_own_place(path)
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise FolderRefused(error.errno, f"{path} is a link or no folder") from error
            raise
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid():
                raise FolderRefused(errno.EPERM, f"{path} belongs to another user")
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise FolderRefused(errno.EPERM, f"{path} can be written to by others")
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether this process may write now. Does not wait: who comes second does without. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open("lock", flags, 0o600, dir_fd=self._descriptor)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                try:
                    yield True
                finally:
                    # Closing alone would leave it to a child that was forked meanwhile.
                    fcntl.flock(lock, fcntl.LOCK_UN)
        finally:
            os.close(lock)

    def files(self, model: str | None = None) -> list[CachedFile]:
        """Versions, of one model or all, the least recently used first. Raises OSError."""
        prefix = "" if model is None else f"{_model_part(model)}-"
        found = []
        with os.scandir(self._descriptor) as entries:
            for entry in entries:
                if entry.name.startswith(prefix) and _VERSION_NAME.fullmatch(entry.name):
                    # Another process may be replacing or dropping it.
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        found.append(CachedFile(entry.name, status.st_size, status.st_mtime_ns))
        return sorted(found, key=lambda file: (file.used, file.name))

    def open_file(self, name: str) -> int:
        """A descriptor for reading. Raises OSError, also where it is no regular file of this user's."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(name, flags, dir_fd=self._descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            os.close(descriptor)
            raise FolderRefused(errno.EPERM, f"{name} is not this user's own file")
        return descriptor

    def touch(self, name: str) -> None:
        """Count as used now. Raises OSError."""
        os.utime(name, dir_fd=self._descriptor, follow_symlinks=False)

    def free(self) -> int:
        """Bytes that this user may still write to the disk. Raises OSError."""
        status = os.fstatvfs(self._descriptor)
        return status.f_bavail * status.f_frsize

    # --- under the lock ------------------------------------------------------------------------------------

    def remove_partial(self) -> None:
        """Remove what a process that was killed while writing has left. Raises OSError."""
        with os.scandir(self._descriptor) as entries:
            left = [entry.name for entry in entries if _PARTIAL_NAME.fullmatch(entry.name)]
        for name in left:
            os.unlink(name, dir_fd=self._descriptor)

    def make_room(self, name: str, size: int, limit: int) -> None:
        """Remove the least recently used until a file ``name`` of ``size`` bytes fits beside the others.

        A file that it is going to replace is not counted and stays. Raises OSError.
        """
        others = [file for file in self.files() if file.name != name]
        used = sum(file.size for file in others)
        while others and (used + size > limit or len(others) >= MAX_FILES):
            file = others.pop(0)
            os.unlink(file.name, dir_fd=self._descriptor)
            used -= file.size

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[int]:
        """A descriptor to write to; at the end its file takes the name, or is removed where an exception passes.

        A process killed at any moment leaves the file that was there before, or the new one. There is no fsync: after
        a power failure the disk may hold less than what was written, which is found when the file is opened, and a
        second of flushing for each gigabyte would be paid by every push. Raises OSError.
        """
        partial = f"{name}-{secrets.token_hex(8)}{_PARTIAL}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o600, dir_fd=self._descriptor)
        try:
            try:
                yield descriptor
            finally:
                os.close(descriptor)
            os.rename(partial, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=self._descriptor)
            raise


def _require_own_place(path: Path) -> None:
    """Refuse to make a folder inside another user's: with sudo, one's home is often still that of whoever called it."""
    for parent in (path, *path.absolute().parents):
        try:
            owner = parent.stat().st_uid
        except FileNotFoundError:
            continue
        if owner not in (0, os.geteuid()):
            raise FolderRefused(errno.EPERM, f"{parent} belongs to another user")
        return
