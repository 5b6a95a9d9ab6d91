"""Successive steps, one push after another by one client: do both sides agree, and does anything grow?

MiniLM's real versions first, then synthetic steps from the last of them. After every push three digests are compared:
the sender's by the second implementation, the receipt's, and the daemon's by its own word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.benchmarks import machine
from tests.benchmarks.daemon_memory import own
from tests.benchmarks.rows import Row, median
from tests.benchmarks.shipd_side import Host
from tests.benchmarks.stepping import BYTES
from tests.benchmarks.workers import Worker

STEPS: Final = 50
WARM: Final = 10
"""Steps until everything has been allocated that is kept."""
SMALLER: Final = 680.0
"""How many times fewer bytes the real warm step has to take than the model has."""
GROWTH: Final = 8.0
"""MiB that each side may have more at the end than when it was warm."""
_MODEL: Final = "minilm"
_ROOM: Final = 1 << 26
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Step:
    """One push. ``name`` is the real step, or empty; memory in bytes, of each side's own, after it."""

    name: str
    agreed: bool
    total: int
    sent: int
    seconds: float
    daemon: int
    sender: int


def measure(way: str = BYTES, steps: int = STEPS) -> list[Row]:
    """The first version whole, then ``steps`` more. One run: what counts here does not vary."""
    setting = machine.settings()[0]
    with Host({_MODEL: _ROOM}) as host, Worker("tests.benchmarks.stepping:Stepping") as sender:
        host.place(setting.receiver)
        sender.call("pin", cores=setting.sender)
        names = [str(step) for step in sender.call("real")]
        sender.call("open", address=host.address)
        sender.call("push", model=_MODEL, way=way)
        found = []
        for number in range(1, steps + 1):
            sender.call("advance")
            name = names[number] if number < len(names) else ""
            found.append(_step(host, sender, name, way))
        sender.call("close")
    return table(found)


def _step(host: Host, sender: Worker, name: str, way: str) -> Step:
    receipt = sender.call("push", model=_MODEL, way=way)
    digests = {receipt["digest"], sender.call("content_digest"), sender.call("live", model=_MODEL)}
    return Step(
        name=name,
        agreed=len(digests) == 1,
        total=receipt["bytes_total"],
        sent=receipt["bytes_sent"],
        seconds=receipt["seconds"],
        daemon=own(host.daemon.pid),
        sender=sender.call("memory"),
    )


def table(steps: Sequence[Step]) -> list[Row]:
    """Agreement, what steps take, memory."""
    rows = [
        Row(
            name=f"{len(steps)} successive steps, both sides agree by digest",
            value=sum(step.agreed for step in steps),
            unit="steps",
            floor=len(steps),
            better="higher",
        )
    ]
    rows += [
        Row(
            name="one warm step at LR 1e-6, all weights: everything sent",
            value=step.total / step.sent,
            unit="x",
            floor=SMALLER,
            better="higher",
            note=f"{step.sent / 1e3:,.0f} kB of {step.total / 1e6:.1f} MB",
        )
        for step in steps
        if step.name == "41"
    ]
    synthetic = [step for step in steps if not step.name]
    rows += [
        Row(
            name="a synthetic step after that: everything sent",
            value=median(step.total / step.sent for step in synthetic),
            unit="x",
            better="higher",
        ),
        Row(
            name="a synthetic step after that, push to COMMITTED",
            value=median(step.seconds for step in synthetic),
            unit="s",
        ),
    ]
    for side in ("daemon", "sender"):
        taken = [getattr(step, side) for step in steps]
        # The most of both ends: what an allocator gives back late is no growth.
        first, last = max(taken[WARM : 2 * WARM], default=taken[0]), max(taken[-WARM:])
        rows.append(
            Row(
                name=f"{side}'s own memory, what it grew by in {max(0, len(steps) - 2 * WARM)} steps",
                value=(last - first) / _MIB,
                unit="MiB",
                floor=GROWTH,
                note=f"{last / _MIB:.0f} MiB at the end",
            )
        )
    return rows
