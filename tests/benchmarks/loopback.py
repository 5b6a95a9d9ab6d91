"""What a fast link pays for incremental transfer: nothing, or next to it.

A step of a synthetic model is pushed over loopback into one model with incremental transfer, as it comes, and into
another with it switched off, in turns; each side on cores of its own.
"""

from collections.abc import Sequence
from typing import Final

from tests.benchmarks import machine
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host
from tests.benchmarks.stepping import TIME, WHOLE
from tests.benchmarks.workers import Worker

TOTAL: Final = 200_000_000
SLOWER: Final = 1.10
"""Times as long as without, at most."""


def measure(rounds: int, total: int = TOTAL, *, incremental: str = TIME, off: str = WHOLE) -> list[Row]:
    """``incremental`` and ``off`` are the ways that are compared."""
    setting = machine.settings()[0]
    ways = {"incremental": incremental, "off": off}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Host(dict.fromkeys(ways, total)) as host, Worker("tests.benchmarks.stepping:Stepping") as sender:
        host.place(setting.receiver)
        sender.call("pin", cores=setting.sender)
        sender.call("synthetic", total=total)
        sender.call("open", address=host.address)
        # Two that are not counted: each of the two images once.
        for number in range(2 + rounds):
            sender.call("take", name=("before", "after")[number % 2])
            # Whoever comes second finds the version in the caches.
            for name in (*ways,) if number % 2 else reversed(ways):
                receipt = sender.call("push", model=name, way=ways[name])
                if number >= 2:
                    seconds[name].append(receipt["seconds"])
        sender.call("close")
    return table(seconds["incremental"], seconds["off"], total)


def table(incremental: Sequence[float], off: Sequence[float], total: int) -> list[Row]:
    """How much longer."""
    ratios = [with_it / without for with_it, without in zip(incremental, off, strict=True)]
    return [
        Row(
            name=f"a step of {total / 1e6:g} MB over loopback",
            value=median(incremental),
            unit="s",
            reference="incremental transfer switched off",
            ratio=median(ratios),
            floor=SLOWER,
            better="lower",
            spread=spread(ratios),
        )
    ]
