"""The benchmarks still measure: their smallest run, and that nothing is left of it when it is interrupted."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from tests.support.processes import Process

SECONDS = 100.0
"""For importing torch in several processes at once."""


def command(*arguments):
    return [sys.executable, "-m", "tests.benchmarks", *arguments, "--rounds", "1", "--bytes", "1e7"]


def test_a_raw_socket_and_shipd_are_measured():
    with Process(command("raw", "shipd")) as process:
        assert process.wait(SECONDS) == 0, process.describe()
        for row in ("raw socket, no checks", "shipd, wire", "shipd, whole push", "shipd, first push, cold images"):
            assert re.search(rf"^\| {row} \| [\d.]+ GB/s \|", process.out, re.MULTILINE), process.describe()
        assert "skipped" not in process.out
        assert "not kept" in process.err


def test_an_interrupted_run_leaves_no_process_behind():
    # Every process that comes of it inherits this.
    mark = f"SHIPD_BENCH_TEST_{os.getpid()}_{time.monotonic_ns()}"
    with Process(command("shipd"), env={"BENCH_MARK": mark}) as process:
        end = time.monotonic() + SECONDS
        pause = threading.Event()
        while "round 1 of 1: shipd" not in process.err:
            assert process.running, process.describe()
            assert time.monotonic() < end, process.describe()
            pause.wait(0.02)
        process.signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130, process.describe()
    end = time.monotonic() + SECONDS
    while left := marked(mark):
        assert time.monotonic() < end, f"still there: {left}"
        pause.wait(0.02)


def marked(mark):
    """Processes with ``mark`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes())
            except OSError:
                # Gone, or another user's.
                continue
    return found
