"""Who pushes, and how every push ended.

For each model a process that can be killed and a client inside this process take turns as they come, directly or
through a proxy that does harm. Every push must end in time, committed with the right digest or in a typed error.
"""

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Self

import shipd
from tests.load.parties import PARTY
from tests.load.versions import digest_of, label_of, state
from tests.support.frames import Way
from tests.support.processes import DEADLINE
from tests.support.proxy import Proxy
from tests.support.serving_process import Nursery, Serving, Told

STALL: Final = 3.0
TIMEOUT: Final = 30.0
"""Seconds that a push may take by its own account."""

HANG: Final = TIMEOUT + 30.0
"""Seconds after which it hangs: what it does once its time is over has deadlines, too."""

UNEXPECTED: Final = {
    *("PeerError", "AuthError", "UnknownModel", "LabelConflict", "TensorMismatch", "CheckpointError"),
    *("UnsupportedTensor", "ConfigError", "AttachError", "Fenced", "MemoryLimit", "TensorChanged"),
}
"""Typed errors that nothing of what happens here explains."""


class Ledger:
    """What happened, in the order in which it did, and what must not have happened. Any thread."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self.events: list[str] = []
        self.ends = Counter[str]()
        """Pushes by how they ended."""
        self.violations: list[str] = []
        self._versions = itertools.count(1)

    def note(self, what: str) -> None:
        """Something happened."""
        with self._lock:
            self.events.append(f"{time.monotonic() - self._began:8.3f} {what}")

    def violation(self, what: str) -> None:
        """Something happened that must not."""
        self.note(f"VIOLATION {what}")
        with self._lock:
            self.violations.append(what)

    def next_version(self) -> int:
        """A number that no version has had."""
        return next(self._versions)

    def ended(self, model: str, version: int, outcome: dict[str, Any]) -> None:
        """How a push of ``version`` ended: see ``Party.push``."""
        error = outcome.get("error")
        with self._lock:
            self.ends[error or "committed"] += 1
        if error is None:
            stale = f", stale {','.join(outcome['stale'])}" if outcome["stale"] else ""
            self.note(f"{model} {label_of(version)} committed, swapped {outcome['swapped']}{stale}")
            if (outcome["label"], outcome["digest"]) != (label_of(version), digest_of(version)):
                self.violation(f"{model} {label_of(version)} was committed as {outcome}")
        else:
            self.note(f"{model} {label_of(version)} {error}: {outcome.get('message', '')}")
            if error in UNEXPECTED or "its log says how" in outcome.get("message", ""):
                self.violation(f"{model} {label_of(version)} ended in {error}: {outcome.get('message')}")


class Harm:
    """One pusher's way to the daemon, on which something goes wrong now and then."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.proxy = Proxy(port)
        self._rng = rng

    def path(self, direct: str) -> tuple[str, str]:
        """An address for one push, and what will happen on the way."""
        self.proxy.forget_rules()
        # What is left of the last one, such as a connection that stalls.
        self.proxy.sever_all()
        if self._rng.random() < 0.5:
            return direct, "directly"
        kind = self._rng.choice(["nothing", "payload", "prelude", "header", "cut", "end", "stall", "lost"])
        if kind in ("payload", "prelude", "header"):
            rule = self.proxy.flip(kind, nth=None)  # type: ignore[arg-type]  # the three parts
        elif kind in ("cut", "end"):
            rule = self.proxy.cut(nth=None, keep=self._rng.random(), how="rst" if kind == "cut" else "fin")
        elif kind == "stall":
            rule = self.proxy.stall(nth=None, keep=self._rng.random())
        elif kind == "lost":
            rule = self.proxy.cut(kind=None, nth=self._rng.randrange(1, 8), way=Way.TO_SENDER)
        else:
            return self.proxy.address, "through a proxy"
        rule.times = 1
        return self.proxy.address, f"through a proxy with {kind}"


class Pushers:
    """Everyone who pushes. ``pause`` lets what is under way end; the end of the block ends all."""

    def __init__(self, ledger: Ledger, nursery: Nursery, port: int, models: list[str], rng: random.Random) -> None:
        self._ledger = ledger
        self._nursery = nursery
        self._direct = f"127.0.0.1:{port}"
        self._models = models
        self._going = threading.Event()
        self._stopping = threading.Event()
        self._seeds = {model: rng.randrange(1 << 32) for model in models}
        self.senders: dict[str, Serving] = {}
        """The sending process of each model: to be killed by whoever likes."""
        self._idle: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self._spawning = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._port = port

    def __enter__(self) -> Self:
        for model in self._models:
            for work in (self._send_from_a_process, self._send_from_here):
                harm = Harm(self._port, random.Random(f"{self._seeds[model]} {work.__name__}"))
                self._stack.enter_context(harm.proxy)
                self._start(work, model, harm)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._going.set()
        for thread in self._threads:
            thread.join(HANG + DEADLINE)
            if thread.is_alive():
                self._ledger.violation(f"{thread.name} does not end")
        for sender in self.senders.values():
            sender.close()
        self._stack.close()

    def _start(self, work: Callable[[str, Harm, threading.Event], None], model: str, harm: Harm) -> None:
        idle = threading.Event()
        self._idle.append(idle)

        def run() -> None:
            try:
                work(model, harm, idle)
            except BaseException as error:  # noqa: BLE001  the runner's to report
                self._ledger.violation(f"who pushes {model} failed: {error!r}")
            finally:
                idle.set()

        thread = threading.Thread(target=run, name=f"{work.__name__} {model}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def go(self) -> None:
        """Push."""
        for idle in self._idle:
            idle.clear()
        self._going.set()

    def pause(self) -> None:
        """Begin nothing more, and wait until everything has ended."""
        self._going.clear()
        for idle in self._idle:
            if not idle.wait(HANG + DEADLINE):
                self._ledger.violation("a push does not end")

    def _turn(self, idle: threading.Event) -> bool:
        """Wait for one's turn. False where it is all over."""
        if not self._going.is_set():
            idle.set()
            self._going.wait()
            idle.clear()
        return not self._stopping.is_set()

    def spawn(self) -> Serving:
        """A new process. They come to the nursery's door one after the other."""
        with self._spawning:
            return self._nursery.spawn(PARTY)

    # --- processes that send -------------------------------------------------------------------------------

    def _send_from_a_process(self, model: str, harm: Harm, idle: threading.Event) -> None:
        rng = random.Random(self._seeds[model] + 1)
        sender = self.senders[model] = self.spawn()
        while self._turn(idle):
            version = self._ledger.next_version()
            address, way = harm.path(self._direct)
            self._ledger.note(f"{model} {label_of(version)} is sent by process {sender.pid} {way}")
            try:
                outcome = sender.ask("push", address, model, version, STALL, TIMEOUT, deadline=HANG)
            except Told as raised:
                self._ledger.violation(f"{model} {label_of(version)} ended in no typed error: {raised}")
                continue
            except (AssertionError, OSError) as lost:
                # A killed process may not be quite gone yet when its end of the conversation is.
                if not sender.gone(1.0):
                    self._ledger.violation(f"{model} {label_of(version)} hangs: {lost}")
                    sender.kill()
                self._ledger.ended(model, version, {"error": "killed"})
                sender.close()
                sender = self.senders[model] = self.spawn()
                continue
            self._ledger.ended(model, version, outcome)
            self._breathe(rng, outcome)

    # --- a client in this process --------------------------------------------------------------------------

    def _send_from_here(self, model: str, harm: Harm, idle: threading.Event) -> None:
        rng = random.Random(self._seeds[model] + 2)
        while self._turn(idle):
            version = self._ledger.next_version()
            address, way = harm.path(self._direct)
            patience = rng.uniform(0, 0.2) if rng.random() < 0.15 else None
            self._ledger.note(f"{model} {label_of(version)} is sent from here {way}")
            outcome = asyncio.run(self._push(address, model, version, patience))
            self._ledger.ended(model, version, outcome)
            self._breathe(rng, outcome)

    async def _push(self, address: str, model: str, version: int, patience: float | None) -> dict[str, Any]:
        """One push, cancelled after ``patience`` seconds."""
        pushing = asyncio.create_task(self._connect_and_push(address, model, version))
        done, _ = await asyncio.wait({pushing}, timeout=HANG if patience is None else patience)
        if not done and patience is None:
            self._ledger.violation(f"{model} {label_of(version)} hangs")
        if not done:
            pushing.cancel()
            await asyncio.wait({pushing}, timeout=HANG)
        try:
            receipt = pushing.result()
        except asyncio.CancelledError:
            return {"error": "cancelled"}
        except shipd.ShipError as error:
            return {"error": type(error).__name__, "message": str(error)}
        except BaseException as error:  # noqa: BLE001  this is what is looked for
            self._ledger.violation(f"{model} {label_of(version)} ended in no typed error: {error!r}")
            return {"error": type(error).__name__, "message": str(error)}
        return {"label": receipt.label, "digest": receipt.digest, "swapped": receipt.swapped, "stale": receipt.stale}

    async def _connect_and_push(self, address: str, model: str, version: int) -> shipd.Receipt:
        async with shipd.connect(address) as client:
            return await client.push(state(version), model=model, label=label_of(version), stall=STALL, timeout=TIMEOUT)

    def _breathe(self, rng: random.Random, outcome: dict[str, Any]) -> None:
        """Leave others a moment, and longer where nobody answers: two cores have to do for everyone."""
        absent = outcome.get("error") in ("ConnectError", "ConnectionLost")
        self._stopping.wait(rng.uniform(0.2, 0.4) if absent else rng.uniform(0.01, 0.06))
