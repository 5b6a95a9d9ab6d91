"""The list of benchmarks: what each is called on the command line and in the table, and how it is run.

A new benchmark is a module with ``measure(rounds)`` (see tests.benchmarks.rows) and a line in SECTIONS.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.benchmarks import (
    codecs,
    daemon_memory,
    growth,
    inference,
    loading,
    loopback,
    side_by_side,
    small_tensors,
    stages,
    steps,
    thin,
)
from tests.benchmarks.machine import ROOT
from tests.benchmarks.rows import Row, as_row

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was chosen on the command line."""

    rounds: int
    contenders: Sequence[str]
    total: int
    full: bool
    say: Say


@dataclass(frozen=True)
class Section:
    """``name`` on the command line, ``title`` above its table; ``run`` measures."""

    name: str
    title: str
    run: Callable[[Run], list[Row]]
    by_name: bool = False
    """Whether it runs only where it is named."""


def in_process_of_its_own(module: str, deadline: float = 300.0) -> Callable[[Run], list[Row]]:
    """For a benchmark that measures in its own process, which should then have nothing else in it."""

    def run(chosen: Run) -> list[Row]:
        with tempfile.TemporaryDirectory(prefix="shipd-bench-") as directory:
            file = Path(directory) / "rows.json"
            command = [sys.executable, "-m", "tests.benchmarks.alone", module, str(chosen.rounds), str(file)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=deadline)
            if done.returncode:
                raise RuntimeError(f"{module} ended with {done.returncode}\n{done.stderr[-3000:]}")
            return [as_row(row) for row in json.loads(file.read_text())]

    return run


SECTIONS: Final = (
    Section(
        "side-by-side",
        "One gigabyte, one version to one host",
        lambda run: side_by_side.measure(run.rounds, run.contenders, run.total, run.say),
    ),
    Section("loading", "Beside loading the file", lambda run: loading.measure(run.rounds, run.full, run.say)),
    Section("stages", "Where the time of one gigabyte goes", lambda run: stages.measure(run.rounds)),
    Section("small", "Many small tensors", lambda run: small_tensors.measure(run.rounds)),
    Section("pause", "The pause of a swap", in_process_of_its_own("tests.benchmarks.pause")),
    Section("hold", "What a hold costs", in_process_of_its_own("tests.benchmarks.hold")),
    Section("memory", "The daemon under a large push", lambda run: daemon_memory.measure(run.rounds)),
    Section("inference", "Inference meanwhile", lambda run: inference.measure(run.rounds)),
    Section(
        "codecs",
        "What a step becomes: payloads, and speeds on one core",
        lambda run: codecs.measure(run.rounds, run.full, run.say),
    ),
    Section("thin-link", "A step over a thin link", lambda run: thin.measure(run.rounds, run.say)),
    Section("steps", "Fifty successive steps", lambda _run: steps.measure()),
    Section("loopback", "What a fast link pays", lambda run: loopback.measure(run.rounds)),
    Section("growth", "Growth", lambda run: growth.measure(run.rounds, run.full, run.say), by_name=True),
)
