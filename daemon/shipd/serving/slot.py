"""One thread's place at the gate: what ``Gate.hold()`` returns. Belongs here: entering and leaving, sync and async.

A slot *is* a reentrant lock, owned by its thread while the thread holds and by the swapping thread during a swap.
So exclusion rests on a lock of the operating system and not on an order of memory accesses; the thread's own lock
is practically never contended, which is what makes a hold cheap; and the swapping thread waits for a holder by
acquiring, without polling and without the holder doing anything when it leaves.

KeyboardInterrupt can strike a thread only where the interpreter looks for signals: on entering a Python function
and after a call made by the CALL instruction. Hence two oddities:

- ``__exit__`` is the lock's own, in C: a Python function could be interrupted before its first line, and the slot
  would stay held for ever.
- The lock is acquired by *reading a property* whose getter is the lock's C method. Between that and the end of
  ``__enter__`` there are only attribute reads and forward jumps, so either ``__enter__`` raises and nothing is held,
  or ``with`` has taken over.
"""

import _thread
import functools
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shipd.errors import Fenced
from shipd.serving.version import Version

if TYPE_CHECKING:
    from shipd.serving.gate import Gate

    class ReentrantLock:
        """_thread.RLock, which typeshed takes for final and of which it leaves out half."""

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
        def release(self) -> None: ...
        def __enter__(self) -> object: ...
        def __exit__(self, kind: object, error: object, traceback: object, /) -> None: ...
        def owned(self) -> bool: ...
        def reinitialise(self) -> None: ...

else:

    class ReentrantLock(_thread.RLock):
        """The interpreter's reentrant lock, with names for what threading.Condition and fork handlers use of it."""

        __slots__ = ()
        owned = _thread.RLock._is_owned  # noqa: SLF001
        reinitialise = _thread.RLock._at_fork_reinit  # noqa: SLF001


_get_ident = _thread.get_ident


@dataclass(eq=False, slots=True)
class TaskHold:
    """One ``async with`` of a task. Tasks that it starts inherit a reference to it, and see when it ends."""

    gate: "Gate"
    outer: "TaskHold | None"
    active: bool = True


task_holds: Final[ContextVar[TaskHold | None]] = ContextVar("shipd_task_holds", default=None)
"""The innermost hold of the current task or of those it descends from. One variable for all gates, because context
variables are never collected."""


def _innermost_active(hold: TaskHold | None) -> TaskHold | None:
    while hold is not None and not hold.active:
        hold = hold.outer
    return hold


class Lifetime:
    """Dies with a thread: only the thread's local storage refers to it."""

    __slots__ = ("__weakref__",)


class Slot(ReentrantLock):
    """Context manager of one thread, for ``with`` and ``async with``; reusable and reentrant.

    gate        where it belongs
    ident       of its thread
    lifetime    weak reference to something that dies with the thread
    forward     a second lock: held during forwards that the default hooks guard, see ``Gate.enter_forward``
    forward_of  id() of the outermost module of the latest forward
    stale       set by the swapping thread: ``forward`` is held by a forward that is over
    serial      counts what makes an ongoing judgement of ``stale`` worthless
    tasks       ``async with`` blocks that this thread's event loop is in
    """

    __slots__ = ("forward", "forward_of", "gate", "ident", "lifetime", "serial", "stale", "tasks")

    def __init__(self, gate: "Gate", lifetime: "weakref.ref[Lifetime]") -> None:
        self.gate = gate
        self.ident = _get_ident()
        self.lifetime = lifetime
        self.forward = ReentrantLock()
        self.forward_of = 0
        self.stale = False
        self.serial = 0
        self.tasks = 0

    _taken = property(_thread.RLock.acquire)
    """Reading it acquires the lock, waiting where the swapping thread has it. True."""

    _taken_at_once = property(functools.partial(_thread.RLock.acquire, blocking=False))
    """Reading it acquires the lock unless another thread has it. Whether it was acquired."""

    def __enter__(self) -> Version:
        gate = self.gate
        if gate.shut or _get_ident() != self.ident:
            return self._enter_slowly()
        if self._taken and gate.fenced is None:
            return gate.version
        self.release()
        raise Fenced(gate.fenced or "")

    if not TYPE_CHECKING:
        # Stated, so that nobody ever adds one in Python: see the module's docstring.
        __exit__ = _thread.RLock.__exit__

    def _enter_slowly(self) -> Version:
        """The gate is closed or fenced, or the slot is another thread's."""
        gate = self.gate
        self._check_thread()
        if not self.holds(within_forward=1):
            gate.wait_outside()
            if self._taken and gate.fenced is None:
                return gate.version
            self.release()
            raise Fenced(gate.fenced or "")
        # Held already, so neither the closed gate nor the fence is for this one.
        if self._taken:
            return gate.version
        raise AssertionError("a blocking acquire returned without the lock")

    def _check_thread(self) -> None:
        if _get_ident() != self.ident:
            raise RuntimeError("a hold belongs to the thread that asked for it: call hold() in every thread")

    def holds(self, *, within_forward: int) -> bool:
        """Whether the calling thread, whose slot this is, holds already.

        ``within_forward``: how many calls of the module must be on its stack if it is inside one.
        """
        if self.owned():
            return True
        return self.forward.owned() and self.gate.forward_goes_on(self, within_forward)

    async def __aenter__(self) -> Version:
        gate = self.gate
        self._check_thread()
        outer = _innermost_active(task_holds.get())
        hold = TaskHold(gate, outer)
        passed = False
        while True:
            nested = self.owned() and (self.tasks == 0 or _holds(outer, gate))
            if (passed or nested or not gate.shut) and self._taken_at_once:
                break
            passed = await gate.reopened()
        try:
            if gate.fenced is not None and not nested:
                raise Fenced(gate.fenced)
            task_holds.set(hold)
            self.tasks += 1
        except BaseException:
            self.release()
            raise
        return gate.version

    async def __aexit__(self, *_: object) -> None:
        # The release comes first: what could be interrupted after it is harmless.
        self.release()
        self.tasks = max(0, self.tasks - 1)
        hold = _innermost_active(task_holds.get())
        while hold is not None and hold.gate is not self.gate:
            hold = _innermost_active(hold.outer)
        if hold is not None:
            hold.active = False
        task_holds.set(_innermost_active(task_holds.get()))


def _holds(hold: TaskHold | None, gate: "Gate") -> bool:
    while hold is not None:
        if hold.active and hold.gate is gate:
            return True
        hold = hold.outer
    return False
