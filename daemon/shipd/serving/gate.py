"""The gate between holds and swaps: a swap happens when no thread holds, and a hold sees one version.

Why no reader ever sees a mix: a hold owns its thread's lock from entering to leaving, and a swap acts while it owns
the lock of every thread that can hold. A thread that comes for the first time during a swap puts its slot into
``_slots`` *before* it looks at ``shut``, and the swapping thread sets ``shut`` *before* it reads ``_slots``: so either
the swap waits for that slot, or the thread sees that the gate is shut and waits outside. Dictionaries and attributes
of Python objects are sequentially consistent, under the GIL and, through their own locks, without it.

``shut`` is otherwise about fairness alone: once it is set, outermost holds wait outside and do not compete for their
locks, so holders can only become fewer. What goes wrong in waiting costs a commit its time, never a reader its
version.

The default hooks hold through a lock of their own, because a BaseException in a forward skips torch's post hooks and
leaves that lock behind. Only whoever finds it decides, under ``_judging``, whether the forward goes on: its own
thread at the next entry, or the swapping thread, which looks at the thread's stack. In doubt a forward goes on.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Final

from shipd.errors import Fenced, SwapFailed
from shipd.serving.slot import Lifetime, ReentrantLock, Slot
from shipd.serving.turns import short_turns
from shipd.serving.version import Version

log = logging.getLogger("shipd.serving")

CallFinder = Callable[[FrameType | None, int], tuple[int, bool]]
"""Given a thread's innermost frame and a module's id(): how many calls of the module are on that stack for certain,
and whether there may be others that cannot be made out."""

LOOK: Final = 0.02
"""Seconds of waiting for one holder after which it is asked whether its thread lives or its forward is over."""

BREATH: Final = 0.1
"""Longest that the gate stays open between two attempts, for those who waited outside to get in."""


@dataclass(frozen=True, slots=True)
class Pause:
    """What a swap cost. ``pause_seconds`` is the gate closed to the gate open, the longest where it took several
    ``attempts``; ``wait_seconds`` how long it took in the last of them until the last holder had left."""

    pause_seconds: float
    wait_seconds: float
    attempts: int


class _Local(threading.local):
    """Storage of each thread: its slot, made when it first asks."""

    def __init__(self, admit: Callable[["weakref.ref[Lifetime]"], Slot], forget: Callable[[int], object]) -> None:
        self.lifetime = Lifetime()
        # Called in the dying thread. The key is the lifetime's address, which is unique while it is in use.
        key = id(self.lifetime)
        self.slot = admit(weakref.ref(self.lifetime, lambda _: forget(key)))


def _cannot_tell(_frame: FrameType | None, _module: int) -> tuple[int, bool]:
    return 0, True


class Gate:
    """Where threads hold a version and one thread swaps it.

    version  what holds see: label and digest. Set by ``swap``; may be set while nobody holds
    shut     whether outermost holds wait or are refused
    fenced   why holds are refused, or None
    """

    def __init__(self, version: Version, *, calls: CallFinder = _cannot_tell) -> None:
        self.version = version
        self.shut = False
        self.fenced: str | None = None
        self._calls = calls
        self._slots: dict[int, Slot] = {}
        self._local = _Local(self._admit, lambda key: self._slots.pop(key, None))
        self._reset()
        _gates.add(self)

    def _reset(self) -> None:
        """Everything that other threads could be in the middle of."""
        self._closed = False
        # The thread that swaps at this moment, and whether the weights may be a mix at this moment.
        self._acting = 0
        self._mixed = False
        self._waiting: set[object] = set()
        self._swapping = threading.Lock()
        self._state = threading.Lock()
        self._judging = threading.Lock()
        # Held while the gate is closed. A plain lock, because threading's Event breaks when a wait is interrupted.
        self._turnstile = threading.Lock()
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def _admit(self, lifetime: "weakref.ref[Lifetime]") -> Slot:
        slot = Slot(self, lifetime)
        self._slots[id(lifetime())] = slot
        return slot

    # Holding ------------------------------------------------------------------------------------------------------

    def hold(self) -> Slot:
        """The calling thread's context manager, for ``with`` and ``async with``: yields the current Version.

        A thread that holds already is never blocked. An outermost ``with`` waits while a commit is pending; an
        outermost ``async with`` does so without blocking its event loop. Entering raises Fenced while fenced.
        """
        return self._local.slot

    def enter_forward(self, module: object) -> None:
        """Hold for a forward of ``module``, until ``leave_forward``. Called by the module's first pre-hook."""
        slot = self._local.slot
        if slot.holds(within_forward=2 if slot.forward_of == id(module) else 1):
            if slot.forward.owned():
                slot.forward.acquire()
            return
        if self.shut:
            self.wait_outside()
        slot.forward_of = id(module)
        slot.forward.acquire()
        slot.stale = False
        if self.fenced is not None:
            slot.forward.release()
            raise Fenced(self.fenced)

    def leave_forward(self) -> None:
        """End the hold of ``enter_forward``. Harmless without one: a pre-hook that raised may have come first."""
        forward = self._local.slot.forward
        if forward.owned():
            forward.release()

    def forward_goes_on(self, slot: Slot, calls: int) -> bool:
        """Whether the calling thread is still inside the forward that left ``slot.forward`` held; if not, it is
        released. At least ``calls`` calls of the module are on the stack if it is."""
        certain, doubtful = self._calls(inspect.currentframe(), slot.forward_of)
        with self._judging:
            slot.serial += 1
            # A swap may be under way that no longer waits for this forward: then nothing may go past the gate.
            if not slot.stale and (certain >= calls or doubtful):
                return True
            slot.stale = False
        while slot.forward.owned():
            slot.forward.release()
        return False

    # Waiting outside ----------------------------------------------------------------------------------------------

    def wait_outside(self) -> None:
        """Wait until the gate has been open, if it is closed. Raises Fenced. For threads that do not hold."""
        me = threading.get_ident()
        with self._state:
            turnstile = self._turnstile if self._closed else None
            if turnstile is not None:
                self._waiting.add(me)
        if turnstile is not None:
            try:
                with turnstile:
                    pass
            finally:
                self._waiting.discard(me)
        if self.fenced is not None:
            raise Fenced(self.fenced)

    async def reopened(self) -> bool:
        """``wait_outside`` without blocking the event loop. True where there was something to wait for."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._state:
            if not self._closed:
                if self.fenced is not None:
                    raise Fenced(self.fenced)
                return False
            self._futures.append((loop, future))
            self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)
        if self.fenced is not None:
            raise Fenced(self.fenced)
        return True

    # Swapping -----------------------------------------------------------------------------------------------------

    def swap(
        self,
        action: Callable[[], Version],
        *,
        commit_timeout: float,
        max_hold: float,
        then: Callable[[Version], object] | None = None,
    ) -> Pause:
        """Run ``action`` while no thread holds; what it returns is the version from then on.

        ``then`` runs before holds resume, may itself hold, and cannot undo the swap: what it raises is logged.
        Where holders do not leave within ``max_hold`` seconds the gate reopens for a moment and closes again, until
        ``commit_timeout``. Then raises SwapFailed, naming the threads. What ``action`` raises comes out here, after
        the gate has opened, with the version unchanged; ``action`` may call ``fence`` before it raises.
        """
        with self._swapping:
            if self._local.slot.holds(within_forward=1):
                raise RuntimeError("the swapping thread holds the gate itself")
            deadline = time.monotonic() + commit_timeout
            attempts = 0
            longest = 0.0
            while True:
                attempts += 1
                with short_turns():
                    closed_at = time.monotonic()
                    waited, holders = self._attempt(action, then, closed_at, min(deadline, closed_at + max_hold))
                    now = time.monotonic()
                longest = max(longest, now - closed_at)
                if holders is None:
                    return Pause(longest, waited, attempts)
                if now >= deadline:
                    who = ", ".join(holders) or "(they left just then)"
                    raise SwapFailed(
                        f"not swapped: no moment without holds in {commit_timeout:g} s; when it was given up, these "
                        f"threads had been holding for at least {waited:.3g} s: {who}. The old version serves."
                    )
                self._let_in()

    def _attempt(
        self,
        action: Callable[[], Version],
        then: Callable[[Version], object] | None,
        closed_at: float,
        until: float,
    ) -> tuple[float, list[str] | None]:
        """Close the gate, act if every holder leaves in time, open it.

        Returns the seconds waited, and None, or the names of the threads that did not leave.
        """
        holders: list[str] | None = None
        taken: list[ReentrantLock] = []
        try:
            self._close()
            drained = self._drain(taken, until)
            waited = time.monotonic() - closed_at
            if not drained:
                holders = self._holders()
            else:
                self._acting = threading.get_ident()
                self._mixed = True
                self.version = action()
                self._mixed = False
                if then is not None:
                    self._call(then)
        finally:
            self._acting = 0
            self._mixed = False
            for lock in reversed(taken):
                lock.release()
            self._open()
        return waited, holders

    def _call(self, then: Callable[[Version], object]) -> None:
        try:
            then(self.version)
        except Exception:  # the weights are swapped: nothing that a callback does can be a reason to say otherwise
            log.exception("a callback after the swap to %r failed", self.version.label)

    def _close(self) -> None:
        with self._state:
            self._turnstile = threading.Lock()
            self._turnstile.acquire()
            self._closed = True
            self.shut = True

    def _open(self) -> None:
        with self._state:
            self._closed = False
            self.shut = self.fenced is not None
            if self._turnstile.locked():
                self._turnstile.release()
            futures, self._futures = self._futures, []
        for loop, future in futures:
            # A loop that is closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, future)

    def _let_in(self) -> None:
        """Give those who waited outside the time to get in, so that nobody waits longer than ``max_hold``."""
        until = time.monotonic() + BREATH
        while True:
            time.sleep(0.001)
            if not self._waiting or time.monotonic() >= until:
                return

    def _drain(self, taken: list[ReentrantLock], until: float) -> bool:
        """Acquire every lock of every slot. False where a thread still holds at ``until``."""
        for slot in list(self._slots.values()):
            # The forward's lock first. A thread inside a forward may hold explicitly as well, so the swapping thread
            # must not sit on ``slot`` while it waits for ``slot.forward``; the reverse cannot happen.
            for lock in (slot.forward, slot):
                if not self._take(slot, lock, taken, until):
                    return False
        return True

    def _take(self, slot: Slot, lock: ReentrantLock, taken: list[ReentrantLock], until: float) -> bool:
        """Acquire ``lock``, or find out that nobody holds through it although it is locked. False at ``until``."""
        patience = 0.0
        while not lock.acquire(timeout=patience):
            if patience and self._abandoned(slot, lock):
                return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            patience = min(LOOK, left)
        taken.append(lock)
        return True

    def _abandoned(self, slot: Slot, lock: ReentrantLock) -> bool:
        """Whether what locked ``lock`` is over: its thread has died, or it was a forward that did not end properly."""
        return slot.lifetime() is None or (lock is slot.forward and self._left_behind(slot))

    def _left_behind(self, slot: Slot) -> bool:
        """Whether no forward goes on that could hold ``slot.forward``; then remembered until its thread enters."""
        serial = slot.serial
        frames = sys._current_frames()  # noqa: SLF001  documented, and the only way to see another thread's stack
        certain, doubtful = self._calls(frames.get(slot.ident), slot.forward_of)
        del frames
        if certain or doubtful:
            return False
        with self._judging:
            # If the thread has come back meanwhile it has judged for itself, and this judgement is void.
            if slot.serial != serial:
                return False
            slot.stale = True
            return True

    def _holders(self) -> list[str]:
        """Names of the threads that hold."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        found = []
        for slot in list(self._slots.values()):
            for lock in (slot.forward, slot):
                if lock.acquire(blocking=False):
                    lock.release()
                elif not self._abandoned(slot, lock):
                    found.append(names.get(slot.ident, f"thread {slot.ident}"))
                    break
        return found

    # Fencing ------------------------------------------------------------------------------------------------------

    def fence(self, reason: str) -> None:
        """Refuse every new outermost hold with Fenced(reason); holds that are under way finish."""
        with self._state:
            self.fenced = reason
            self.shut = True

    def unfence(self) -> None:
        """Admit holds again."""
        with self._state:
            self.fenced = None
            self.shut = self._closed

    # Forking ------------------------------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        """In the child only the forking thread exists; what the others held, nobody will release."""
        me = threading.get_ident()
        mine = self._acting == me
        torn = self._mixed and not mine
        self._slots = {key: slot for key, slot in self._slots.items() if slot.ident == me}
        for slot in self._slots.values():
            for lock in (slot.forward, slot):
                if not lock.owned():
                    lock.reinitialise()
        closed = self._closed
        self._reset()
        if mine:
            # Forked by the swapping thread, from within a swap: the child returns through the same swap.
            self._closed, self._acting = closed, me
        elif torn:
            self.fenced = "this process was forked in the middle of a swap, so its weights are not whole"
        self.shut = self._closed or self.fenced is not None


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


_gates: "weakref.WeakSet[Gate]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for gate in list(_gates):
        gate.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
