"""What each process has at one moment, from /proc: what must not grow."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import memory


@dataclass(frozen=True)
class Census:
    """One process. ``private`` and ``file`` are bytes of RssAnon and RssFile; ``descriptors`` counts by kind."""

    private: int
    file: int
    threads: int
    descriptors: Counter[str]
    images: int
    """Mappings of memfds."""

    @classmethod
    def of(cls, pid: int) -> "Census":
        """Take it now."""
        resident = memory(pid)
        kinds = Counter[str]()
        for entry in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            try:
                target = os.readlink(f"/proc/{pid}/fd/{entry}")  # noqa: PTH115
            except OSError:
                continue
            kinds[target.partition(":")[0] if not target.startswith("/memfd:") else "memfd"] += 1
        return cls(
            private=resident["RssAnon"],
            file=resident["RssFile"],
            threads=len(os.listdir(f"/proc/{pid}/task")),  # noqa: PTH208
            descriptors=kinds,
            images=Path(f"/proc/{pid}/maps").read_bytes().count(b"/memfd:"),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Everything that must be exactly what it was."""
        return {**self.descriptors, "threads": self.threads, "mapped images": self.images}

    def __str__(self) -> str:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return f"{self.private / 2**20:.1f} MiB private, {self.file / 2**20:.1f} MiB file, {counted}"
