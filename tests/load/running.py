"""The load from its start to its end, and what must hold there.

Chaos reigns twice. Between the two, and after the second, everybody is left to settle: then each process must serve
the committed version, bit for bit, and nothing may have grown. In the second round the daemon is left alive, so that
what it has at the end can be compared with what it had before.
"""

import asyncio
import contextlib
import math
import random
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

import shipd
from tests.load.census import Census
from tests.load.fleet import Fleet
from tests.load.pushing import STALL, TIMEOUT, Ledger, Pushers
from tests.load.versions import digest_of, image_size, label_of, state
from tests.support.processes import DEADLINE
from tests.support.serving_process import Nursery, Told

MODELS: Final = ["alpha", "beta", "gamma", "delta"]
PROCESSES: Final = 4

SETTLE_SECONDS: Final = 60.0
"""In which everybody must have caught up, once nobody is killed any more."""

GROWTH: Final = 16 * 2**20
"""Bytes by which the daemon's own memory may differ between two moments of rest: what allocators keep."""

CEILING: Final = 80 * 2**20
"""RssAnon and RssFile of the daemon, whatever happens to it."""


_DAEMON_LIVES: Final = 12.0
"""Seconds between two kills of the daemon, about."""


class LoadFailed(AssertionError):
    """Something did not hold."""


class Load:
    """One run, of processes from ``nursery``, with ``seconds`` of chaos.

    ``seed`` decides what is done to whom in which order; what comes of it, the machine.
    """

    def __init__(
        self, nursery: Nursery, seconds: float, seed: int, say: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._nursery = nursery
        self._seconds = seconds
        self._seed = seed
        self._say = say
        self._rng = random.Random(seed)
        self._pause = threading.Event()
        self.ledger = Ledger()

    def run(self) -> str:
        """The whole of it; what happened, in a few lines. Raises LoadFailed."""
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="shipd-"))
            fleet = Fleet(Path(directory), self.ledger, self._nursery, MODELS, PROCESSES, self._rng)
            stack.callback(fleet.close)
            try:
                return self._through(fleet)
            except LoadFailed:
                raise
            except Exception as error:
                raise LoadFailed(self._report(fleet, traceback.format_exc())) from error

    def _through(self, fleet: Fleet) -> str:
        with Pushers(self.ledger, self._nursery, fleet.port, MODELS, self._rng) as pushers:
            fleet.gather()
            self._check(fleet)
            self._say(f"{len(fleet.members)} processes have attached")
            self._rage(fleet, pushers, self._seconds * 0.4, every=_DAEMON_LIVES)
            before = self._settle(fleet)
            self._rage(fleet, pushers, self._seconds * 0.6)
            after = self._settle(fleet)
        grown = after.private + after.file - before.private - before.file
        if grown > GROWTH or after.private + after.file > CEILING:
            self.ledger.violation(f"the daemon grew from {before} to {after}")
        readings = self._readings(fleet)
        self._close(fleet)
        self._check(fleet)
        ends = ", ".join(f"{count} {how}" for how, count in self.ledger.ends.most_common())
        return (
            f"{self.ledger.ends.total()} pushes: {ends}\n"
            f"{readings['answers']} answers of those who live were right, {readings['fenced']} were refused\n"
            f"the daemon was killed {fleet.restarts} times; before: {before}\n"
            f"after: {after}"
        )

    # --- chaos ---------------------------------------------------------------------------------------------

    def _rage(self, fleet: Fleet, pushers: Pushers, seconds: float, *, every: float | None = None) -> None:
        """Pushes without a pause, while somebody is killed or stopped about twice a second, the daemon ``every`` ..."""
        deeds = (fleet.kill_sender, fleet.kill_member, fleet.stop_member)
        pushers.go()
        end = time.monotonic() + seconds
        daemon_dies = time.monotonic() + (every / 4 if every is not None else math.inf)
        while (now := time.monotonic()) < end:
            if every is not None and now > daemon_dies:
                fleet.kill_daemon()
                daemon_dies = time.monotonic() + self._rng.uniform(0.5, 1.5) * every
            else:
                self._rng.choice(deeds)(pushers)
            fleet.look()
            fleet.listen_to_daemon()
            self._check(fleet)
            self._pause.wait(max(0.0, min(end - time.monotonic(), self._rng.uniform(0.1, 0.9))))
        pushers.pause()
        self._say(f"{self.ledger.ends.total()} pushes, {self.ledger.ends['committed']} committed")

    # --- rest ----------------------------------------------------------------------------------------------

    def _settle(self, fleet: Fleet) -> Census:
        """Everybody comes to one last version; what the daemon has then."""
        fleet.gather()
        self._check(fleet)
        versions = {model: self._push_at_last(fleet, model) for model in MODELS}
        end = time.monotonic() + SETTLE_SECONDS
        for member in fleet.members:
            version = versions[member.model]
            try:
                found = member.process.ask("come_to", label_of(version), max(1.0, end - time.monotonic()))
            except (Told, AssertionError) as error:
                found = {"error": str(error)}
            if found.get("digest") != digest_of(version):
                self.ledger.violation(f"{member.name} should serve {label_of(version)}, and {found}")
        self._check(fleet)
        asyncio.run(self._ask(fleet, versions))
        census = self._at_rest(fleet)
        fleet.listen_to_daemon()
        fleet.listen_to_members()
        self._check(fleet)
        self._say(f"settled; the daemon has {census}")
        return census

    def _push_at_last(self, fleet: Fleet, model: str) -> int:
        """A version that is committed although nobody may be ready for it yet."""
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            version = self.ledger.next_version()
            try:
                receipt = asyncio.run(self._push(fleet.port, model, version))
            except shipd.ShipError as error:
                self.ledger.note(f"{model} {label_of(version)} at last {type(error).__name__}: {error}")
                if time.monotonic() > end:
                    raise
                self._pause.wait(0.2)
                continue
            assert (receipt.label, receipt.digest) == (label_of(version), digest_of(version)), receipt
            self.ledger.note(f"{model} {label_of(version)} committed at last, swapped {receipt.swapped}")
            return version

    async def _push(self, port: int, model: str, version: int) -> shipd.Receipt:
        async with shipd.connect(f"127.0.0.1:{port}") as client:
            return await client.push(state(version), model=model, label=label_of(version), stall=STALL, timeout=TIMEOUT)

    async def _ask(self, fleet: Fleet, versions: dict[str, int]) -> None:
        """The daemon's books say the same, and it holds the images that there should be."""
        async with shipd.connect(f"127.0.0.1:{fleet.port}") as client:
            told = await client.status()
            for model, version in versions.items():
                found = await client.verify(model)
                right = [each.matches and each.digest == digest_of(version) for each in found.processes]
                if right != [True] * PROCESSES or found.digest != digest_of(version):
                    self.ledger.violation(f"read back after {label_of(version)}: {found}")
        for known in told.models:
            states = [each.state for each in known.processes]
            version = versions[known.name]
            if states != ["serving"] * PROCESSES or known.transfer is not None or known.label != label_of(version):
                self.ledger.violation(f"status after {label_of(version)}: {known}")
        # Three each, since one process of each model serves from its image.
        expected = 3 * image_size() * len(MODELS)
        if told.memory_used != expected:
            self.ledger.violation(f"images take {told.memory_used} bytes where {expected} are due")

    def _at_rest(self, fleet: Fleet) -> Census:
        """The daemon once the last connections have gone: as many descriptors as there are processes and images."""
        daemon = Census.of(fleet.daemon.pid)
        end = time.monotonic() + DEADLINE
        images = 3 * len(MODELS)
        # Two to listen on, and the pair through which signals reach the loop.
        sockets = 4 + len(fleet.members)
        while daemon.descriptors["socket"] > sockets or daemon.descriptors["memfd"] > 2 * images:
            if time.monotonic() > end:
                self.ledger.violation(f"the daemon has {daemon} with {sockets} sockets and {images} images due")
                break
            self._pause.wait(0.05)
            daemon = Census.of(fleet.daemon.pid)
        if daemon.images != images:
            self.ledger.violation(f"the daemon maps {daemon.images} images where {images} are due")
        self._compare_members(fleet)
        return daemon

    def _compare_members(self, fleet: Fleet) -> None:
        """However long a process has lived and whatever it went through: it has no more than its youngest like."""
        for mode in ("copy", "flip"):
            alike = sorted((each for each in fleet.members if each.mode == mode), key=lambda each: -each.since)
            counts = {member.name: Census.of(member.process.pid).counts for member in alike}
            least = {kind: min(each.get(kind, 0) for each in counts.values()) for kind in next(iter(counts.values()))}
            for name, found in counts.items():
                if any(count > least.get(kind, 0) + 2 for kind, count in found.items()):
                    self.ledger.violation(f"{name}, mode {mode}, has {found}, others {least}")

    def _readings(self, fleet: Fleet) -> dict[str, int]:
        """Of all that live, together."""
        found = [member.process.ask("readings") for member in fleet.members]
        for member, each in zip(fleet.members, found, strict=True):
            if not each["answers"]:
                self.ledger.violation(f"{member.name} has answered nothing")
        return {what: sum(each[what] for each in found) for what in ("answers", "fenced")}

    def _close(self, fleet: Fleet) -> None:
        """Half of them detach, the daemon goes, the others detach without it."""
        for at, member in enumerate(fleet.members):
            if at == len(fleet.members) // 2:
                code = fleet.daemon.terminate()
                if code:
                    self.ledger.violation(f"the daemon ended with {code}")
            left = member.process.ask("leave")
            if left != ["MainThread"]:
                self.ledger.violation(f"{member.name} has detached, and {left} run")
            if Census.of(member.process.pid).images:
                self.ledger.violation(f"{member.name} has detached and still maps images")
        fleet.listen_to_daemon()
        fleet.listen_to_members()

    # --- failures ------------------------------------------------------------------------------------------

    def _check(self, fleet: Fleet) -> None:
        if self.ledger.violations:
            raise LoadFailed(self._report(fleet, "\n".join(self.ledger.violations[:10])))

    def _report(self, fleet: Fleet, what: str) -> str:
        events = "\n".join(self.ledger.events[-80:])
        return (
            f"{what}\nseed {self._seed}: python -m tests.load --seconds {self._seconds:g} --seed {self._seed}\n"
            f"--- events\n{events}\n{fleet.tails()}"
        )
