"""A file of a checkpoint whose bytes are still arriving: what every reader of checkpoints reads, and waits for."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.remote.download import Download
from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.remote.server import Refusal, Remote
from shipd.checkpoints.wording import quoted

_AHEAD: Final = 64 * 1024


class RemoteFile(OpenFile):
    """An ``OpenFile`` over what is fetched from a URL. ``path`` is the URL as it may be shown.

    What is asked for and not there yet is waited for. Everything raises what ``Fetching.wait`` raises.
    """

    local = False

    def __init__(self, download: Download, fetching: Fetching) -> None:
        """``download`` has been described, and is this file's from now on."""
        descriptor = download.spool.descriptor
        super().__init__(download.remote.shown, descriptor, os.fstat(descriptor))
        self._download = download
        self._fetching = fetching
        self._siblings: dict[str, Download] = {}

    @classmethod
    def fetch(cls, remote: Remote, fetching: Fetching) -> Self:
        """Begin to fetch ``remote``, and wait until it is known to be there and how long it is. Raises CheckpointError,
        Stalled or Interrupted."""
        return cls._described(_start(fetching, remote), fetching)

    @classmethod
    def _described(cls, download: Download, fetching: Fetching) -> Self:
        try:
            fetching.describe(download)
            if download.size is None:
                # Its end is the only one to tell.
                fetching.wait_for_all(download)
            return cls(download, fetching)
        except BaseException:
            fetching.close(download)
            raise

    @property
    def folder(self) -> str:
        """See ``OpenFile.folder``."""
        return self._download.remote.folder

    @property
    def stable_path(self) -> str:
        """See ``OpenFile.stable_path``; of the temporary file."""
        by_descriptor = Path(f"/proc/self/fd/{self.descriptor}")
        return str(by_descriptor) if by_descriptor.exists() else f"/dev/fd/{self.descriptor}"

    def stream(self) -> BinaryIO:
        """See ``OpenFile.stream``; fetches only what is read."""
        return io.BufferedReader(_Stream(self), _AHEAD)

    def read_at(self, offset: int, size: int) -> bytes:
        """See ``OpenFile.read_at``."""
        self._await(offset, min(offset + size, self.size))
        return super().read_at(offset, size)

    def load(self, *, whole: bool) -> None:
        """See ``OpenFile.load``. Raises CheckpointError where the disk has too little room for it, too."""
        self._fetching.load(self._download)
        if whole:
            self._fetching.wait_for_all(self._download)

    def changed(self) -> str | None:
        """See ``OpenFile.changed``; None once everything is there, since that does not change any more."""
        if self._download.complete or self._download.failure is None:
            return None
        return f"the file {quoted(self.path)}"

    def require(self, tensor: str, start: int, stop: int) -> None:
        """See ``OpenFile.require``."""
        self._await(start, stop, tensor)

    def require_each(self, tensor: str, starts: Sequence[int], stops: Sequence[int]) -> None:
        """See ``OpenFile.require_each``."""
        if not self._download.complete:
            for start, stop in zip(starts, stops, strict=True):
                self._await(start, stop, tensor)

    def _await(self, start: int, stop: int, tensor: str | None = None) -> None:
        if self.descriptor < 0:
            raise ValueError(f"{quoted(self.path)} is closed")
        if not self._download.complete:
            self._fetching.wait(self._download, start, stop, tensor)

    def missing_beside(self, names: Sequence[str]) -> list[str]:
        """See ``OpenFile.missing_beside``. Those that are there are being fetched from now on."""
        for name in names:
            if name not in self._siblings:
                self._siblings[name] = _start(self._fetching, self._download.remote.beside(name))
        missing = []
        for name in names:
            download = self._siblings[name]
            try:
                self._fetching.describe(download)
            except Exception:
                if download.failure is None or not download.failure.absent:
                    raise
                missing.append(name)
        return missing

    def open_beside(self, name: str) -> OpenFile:
        """See ``OpenFile.open_beside``."""
        download = self._siblings.pop(name, None) or _start(self._fetching, self._download.remote.beside(name))
        return self._described(download, self._fetching)

    def close(self) -> None:
        """See ``OpenFile.close``. Also gives up what ``missing_beside`` has begun and nobody opened."""
        self.descriptor = -1
        for download in (self._download, *self._siblings.values()):
            self._fetching.close(download)


def _start(fetching: Fetching, remote: Remote) -> Download:
    try:
        return fetching.start(remote)
    except Refusal as error:
        raise error.kind(str(error)) from error


class _Stream(io.RawIOBase):
    """A file as a stream of bytes, of which only what is read is waited for."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if at < 0:
            raise OSError(f"byte {at} lies before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._file.read_at(self._at, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
