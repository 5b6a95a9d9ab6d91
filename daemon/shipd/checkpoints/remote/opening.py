"""From a URL to a file that is being fetched; and which file it is, where the URL names a directory."""

import posixpath
from typing import TYPE_CHECKING, Final

from shipd.checkpoints.directory import checkpoint_in
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.remote import location
from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.remote.file import RemoteFile
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError

if TYPE_CHECKING:
    from shipd.checkpoints.remote.filesystem import FilesystemFile

_WEB: Final = ("http", "https")

_MOST_SILENT: Final = 86400.0
"""Seconds of a read from a socket, which has no way of waiting for ever by the clock."""

_PAGE: Final = (b"<!doctype html", b"<html", b"<head", b"<body")


def open_url(url: str, fetching: Fetching) -> OpenFile:
    """The checkpoint's file at ``url``, of any scheme but file.

    Raises CheckpointError where it cannot be fetched, Stalled and Interrupted.
    """
    if location.scheme_of(url) in _WEB:
        return _open_on_web(url, fetching)
    return _open_on_filesystem(url, fetching)


def _open_on_web(url: str, fetching: Fetching) -> OpenFile:
    from shipd.checkpoints.remote.connections import Pool
    from shipd.checkpoints.remote.web import WebFile

    remote = WebFile(url, fetching.shared(Pool), min(fetching.stall / 2, _MOST_SILENT))
    if remote.original.path.partition("?")[0].endswith("/"):
        raise CheckpointError(
            f"{quoted(remote.shown)} is a directory, and over {location.scheme_of(url)} there is no telling what is in "
            "one; name the file, or the index of a checkpoint in several files (such as "
            f"{remote.folder}model.safetensors.index.json)"
        )
    file = RemoteFile.fetch(remote, fetching)
    try:
        opening = file.read_at(0, 512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        if opening.startswith(_PAGE):
            raise CheckpointError(
                f"{quoted(remote.shown)} is answered with a web page and not with a file: a page about the file, a "
                "login, or the list of a directory. Name the URL of the file itself (on Hugging Face with /resolve/ in "
                "it and not /blob/, on GitHub with /raw/); where it asks for a login, put name and password into the "
                "URL, or use a signed link"
            )
    except BaseException:
        file.close()
        raise
    return file


def _open_on_filesystem(url: str, fetching: Fetching) -> OpenFile:
    from shipd.checkpoints.remote.filesystem import FilesystemFile

    shown = location.shown(url)
    remote = fetching.call(lambda: FilesystemFile.of(url), shown)
    if fetching.call(remote.is_directory, shown):
        folder = _Folder(remote, fetching)
        return folder.open(checkpoint_in(folder))
    return RemoteFile.fetch(remote, fetching)


class _Folder:
    """A ``Folder`` of a filesystem of fsspec."""

    def __init__(self, remote: "FilesystemFile", fetching: Fetching) -> None:
        self.path = remote.shown
        self._remote = remote
        self._fetching = fetching

    def names(self) -> list[str]:
        """See ``Folder.names``."""
        entries = self._fetching.call(self._remote.entries, self.path)
        return sorted(posixpath.basename(entry["name"]) for entry in entries if entry.get("type") == "file")

    def open(self, name: str) -> OpenFile:
        """See ``Folder.open``."""
        return RemoteFile.fetch(self._remote.inside(name), self._fetching)
