"""Beside loading: a file pushed into a model that is resident on the same host, and the same file loaded into one.

Every way is measured in a process of its own, made for one measurement, that has built its model beforehand; a push is
made by a process with nothing in it, through the daemon's Unix socket, into a model that is resident in a third. The
clock runs from the call until the weights are live: connecting counts, importing does not. No process is pinned:
loading uses as many cores as it can, and so does a push. In each round all ways read files of the same content, in
turns, once from the page cache and once from the disk. Memory is taken in a round of its own, which is not timed.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.benchmarks import page_cache
from tests.benchmarks.loading_side import FORMATS, WAYS
from tests.benchmarks.payload import GB
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host
from tests.benchmarks.side_by_side import reason
from tests.benchmarks.workers import Worker, WorkerFailed
from tests.support.processes import memory

TENSORS: Final = 64
SMALL: Final = 20_000
"""Tensors of the same file once more, as many mixture-of-experts models have them."""

MODES: Final = {"copy": 1.8, "flip": 1.2}
"""How the resident model swaps, and how many times as long as the best way of loading a push may take."""

GROWTH: Final = 0.1
"""The sender's memory, as a share of what torch.load takes."""

PLAIN: Final = "torch.load"
_MIB: Final = 1 << 20
_EVERY: Final = 0.0005


@dataclass(frozen=True)
class Sample:
    """One measurement, in seconds. ``way`` is a way of loading, or "push, MODE, FORMAT"."""

    way: str
    cache: str
    round: int
    seconds: float


def pushed(mode: str, kind: str) -> str:
    """The way of pushing a file of that format into a model that swaps in that mode."""
    return f"push, mode {mode}, {kind}"


EVERY: Final = (*WAYS, *(pushed(mode, kind) for mode in MODES for kind in FORMATS))


def measure(
    rounds: int,
    full: bool = False,
    say: Callable[[str], None] = lambda _: None,
    total: int = GB,
    counts: Sequence[int] | None = None,
    ways: Sequence[str] = EVERY,
) -> list[Row]:
    """For each number of tensors that make up ``total`` bytes; the floors are about the first. ``full``: also with many
    small ones, which take four minutes."""
    counts = counts or ((TENSORS, SMALL) if full else (TENSORS,))
    rows: list[Row] = []
    for count in counts:
        rows += _measure(rounds, say, total, count, ways, bounded=count == counts[0])
    return rows


def _measure(
    rounds: int, say: Callable[[str], None], total: int, count: int, ways: Sequence[str], *, bounded: bool
) -> list[Row]:
    samples: list[Sample] = []
    failed: dict[str, str] = {}
    growth: dict[str, tuple[int, int]] = {}
    with (
        Host(dict.fromkeys(MODES, total)) as host,
        Worker("tests.benchmarks.loading_side:Maker", total=total, count=count) as maker,
    ):
        for mode in MODES:
            host.serve(mode, total, count, mode=mode)
        bench = _Bench(host, total, count, failed)
        # Every image is written to once before anything counts.
        for _ in range(3):
            maker.call("write", path=str(bench.base))
            for mode in MODES:
                bench.push(mode, "safetensors")
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {count} tensors")
            maker.call("write", path=str(bench.base))
            for cache in ("warm", "cold"):
                for way in ways if number % 2 else reversed(ways):
                    seconds = bench.timed(way, cache)
                    if seconds is not None:
                        samples.append(Sample(way, cache, number, seconds))
        say(f"memory: {count} tensors")
        maker.call("write", path=str(bench.base))
        for way in ways:
            found = bench.grown(way)
            if found is not None:
                growth[way] = found
    return table(samples, growth, failed, total, count, bounded=bounded)


class _Bench:
    """The host, the files, and how each way is run once."""

    def __init__(self, host: Host, total: int, count: int, failed: dict[str, str]) -> None:
        self.host = host
        self.base = host.directory / "model"
        self._shape = {"total": total, "count": count}
        self._failed = failed
        self._pushes = itertools.count()

    def file(self, kind: str) -> Path:
        """Of that format."""
        return Path(str(self.base) + FORMATS[kind])

    def push(self, mode: str, kind: str) -> dict[str, Any]:
        """Once, from a process of its own, and what came of it."""
        with Worker("tests.benchmarks.loading_side:Pusher") as worker:
            return self._push(worker, mode, kind)

    def _push(self, worker: Worker, mode: str, kind: str) -> dict[str, Any]:
        # A label of its own each: the same content under the same one would be there already.
        receipt: dict[str, Any] = worker.call(
            "push",
            address=str(self.host.daemon.socket),
            path=str(self.file(kind)),
            model=mode,
            label=f"push-{next(self._pushes)}",
        )
        if not receipt["swapped"]:
            raise AssertionError(f"nothing was swapped in mode {mode}")
        return receipt

    def timed(self, way: str, cache: str) -> float | None:
        """Seconds of one way with its file in the page cache or not; None where it does not run here."""
        run = self._run(way, lambda: (page_cache.warm if cache == "warm" else page_cache.cool)(self.file(_kind(way))))
        return None if run is None else run[0]

    def grown(self, way: str) -> tuple[int, int] | None:
        """Bytes by which the process grew at most: RssAnon and RssShmem, sampled; and all that is resident."""
        run = self._run(way, lambda: page_cache.warm(self.file(_kind(way))), watched=True)
        return None if run is None else run[1]

    def _run(
        self, way: str, prepare: Callable[[], None], *, watched: bool = False
    ) -> tuple[float, tuple[int, int]] | None:
        if way in self._failed:
            return None
        mode, kind = _mode(way), _kind(way)
        try:
            with (
                Worker("tests.benchmarks.loading_side:Pusher")
                if mode
                else Worker("tests.benchmarks.loading_side:Loader", way=way, **self._shape)
            ) as worker:
                before = worker.call("rest")
                prepare()
                with Watch(worker.pid, running=watched) as watch:
                    if mode:
                        seconds = self._push(worker, mode, kind)["seconds"]
                    else:
                        seconds = worker.call("load", path=str(self.file(kind)))["seconds"]
                after = memory(worker.pid)
        except WorkerFailed as error:
            if mode:
                raise
            self._failed[way] = reason(error)
            return None
        resident = before["RssAnon"] + before["RssFile"] + before["RssShmem"]
        return seconds, (watch.peak - watch.first, after["VmHWM"] - resident)


class Watch:
    """Samples RssAnon and RssShmem of a process, in bytes, on a thread; ``peak`` is the most there were."""

    def __init__(self, pid: int, *, running: bool) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if running else None
        self.first = self.peak = self._own()

    def _own(self) -> int:
        found = memory(self._pid)
        return found["RssAnon"] + found["RssShmem"]

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            self.peak = max(self.peak, self._own())

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _mode(way: str) -> str:
    return "" if way in WAYS else way.split(", ")[1].removeprefix("mode ")


def _kind(way: str) -> str:
    return WAYS[way][0] if way in WAYS else way.split(", ")[2]


def table(
    samples: Sequence[Sample],
    growth: dict[str, tuple[int, int]],
    failed: dict[str, str],
    total: int,
    count: int,
    *,
    bounded: bool,
) -> list[Row]:
    """The medians. A push is compared with whichever way of loading was the fastest in the same round."""
    rows: list[Row] = []
    size = f"{total / GB:g} GB in {count:,} tensors"
    known = {(one.way, one.cache, one.round): one.seconds for one in samples}
    for cache in ("warm", "cold"):
        numbers = sorted({one.round for one in samples if one.cache == cache})
        best = {
            number: min(
                seconds for (way, where, at), seconds in known.items() if (where, at) == (cache, number) and way in WAYS
            )
            for number in numbers
        }
        for way in EVERY:
            name = f"{size}, {cache}: {way}"
            if way in failed:
                rows.append(Row(name=name, unit="s", skipped=failed[way]))
                continue
            taken = {number: known[way, cache, number] for number in numbers if (way, cache, number) in known}
            if not taken:
                continue
            row = Row(name=name, value=median(taken.values()), unit="s", better="lower")
            if mode := _mode(way):
                ratios = [seconds / best[number] for number, seconds in taken.items()]
                row.reference, row.ratio, row.spread = "the fastest way of loading", median(ratios), spread(ratios)
                row.bounds = "ratio"
                row.floor = MODES[mode] if bounded else None
            rows.append(row)
    for way, (own, resident) in growth.items():
        name = f"{size}: how much memory grew, {way}"
        row = Row(name=name, value=resident / _MIB, unit="MiB", note=f"{own / _MIB:.1f} MiB without the file's pages")
        if _mode(way) and PLAIN in growth:
            # Of both the larger figure here, and the smaller one there: pages of the file count as the sender's.
            row.reference, row.ratio, row.floor = PLAIN, max(own, resident) / min(growth[PLAIN]), GROWTH
            row.bounds, row.better = "ratio", "lower"
        rows.append(row)
    return rows
