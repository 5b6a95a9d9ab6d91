"""The command line: ``python -m tests.benchmarks``, best by ``make bench``.

    python -m tests.benchmarks                   everything but growth; replaced in results.json and the pictures
    python -m tests.benchmarks small memory      these only, and only these are replaced in results.json
    python -m tests.benchmarks raw shipd         these of the side by side only; printed, not kept
    python -m tests.benchmarks growth --full     the whole grid
    python -m tests.benchmarks codecs --full     synthetic steps of up to 2 GB
    python -m tests.benchmarks loading --full    files of 20,000 tensors as well
    python -m tests.benchmarks --table           results.json into README.md

On Ctrl-C every process is ended and nothing is written.
"""

import argparse
import signal
import sys
import time
from types import FrameType
from typing import Final, NoReturn

from tests.benchmarks import machine, plot, report
from tests.benchmarks.machine import ROOT
from tests.benchmarks.payload import GB
from tests.benchmarks.rows import Row
from tests.benchmarks.sections import SECTIONS, Run, Section
from tests.benchmarks.side_by_side import CONTENDERS, reason
from tests.benchmarks.workers import preload, shut_down

ROUNDS: Final = 5


def main(arguments: list[str] | None = None) -> int:
    """Measure; the exit code."""
    chosen = _parse(arguments)
    if chosen.table:
        report.rewrite(
            ROOT / "README.md",
            report.load(),
            [(what, str(path.relative_to(ROOT))) for path, what in plot.PICTURES if path.exists()],
        )
        return 0
    if sys.platform != "linux":
        print("shipd's daemon runs on Linux, and so do its benchmarks", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _stop)
    try:
        _measure(chosen)
    except KeyboardInterrupt:
        print("interrupted; every process has been ended, nothing was written", file=sys.stderr)
        return 130
    finally:
        shut_down()
    return 0


def _measure(chosen: argparse.Namespace) -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    contenders = [name for name in chosen.names if name in {one.name for one in CONTENDERS}]
    wanted = [
        section
        for section in SECTIONS
        if (not chosen.names and not section.by_name)
        or section.name in chosen.names
        or (contenders and section.name == "side-by-side")
    ]
    if any(section.name == "side-by-side" for section in wanted) and (not contenders or "torchft" in str(contenders)):
        # It takes as long to import as torch.
        preload("torchft.checkpointing.http_transport", "torchft.checkpointing.pg_transport")
    where = machine.describe()
    run = Run(rounds=chosen.rounds, contenders=contenders, total=int(chosen.bytes), full=chosen.full, say=say)
    found = {}
    for section in wanted:
        say(section.title)
        found[section.name] = report.section(section.title, where, chosen.rounds, _rows(section, run))
    print(report.markdown({"sections": found}))
    say("done")
    # A part of the side by side, or other sizes, would pass for the whole.
    partial = contenders or chosen.bytes != GB or chosen.rounds < ROUNDS
    if partial and not chosen.keep:
        say("not kept: fewer rounds, rows or bytes than a whole run")
        return
    merged = {**report.load()["sections"], **found}
    ordered = {section.name: merged[section.name] for section in SECTIONS if section.name in merged}
    report.save({"sections": ordered})
    try:
        plot.draw(report.load())
    except ImportError as error:
        say(f"no pictures: {error}")


def _rows(section: Section, run: Run) -> list[Row]:
    """Its rows; one that says why where there are none, so that the others are not lost."""
    try:
        return section.run(run)
    except Exception as error:  # noqa: BLE001  whatever it is, it is told in the table
        run.say(f"{section.name}: {type(error).__name__}: {error}")
        return [Row(name=section.title, skipped=f"{type(error).__name__}: {reason(error)}")]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    rows = [one.name for one in CONTENDERS]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; or {', '.join(rows)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the medians are taken (%(default)s)")
    parser.add_argument("--bytes", type=float, default=GB, help="of the side by side (%(default).0e)")
    full = "growth: the whole grid; codecs: steps of up to 2 GB; loading: many small tensors as well"
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--keep", action="store_true", help="write results.json even of a part")
    parser.add_argument("--table", action="store_true", help="write results.json into README.md, measure nothing")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - {*names, *rows}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join([*names, *rows])}")
    if chosen.rounds < 1 or chosen.bytes < 1e6:
        parser.error("at least one round, of at least a megabyte")
    return chosen


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
