"""``python -m tests.load --seconds 300``: four models, sixteen serving processes, and everything killed at random."""

import argparse
import sys
import time

from tests.load.running import Load, LoadFailed
from tests.support.serving_process import Nursery


def main() -> int:
    """The command: 0 where everything held, 1 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long chaos reigns (default: 300)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what happens (default: the time)")
    options = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    say(f"seed {options.seed}")
    try:
        with Nursery() as nursery:
            print(Load(nursery, options.seconds, options.seed, say).run())
    except LoadFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
