"""A resident model as its session sees it: its gate, and the swapper behind that.

Belongs here: the order in which gate, swapper and callbacks are used. How versions get in is in ``swap``; what the
session asks is in ``follower``.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from shipd.errors import Fenced, ShipError
from shipd.images.memory import Access, ImageMapping
from shipd.serving.deliver import DeliverSwap, Image
from shipd.serving.follower import SwapTimes
from shipd.serving.gate import Gate
from shipd.serving.staging import Torn
from shipd.serving.swap import Swapper
from shipd.serving.tensors import ModelTensors
from shipd.serving.version import Version
from shipproto.dtypes import BY_NAME
from shipproto.errors import MalformedMessage
from shipproto.layout import Layout
from shipproto.rangeset import RangeSet
from shipproto.resident import Resident
from shipproto.structure import Structure, TensorSpec

log = logging.getLogger("shipd.serving")

_DETACH_SECONDS: Final = 10.0
_NOTHING: Final = Structure.build(())


class ModelFollower:
    """What the link does to the model: see ``Follower``. All but ``digest`` on the link's thread.

    resident  what the model consists of
    """

    delivered = False

    def __init__(
        self,
        gate: Gate,
        swapper: Swapper,
        resident: Resident,
        max_hold: float,
        callbacks: list[Callable[[Version], object]],
    ) -> None:
        self.private = swapper.access is Access.PRIVATE
        self._gate = gate
        self._swapper = swapper
        self._resident = resident
        self._max_hold = max_hold
        self._callbacks = callbacks
        self.patience = _DETACH_SECONDS
        """How long detaching waits for holds."""
        self._attached = False
        self._torn: str | None = None
        self._reading = threading.Lock()

    def resident(self) -> Resident:
        return self._resident

    def lay_out(self, structure: Structure) -> None:  # noqa: ARG002  whatever it is
        raise MalformedMessage("LaidOut to a process that has said itself how its images are laid out")

    def held(self) -> Version | None:
        return self._gate.version if self._attached and self._gate.fenced is None else None

    def map(self, fd: int, size: int) -> ImageMapping:
        return ImageMapping(fd, size, self._swapper.access)

    def prepare(self, mapping: ImageMapping, cancelled: Callable[[], bool]) -> None:
        try:
            self._swapper.prepare(mapping, cancelled)
        except OSError as error:
            log.warning("an image could not be prepared; the first swap will be slower", extra={"why": str(error)})

    def fill(self, image: memoryview) -> None:
        """Raises Fenced where the live parameters are a mix: they must not become a version."""
        if self._torn is not None:
            raise Fenced(self._torn)
        self._swapper.fill(image)

    def arrived(self, mapping: ImageMapping, chunks: RangeSet) -> None:
        self._swapper.arrived(mapping, chunks.ranges())

    def stage(self, mapping: ImageMapping) -> None:
        self._swapper.stage(mapping)

    def unstage(self) -> None:
        self._swapper.discard()

    def swap(self, version: Version, timeout: float) -> SwapTimes:
        """Swap behind the closed gate. A fenced process may be served again afterwards: it is on the version."""
        copy_seconds = 0.0

        def act() -> Version:
            nonlocal copy_seconds
            started = time.perf_counter()
            try:
                self._swapper.apply()
            except Torn as error:
                reason = f"the weights are a mix of two versions: {error}"
                # Inside the closed gate, so that nobody gets to see them.
                self._gate.fence(reason)
                self._torn = reason
                raise Fenced(reason) from error
            copy_seconds = time.perf_counter() - started
            self._torn = None
            return version

        self._swapper.approach()
        pause = self._gate.swap(act, commit_timeout=timeout, max_hold=self._max_hold, then=self._call_back)
        return SwapTimes(pause.pause_seconds, pause.wait_seconds, copy_seconds)

    def _call_back(self, version: Version) -> None:
        for callback in list(self._callbacks):
            try:
                callback(version)
            except BaseException:
                # Also SystemExit: it is shipd's thread, and the swap has happened.
                log.exception("an on_swap callback failed", extra={"label": version.label})

    def settle(self) -> bool:
        return self._swapper.settle()

    def reads(self, mapping: ImageMapping) -> bool:
        return self._swapper.reads(mapping)

    def forget(self, mapping: ImageMapping) -> None:
        self._swapper.forget(mapping)

    def adopt(self, mapping: ImageMapping, version: Version) -> None:
        self._swapper.adopt(mapping)
        self._gate.version = version
        self._attached = True
        self._gate.unfence()

    def wait_for_version(self) -> None:
        raise MalformedMessage("Attached without a version to a process that could have brought one")

    def read_back(self) -> bytes:
        with self._gate.hold():
            return self.digest()

    def digest(self) -> bytes:
        """Version digest of the live parameters; the caller holds the gate. On any thread."""
        with self._reading:
            return self._swapper.digest()

    def fence(self, reason: str) -> None:
        self._gate.fence(reason)

    def let_go(self) -> bool:
        if not self.private:
            return True
        try:
            self._gate.swap(self._let_go, commit_timeout=self.patience, max_hold=self._max_hold)
        except (ShipError, RuntimeError) as error:
            log.warning("detached during a hold: the model stays in the daemon's image", extra={"why": str(error)})
            return False
        return True

    def _let_go(self) -> Version:
        self._swapper.let_go()
        return self._gate.version

    def close(self) -> None:
        """The link has ended."""
        self._swapper.close()

    def abandon_after_fork(self) -> None:
        self._reading = threading.Lock()
        if self.private and self._attached:
            # The images go on belonging to the daemon, which knows of the parent only and will write to them.
            self._gate.fence(
                "this process was forked from one that serves in mode 'flip', whose weights will change under it: "
                "attach after the fork, or use mode 'copy'"
            )


def resident_of(tensors: ModelTensors) -> Resident:
    """What a model says of itself when it attaches. Non-persistent buffers of dtypes that no checkpoint can have are
    left out."""
    transient = Structure.build(
        TensorSpec(buffer.name, buffer.dtype, buffer.shape) for buffer in tensors.transient if buffer.dtype in BY_NAME
    )
    return Resident(tensors.structure, transient)


class DeliveredFollower(ModelFollower):
    """The same for what has ``load_weights``: any structure will do, and nothing can be read back."""

    delivered = True

    def __init__(
        self, gate: Gate, swapper: DeliverSwap, max_hold: float, callbacks: list[Callable[[Version], object]]
    ) -> None:
        super().__init__(gate, swapper, Resident(_NOTHING, _NOTHING), max_hold, callbacks)
        self._deliver = swapper

    def resident(self) -> Resident:
        """What it has been given, so that a daemon that was restarted gets it back."""
        structure = self._deliver.structure if self.held() is not None else None
        return Resident(structure or _NOTHING, _NOTHING)

    def lay_out(self, structure: Structure) -> None:
        if len(structure):
            self._deliver.lay_out(Layout(structure))

    def held(self) -> Version | None:
        known = self._gate.fenced is None and self._deliver.structure is not None
        return self._gate.version if known else None

    def map(self, fd: int, size: int) -> ImageMapping:
        return Image(fd, size)

    def swap(self, version: Version, timeout: float) -> SwapTimes:
        """As of a model; and the first version of all ends a fence, since it comes to a process that is attached."""
        times = super().swap(version, timeout)
        self._gate.unfence()
        return times

    def wait_for_version(self) -> None:
        """Serve what there is, unless that is part of one thing and part of another."""
        if self._torn is None:
            self._gate.unfence()

    def let_go(self) -> bool:
        self._deliver.let_go()
        return True

    def abandon_after_fork(self) -> None:
        super().abandon_after_fork()
        if self._deliver.lends():
            self._gate.fence(
                "this process was forked from one whose load_weights keeps the tensors that it was given, and those "
                "will change under it: attach after the fork, or have load_weights copy them"
            )
