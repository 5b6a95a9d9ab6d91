"""What runs in the forked processes of the load: a serving process with readers that check every answer, and a sender.

Whoever is killed takes with it what it knows, so what must not be is said at once, on stderr, where the runner looks.
"""

import sys
import threading
import time
import traceback
from typing import Any, Final

import torch

import shipd
from tests.load.versions import QUESTION, Striped, fault, label_of, state
from tests.support.processes import DEADLINE, push

VIOLATION: Final = "VIOLATION:"
"""Begins each line on stderr that must not be there."""

_PACE: Final = 0.03
"""Seconds between two answers of one reader: thirty-two of them share two cores with everything that they read."""

_ATTACH_SECONDS: Final = 60.0


def _say(what: str) -> None:
    print(f"{VIOLATION} {what}", file=sys.stderr, flush=True)


class Party:
    """What a forked process can be asked to do."""

    def __init__(self) -> None:
        self._model: Striped | None = None
        self._resident: shipd.Resident | None = None
        self._stopping = threading.Event()
        self._readers: list[threading.Thread] = []
        self._answers = 0
        self._fenced = 0

    # --- serving -------------------------------------------------------------------------------------------

    def serve(self, place: str, name: str, mode: str) -> list[str]:
        """Attach a model of version 0, as often as it takes, and read it; the errors on the way, in words."""
        self._model = Striped()
        refused: list[str] = []
        end = time.monotonic() + _ATTACH_SECONDS
        while self._resident is None:
            try:
                self._resident = shipd.attach(self._model, name, socket=place, mode=mode)
            except shipd.ShipError as error:
                refused.append(f"{type(error).__name__}: {error}")
                assert time.monotonic() < end, refused
                self._stopping.wait(0.1)
        self._readers = [threading.Thread(target=self._read, args=(style,), name=style) for style in ("hold", "hooks")]
        for reader in self._readers:
            reader.start()
        return refused

    def _read(self, style: str) -> None:
        """Ask without end. Fenced is the one error there may be."""
        assert self._model is not None
        assert self._resident is not None
        with torch.inference_mode():
            while not self._stopping.wait(_PACE):
                try:
                    if style == "hold":
                        with self._resident.hold() as version:
                            wrong = fault(self._model.forward(QUESTION), version.label)
                    else:
                        wrong = fault(self._model(QUESTION), None)
                    self._answers += 1
                    if wrong:
                        _say(f"a reader was given {wrong}")
                except shipd.Fenced:
                    self._fenced += 1
                except BaseException:  # noqa: BLE001  said, and the end of this reader
                    _say(f"a reader failed\n{traceback.format_exc()}")
                    return

    def readings(self) -> dict[str, int]:
        """How many answers were given, and how often one was refused."""
        return {"answers": self._answers, "fenced": self._fenced}

    def come_to(self, label: str, deadline: float) -> dict[str, Any]:
        """Wait until this version is served, or the deadline is over: what is served then, read back from it."""
        resident = self._resident
        assert resident is not None
        end = time.monotonic() + deadline
        while resident.label != label or resident.stale is not None or not resident.connected:
            if time.monotonic() > end:
                return {"label": resident.label, "stale": resident.stale, "connected": resident.connected}
            self._stopping.wait(0.01)
        return {"label": resident.label, "stale": None, "connected": True, "digest": resident.verify()}

    def leave(self) -> list[str]:
        """Stop reading and detach; the threads that are left."""
        self._stopping.set()
        for reader in self._readers:
            reader.join(DEADLINE)
        if self._resident is not None:
            self._resident.detach()
        return sorted(thread.name for thread in threading.enumerate())

    # --- sending -------------------------------------------------------------------------------------------

    def push(self, address: str, model: str, version: int, stall: float, timeout: float) -> dict[str, Any]:
        """Push a version; the receipt, or the typed error. Anything else is raised."""
        try:
            receipt = push(address, state(version), model=model, label=label_of(version), stall=stall, timeout=timeout)
        except shipd.ShipError as error:
            return {"error": type(error).__name__, "message": str(error)}
        return {"label": receipt.label, "digest": receipt.digest, "swapped": receipt.swapped, "stale": receipt.stale}


PARTY: Final = f"{Party.__module__}.{Party.__name__}"
"""What the nursery is asked for."""
