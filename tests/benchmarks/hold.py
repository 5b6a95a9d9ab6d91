"""What a hold costs: ``with resident.hold()`` by itself, and by eight threads at once.

    python -m tests.benchmarks.hold

Times are of a thread's CPU and include the loop around it: the floors are of these. With eight threads the time that
passes for each hold is given as well. Under the GIL threads take turns, so on an idle machine it is about what one hold
costs, and not an eighth of it; on a busy one it says how busy that is.
"""

import json
import statistics
import threading
import time
from typing import Any, Final

from shipd.serving.gate import Gate
from shipd.serving.version import Version

HOLDS: Final = 200_000
THREADS: Final = 8


def _hold(gate: Gate) -> float:
    """CPU seconds of this thread for each hold."""
    hold = gate.hold
    started = time.thread_time()
    for _ in range(HOLDS):
        with hold():
            pass
    return (time.thread_time() - started) / HOLDS


def _lock() -> float:
    """The same for a plain lock, to compare with."""
    lock = threading.Lock()
    started = time.thread_time()
    for _ in range(HOLDS):
        with lock:
            pass
    return (time.thread_time() - started) / HOLDS


def _together(gate: Gate) -> tuple[float, float]:
    """CPU seconds for each hold of the thread that needed most, and elapsed seconds for each hold of all threads."""
    costs: list[float] = []
    ready = threading.Barrier(THREADS + 1)

    def work() -> None:
        gate.hold()
        ready.wait()
        costs.append(_hold(gate))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return max(costs), (time.perf_counter() - started) / (THREADS * HOLDS)


def measure(rounds: int = 5) -> list[dict[str, Any]]:
    """Rows of seconds, medians of ``rounds``; the reference is a plain ``threading.Lock``."""
    gate = Gate(Version("", ""))
    alone, locks, cpu, elapsed = [], [], [], []
    for _ in range(rounds):
        locks.append(_lock())
        alone.append(_hold(gate))
        most, each = _together(gate)
        cpu.append(most)
        elapsed.append(each)
    lock = statistics.median(locks)

    def row(name: str, values: list[float], floor: float | None) -> dict[str, Any]:
        value = statistics.median(values)
        return {
            "name": name,
            "value": value,
            "unit": "s",
            "reference": lock,
            "ratio": value / lock,
            "floor": floor,
            "goal": None,
            "bounds": "value",
            "rounds": rounds,
        }

    return [
        row("hold, one thread, CPU", alone, 1e-6),
        row(f"hold, {THREADS} threads, CPU of the dearest", cpu, 2e-6),
        row(f"hold, {THREADS} threads, elapsed for each", elapsed, None),
    ]


def main() -> None:
    """Print the rows, one JSON object a line."""
    for row in measure():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
