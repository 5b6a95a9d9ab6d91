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
import time
from collections.abc import Iterator
from typing import Final

TURN: Final = 0.0002
"""Seconds that another thread may keep the GIL inside ``short_turns``. Handing it over costs some 10 µs."""

_NAP: Final = 0.00005
"""Seconds of sleep that certainly give the GIL away."""

_usual: list[float] = []
"""Intervals to come back to, of those who are inside ``short_turns``."""


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Have everybody's turns last ``TURN`` seconds, and begin with one of one's own.

    The interval belongs to the interpreter, so it is put back exactly, unless somebody else has set it meanwhile.
    """
    usual = sys.getswitchinterval()
    if usual <= TURN:
        yield
        return
    _usual.append(usual)
    sys.setswitchinterval(TURN)
    # Not TURN: it is kept in whole microseconds, and rounded.
    short = sys.getswitchinterval()
    try:
        # Whoever waits for the GIL takes it away an interval after it was last handed over: that moment is to be now.
        time.sleep(_NAP)
        yield
    finally:
        if sys.getswitchinterval() == short:
            sys.setswitchinterval(usual)
        with contextlib.suppress(ValueError):
            _usual.remove(usual)


def _after_fork_in_child() -> None:
    # The threads that would have put it back exist in the parent only. The forking one finds it done.
    if _usual:
        sys.setswitchinterval(_usual[0])
    _usual.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
