"""What interrupts a thread that waits in poll(2)."""

import os
import select

from shipd.errors import ConnectError


class Waker:
    """Wakes a lane from another thread, for good: once woken, every wait on it raises Interrupted."""

    def __init__(self) -> None:
        """Raises ConnectError where there are no descriptors left."""
        try:
            self._read, self._write = os.pipe()
        except OSError as error:
            raise ConnectError(
                f"cannot connect: {error.strerror}. Let this process have more descriptors (ulimit -n)."
            ) from error
        self._open = [self._read, self._write]
        os.set_blocking(self._read, False)
        self.woken = False

    def fileno(self) -> int:
        """The descriptor that becomes readable."""
        return self._read

    def wake(self) -> None:
        """May be called from any thread, and from a signal handler."""
        if not self.woken:
            self.woken = True
            os.write(self._write, b"!")

    def wait(self, seconds: float) -> bool:
        """Sleep, but not through a wake-up. True if there was one."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        poll.poll(seconds * 1000)
        return self.woken

    def close(self) -> None:
        """Release the descriptors. Harmless twice."""
        self.woken = True
        while self._open:
            os.close(self._open.pop())
