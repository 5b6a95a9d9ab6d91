"""What a large push costs the daemon: memory of its own, and how late its event loop gets.

Memory of its own is RssAnon + RssFile. The images are RssShmem: they are the models, and bounded by memory_limit.
"""

import re
import threading
import urllib.request
from typing import Final, Self

from tests.benchmarks import machine
from tests.benchmarks.payload import GB
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host, push
from tests.benchmarks.workers import Worker
from tests.support.processes import memory

TOTAL: Final = 3 * GB
_MIB: Final = 1 << 20
_EVERY: Final = 0.01
_ROUNDS: Final = 3
"""Memory varies little from push to push, and three gigabytes take their time."""
_BUCKET: Final = re.compile(r'^shipd_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)

Histogram = dict[float, float]
"""Upper bounds in seconds, and how many were at most that."""


class Watch:
    """Samples a process's own memory on a thread; ``peak`` after the block is the most it had, in bytes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.first = self.peak = own(pid)

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            self.peak = max(self.peak, own(self._pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def own(pid: int) -> int:
    """RssAnon + RssFile in bytes."""
    found = memory(pid)
    return found["RssAnon"] + found["RssFile"]


def measure(rounds: int, total: int = TOTAL) -> list[Row]:
    """A fresh daemon each round, one push into it, the processes on cores of their own."""
    setting = machine.settings()[0]
    most, growth, lags = [], [], []
    free = machine.available_memory()
    if free is not None and free < (needed := 2 * total + GB):
        why = f"needs {needed / GB:.0f} GB of free memory, there are {free / GB:.1f}"
        return [Row(name="daemon, memory of its own", unit="MiB", skipped=why)]
    with Worker("tests.benchmarks.shipd_side:Sender", total=total) as sender:
        sender.call("pin", cores=setting.sender)
        for _ in range(min(rounds, _ROUNDS)):
            with Host({"model": total}) as host:
                host.place(setting.receiver)
                before = loop_lag(host.metrics)
                with Watch(host.daemon.pid) as watch:
                    push(host, sender)
                lags.append(p99(before, loop_lag(host.metrics)))
                most.append(watch.peak / _MIB)
                growth.append((watch.peak - watch.first) / _MIB)
    size = f"{total / GB:g} GB"
    rows = [
        Row(
            name=f"daemon's own memory during a push of {size}",
            value=median(most),
            unit="MiB",
            floor=80,
            spread=spread(most),
        ),
        Row(name="and how much it grew", value=median(growth), unit="MiB", floor=40, spread=spread(growth)),
    ]
    known = [lag * 1000 for lag in lags if lag is not None]
    if known:
        rows.append(
            Row(
                name="event-loop lag meanwhile, 99th percentile",
                value=median(known),
                unit="ms",
                floor=20,
                spread=spread(known),
            )
        )
    return rows


def loop_lag(metrics: str | None) -> Histogram | None:
    """The daemon's histogram of its event loop's lag, from http://``metrics``/metrics; None where there is none."""
    if metrics is None:
        return None
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {float(bound): float(count) for bound, count in _BUCKET.findall(text)} or None


def p99(before: Histogram | None, after: Histogram | None) -> float | None:
    """The bound, in seconds, that 99 of 100 between two readings did not exceed; None without readings."""
    if before is None or after is None:
        return None
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    total = max(counts.values(), default=0.0)
    if not total:
        return None
    return next(bound for bound, count in counts.items() if count >= 0.99 * total)
