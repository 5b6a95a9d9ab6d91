"""Fuzz one target, or all of them, for longer than the suite does: ``python -m tests.fuzz TARGET --runs 1000000``.

Exits 1 at the first input that breaks the invariant and prints it, so that it can become a test.
"""

import argparse
import resource
import sys
import time
import traceback

from tests.fuzz.mutator import Mutator
from tests.fuzz.targets import TARGETS

_SLOW_SECONDS = 2.0
_GROWTH = 512 * 1024
"""KiB by which the process may grow."""


def fuzz(name: str, runs: int, seed: int) -> bool:
    """Run ``runs`` inputs; False where one broke the invariant."""
    target = TARGETS[name]
    mutator = Mutator(target.seeds(), seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    for run in range(runs):
        data = mutator.next()
        started = time.monotonic()
        try:
            target.fuzz_one(data)
        except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
            traceback.print_exc()
            problem = "raised"
        else:
            problem = ""
        if time.monotonic() - started > _SLOW_SECONDS:
            problem = f"took {time.monotonic() - started:.1f} s"
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > _GROWTH:
            problem = "took more memory than an input may"
        if problem:
            print(f"{name}: input {run} of seed {seed} {problem}:\n{data.hex()}")
            return False
    rate = runs / (time.monotonic() - began)
    print(f"{name}: {runs} inputs, {rate:.0f} a second, nothing found")
    return True


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats a run (default: the time)")
    parser.add_argument("--input", help="run just this input, given in hexadecimal")
    options = parser.parse_args()
    names = list(TARGETS) if options.target == "all" else [options.target]
    if options.input is not None:
        for name in names:
            TARGETS[name].fuzz_one(bytes.fromhex(options.input))
        return 0
    failed = [name for name in names if not fuzz(name, options.runs, options.seed)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
