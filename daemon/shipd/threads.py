"""Starting threads of which there may be no more: the system limits how many a process, a user or a unit may have."""

import concurrent.futures
import threading

from shipd.errors import ConfigError, ShipError


def start(thread: threading.Thread, kind: type[ShipError], what: str) -> None:
    """Start ``thread``. Raises ``kind`` where that is not possible: ``what`` says what comes of it."""
    try:
        thread.start()
    except RuntimeError as error:
        raise no_thread(kind, what) from error


def start_all(pool: concurrent.futures.ThreadPoolExecutor, count: int) -> None:
    """Have ``pool`` start its ``count`` threads, which it would do only when they are needed. Raises ConfigError."""
    together = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(together.wait)
    except RuntimeError as error:
        together.abort()
        raise no_thread(ConfigError, "the daemon cannot work") from error
    together.wait()


def no_thread(kind: type[ShipError], what: str) -> ShipError:
    """The error where a thread cannot be started."""
    return kind(f"{what}: the system has no further thread for this process (ulimit -u, or TasksMax of its unit)")
