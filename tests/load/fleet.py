"""The daemon and the serving processes of the load: started, killed, stopped, brought back, and listened to."""

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.load.parties import PARTY, VIOLATION
from tests.load.pushing import STALL, Ledger, Pushers
from tests.support.processes import ShipdProcess
from tests.support.serving_process import Nursery, Serving, Told

STAGE_SECONDS: Final = 3.0
"""A process that is stopped for longer is evicted."""

SETTINGS: Final[dict[str, Any]] = {
    "stall": STALL, "resume_window": 2.0, "stage_timeout": STAGE_SECONDS, "commit_timeout": 2.0,
}  # fmt: skip

_COME_BACK: Final = 90.0
"""Seconds in which a process must have attached: it waits for whatever is being rolled out, and so do others."""


@dataclass
class Member:
    """One place for a serving process, and who has it now."""

    model: str
    mode: str
    process: Serving
    attaching: bool = True
    resumes: float | None = None
    """When it goes on, if it is stopped."""
    since: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """For messages."""
        return f"process {self.process.pid} of {self.model}"


class Fleet:
    """One daemon, always on the same port and socket, and ``count`` serving processes for each model."""

    def __init__(
        self, directory: Path, ledger: Ledger, nursery: Nursery, models: list[str], count: int, rng: random.Random
    ) -> None:
        self.models = models
        self._directory = directory
        self._ledger = ledger
        self._nursery = nursery
        self._rng = rng
        # Declared, so that they can be pushed to when the daemon is back and no process is yet.
        self._settings = {**SETTINGS, "models": dict.fromkeys(models, "64MiB")}
        self._heard = len(nursery.err)
        self._daemon = ShipdProcess(directory, **self._settings)
        self.port = self._daemon.port
        self._said = 0
        self.restarts = 0
        self.members: list[Member] = []
        for model in models:
            for at in range(count):
                # One of each model's serves straight from the images.
                self._join(model, "flip" if at == 0 else "copy")

    @property
    def daemon(self) -> ShipdProcess:
        """The one that runs now."""
        return self._daemon

    def close(self) -> None:
        """Make an end of everything that still runs."""
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                member.process.resume()
            member.process.close()
        self._daemon.__exit__()

    # --- serving processes ---------------------------------------------------------------------------------

    def _join(self, model: str, mode: str) -> None:
        process = self._nursery.spawn(PARTY)
        process.begin("serve", str(self._daemon.socket), model, mode)
        self.members.append(Member(model, mode, process))

    def _replace(self, member: Member, pushers: Pushers) -> None:
        member.process.close()
        member.process = pushers.spawn()
        member.process.begin("serve", str(self._daemon.socket), member.model, member.mode)
        member.attaching, member.resumes, member.since = True, None, time.monotonic()

    def look(self) -> None:
        """Whoever has attached has; whoever has been stopped for long enough goes on."""
        now = time.monotonic()
        for member in self.members:
            if member.resumes is not None and now >= member.resumes:
                member.process.resume()
                member.resumes = None
                self._ledger.note(f"{member.name} goes on")
            if member.attaching and member.resumes is None and member.process.answered:
                self._attached(member)

    def _attached(self, member: Member) -> None:
        try:
            refused = member.process.result(_COME_BACK)
        except (Told, AssertionError) as error:
            self._ledger.violation(f"{member.name} cannot attach: {error}")
            refused = []
        member.attaching = False
        self._ledger.note(f"{member.name} has attached{' after ' if refused else ''}{'; '.join(refused)}")

    def gather(self) -> None:
        """Everybody goes on, and has attached."""
        for member in self.members:
            if member.resumes is not None:
                member.process.resume()
                member.resumes = None
        for member in self.members:
            if member.attaching:
                self._attached(member)

    # --- what is done to them ------------------------------------------------------------------------------

    def kill_sender(self, pushers: Pushers) -> None:
        """kill -9 of a process that pushes."""
        model = self._rng.choice(self.models)
        sender = pushers.senders.get(model)
        if sender is not None:
            self._ledger.note(f"kill -9 of process {sender.pid}, which pushes {model}")
            with contextlib.suppress(OSError):
                sender.signal(signal.SIGKILL)

    def kill_member(self, pushers: Pushers) -> None:
        """kill -9 of a serving process, also while it attaches or is stopped; another takes its place."""
        member = self._rng.choice(self.members)
        self._ledger.note(f"kill -9 of {member.name}{', which attaches' if member.attaching else ''}")
        member.process.signal(signal.SIGKILL)
        if not member.process.gone(_COME_BACK):
            self._ledger.violation(f"{member.name} does not die of SIGKILL")
        self._replace(member, pushers)

    def stop_member(self, _pushers: Pushers) -> None:
        """SIGSTOP of a serving process: for a moment, or until it has been given up."""
        free = [member for member in self.members if member.resumes is None]
        if len(free) < len(self.members) - 2:
            return
        member = self._rng.choice(free)
        seconds = self._rng.choice([0.2, STAGE_SECONDS + 1.5])
        self._ledger.note(f"{member.name} is stopped for {seconds} s")
        member.process.signal(signal.SIGSTOP)
        member.resumes = time.monotonic() + seconds

    def kill_daemon(self) -> None:
        """kill -9 of the daemon; another one starts in its place."""
        self._ledger.note(f"kill -9 of the daemon, process {self._daemon.pid}")
        self._daemon.signal(signal.SIGKILL)
        self._daemon.wait(_COME_BACK)
        self.listen_to_daemon()
        self._daemon.__exit__()
        # Everybody asks after it meanwhile, so it may take its time.
        listen = f"127.0.0.1:{self.port}"
        self._daemon = ShipdProcess(self._directory, listen=listen, await_ready=False, **self._settings)
        self._said = 0
        self._daemon.notify.wait_for("READY=1", deadline=_COME_BACK, process=self._daemon)
        self.restarts += 1
        self._ledger.note(f"the daemon is back as process {self._daemon.pid}")

    # --- what they say -------------------------------------------------------------------------------------

    def listen_to_daemon(self) -> None:
        """Nothing may have gone wrong that it has not foreseen."""
        said = self._daemon.err
        for line in said[self._said :].splitlines():
            if "unexpectedly" in line or "Traceback" in line or '"level": "error"' in line:
                self._ledger.violation(f"the daemon says {line}")
        self._said = len(said)

    def listen_to_members(self) -> None:
        """Nor in a serving process or a sender, whose readers check every answer."""
        said = self._nursery.err[self._heard :]
        for at, line in enumerate(lines := said.splitlines()):
            if VIOLATION in line or "unexpectedly" in line or "Traceback" in line:
                self._ledger.violation("\n".join(["a process says", *lines[at : at + 20]]))

    def tails(self) -> str:
        """The last that everybody has said."""
        return (
            f"--- the daemon\n{os.linesep.join(self._daemon.err.splitlines()[-40:])}\n"
            f"--- serving processes and senders\n{os.linesep.join(self._nursery.err[self._heard :].splitlines()[-40:])}"
        )
