"""``shipd.attach``: a model that is being served gets its next versions from the daemon on this host."""

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from torch import nn

from shipd.errors import AttachError, IntegrityError, NotReadBack
from shipd.serving.deliver import DeliverSwap, LoadsWeights
from shipd.serving.gate import Gate
from shipd.serving.hooks import Hooks, find_calls
from shipd.serving.link import Link
from shipd.serving.model_follower import DeliveredFollower, ModelFollower, resident_of
from shipd.serving.slot import Slot
from shipd.serving.swap import MODES, make_swapper
from shipd.serving.tensors import ModelTensors, places
from shipd.serving.turns import short_turns
from shipd.serving.version import Version
from shipd.serving.wrappers import described_class, unwrapped
from shipproto.layout import Layout
from shipproto.limits import MAX_CLASS_NAME
from shipproto.names import check_label

DEFAULT_SOCKET: Final = "/run/shipd/shipd.sock"
_UNATTACHED: Final = Version("", "")


def attach(
    model: nn.Module | LoadsWeights,
    name: str,
    *,
    socket: str | os.PathLike[str] = DEFAULT_SOCKET,
    mode: str = "auto",
    max_hold: float = 1.0,
    hooks: bool = True,
    timeout: float = 60.0,
) -> "Resident":
    """Have ``model``, which this process serves, follow the versions that are pushed as ``name`` on this host.

    model     a module: also one that is or contains what torch.compile, DataParallel, DistributedDataParallel or
              activation checkpointing have wrapped, or a ScriptModule. A wrapper adds nothing to the names, so that a
              plain, a compiled and a DataParallel process can share one ``name``; but to a ScriptModule its
              non-persistent buffers are persistent. Or anything that has vLLM's ``load_weights(weights)``, see below
    mode      "copy" overwrites the live tensors, whose addresses stay; "direct" does so as well, but on CUDA without a
              shadow of the weights on the device: from host to device while nothing is served, which takes longer;
              "flip" (on the CPU) binds them to the next version's memory instead, which takes no time but moves them;
              "auto" is copy, or direct where the device has no room for the shadow. "load_weights" hands the version
              to ``model.load_weights``; for what is no module it is the only mode. ``Resident.mode`` and
              ``shipctl status`` say what it has become
    max_hold  seconds that new holds may be kept waiting by a swap that itself waits for a long hold
    hooks     whether each forward of the model is a hold of its own; without, only ``hold()`` is
    timeout   seconds for attaching

    If a version is committed already it is installed before this returns; else the model as it is becomes the
    first one. Serving goes on without the daemon, and the process attaches again by itself when that comes back.
    Resident models are for inference: a swap under a live autograd graph breaks its backward.

    Which calls the hooks hold: those of the module that was attached and, where that is a wrapper, of what it wraps;
    and those of a wrapper made of it, as far as it calls the module. Not: code of an enclosing function or module that
    torch.compile has compiled before, and, where the plain module is attached, what a wrapper does first (buffers that
    DistributedDataParallel broadcasts, parameters that DataParallel copies to other GPUs). ``hold()`` around the call,
    or attaching the wrapper, covers them. A compiled model is not compiled again after a swap. What has made constants
    of the weights does not follow them: frozen ScriptModules, torch.compile with freezing, exported programs.

    With load_weights a version is handed over as an iterator over pairs of name and tensor, in the order of the names,
    inside the closed gate and under no_grad, on shipd's thread. Names and dtypes are those of what is pushed, and any
    will do; tied tensors come under each of their names. The tensors are in memory, of the callee alone: it may keep
    and change them. All must be taken before it returns. If it raises, it is given the version before again; if that
    raises too, or there is none, the process is fenced. Until the first push nothing is installed, and ``label`` and
    ``digest`` are empty. What became of a version cannot be read back. Where a model's first version came with a
    process that attached a module, that version is handed over, and the names are that module's.

    Raises AttachError or UnsupportedTensor (this model cannot be resident), ConnectError (no daemon there),
    TensorMismatch (another model has that name), Busy (see the message), MemoryLimit, Stalled; and SwapFailed where
    load_weights failed for the version that is committed: then ``model`` may have a part of it.
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
        self,
        model: nn.Module | LoadsWeights,
        name: str,
        socket: Path,
        *,
        mode: str,
        max_hold: float,
        hooks: bool,
        timeout: float,
    ) -> None:
        self.name = name
        self._gate = Gate(_UNATTACHED, calls=find_calls)
        self._callbacks: list[Callable[[Version], object]] = []
        self._follower: ModelFollower
        self._places: Callable[[], set[int]]
        pinned = False
        if mode == "load_weights" or not isinstance(model, nn.Module):
            self._follower = DeliveredFollower(
                self._gate, DeliverSwap(_loading(model, mode)), max_hold, self._callbacks
            )
            self._places = functools.partial(_places_of, model)
            self.mode = DeliverSwap.mode
        else:
            with short_turns():
                tensors = ModelTensors(model)
                swapper = make_swapper(tensors, Layout(tensors.structure), mode)
            self._follower = ModelFollower(self._gate, swapper, resident_of(tensors), max_hold, self._callbacks)
            self._places = lambda: places(tensors.live)
            self.mode = swapper.mode
            pinned = tensors.device.type == "cuda"
        self._link = Link(
            self._follower,
            model=name,
            model_class=_class_name(model),
            socket=socket,
            mode=self.mode,
            # Copies to the device, or maps pages, while the rest still arrives.
            pinned=pinned or self.mode == "flip",
        )
        self._hooks: Hooks | None = None
        self._detaching = threading.Lock()
        try:
            _register(self)
            # Before the first version is installed: the model may be serving already.
            if hooks and isinstance(model, nn.Module):
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

        Raises IntegrityError where they are not what was committed: something else has written to them. Raises
        NotReadBack in mode load_weights: ``digest`` is that of the version that was delivered.
        """
        with self._gate.hold() as version:
            if self._follower.delivered:
                raise NotReadBack(
                    f"model {self.name!r} takes its versions through load_weights: {version.label or 'none yet'!r} was "
                    "delivered, and what became of it cannot be read back",
                    model=self.name,
                )
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
        """Stop following. The model keeps the version it has, in memory of its own. Harmless twice.

        A swap that is under way is finished first, and with it the ``on_swap`` callbacks and ``load_weights`` that run:
        these are the caller's own, and nothing ends them.
        """
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

    def places(self) -> set[int]:
        """Addresses of what it swaps, which no other session may swap as well."""
        return self._places()

    def after_fork_in_child(self) -> None:
        """What os.register_at_fork calls: the child follows no daemon, and must not keep the parent's session open."""
        self._detaching = threading.Lock()
        self._link.abandon_after_fork()
        self._follower.abandon_after_fork()


def _class_name(model: object) -> str:
    """The class's qualified name, for people; of one that is too long for the wire the end, where it is most telling.

    What is not printable ASCII is escaped.
    """
    name = described_class(model).encode("ascii", "backslashreplace").decode()
    return name if len(name) <= MAX_CLASS_NAME else f"...{name[3 - MAX_CLASS_NAME :]}"


_residents: set[Resident] = set()
"""What is attached. Not weak references: the session goes on although the user keeps none, and so must what is done
about it after a fork."""
_registering = threading.Lock()


def _register(resident: Resident) -> None:
    """Raises AttachError where another session swaps some of the same tensors: each under the other's holds."""
    own = resident.places()
    with _registering:
        for other in _residents:
            if own & other.places():
                raise AttachError(
                    f"this model is attached already, as {other.name!r}: detach() that resident first", model=other.name
                )
        _residents.add(resident)


def _loading(model: nn.Module | LoadsWeights, mode: str) -> LoadsWeights:
    """``model`` as what has load_weights. Raises AttachError."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module) and mode in MODES and mode != "auto":
        raise AttachError(f"mode {mode!r} is for modules, and this {kind} is none; leave it out")
    if not callable(getattr(model, "load_weights", None)):
        raise AttachError(
            f"mode 'load_weights' needs a method of that name, and {kind} has none"
            if isinstance(model, nn.Module)
            else f"a {kind} is no torch.nn.Module, and has no load_weights(weights) either: it cannot be attached"
        )
    return cast("LoadsWeights", model)


def _places_of(model: nn.Module | LoadsWeights) -> set[int]:
    if isinstance(model, nn.Module):
        return {id(unwrapped(model)), *places([*model.parameters(), *model.buffers()])}
    return {id(model)}


def _after_fork_in_child() -> None:
    for resident in list(_residents):
        resident.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
