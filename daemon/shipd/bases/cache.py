"""The last committed version of each model on disk: what makes the second ``shipctl push`` of a model incremental.

Nothing here fails a push. What goes wrong in reading is a base that is not there; in writing, a reason to be told once.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Self

from shipd.bases.base import MAX_BASES, Base
from shipd.bases.cache_file import FileBase, Unusable, decode_structure, file_size, read_header, write_version
from shipd.bases.cache_folder import CacheFolder, file_name
from shipd.bases.store import obtainable
from shipd.errors import ShipError
from shipd.units import format_bytes
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from shipproto.structure import Structure

log = logging.getLogger("shipd.bases")

VARIABLE: Final = "SHIPD_CACHE"
"""Names the folder; empty switches the cache off."""

DEFAULT_LIMIT: Final = 10 << 30
"""Bytes of all versions. While one is written, the one that it replaces is there as well."""

_SPARE_SHARE: Final = 0.05
"""Of the bytes that the disk has free: these stay free."""


class VersionCache:
    """A ``Bases`` on disk. ``folder`` None: switched off, and nothing is found or kept.

    limit   bytes of all versions together
    """

    def __init__(self, folder: Path | None, *, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder
        self._limit = limit

    @classmethod
    def default(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The user's own: $SHIPD_CACHE, or shipd/versions in $XDG_CACHE_HOME, by default ~/.cache."""
        named = environment.get(VARIABLE)
        if named is not None:
            return cls(Path(named) if named else None)
        home = environment.get("XDG_CACHE_HOME", "")
        if not Path(home).is_absolute():  # as the specification of the variable asks, also where it is empty
            try:
                home = str(Path.home() / ".cache")
            except RuntimeError:  # There is no home.
                return cls(None)
        return cls(Path(home) / "shipd" / "versions")

    def digests(self, model: str, offered: Structure) -> tuple[bytes, ...]:
        """See ``Bases.digests``; by what the files say of themselves, which ``open`` proves."""
        found: list[bytes] = []
        if self.folder is None:
            return ()
        try:
            with CacheFolder.open(self.folder) as folder:
                for file in reversed(folder.files(model)):
                    found += _digest_of(folder, file.name, model, offered)
        except OSError as error:
            _note(error)
        return tuple(dict.fromkeys(found))[:MAX_BASES]

    def open(self, model: str, layout: Layout, digest: bytes) -> Base | None:
        """See ``Bases.open``. Makes a pass over the file."""
        if self.folder is None:
            return None
        name = file_name(model, layout.structure)
        try:
            with CacheFolder.open(self.folder) as folder:
                descriptor = folder.open_file(name)
                try:
                    base = FileBase(descriptor, layout, digest)
                except BaseException:
                    os.close(descriptor)
                    raise
                try:
                    folder.touch(name)
                except OSError as error:
                    _note(error)
                return base
        except (OSError, Unusable) as error:
            _note(error)
            return None

    def keep(self, model: str, digests: LeafDigests, read_chunk: Callable[[int], memoryview]) -> str | None:
        """A receiver has committed a version of ``model``: keep it in place of the one before.

        digests      of what was sent; all of them known
        read_chunk   gives the bytes of a chunk as they lie in the image, valid until its next call
        Returns why the version is not kept, as the end of a sentence; None where it is, or the cache is switched off.
        What was kept before stays then. What ``read_chunk`` raises is a reason where it is a ShipError or an OSError.
        Does not wait where another process is writing.
        """
        if self.folder is None:
            return None
        try:
            with CacheFolder.open(self.folder, create=True) as folder, folder.locked() as ours:
                if not ours:
                    return f"another process is writing to {self.folder}"
                return self._keep(folder, model, digests, read_chunk)
        except OSError as error:
            return f"{self.folder} cannot be used: {error.strerror or error}"
        except (Unusable, ShipError) as error:
            return str(error)

    def _keep(
        self, folder: CacheFolder, model: str, digests: LeafDigests, read_chunk: Callable[[int], memoryview]
    ) -> str | None:
        layout = digests.layout
        name, size = file_name(model, layout.structure), file_size(model, layout)
        folder.remove_partial()
        if _holds(folder, name, model, digests):
            folder.touch(name)
            return None
        if size > self._limit:
            return f"it has {format_bytes(size)} and at most {format_bytes(self._limit)} are kept in {self.folder}"
        folder.make_room(name, size, self._limit)
        free = folder.free()
        if size > free * (1 - _SPARE_SHARE):
            return f"it has {format_bytes(size)} and the disk of {self.folder} has {format_bytes(free)} left"
        with folder.replacing(name) as descriptor:
            write_version(descriptor, model, digests, read_chunk)
        return None


def _digest_of(folder: CacheFolder, name: str, model: str, offered: Structure) -> list[bytes]:
    """The digest of the version in a file, if it is the model's and of a structure that can be made."""
    try:
        descriptor = folder.open_file(name)
        try:
            header, _ = read_header(descriptor)
        finally:
            os.close(descriptor)
        if header.model != model:
            return []
        same = header.structure == offered.encoded
        return [header.digest] if same or obtainable(decode_structure(header), offered) else []
    except (OSError, Unusable) as error:
        _note(error)
        return []


def _holds(folder: CacheFolder, name: str, model: str, digests: LeafDigests) -> bool:
    """Whether a file says that it is this very version, and has the size for it."""
    try:
        descriptor = folder.open_file(name)
    except OSError:
        return False
    try:
        header, start = read_header(descriptor)
        size = os.fstat(descriptor).st_size
    except (OSError, Unusable):
        return False
    finally:
        os.close(descriptor)
    known = (header.model, header.digest, size) == (model, digests.version_digest(), start + digests.layout.size)
    return known and header.structure == digests.layout.structure.encoded


def _note(error: Exception) -> None:
    if not isinstance(error, FileNotFoundError):
        log.debug("a cached version cannot be used", extra={"why": str(error)})
