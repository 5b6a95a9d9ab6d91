"""How time and memory grow with bytes, with tensors and with serving processes.

    python -m tests.benchmarks growth           three or two points on each axis
    python -m tests.benchmarks growth --full    10 MB to 8 GB, 10 to 50,000 tensors, 1 to 8 processes

Points that the free memory does not allow are skipped, and say so. Memory is what daemon and sender add to what they
have at rest: RssAnon + RssFile, without the images, which are the model, and without the tensors that are sent.
"""

from collections.abc import Callable
from typing import Any, Final

from tests.benchmarks import machine
from tests.benchmarks.daemon_memory import Watch
from tests.benchmarks.payload import GB
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host, push
from tests.benchmarks.workers import Worker

MB: Final = 10**6
_MIB: Final = 1 << 20
AMOUNT: Final = 200 * MB
"""What is pushed where tensors or processes are counted."""

GRID: Final[dict[str, tuple[int, ...]]] = {
    "bytes": (10 * MB, 100 * MB, GB),
    "tensors": (10, 1_000, 20_000),
    "processes": (1, 4),
}
FULL: Final[dict[str, tuple[int, ...]]] = {
    "bytes": (10 * MB, 30 * MB, 100 * MB, 300 * MB, GB, 3 * GB, 8 * GB),
    "tensors": (10, 100, 1_000, 10_000, 20_000, 50_000),
    "processes": (1, 2, 4, 8),
}


def measure(rounds: int, full: bool = False, say: Callable[[str], None] = lambda _: None) -> list[Row]:
    """A row for each point; its ``details`` have what is drawn."""
    rows = []
    for axis, points in (FULL if full else GRID).items():
        for point in points:
            say(f"growth: {_name(axis, point)}")
            rows.append(_point(axis, point, rounds))
    return rows


def _name(axis: str, point: int) -> str:
    if axis == "bytes":
        return f"{point / GB:g} GB, nothing attached" if point >= GB else f"{point / MB:g} MB, nothing attached"
    what = f"{point:,} tensors" if axis == "tensors" else f"{point} serving process{'es' * (point > 1)}"
    return f"{AMOUNT / MB:g} MB, {what}"


def _point(axis: str, point: int, rounds: int) -> Row:
    total = point if axis == "bytes" else AMOUNT
    count = point if axis == "tensors" else 0
    processes = {"bytes": 0, "tensors": 1, "processes": point}[axis]
    row = Row(name=_name(axis, point), unit="s", details={"axis": axis, "x": point})
    free = machine.available_memory()
    # What is sent; two images, or only the first; what is served.
    warm = free is None or free > (3 + processes) * total + GB
    if free is not None and not warm and (processes or free < 2 * total + GB):
        row.skipped = f"needs {(2 + 2 * bool(processes) + processes) * total / GB:.0f} GB of free memory"
        return row
    pushes, peaks, first = _push(total, count, processes, rounds if warm else 0)
    timed = [one["seconds"] for one in pushes] or [first]
    row.value, row.spread = median(timed), spread(timed)
    row.note = "" if pushes else "the first push only, into cold images"
    row.details |= {
        "first": first,
        "warm": median(one["seconds"] for one in pushes),
        "pause": median(one["pause_seconds"] for one in pushes if one["pause_seconds"] is not None),
        **peaks,
    }
    return row


def _push(total: int, count: int, processes: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float], float]:
    """Pushes into warm images (none where ``rounds`` is 0), memory, and the seconds of the first push of all."""
    setting = machine.settings()[0]
    with (
        Host({"model": total}) as host,
        Worker("tests.benchmarks.shipd_side:Sender", total=total, count=count) as sender,
    ):
        host.place(setting.receiver)
        sender.call("pin", cores=setting.sender)
        with Watch(host.daemon.pid) as daemon, Watch(sender.pid) as client:
            first = push(host, sender)["seconds"]
            for _ in range(processes):
                host.serve("model", total, count)
            found = [push(host, sender) for _ in range(2 + rounds)][2:] if rounds else []
    peaks = {
        "daemon": (daemon.peak - daemon.first) / _MIB,
        "sender": (client.peak - client.first) / _MIB,
        "daemon_total": daemon.peak / _MIB,
    }
    return found, peaks, float(first)
