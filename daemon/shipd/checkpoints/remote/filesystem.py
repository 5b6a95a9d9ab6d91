"""Files of every scheme but http and https, through fsspec: s3, gs, az, sftp, hf and whatever else it knows.

fsspec is asked on threads that fetch and never on an event loop of ours. Its calls cannot be interrupted: who gives up
waiting for one leaves its thread behind, until fsspec itself gives up.
"""

import posixpath
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from shipd.checkpoints.remote import location
from shipd.checkpoints.remote.server import Answer, Broken, Refusal, changed
from shipd.checkpoints.wording import quoted

_MOST: Final = 4 << 20
"""Bytes of one call: it returns them all at once, and as many threads as fetch have one under way."""

_CHECKSUMS: Final = ("etag", "md5hash", "md5", "crc32c", "checksum", "generation")

_TIMES: Final = ("lastmodified", "last_modified", "mtime", "modified", "updated", "created")
"""What filesystems tell of a file that is another for another version of it, in lower case."""


class FilesystemFile:
    """A ``Remote`` of a filesystem of fsspec."""

    most = _MOST

    def __init__(self, url: str, filesystem: Any, path: str) -> None:
        self.shown = location.shown(url)
        self.folder = location.folder_of(url)
        self.filesystem = filesystem
        self.path = path
        self.found: Mapping[str, str] | None = None
        """What was told of its version at first."""
        self.size = 0
        self._url = url

    @classmethod
    def of(cls, url: str) -> "FilesystemFile":
        """Raises Refusal where there is no fsspec, or it does not know the scheme or lacks what that takes."""
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise Refusal(
                f"{quoted(location.shown(url))}: to read URLs of other schemes than http and https takes fsspec: "
                "pip install 'shipd[fsspec]'"
            ) from error
        try:
            # An instance of our own: no listing of an earlier push is believed.
            filesystem, path = url_to_fs(url, skip_instance_cache=True)
        except ImportError as error:
            raise Refusal(
                f"{quoted(location.shown(url))}: for this scheme fsspec needs one more package: {error}"
            ) from error
        except Exception as error:  # Each filesystem has its own ways to dislike a URL.
            raise Refusal(
                f"{quoted(location.shown(url))} cannot be opened by fsspec ({_text(error, url)}); check the URL"
            ) from error
        return cls(url, filesystem, path)

    def line(self) -> "FilesystemLine":
        """See ``Remote.line``."""
        return FilesystemLine(self)

    def is_directory(self) -> bool:
        """Whether it is no file. Of a file it is found out how long it is, and which version. Raises Refusal."""
        try:
            found = dict(self.filesystem.info(self.path))
        except Exception as error:
            raise self._refusal(error) from error
        if found.get("type") == "directory":
            return True
        size = found.get("size")
        if not isinstance(size, int) or size < 0:
            raise Refusal(f"{quoted(self.shown)}: fsspec cannot tell its size; download it, and push the file")
        self.size, self.found = size, _version(found)
        return False

    def confirm(self) -> None:
        """See ``Remote.confirm``."""
        try:
            self.filesystem.invalidate_cache(posixpath.dirname(self.path))
            now = _version(self.filesystem.info(self.path))
        except FileNotFoundError as error:
            raise changed(self.shown, "it is gone") from error
        except Exception as error:  # As above.
            raise Broken(f"what it is now cannot be found out ({_text(error, self._url)})") from error
        assert self.found is not None
        if what := _difference(self.found, now):
            raise changed(self.shown, what)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises Broken and Refusal."""
        try:
            content: bytes = self.filesystem.cat_file(self.path, start=start, end=stop)
        except FileNotFoundError as error:
            raise changed(self.shown, "it is gone") from error
        except Exception as error:  # As above.
            raise Broken(f"fsspec reports {_text(error, self._url)}") from error
        if len(content) > stop - start:
            raise Refusal(
                f"{quoted(self.shown)}: asked for {stop - start} bytes, fsspec returned {len(content)}; download the "
                "file, and push that"
            )
        return content

    def beside(self, name: str) -> "FilesystemFile":
        """See ``Remote.beside``."""
        return FilesystemFile(
            location.beside(self._url, name), self.filesystem, posixpath.join(posixpath.dirname(self.path), name)
        )

    def inside(self, name: str) -> "FilesystemFile":
        """The file of that name in this directory."""
        return FilesystemFile(f"{self._url.rstrip('/')}/{name}", self.filesystem, posixpath.join(self.path, name))

    def entries(self) -> list[Mapping[str, Any]]:
        """What is in this directory. Raises Refusal."""
        try:
            found: list[Mapping[str, Any]] = [dict(entry) for entry in self.filesystem.ls(self.path, detail=True)]
            if not all(isinstance(entry.get("name"), str) for entry in found):
                raise TypeError("entries without names")
        except Exception as error:
            raise self._refusal(error) from error
        return found

    def _refusal(self, error: Exception) -> Refusal:
        """Why nothing can be told of it. fsspec tries again by itself what may be over soon."""
        if isinstance(error, FileNotFoundError):
            return Refusal(f"{quoted(self.shown)}: there is no such file; check the URL", absent=True)
        if isinstance(error, PermissionError):
            return Refusal(
                f"{quoted(self.shown)}: reading it is not allowed ({_text(error, self._url)}); check the credentials, "
                "which fsspec takes from where the tools of that service have theirs (the environment, their files)"
            )
        return Refusal(
            f"{quoted(self.shown)} cannot be read ({_text(error, self._url)}); check the URL, the credentials and the "
            "network"
        )


class FilesystemLine:
    """A ``Line`` to a filesystem."""

    def __init__(self, file: FilesystemFile) -> None:
        self._file = file
        self._content = memoryview(b"")

    def ask(self, start: int, stop: int | None) -> Answer:
        """See ``Line.ask``."""
        file = self._file
        if file.found is None and file.is_directory():
            raise Refusal(f"{quoted(file.shown)} is a directory and not a file")
        end = min(file.size if stop is None else stop, file.size)
        self._content = memoryview(file.read(start, end) if start < end else b"")
        return Answer(file.size, start, end, in_parts=True)

    def read(self, into: memoryview) -> int:
        """See ``Line.read``."""
        count = min(len(into), len(self._content))
        into[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def done(self) -> None:
        """See ``Line.done``."""
        self._content = memoryview(b"")

    def close(self) -> None:
        """See ``Line.close``."""
        self.done()

    def abort(self) -> None:
        """See ``Line.abort``; a call of fsspec goes on."""


def _version(found: Mapping[str, Any]) -> Mapping[str, str]:
    # A time comes as a datetime from some questions, and as seconds from others.
    told = {
        name.lower(): str(value.timestamp() if isinstance(value, datetime) else value) for name, value in found.items()
    }
    return {name: told[name] for name in ("size", *_CHECKSUMS, *_TIMES) if name in told}


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What tells that they are of two versions; empty where nothing does. Not everything is told every time, and times
    are not always written alike: they count where there are no checksums."""
    names = ["size", *(name for name in _CHECKSUMS if name in before and name in now)]
    if len(names) == 1:
        names += (name for name in _TIMES if name in before and name in now)
    for name in names:
        if before[name] != now[name]:
            return f"its {name} was {quoted(before[name])}, and now is {quoted(now[name])}"
    return ""


def _text(error: Exception, url: str) -> str:
    """What it says, without what is secret in the URL."""
    return quoted(location.without_secrets(f"{type(error).__name__}: {error}", url))
