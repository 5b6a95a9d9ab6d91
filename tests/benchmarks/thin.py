"""A step over a thin link, and a whole model: two hosts in network namespaces of their own, with tbf between them.

Times are from the call of the client's push to its receipt, which comes with COMMITTED. Everything that is compared has
gone over the same link, at the same rate.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host
from tests.benchmarks.stepping import BYTES, WHOLE
from tests.benchmarks.workers import Worker
from tests.support.thin_link import MBIT, NoThinLink, ThinLink

THIN: Final = 10 * MBIT
LESS_THIN: Final = 100 * MBIT
SETTING_UP: Final = 10_000 * MBIT
STEP_FASTER: Final = 50.0
WHOLE_FASTER: Final = 1.4
"""How many times faster a step, and a packed model, have to be than every byte as it is."""
WHOLE_ROUNDS: Final = 3
SECONDS: Final = 120.0
"""For one push: all of MiniLM takes 36 s at 10 Mbit/s."""
_MODEL: Final = "minilm"
_ROOM: Final = 1 << 26
_TOKEN: Final = "what a sender of this benchmark has to prove"


@dataclass(frozen=True)
class Times:
    """Seconds of each push, and the bytes that one sent."""

    step: list[float]
    step_sent: int
    whole: float
    whole_sent: int
    packed: list[float]
    raw: list[float]


def measure(
    rounds: int,
    say: Callable[[str], None] = lambda _: None,
    *,
    small: str = BYTES,
    whole: str = WHOLE,
    thin: int = THIN,
    less_thin: int = LESS_THIN,
) -> list[Row]:
    """``small`` and ``whole`` are the ways that are compared. One push of all of it over the thinner link is enough."""
    try:
        with ThinLink(SETTING_UP) as link, _hosts(link) as (_, sender):
            times = _times(link, sender, rounds, say, (small, whole), (thin, less_thin))
    except NoThinLink as error:
        return [Row(name="one step of MiniLM over a thin link", unit="s", skipped=str(error))]
    return table(times, thin, less_thin)


@contextlib.contextmanager
def _hosts(link: ThinLink) -> Iterator[tuple[Host, Worker]]:
    """A daemon at the receiving end, and a connected sender at the other, which has MiniLM before and after a step."""
    with contextlib.ExitStack() as running:
        token = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="shipd-bench-"))) / "token"
        token.write_text(_TOKEN)
        models = {_MODEL: _ROOM, **{_fresh(number): _ROOM for number in range(WHOLE_ROUNDS)}}
        sender = running.enter_context(Worker("tests.benchmarks.stepping:Stepping"))
        with link.receiver.entered():
            listen = f"{link.receiver.address}:0"
            host = running.enter_context(Host(models, listen=listen, token_file=str(token)))
        steps = sender.call("real")
        while steps.pop(0) != 40:
            sender.call("advance")
        sender.call("keep", name="before")
        sender.call("advance")
        sender.call("keep", name="after")
        sender.call("enter", namespace=str(link.sender.namespace))
        sender.call("open", address=f"{link.receiver.address}:{host.daemon.port}", token=_TOKEN)
        yield host, sender
        sender.call("close")


def _fresh(number: int) -> str:
    """A model that nobody has pushed to."""
    return f"fresh-{number}"


def _times(
    link: ThinLink,
    sender: Worker,
    rounds: int,
    say: Callable[[str], None],
    ways: tuple[str, str],
    rates: tuple[int, int],
) -> Times:
    small, whole = ways

    def push(version: str, model: str, way: str) -> dict[str, Any]:
        sender.call("take", name=version)
        receipt: dict[str, Any] = sender.call("push", deadline=SECONDS, model=model, way=way)
        return receipt

    push("before", _MODEL, small)
    link.set_rate(rates[0])
    say("thin link: steps")
    # Back and forth: a step back is as large as the step.
    steps = [push(("after", "before")[number % 2], _MODEL, small) for number in range(rounds)]
    say("thin link: all of it")
    everything = push(("after", "before")[rounds % 2], _MODEL, whole)
    link.set_rate(rates[1])
    packed, raw = [], []
    for number in range(min(rounds, WHOLE_ROUNDS)):
        say("less thin a link: all of it, packed and raw")
        packed.append(push("before", _fresh(number), small)["seconds"])
        raw.append(push("after", _fresh(number), whole)["seconds"])
    return Times(
        step=[step["seconds"] for step in steps],
        step_sent=max(step["bytes_sent"] for step in steps),
        whole=everything["seconds"],
        whole_sent=everything["bytes_sent"],
        packed=packed,
        raw=raw,
    )


def table(times: Times, thin: int = THIN, less_thin: int = LESS_THIN) -> list[Row]:
    """How much faster."""
    steps = [times.whole / seconds for seconds in times.step]
    packed = [raw / seconds for raw, seconds in zip(times.raw, times.packed, strict=True)]
    return [
        Row(
            name=f"one step of MiniLM over {thin / MBIT:g} Mbit/s, push to COMMITTED",
            value=median(times.step),
            unit="s",
            reference=times.whole,
            ratio=median(steps),
            floor=STEP_FASTER,
            better="higher",
            spread=spread(steps),
            note=f"{times.step_sent / 1e3:,.0f} kB; against all of it, {times.whole_sent / 1e6:.1f} MB",
        ),
        Row(
            name=f"all of MiniLM in bf16 over {less_thin / MBIT:g} Mbit/s, push to COMMITTED",
            value=median(times.packed),
            unit="s",
            reference=median(times.raw),
            ratio=median(packed),
            floor=WHOLE_FASTER,
            better="higher",
            spread=spread(packed),
            note="against raw bytes",
        ),
    ]
