"""Whose turn it is: keeping what happens inside a closed gate, or calls torch for every tensor, from waiting for other
Python threads.

A thread that computes in Python keeps the GIL for a whole switch interval, 5 ms, each time that the swapping thread has
let go of it: more than a swap takes, and 20 s for 10,000 views. A shorter interval meanwhile bounds each such wait. A
longer one would keep others from taking the GIL away, but whoever had asked already would get it once more, and then
for as long as the interval has become.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

TURN: Final = 0.0002
"""Seconds that another thread may keep the GIL inside ``short_turns``. Handing it over costs some 10 µs."""

_NAP: Final = 0.00005
"""Seconds of sleep that certainly give the GIL away."""

_STEP: Final = 0.000002
"""The interpreter keeps whole microseconds, and rounds."""


class _Turns:
    """Who is inside ``short_turns``, and the interval to come back to when the last one leaves."""

    def __init__(self) -> None:
        # A signal handler may come in between, on the thread that has it.
        self._lock = threading.RLock()
        self._inside: set[object] = set()
        self._usual: float | None = None

    def enter(self, who: object) -> None:
        with self._lock:
            self._inside.add(who)
            usual = sys.getswitchinterval()
            if usual > TURN + _STEP:
                self._usual = usual
                sys.setswitchinterval(TURN)

    def leave(self, who: object) -> None:
        """Also right where ``enter`` was interrupted, or never came to anything."""
        with self._lock:
            self._inside.discard(who)
            if not self._inside:
                self._put_back()

    def after_fork_in_child(self) -> None:
        """The threads that would have left exist in the parent only. The forking one finds it done."""
        self._lock = threading.RLock()
        self._inside.clear()
        self._put_back()

    def _put_back(self) -> None:
        # Unless somebody else has set it meanwhile.
        if self._usual is not None and abs(sys.getswitchinterval() - TURN) < _STEP:
            sys.setswitchinterval(self._usual)
        self._usual = None


_turns: Final = _Turns()
os.register_at_fork(after_in_child=_turns.after_fork_in_child)


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Have everybody's turns last ``TURN`` seconds, and begin with one of one's own.

    The interval belongs to the interpreter: the last one to leave puts it back exactly, unless somebody else has set
    it meanwhile.
    """
    who = object()
    try:
        _turns.enter(who)
        # Whoever waits for the GIL takes it away an interval after it was last handed over: that moment is to be now.
        time.sleep(_NAP)
        yield
    finally:
        _turns.leave(who)
