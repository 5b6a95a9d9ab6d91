"""What a thread does while it waits for bytes of a source that are not there yet.

Whoever reads a source has connections to keep alive, and only the thread that waits may use them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Final

ACT_SECONDS: Final = 0.5

_local = threading.local()


@contextlib.contextmanager
def while_waiting(act: Callable[[], object]) -> Iterator[None]:
    """Inside the block this thread does ``act`` every ACT_SECONDS while it waits; what that raises ends the wait."""
    before = getattr(_local, "act", None)
    _local.act = act
    try:
        yield
    finally:
        _local.act = before


def awaited() -> Callable[[], object] | None:
    """What the calling thread is to do every ACT_SECONDS while it waits; None for nothing."""
    act: Callable[[], object] | None = getattr(_local, "act", None)
    return act
