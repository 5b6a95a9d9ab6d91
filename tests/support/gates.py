"""Threads that hold a gate, and what goes with them."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from shipd.serving.gate import Gate, Pause
from shipd.serving.version import Version

OLD = Version("old", "00" * 16)
NEW = Version("new", "11" * 16)
DEADLINE = 30.0


class Worker(threading.Thread):
    """A thread whose failure fails the test that joins it."""

    def __init__(self, work: Callable[[], Any], name: str = "worker") -> None:
        super().__init__(name=name, daemon=True)
        self.work = work
        self.error: BaseException | None = None
        self.result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:  # noqa: BLE001  raised where the thread is joined
            self.error = error

    def finish(self) -> Any:
        """What ``work`` returned, or raised."""
        self.join(DEADLINE)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.error is not None:
            raise self.error
        return self.result


class Holder(Worker):
    """Holds from its start until ``leave`` is set. Its result: the version it was given and the one at the end."""

    def __init__(self, gate: Gate, name: str = "holder") -> None:
        self.gate = gate
        self.entered = threading.Event()
        self.leave = threading.Event()
        super().__init__(self.hold, name)
        assert self.entered.wait(DEADLINE)

    def hold(self) -> tuple[Version, Version]:
        with self.gate.hold() as version:
            self.entered.set()
            assert self.leave.wait(DEADLINE)
            return version, self.gate.version


def enter(gate: Gate) -> Version:
    """Begin a hold that nothing ends but the thread's own end."""
    return gate.hold().__enter__()


def eventually(condition: Callable[[], object]) -> None:
    """Wait for what no event tells of."""
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until, "never happened"
        time.sleep(0.0005)


def swap(
    gate: Gate,
    action: Callable[[], Version] = lambda: NEW,
    *,
    commit_timeout: float = DEADLINE,
    max_hold: float = DEADLINE,
    then: Callable[[Version], object] | None = None,
) -> Pause:
    """``gate.swap`` with limits that matter only where a test gives others."""
    return gate.swap(action, commit_timeout=commit_timeout, max_hold=max_hold, then=then)


class Alarm:
    """One KeyboardInterrupt, wherever the interpreter looks for signals; none once ``clear`` has returned or raised."""

    def __init__(self) -> None:
        self._armed = False

    def set(self, seconds: float) -> None:
        """Strike after so many seconds."""
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def clear(self) -> None:
        """Strike no more, unless that has come already: then it is raised here at the latest."""
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def strike(self, *_: object) -> None:
        """The signal has arrived; how long ago it was sent nobody knows."""
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts() -> Iterator[Alarm]:
    """An alarm, by SIGALRM."""
    alarm = Alarm()
    before = signal.signal(signal.SIGALRM, alarm.strike)
    try:
        yield alarm
    finally:
        alarm.clear()
        signal.signal(signal.SIGALRM, before)
