"""The temporary file that a file of a server is fetched into: without a name, so that it goes with the process."""

import os
import tempfile

from shipd.checkpoints.remote.server import Refusal
from shipd.checkpoints.wording import quoted


class Spool:
    """In the directory for temporary files: TMPDIR, or /tmp. What was not written yet takes no room on the disk."""

    def __init__(self) -> None:
        try:
            self.folder = tempfile.gettempdir()
            self._file = tempfile.TemporaryFile(prefix="shipd-", buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise Refusal(
                f"what is fetched is kept in a temporary file, and none can be made ({error}): set TMPDIR to a "
                "directory that can be written to"
            ) from error
        self.descriptor = self._file.fileno()

    def free(self) -> int:
        """Bytes of room on its disk, as far as this user may have them."""
        status = os.statvfs(self.descriptor)
        return status.f_bavail * status.f_frsize

    def resize(self, size: int) -> None:
        """Let it end there, all of it holes."""
        try:
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            raise self._full(error, size) from error

    def write(self, at: int, content: memoryview) -> None:
        """Write from there on. Any thread. Raises Refusal."""
        try:
            while content:
                written = os.pwrite(self.descriptor, content, at)
                at += written
                content = content[written:]
        except OSError as error:
            raise self._full(error, at + len(content)) from error

    def holds(self, at: int, content: memoryview) -> bool:
        """Whether these are its bytes from there on."""
        return os.pread(self.descriptor, len(content), at) == content

    def close(self) -> None:
        """Give it up, and the room that it takes. Harmless when repeated."""
        self._file.close()

    def _full(self, error: OSError, size: int) -> Refusal:
        return Refusal(
            f"the temporary file in {quoted(self.folder)} cannot take {size} bytes ({error.strerror}); set TMPDIR to a "
            "directory on a disk with more room"
        )
