"""A checkpoint file while it is open: opened with typed errors, and watched for changes.

A file that is replaced by another (written aside and renamed, as careful savers do) is no change: what is
open stays as it was. A file that is written in place is one, and is noticed by its size and time of change.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar, Final, Self

from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError, TensorChanged

_ADVICE: Final[dict[type[OSError], str]] = {
    FileNotFoundError: "there is no such file: check the path",
    PermissionError: "permission to read it is missing: run as its owner, or make it readable",
    NotADirectoryError: "a part of the path is a file and not a directory: check the path",
}


class OpenFile:
    """A regular file, open for reading. ``size`` is what it was when it was opened.

    ``remote.file`` has one whose bytes are still arriving; everything here is asked in such a way that it can wait for
    those that are needed.
    """

    local: ClassVar[bool] = True
    """Whether it lies in a directory of this host."""

    def __init__(self, path: str, descriptor: int, status: os.stat_result) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = status.st_size
        self._opened = _identity(status)

    @classmethod
    def open(cls, path: str) -> Self:
        """Open ``path``. Raises CheckpointError where that is not possible or it is not a regular file."""
        try:
            # O_NONBLOCK: opening a named pipe would otherwise wait for a writer, for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            advice = _ADVICE.get(type(error), error.strerror or str(error))
            raise CheckpointError(f"cannot open {quoted(path)}: {advice}") from error
        except ValueError as error:  # a NUL in the path
            raise CheckpointError(f"cannot open {quoted(path)}: {error}") from error
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise CheckpointError(f"{quoted(path)} is a directory and not a file")
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(
                    f"{quoted(path)} is a pipe, socket or device; a checkpoint must be a regular file, "
                    "so that it can be mapped into memory"
                )
            return cls(path, descriptor, status)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def stable_path(self) -> str:
        """A path that opens this very file, also when another has taken its name meanwhile."""
        by_descriptor = Path(f"/proc/self/fd/{self.descriptor}")
        return str(by_descriptor) if by_descriptor.exists() else self.path

    @property
    def folder(self) -> str:
        """What it lies in, for messages."""
        return str(Path(self.path).parent)

    def stream(self) -> BinaryIO:
        """The file as a stream, from its beginning. To close it closes nothing else."""
        return open(self.descriptor, "rb", closefd=False)

    def load(self, *, whole: bool) -> None:
        """It is going to be read: fetch it, where it is not there yet, and with ``whole`` wait for that."""

    def missing_beside(self, names: Sequence[str]) -> list[str]:
        """Which of the files of these names, relative paths, are not there beside this one."""
        return [name for name in names if not (Path(self.path).parent / name).exists()]

    def open_beside(self, name: str) -> "OpenFile":
        """The file of that name beside this one. Raises what ``open`` raises."""
        return OpenFile.open(str(Path(self.path).parent / name))

    def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer only at the end of the file."""
        parts = []
        try:
            while size and (part := os.pread(self.descriptor, size, offset)):
                parts.append(part)
                offset += len(part)
                size -= len(part)
        except OSError as error:
            raise CheckpointError(f"reading {quoted(self.path)} failed at byte {offset}: {error.strerror}") from error
        return b"".join(parts)

    def changed(self) -> str | None:
        """What happened to the file since it was opened, or None. About a microsecond."""
        now = self._status()
        if now.st_size != self.size:
            return f"the file {quoted(self.path)} (it had {self.size} bytes and now has {now.st_size})"
        if _identity(now) != self._opened:
            return f"the file {quoted(self.path)} (it was written to while it was being read)"
        return None

    def require_whole(self, tensor: str) -> None:
        """Raise TensorChanged where the file is shorter than when it was opened.

        To touch a mapped page behind the end of its file kills the process with SIGBUS, so this is asked
        before every read. It leaves a window of microseconds, from here until the bytes are used, in which
        a truncation still would: that is the price of mapping a file that others may cut. Saving to a new
        file and renaming it is safe at any time.
        """
        size = self._status().st_size
        if size < self.size:
            raise TensorChanged(
                f"{quoted(self.path)} was cut from {self.size} to {size} bytes while tensor {quoted(tensor)} "
                "was being read; save to a new file and rename it instead, then push again",
                tensor=tensor,
            )

    def require(self, tensor: str, start: int, stop: int) -> None:  # noqa: ARG002  here all of it is there
        """Before bytes [start, stop) of the file are read through a mapping, which are of ``tensor``: see
        ``require_whole``."""
        self.require_whole(tensor)

    def require_each(self, tensor: str, starts: Sequence[int], stops: Sequence[int]) -> None:  # noqa: ARG002  as above
        """As ``require``, of several ranges, the first of which is of ``tensor``."""
        self.require_whole(tensor)

    def _status(self) -> os.stat_result:
        if self.descriptor < 0:
            raise ValueError(f"{quoted(self.path)} is closed")
        return os.fstat(self.descriptor)

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino
