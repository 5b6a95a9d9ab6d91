"""The Unix socket as a file: who may connect, and whose it is when one is there already."""

import grp
import os
import socket
import stat
from pathlib import Path
from typing import Final

from shipd.errors import ConfigError

_BACKLOG: Final = 64


class SocketFile:
    """A listening Unix socket, readable and writable for its owner and its group only.

    Raises ConfigError where it cannot be had; a socket that nobody listens on any more is replaced.
    """

    def __init__(self, path: Path, group: str | None) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if path.is_socket():
                _remove_stale(path)
            # Before there is a file that would have to be removed again.
            gid = grp.getgrnam(group).gr_gid if group is not None else -1
            previous = os.umask(0o117)
            try:
                self.socket.bind(str(path))
            finally:
                os.umask(previous)
            if group is not None:
                _give_to(path, gid)
            self.socket.listen(_BACKLOG)
            self.socket.settimeout(0)
        except (OSError, KeyError) as error:
            self.socket.close()
            why = error.strerror if isinstance(error, OSError) else f"no group {group!r}"
            raise ConfigError(f"cannot listen on {path}: {why}") from error
        except ConfigError:
            self.socket.close()
            raise
        info = path.stat()
        self._inode = (info.st_dev, info.st_ino)
        self.gid = info.st_gid

    def admits(self, uid: int, groups: frozenset[int]) -> bool:
        """Whether a process of this user may talk here: the file's mode says the same to whoever connects, and this
        to whoever was handed a connected socket."""
        return uid in (0, os.geteuid()) or self.gid in groups

    def close(self) -> None:
        """Stop listening and remove the file, unless a newer daemon has put its own in its place."""
        self.socket.close()
        try:
            info = self.path.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISSOCK(info.st_mode) and (info.st_dev, info.st_ino) == self._inode:
            self.path.unlink(missing_ok=True)


def _give_to(path: Path, gid: int) -> None:
    try:
        os.chown(path, -1, gid)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more. Raises ConfigError if somebody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConfigError(f"cannot tell whether {path} is in use: {error.strerror or error}") from error
    raise ConfigError(f"another daemon is listening on {path}")
