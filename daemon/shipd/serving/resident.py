"""``shipd.attach``: a model that is being served gets its next versions from the daemon on this host."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from torch import nn

from shipd.errors import AttachError, Fenced, IntegrityError, ShipError
from shipd.images.memory import Access, ImageMapping
from shipd.serving.follower import SwapTimes
from shipd.serving.gate import Gate
from shipd.serving.hooks import Hooks, find_calls
from shipd.serving.link import Link
from shipd.serving.slot import Slot
from shipd.serving.staging import Torn
from shipd.serving.swap import Swapper, make_swapper
from shipd.serving.tensors import ModelTensors
from shipd.serving.turns import short_turns
from shipd.serving.version import Version
from shipproto.layout import Layout
from shipproto.names import check_label
from shipproto.rangeset import RangeSet
from shipproto.resident import Resident as ResidentBody
from shipproto.structure import Structure, TensorSpec

log = logging.getLogger("shipd.serving")

DEFAULT_SOCKET: Final = "/run/shipd/shipd.sock"
_DETACH_SECONDS: Final = 10.0
_UNATTACHED: Final = Version("", "")


def attach(
    model: nn.Module,
    name: str,
    *,
    socket: str | os.PathLike[str] = DEFAULT_SOCKET,
    mode: str = "auto",
    max_hold: float = 1.0,
    hooks: bool = True,
    timeout: float = 60.0,
) -> "Resident":
    """Have ``model``, which this process serves, follow the versions that are pushed as ``name`` on this host.

    mode      "copy" overwrites the live tensors, whose addresses stay; "direct" does so as well, but on CUDA without a
              shadow of the weights on the device: from host to device while nothing is served, which takes longer;
              "flip" (on the CPU) binds them to the next version's memory instead, which takes no time but moves them;
              "auto" is copy, or direct where the device has no room for the shadow. ``Resident.mode`` and
              ``shipctl status`` say what it has become
    max_hold  seconds that new holds may be kept waiting by a swap that itself waits for a long hold
    hooks     whether each forward of the model is a hold of its own; without, only ``hold()`` is
    timeout   seconds for attaching

    If a version is committed already it is installed before this returns; else the model as it is becomes the
    first one. Serving goes on without the daemon, and the process attaches again by itself when that comes back.
    Resident models are for inference: a swap under a live autograd graph breaks its backward.

    Raises AttachError or UnsupportedTensor (this model cannot be resident), ConnectError (no daemon there),
    TensorMismatch (another model has that name), MemoryLimit, Stalled.
    """
    return Resident(
        model, check_label("model name", name), Path(socket), mode=mode, max_hold=max_hold, hooks=hooks, timeout=timeout
    )


class Handle:
    """A registered callback; ``remove()`` takes it off again."""

    def __init__(self, callbacks: "list[Callable[[Version], object]]", callback: Callable[[Version], object]) -> None:
        self._callbacks = callbacks
        self._callback = callback

    def remove(self) -> None:
        """Harmless twice."""
        if self._callback in self._callbacks:
            self._callbacks.remove(self._callback)


class Resident:
    """An attached model. Made by ``attach``; everything here may be called from any thread."""

    def __init__(
        self, model: nn.Module, name: str, socket: Path, *, mode: str, max_hold: float, hooks: bool, timeout: float
    ) -> None:
        self.name = name
        self._gate = Gate(_UNATTACHED, calls=find_calls)
        with short_turns():
            tensors = ModelTensors(model)
            swapper = make_swapper(tensors, Layout(tensors.structure), mode)
        self.mode = swapper.mode
        self._callbacks: list[Callable[[Version], object]] = []
        self._follower = _ModelFollower(self._gate, swapper, max_hold, self._callbacks)
        self._link = Link(
            self._follower,
            ResidentBody(tensors.structure, _transient(tensors)),
            model=name,
            socket=socket,
            mode=swapper.mode,
            # Copies to the device, or maps pages, while the rest still arrives.
            pinned=tensors.device.type == "cuda" or self.mode == "flip",
        )
        self._hooks: Hooks | None = None
        self._detaching = threading.Lock()
        self._tensors = tensors
        try:
            _register(self)
            # Before the first version is installed: the model may be serving already.
            if hooks:
                self._hooks = Hooks(model, self._gate)
            self._link.start(timeout)
        except BaseException:
            self.detach()
            raise

    def __repr__(self) -> str:
        return f"<shipd.Resident {self.name!r} {self.label!r} {self.digest}>"

    @property
    def version(self) -> Version:
        """What is live now. To see one version for longer, use ``hold()``."""
        return self._gate.version

    @property
    def label(self) -> str:
        """Label of the version that is live."""
        return self._gate.version.label

    @property
    def digest(self) -> str:
        """Digest of the version that is live, 32 hex digits, as it was committed. ``verify()`` reads it back."""
        return self._gate.version.digest

    @property
    def stale(self) -> str | None:
        """Why holds raise Fenced: this process could not follow a commit. None while it serves."""
        return self._gate.fenced

    @property
    def connected(self) -> bool:
        """Whether the daemon is there. Serving does not depend on it."""
        return self._link.connected

    def hold(self) -> Slot:
        """``with resident.hold() as version:`` (or ``async with``): no swap happens inside the block.

        Needed around whatever must see one version and is more than one forward: a generation of many, a direct
        ``model.forward()``, other methods of the model. Costs about a microsecond; nests; a thread that holds
        already never waits. Raises Fenced while the process is stale.
        """
        return self._gate.hold()

    def verify(self) -> str:
        """Read the live parameters back and digest them; the digest, as 32 hex digits.

        Raises IntegrityError where they are not what was committed: something else has written to them.
        """
        with self._gate.hold() as version:
            found = self._follower.digest().hex()
        if found != version.digest:
            raise IntegrityError(
                f"model {self.name!r} should be {version.label!r} with digest {version.digest}, and its live "
                f"parameters have {found}: something in this process has written to them",
                model=self.name,
            )
        return found

    def on_swap(self, callback: Callable[[Version], object]) -> Handle:
        """Call ``callback(version)`` after every swap and before holds resume: to drop caches of the old version.

        It runs on shipd's thread, may ``hold()`` itself, and cannot undo the swap: what it raises is logged.
        """
        self._callbacks.append(callback)
        return Handle(self._callbacks, callback)

    def detach(self) -> None:
        """Stop following. The model keeps the version it has, in memory of its own. Harmless twice."""
        # A callback must not wait for a thread that detaches, because that waits for the callback.
        if not self._detaching.acquire(blocking=not self._link.runs_here):
            return
        try:
            if not self._link.runs_here and self._gate.hold().holds(within_forward=1):
                # This thread's own hold, which will not end while it waits here.
                self._follower.patience = 0.0
            self._link.stop()
            if self._hooks is not None:
                self._hooks.remove()
                self._hooks = None
            _residents.discard(self)
        finally:
            self._detaching.release()

    def after_fork_in_child(self) -> None:
        """What os.register_at_fork calls: the child follows no daemon, and must not keep the parent's session open."""
        self._detaching = threading.Lock()
        self._link.abandon_after_fork()
        self._follower.abandon_after_fork()


class _ModelFollower:
    """What the link does to the model: see ``follower.Follower``. All but ``digest`` on the link's thread."""

    def __init__(
        self, gate: Gate, swapper: Swapper, max_hold: float, callbacks: list[Callable[[Version], object]]
    ) -> None:
        self.private = swapper.access is Access.PRIVATE
        self._gate = gate
        self._swapper = swapper
        self._max_hold = max_hold
        self._callbacks = callbacks
        self.patience = _DETACH_SECONDS
        """How long detaching waits for holds."""
        self._attached = False
        self._torn: str | None = None
        self._reading = threading.Lock()

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


def _transient(tensors: ModelTensors) -> Structure:
    """The non-persistent buffers that a checkpoint might contain; others could not be in one."""
    from shipproto.dtypes import BY_NAME

    return Structure.build(
        TensorSpec(buffer.name, buffer.dtype, buffer.shape) for buffer in tensors.transient if buffer.dtype in BY_NAME
    )


_residents: set[Resident] = set()
"""What is attached. Not weak references: the session goes on although the user keeps none, and so must what is done
about it after a fork."""
_registering = threading.Lock()


def _register(resident: Resident) -> None:
    """Raises AttachError where another session swaps some of the same tensors: each under the other's holds."""
    own = _places(resident)
    with _registering:
        for other in _residents:
            if own & _places(other):
                raise AttachError(
                    f"this model is attached already, as {other.name!r}: detach() that resident first", model=other.name
                )
        _residents.add(resident)


def _places(resident: Resident) -> set[int]:
    return {tensor.data_ptr() for tensor in resident._tensors.live if tensor.numel()}  # noqa: SLF001


def _after_fork_in_child() -> None:
    for resident in list(_residents):
        resident.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
