"""One push from the opening of its checkpoint to its receipt, on one thread.

    open the checkpoint (and a base) -> plan what becomes of its tensors -> offer, send, commit

What a plan is: ``shipd.matching``. How one is come by: ``planning``. The rest is ``push``.
"""

import math
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from shipd.address import Address
from shipd.bases.base import Keeper
from shipd.bases.checkpoint import CheckpointBases
from shipd.bases.store import kept_versions
from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.source import Source, open_source
from shipd.client.choice import Prefer
from shipd.client.incremental import Incremental
from shipd.client.options import PushOptions
from shipd.client.planning import Outcome, Planner, Wishes
from shipd.client.push import CONNECT_SECONDS, Push, too_late
from shipd.client.questions import Questioner
from shipd.client.receipt import Receipt
from shipd.errors import ConnectError, Interrupted, Stalled, TensorMismatch
from shipd.transfer.lane import Lane
from shipd.transfer.waker import Waker
from shipproto.errors import LocalError

if TYPE_CHECKING:
    from shipd.checkpoints.source import Checkpoint

_COMPILE_ABOVE: Final = 1 << 30
"""Bytes of a model from which a process that keeps nothing in memory, and so pushes once, has loops compiled."""


@dataclass(frozen=True, kw_only=True)
class What:
    """What is to be shipped, as ``Client.push`` takes it."""

    checkpoint: "Checkpoint"
    key: str | None = None
    snapshot: bool = False
    base: "Checkpoint | Literal[False] | None" = None
    base_key: str | None = None
    prefer: Prefer = "time"
    wishes: Wishes = field(default_factory=Wishes)


class Shipment:
    """``run`` on any thread, once; ``cancel`` from any other; ``close`` when it has run, or never will.

    Takes over ``lane``, a connection that is there.
    """

    def __init__(
        self,
        what: What,
        address: Address | Path,
        options: PushOptions,
        keepers: Sequence[Keeper],
        lane: Lane | None,
    ) -> None:
        self._what = what
        self._address = address
        self._options = options
        self._keepers = tuple(keepers)
        self._waker = Waker()
        self._fetching = Fetching(stall=options.stall, timeout=options.timeout, on_progress=options.fetched)
        self._given = lane
        self._began = time.monotonic()
        self._deadline = math.inf if options.timeout is None else self._began + options.timeout
        # Not a method of this: whoever refers to itself keeps a version's tensors until the next garbage collection.
        open_lane = partial(_open_lane, address, options.token, self._deadline, self._waker)
        self._questioner = Questioner(open_lane, self._waker, lane, until=self._deadline)
        self._push: Push | None = None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End it, unless its commit is already under way."""
        self._cancelled.set()
        self._waker.wake()
        if self._push is not None:
            # First: what fails for want of what is fetched must be known to be interrupted.
            self._push.cancel()
        self._fetching.cancel()

    def run(self) -> Receipt:
        """Ship. Raises ValueError for what cannot be offered, and ShipError."""
        what, began = self._what, self._began
        with ExitStack() as stack:
            source = open_source(what.checkpoint, key=what.key, snapshot=what.snapshot, fetching=self._fetching)
            stack.callback(source.close)
            opened = time.monotonic()
            old: Source | None = None
            if what.base is not None and what.base is not False:
                old = open_source(what.base, key=what.base_key, fetching=self._fetching)
                stack.callback(old.close)
            planner = Planner(
                self._questioner, str(self._address), self._options.model, what.wishes, self._options.stall
            )
            outcome = self._plan(planner, source)
            try:
                receipt = self._deliver(source, old, outcome, began, opened)
            except TensorMismatch:
                if not outcome.remembered:
                    raise
                # The model is another one than it was when that plan was made.
                planner.forget(source)
                outcome = self._plan(planner, source)
                receipt = self._deliver(source, old, outcome, began, opened)
            planner.remember(source, outcome)
            return receipt

    def close(self) -> None:
        """Give back what it holds. Harmless twice."""
        self._questioner.close()
        self._waker.close()

    def _plan(self, planner: Planner, source: Source) -> Outcome:
        try:
            return planner.plan(source)
        except (ConnectError, Stalled) as error:
            if time.monotonic() < self._deadline:
                raise
            raise too_late(self._options, self._address) from error

    def _deliver(self, source: Source, old: Source | None, outcome: Outcome, began: float, opened: float) -> Receipt:
        what = self._what
        base = None if old is None else CheckpointBases(outcome.applied_to(old))
        # Of a version that is put together where it is received nobody here has a base.
        keepers = () if outcome.partial else self._keepers
        incremental = Incremental(
            keepers if base is None else (base, *keepers),
            keepers,
            named=base,
            prefer=what.prefer,
            limit=self._options.limit,
            compile_above=0 if kept_versions in self._keepers else _COMPILE_ABOVE,
        )
        planned = outcome.applied_to(source)
        lane = self._questioner.take()
        try:
            try:
                self._push = Push(
                    planned,
                    self._address,
                    replace(self._options, partial=outcome.partial),
                    None if what.base is False else incremental,
                    outcome,
                    lane=lane,
                    began=began,
                    opened=opened,
                    connected_before=lane.open_seconds if lane is not None and lane is self._given else 0.0,
                )
            except LocalError as error:
                raise ValueError(f"this cannot be offered: {error}") from error
            if self._cancelled.is_set():
                # Meanwhile, when there was nothing yet to cancel.
                self._push.cancel()
            return self._push.run()
        finally:
            if lane is not None:
                lane.close()


def _open_lane(address: Address | Path, token: bytes | None, deadline: float, waker: Waker) -> Lane:
    """A connection, within the time that is left for the whole push. Raises ShipError."""
    if waker.woken:
        raise Interrupted("interrupted before anything was offered; the previous version is serving")
    seconds = min(CONNECT_SECONDS, max(0.001, deadline - time.monotonic()))
    return Lane.open(address, token=token, timeout=seconds, waker=waker)
