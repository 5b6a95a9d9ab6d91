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


def test_loading_is_measured():
    """Each kind of way once, and that files really are in the page cache or not."""
    script = (
        "from tests.benchmarks import loading, workers\n"
        "ways = ('safetensors load_file', loading.pushed('flip', 'safetensors'))\n"
        "for row in loading.measure(1, total=10**7, counts=(8,), ways=ways):\n"
        "    print(row.name, row.value, row.ratio, row.skipped, sep=' | ')\n"
        "workers.shut_down()\n"
    )
    with Process([sys.executable, "-c", script]) as process:
        assert process.wait(SECONDS) == 0, process.describe()
        rows = [line.split(" | ") for line in process.out.splitlines()]
    push = "push, mode flip, safetensors"
    names = [f"{cache}: {way}" for cache in ("warm", "cold") for way in ("safetensors load_file", push)]
    assert [name.partition(" tensors, ")[2] for name, *_ in rows[:4]] == names
    assert [name.partition(" grew, ")[2] for name, *_ in rows[4:]] == ["safetensors load_file", push]
    assert all(float(value) > 0 for _, value, _, _ in rows)
    assert [float(ratio) > 0 for _, _, ratio, _ in rows if ratio != "None"] == [True] * 2


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
