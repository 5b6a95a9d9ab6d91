"""The machine: which cores there are, pinning processes to them, and what it is called in the table."""

import datetime as dt
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Setting:
    """Where the two sides of a transfer run. The daemon and the serving process are one side: the receiving host."""

    name: str
    sender: tuple[int, ...]
    receiver: tuple[int, ...]


PINNED: Final = "one core each"
HALVES: Final = "half the cores each"
UNPINNED: Final = "unpinned"


def settings() -> list[Setting]:
    """Every way in which the two sides are placed on this machine; the one that the floors are about comes first.

    One core each, of different physical cores where the machine says which those are; half of the cores each where
    that is more than one; and unpinned. Where processes cannot be pinned (macOS, a single core), unpinned alone.
    """
    if not hasattr(os, "sched_setaffinity"):
        return [Setting(UNPINNED, (), ())]
    cores = tuple(sorted(os.sched_getaffinity(0)))
    found = []
    physical = _physical(cores)
    if len(physical) >= 2:
        found.append(Setting(PINNED, (physical[0][0],), (physical[1][0],)))
    if len(physical) >= 4:
        half = len(physical) // 2
        sender = tuple(core for group in physical[:half] for core in group)
        receiver = tuple(core for group in physical[half : 2 * half] for core in group)
        found.append(Setting(HALVES, sender, receiver))
    return [*found, Setting(UNPINNED, cores, cores)]


def pin(cores: tuple[int, ...] | list[int], pid: int | None = None) -> None:
    """Keep every thread of a process (this one by default) on these cores; threads it starts later follow."""
    if not cores:
        return
    tasks = Path("/proc") / str(pid or os.getpid()) / "task"
    for task in tasks.iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:
            # A thread that has just ended.
            continue


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    return _meminfo("MemAvailable")


def describe() -> dict[str, Any]:
    """What stands above the table: the machine, the software, the date and the commit."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory": _meminfo("MemTotal"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def _physical(cores: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The cores by physical core."""
    groups: dict[str, list[int]] = {}
    for core in cores:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        try:
            siblings = path.read_text().strip()
        except OSError:
            siblings = str(core)
        groups.setdefault(siblings, []).append(core)
    return [tuple(group) for group in groups.values()]


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _meminfo(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _commit() -> str:
    """The commit, with a + where the tree differs from it."""
    try:
        run = [
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout
            for arguments in (
                ("rev-parse", "--short=10", "HEAD"),
                ("status", "--porcelain", "--", "daemon", "protocol", "tests/benchmarks/*.py"),
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run[0].strip() + ("+" if run[1].strip() else "")
