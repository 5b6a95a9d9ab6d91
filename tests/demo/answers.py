"""The serving process as the demo sees it: every answer that it gave, under which version, and how long it took."""

import json
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.support.processes import Process

if TYPE_CHECKING:
    from tests.demo.trainer import Made

DEADLINE: Final = 120.0
"""Seconds until a wait is given up. Importing torch takes ten on a slow machine, sixty on one that is also busy."""


@dataclass(frozen=True)
class Spoken:
    """An answer that was given, perhaps many times."""

    label: str
    question: str
    answer: str
    bits: bytes


class Serving(Process):
    """``tests.demo.serving``, from the start to the end of the block."""

    def __init__(self, socket: Path) -> None:
        super().__init__(
            [sys.executable, "-m", "tests.demo.serving", str(socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.label = ""
        """Of the version that it came with."""
        self.failures: list[str] = []
        self.seconds: list[float] = []
        self.across: list[float] = []
        """What the first answer of each later version took: it waited for the swap."""
        self._spoken: list[Spoken] = []
        self._given = Counter[int]()
        self._latest = ""
        self._done = False
        self._ended = False
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="answers", daemon=True)
        self._reader.start()

    # --- waiting -------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Until it is attached."""
        self._wait_for(lambda: bool(self.label), "did not attach")

    def wait_answer(self, label: str, question: str) -> str:
        """What a version answers to a question, once it has been asked."""
        self._wait_for(lambda: self._find(label, question) is not None, f"gave no answer as {label}")
        found = self._find(label, question)
        assert found is not None
        return found.answer

    def wait_more(self, label: str) -> None:
        """Until it has answered every question again, as ``label``."""
        before = self._count_of(label)
        wanted = before + 2 * len({spoken.question for spoken in self._spoken})
        self._wait_for(lambda: self._count_of(label) >= wanted, f"gave no more answers as {label}")

    def stop(self) -> int:
        """Have it end, and its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code if code or self._done else 1

    # --- accounts ------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Answers so far."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Seconds for an answer."""
        return statistics.median(self.seconds)

    @property
    def slowest(self) -> float:
        """Seconds for an answer."""
        return max(self.seconds)

    def wrong(self, versions: Mapping[str, "Made"]) -> dict[Spoken, int]:
        """Answers that are not bit for bit, and word for word, what the version of their label replies elsewhere."""

        def right(spoken: Spoken) -> bool:
            version = versions.get(spoken.label)
            reply = version.replies[spoken.question] if version is not None else None
            return reply is not None and (reply.answer, reply.embedding) == (spoken.answer, spoken.bits)

        return {spoken: self._given[number] for number, spoken in enumerate(self._spoken) if not right(spoken)}

    def _find(self, label: str, question: str) -> Spoken | None:
        matching = (spoken for spoken in self._spoken if (spoken.label, spoken.question) == (label, question))
        return next(matching, None)

    def _count_of(self, label: str) -> int:
        return sum(self._given[number] for number, spoken in enumerate(self._spoken) if spoken.label == label)

    # --- listening -----------------------------------------------------------------------------------------

    def _wait_for(self, condition: Callable[[], bool], complaint: str) -> None:
        with self._heard:
            self._heard.wait_for(lambda: condition() or self._ended, DEADLINE)
            if not condition():
                how = f"ended with {self.wait()}" if self._ended else f"took longer than {DEADLINE:.0f} s"
                raise AssertionError(f"the serving process {complaint}: it {how}")

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        for line in stream:
            said = json.loads(line)
            with self._heard:
                self._take(said.pop("event"), said)
                self._heard.notify_all()
        stream.close()
        with self._heard:
            self._ended = True
            self._heard.notify_all()

    def _take(self, event: str, said: dict[str, Any]) -> None:
        if event == "answered":
            spoken = self._spoken[said["id"]]
            self._given[said["id"]] += 1
            self.seconds.append(said["seconds"])
            if self._latest not in ("", spoken.label):
                self.across.append(said["seconds"])
            self._latest = spoken.label
        elif event == "new":
            self._spoken.append(Spoken(said["label"], said["question"], said["answer"], bytes.fromhex(said["bits"])))
        elif event == "failed":
            self.failures.append(said["error"])
        elif event == "ready":
            self.label = said["label"]
        elif event == "done":
            self._done = True
