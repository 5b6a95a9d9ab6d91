"""What the demo looks like: chapters of rows, each row with a mark where it claims something that was checked.

On a terminal there are colours, and a line at the bottom that moves while something is under way.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console
from rich.text import Text

WIDTH: Final = 100
LABEL: Final = 9


class Screen:
    """Prints the story and remembers what was off."""

    def __init__(self) -> None:
        # A character that the terminal cannot show is no reason to fail.
        if reconfigure := getattr(sys.stdout, "reconfigure", None):
            reconfigure(errors="replace")
        self._console = Console(highlight=False, emoji=False)
        self._console.width = min(self._console.width, WIDTH) if self._console.is_terminal else WIDTH
        held, off = "✓✗" if self._console.encoding.startswith("utf") else "+!"
        self._marks = {True: (f" {held}", "green"), False: (f" {off}", "bold red"), None: ("  ", "")}
        self.problems: list[str] = []

    def title(self, text: str) -> None:
        """The first line."""
        self._print(Text(text, "bold"))

    def chapter(self, text: str, aside: str = "") -> None:
        """A heading."""
        self._print(Text())
        self._print(Text.assemble((text, "bold cyan"), (aside and f"   {aside}", "dim")))

    def row(self, label: str, *parts: str, lead: str = "", holds: bool | None = None, off: str = "") -> None:
        """A row of ``parts``: side by side, or below each other where the terminal is too narrow.

        Where ``holds`` is given the row is a claim, and ``off`` says what is wrong if it does not hold.
        """
        if holds is False:
            self.problems.append(off or f"{label}: {', '.join(parts)}")
        indent = 2 + 1 + LABEL + 1
        width = max(20, self._console.width - indent)
        joined = "   ".join(parts)
        text = Text.assemble(
            (lead and f"{lead} ", "dim"),
            (joined if len(joined) <= width else "\n".join(parts), "bold red" if holds is False else ""),
        )
        for number, line in enumerate(text.wrap(self._console, width)):
            first = Text.assemble(self._marks[holds], " ", (f"{label:<{LABEL}}", "dim"), " ")
            line.rstrip()
            self._print((first if number == 0 else Text(" " * indent)) + line)

    def verdict(self, text: str) -> None:
        """The last word: ``text`` and where to go next, or everything that was off."""
        self._print(Text())
        if self.problems:
            for problem in self.problems:
                self._print(Text(f"Off: {problem}", "bold red"))
            return
        self._print(Text(text, "bold green"))
        self.row("README.md", "the daemon, your serving process, your trainer: a few lines each")
        self.row("shipctl", "push, status and verify from a shell: .venv/bin/shipctl --help")
        self.row("systemd/", "the daemon as a hardened service, with a commented configuration")

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
        with self._console.status(_Activity(activity, count), spinner="dots", refresh_per_second=10):
            yield

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


class _Activity:
    """A text that is made anew each time it is shown."""

    def __init__(self, activity: str, count: Callable[[], int] | None) -> None:
        self._activity = activity
        self._count = count

    def __rich__(self) -> Text:
        counted = f"   {self._count():,} questions answered" if self._count is not None and self._count() else ""
        return Text.assemble(self._activity, (counted, "dim"))
