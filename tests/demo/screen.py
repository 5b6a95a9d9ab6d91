"""What the demo looks like: chapters of rows, each row with a mark where it claims something that was checked.

On a terminal there are colours, and a line at the bottom that moves while something is under way.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH: Final = 100


class Screen:
    """Prints the story and remembers what was off."""

    def __init__(self) -> None:
        # A mark that a terminal cannot show is no reason to fail.
        if reconfigure := getattr(sys.stdout, "reconfigure", None):
            reconfigure(errors="replace")
        self._console = Console(highlight=False, emoji=False)
        self._console.width = min(self._console.width, WIDTH) if self._console.is_terminal else WIDTH
        self._marks = {True: Text("✓", "green"), False: Text("✗", "bold red"), None: Text()}
        self.problems: list[str] = []

    def title(self, text: str) -> None:
        """The first line."""
        self._print(Text(text, "bold"))

    def chapter(self, text: str, aside: str = "") -> None:
        """A heading."""
        self._print(Text())
        self._print(Text.assemble((text, "bold cyan"), "   " if aside else "", (aside, "dim")))

    def row(self, label: str, text: str, *, holds: bool | None = None, off: str = "") -> None:
        """A line; where ``holds`` is given it is a claim, and ``off`` says what is wrong if it does not hold."""
        if holds is False:
            self.problems.append(off or f"{label}: {text}")
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=2, justify="right")
        grid.add_column(width=9)
        grid.add_column()
        grid.add_row(self._marks[holds], Text(label, "dim"), Text(text, "bold red" if holds is False else ""))
        self._print(grid)

    def verdict(self, text: str) -> None:
        """The last word: ``text``, or everything that was off."""
        self._print(Text())
        if not self.problems:
            self._print(Text(text, "bold green"))
            return
        for problem in self.problems:
            self._print(Text(f"Off: {problem}", "bold red"))

    def where_next(self) -> None:
        """For whoever wants more."""
        self.row("next", "README.md      the daemon, your serving process and your trainer, in a few lines each")
        self.row("", "shipctl -h     push, status and verify from a shell")
        self.row("", "systemd/       the daemon as a hardened service, with a commented configuration")

    def complain(self, text: str) -> None:
        """Something ended the story before its end."""
        self.problems.append(text)
        self._print(Text())
        self._print(Text(text, "red"))

    @contextlib.contextmanager
    def working(self, activity: str, count: Callable[[], int] | None = None) -> Iterator[None]:
        """While something takes its time. Only a terminal sees it, and nothing of it stays."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        with self._console.status(_Activity(activity, count), spinner="dots", refresh_per_second=10):  # type: ignore[arg-type]
            yield

    def _print(self, what: Text | Table) -> None:
        self._console.print(what)


class _Activity:
    """A text that is made anew each time it is shown."""

    def __init__(self, activity: str, count: Callable[[], int] | None) -> None:
        self._activity = activity
        self._count = count

    def __rich__(self) -> Text:
        counted = f"   {self._count():,} questions answered" if self._count is not None else ""
        return Text.assemble(self._activity, (counted, "dim"))
