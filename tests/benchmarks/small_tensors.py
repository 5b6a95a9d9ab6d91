"""What many tensors cost: 20,000 of them against one of the same total, by whole pushes.

Known: attached in mode copy, so that the receiver has the layout and its images are warm; applying the version to the
live tensors is part of the push. First: a model that was only declared, so that the structure travels and images are
touched for the first time, on both sides of the comparison.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from tests.benchmarks import machine
from tests.benchmarks.machine import Setting
from tests.benchmarks.payload import GB
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host, push
from tests.benchmarks.workers import Worker

COUNT: Final = 20_000
KNOWN: Final = "the layout is known"
FIRST: Final = "first push"
CASES: Final = ((64 << 10, {KNOWN: (1.4, 1.15)}), (4 << 10, {KNOWN: (2.5, 1.5), FIRST: (4.0, 2.5)}))
"""Bytes of a tensor; for each kind of push its floor and its goal."""

Seconds = dict[tuple[str, str], list[float]]
"""By kind of push and setting, one for each round."""


def measure(rounds: int, count: int = COUNT) -> list[Row]:
    """Many and one take turns in every round."""
    settings = machine.settings()
    rows = []
    for size, kinds in CASES:
        name = f"{count:,} tensors of {size >> 10} KiB"
        free = machine.available_memory()
        # For each of the two: what is sent, what is served, two images.
        if free is not None and free < (needed := 8 * count * size + GB):
            why = f"needs {needed / GB:.0f} GB of free memory, there are {free / GB:.1f}"
            rows.append(Row(name=name, unit="s", skipped=why))
            continue
        many, one = _alternate(rounds, count, size, FIRST in kinds, settings)
        for kind, (floor, goal) in kinds.items():
            row = Row(
                name=f"{name}, {kind}", unit="s", reference="one tensor of the same total", floor=floor, goal=goal
            )
            for setting in settings:
                mine, other = (found.get((kind, setting.name), []) for found in (many, one))
                ratios = [ours / theirs for ours, theirs in zip(mine, other, strict=True)]
                if setting is settings[0]:
                    row.value, row.ratio, row.spread = median(mine), median(ratios), spread(ratios)
                elif ratios:
                    row.elsewhere[setting.name] = (median(mine), median(ratios))
            rows.append(row)
    return rows


def _alternate(rounds: int, count: int, size: int, first: bool, settings: Sequence[Setting]) -> tuple[Seconds, Seconds]:
    many: Seconds = {}
    one: Seconds = {}
    declared = rounds if first else 0
    where = settings[0]
    with _side(count, count * size, declared, where) as left, _side(1, count * size, declared, where) as right:
        for number in range(rounds):
            for side, found in ((left, many), (right, one)):
                side.place(where)
                if first:
                    found.setdefault((FIRST, where.name), []).append(side.push(f"first-{number}"))
            for setting in settings:
                for side, found in ((left, many), (right, one)):
                    side.place(setting)
                    found.setdefault((KNOWN, setting.name), []).append(side.push("model"))
        for side in (left, right):
            side.check()
    return many, one


class _Side:
    """A host with a model of ``count`` tensors, warm, and others that were declared and nobody has pushed to."""

    def __init__(self, host: Host, sender: Worker, serving: Worker) -> None:
        self._host = host
        self._sender = sender
        self._serving = serving
        self._receipt: dict[str, Any] = {}

    def place(self, setting: Setting) -> None:
        """Both sides onto their cores."""
        self._host.place(setting.receiver)
        self._sender.call("pin", cores=setting.sender)

    def push(self, model: str) -> float:
        """Seconds of a whole push."""
        self._receipt = push(self._host, self._sender, model=model)
        return float(self._receipt["seconds"])

    def check(self) -> None:
        """What is live is what was pushed."""
        if self._serving.call("verify", name="model") != self._receipt["digest"]:
            raise AssertionError("other bytes are live than were pushed")


@contextlib.contextmanager
def _side(count: int, total: int, declared: int, setting: Setting) -> Iterator[_Side]:
    models = {"model": total, **{f"first-{number}": total for number in range(declared)}}
    with Host(models) as host, Worker("tests.benchmarks.shipd_side:Sender", total=total, count=count) as sender:
        host.place(setting.receiver)
        side = _Side(host, sender, host.serve("model", total, count))
        side.place(setting)
        for _ in range(2):
            # Each of the two images once.
            side.push("model")
        yield side
