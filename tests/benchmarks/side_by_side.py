"""shipd beside its rivals: one gigabyte from one process to another, everything alternating in one run.

Every round runs each contender once, in a few processes of its own, and never two at the same time. Each transfer has
one over a raw socket just before it, placed on the same cores: a ratio compares these two, so that a machine which is
slow for a while is slow for both.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.benchmarks import machine, payload
from tests.benchmarks.machine import Setting
from tests.benchmarks.pair import Pair
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host, push
from tests.benchmarks.workers import Worker, WorkerFailed

RAW: Final = "raw socket, no checks"
WIRE: Final = "shipd, wire"
PUSH: Final = "shipd, whole push"
FILE: Final = "shipd, whole push of a safetensors file"
COLD: Final = "shipd, first push, cold images"
GLOO: Final = "gloo broadcast, 64 MiB buckets"
GLOO_COPY: Final = "gloo + copy"
GLOO_BOTH: Final = "gloo + checks + copy"
HTTP: Final = "torchft HTTPTransport, 4 chunks"
PG: Final = "torchft PGTransport, in place"
MOONCAKE: Final = "Mooncake TCP"


@dataclass(frozen=True)
class Sample:
    """One transfer, and the raw one before it; seconds."""

    row: str
    setting: str
    round: int
    seconds: float
    raw: float


@dataclass(frozen=True)
class Bench:
    """What a visit has to work with."""

    settings: Sequence[Setting]
    raw: Pair
    total: int
    round: int

    def measure(self, setting: Setting, rows: Callable[[], dict[str, float]]) -> Generator[Sample, None, None]:
        """A raw transfer, then what ``rows`` measures."""
        self.raw.place(setting)
        reference = self.raw.transfer()
        for row, seconds in rows().items():
            yield Sample(row, setting.name, self.round, seconds, reference)


@dataclass(frozen=True)
class Contender:
    """``name`` on the command line, the rows it measures, and how it is visited once a round."""

    name: str
    rows: tuple[str, ...]
    visit: Callable[[Bench], Generator[Sample, None, None]]


def _raw(bench: Bench) -> Generator[Sample, None, None]:
    """Against the raw transfer before it: its ratio tells how steady the machine is."""
    for setting in bench.settings:
        yield from bench.measure(setting, lambda: {RAW: bench.raw.transfer()})


def _peer(module: str, kinds: dict[str, str], **arguments: Any) -> Callable[[Bench], Generator[Sample, None, None]]:
    def visit(bench: Bench) -> Generator[Sample, None, None]:
        with Pair(f"tests.benchmarks.peers.{module}", total=bench.total, **arguments) as pair:
            pair.place(bench.settings[0])
            # Once without counting: connections reach their speed, memory is touched.
            pair.transfer(list(kinds)[-1])
            for setting in bench.settings:
                pair.place(setting)
                for kind, row in kinds.items():
                    yield from bench.measure(setting, lambda: {row: pair.transfer(kind)})  # noqa: B023  called at once
            pair.check()

    return visit


def _shipd(bench: Bench) -> Generator[Sample, None, None]:
    """Into a fresh daemon whose images nobody has touched; then, with a model attached in mode copy, into warm ones.

    The serving process is on the daemon's side. It is idle while the bytes travel, and the swap is part of the push.
    """
    total = bench.total
    first = bench.settings[0]
    with Host({"model": total}) as host, Worker("tests.benchmarks.shipd_side:Sender", total=total) as sender:
        host.place(first.receiver)
        sender.call("pin", cores=first.sender)
        yield from bench.measure(first, lambda: {COLD: push(host, sender)["seconds"]})
        host.serve("model", total)
        sender.call("save", path=str(host.directory / "model.safetensors"))
        for _ in range(2):
            # Each of the two images once.
            push(host, sender)
        receipt: dict[str, Any] = {}

        def from_memory() -> dict[str, float]:
            receipt.update(push(host, sender))
            return {WIRE: receipt["wire_seconds"], PUSH: receipt["seconds"]}

        for setting in bench.settings:
            if len(setting.receiver) != len(first.receiver):
                # Started where it runs, torch copies with as many threads as it has cores there.
                host.dismiss()
                host.place(setting.receiver)
                host.serve("model", total)
            host.place(setting.receiver)
            sender.call("pin", cores=setting.sender)
            yield from bench.measure(setting, lambda: {FILE: push(host, sender, from_file=True)["seconds"]})
            yield from bench.measure(setting, from_memory)
        if host.serving[0].call("verify", name="model") != receipt["digest"] or not receipt["swapped"]:
            raise AssertionError("shipd: other bytes are live than were pushed")


CONTENDERS: Final = (
    Contender("raw", (RAW,), _raw),
    Contender("shipd", (WIRE, PUSH, FILE, COLD), _shipd),
    Contender(
        "gloo",
        (GLOO, GLOO_COPY, GLOO_BOTH),
        _peer("gloo", {"plain": GLOO, "copy": GLOO_COPY, "checks+copy": GLOO_BOTH}),
    ),
    # What its threads are for; without, it is as fast or slower.
    Contender("torchft-http", (HTTP,), _peer("torchft_http", {"": HTTP}, chunks=4)),
    Contender("torchft-pg", (PG,), _peer("torchft_pg", {"": PG})),
    Contender("mooncake", (MOONCAKE,), _peer("mooncake", {"": MOONCAKE})),
)

BOUNDS: Final[dict[str, tuple[float | None, float | None]]] = {WIRE: (0.85, 1.05)}
"""Floor and goal of a row's ratio to the raw socket."""

COMPARED: Final = (
    (PUSH, GLOO_BOTH, 1.0, None),
    (PUSH, GLOO_COPY, None, 1.0),
    (WIRE, HTTP, 2.5, 4.0),
    (PUSH, HTTP, None, None),
    (WIRE, MOONCAKE, 1.5, 2.5),
    (PUSH, MOONCAKE, None, None),
)
"""What is compared with what; floor and goal of how many times as fast it is. The last two neither check anything nor
copy it into a model, so the floors are for the wire; a push is verified and swapped in as well."""


def measure(
    rounds: int, names: Sequence[str] = (), total: int = payload.GB, say: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """All contenders, or those named."""
    chosen = [one for one in CONTENDERS if not names or one.name in names]
    settings = machine.settings()
    samples: list[Sample] = []
    failed: dict[str, str] = {}
    with Pair("tests.benchmarks.peers.raw", total=total) as raw:
        raw.transfer()
        for number in range(rounds):
            for contender in chosen:
                if contender.name in failed:
                    continue
                say(f"round {number + 1} of {rounds}: {contender.name}")
                found: list[Sample] = []
                try:
                    with contextlib.closing(contender.visit(Bench(settings, raw, total, number))) as visit:
                        found.extend(visit)
                except (WorkerFailed, AssertionError, OSError) as error:
                    if contender.name in ("raw", "shipd"):
                        raise
                    failed[contender.name] = reason(error)
                    say(str(error))
                else:
                    samples += found
        raw.check()
    return table(samples, chosen, failed, settings, total)


def table(
    samples: Sequence[Sample],
    chosen: Sequence[Contender],
    failed: dict[str, str],
    settings: Sequence[Setting],
    total: int,
) -> list[Row]:
    """The medians."""
    rows = []
    for contender in chosen:
        for name in contender.rows:
            floor, goal = BOUNDS.get(name, (None, None))
            row = Row(name=name, unit="GB/s", reference=RAW, floor=floor, goal=goal, better="higher", bounds="ratio")
            if contender.name in failed:
                row.skipped = failed[contender.name]
            for setting in settings:
                mine = [one for one in samples if one.row == name and one.setting == setting.name]
                value = median(total / one.seconds / 1e9 for one in mine)
                ratios = [one.raw / one.seconds for one in mine]
                _place(row, setting is settings[0], setting.name, value, ratios)
            rows.append(row)
    known = {(one.row, one.setting, one.round): one for one in samples}
    for ours, peer, floor, goal in COMPARED:
        if not any(one.row == peer for one in samples) or not any(one.row == ours for one in samples):
            continue
        row = Row(name=ours, unit="GB/s", reference=peer, floor=floor, goal=goal, better="higher", bounds="ratio")
        for setting in settings:
            # Through the raw socket of each, since minutes may lie between the two.
            both = [
                (push, other)
                for (name, where, number), push in known.items()
                if (name, where) == (ours, setting.name) and (other := known.get((peer, where, number)))
            ]
            value = median(total / push.seconds / 1e9 for push, _ in both)
            ratios = [(push.raw / push.seconds) / (other.raw / other.seconds) for push, other in both]
            _place(row, setting is settings[0], setting.name, value, ratios)
        rows.append(row)
    return rows


def _place(row: Row, first: bool, setting: str, value: float | None, ratios: list[float]) -> None:
    if value is None:
        return
    if first:
        row.value, row.ratio, row.spread = value, median(ratios), spread(ratios)
    else:
        row.elsewhere[setting] = (value, median(ratios))


def reason(error: BaseException) -> str:
    """Why a row is missing, short enough for a table."""
    text = str(error).splitlines()[0]
    for noise in ("tests.benchmarks.peers.", ":Sender", ":Receiver", "ready failed: "):
        text = text.replace(noise, "")
    return text[:200]
