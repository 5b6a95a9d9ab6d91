"""The serving process's side of the session with its daemon: a thread that follows the daemon's lead.

    connect -> ATTACH -> (FILL) or (STAGE, SWAP) -> ATTACHED -> { ARRIVING, STAGE, SWAP, UNSTAGE, DIGEST }* -> lost
       ^___________________________ with backoff, reporting the version that is really held ________________|

Losing the daemon never stops serving. Everything that touches the model happens on this one thread, in the
order in which the daemon asks for it.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shipd.errors import AttachError, ConnectError, Fenced, Interrupted, ShipError, Stalled
from shipd.images.memory import ImageMapping
from shipd.serving.follower import Follower
from shipd.serving.version import Version
from shipd.threads import start
from shipd.transfer.faults import peer_error, remote_error
from shipd.transfer.lane import Lane
from shipd.transfer.waker import Waker
from shipproto.aborts import read_abort
from shipproto.connection import Event, MessageArrived
from shipproto.errors import MalformedMessage, ProtocolError
from shipproto.frame import Buffer
from shipproto.limits import LEAF_SIZE, MAX_IMAGE_BYTES, MAX_TEXT
from shipproto.messages import (
    Abort,
    Arriving,
    Attach,
    Attached,
    Detach,
    DigestIs,
    DigestRequest,
    Evicted,
    Fill,
    Filled,
    Images,
    LaidOut,
    Message,
    Release,
    Stage,
    StageReady,
    Swap,
    Swapped,
    Unstage,
)
from shipproto.names import harmless
from shipproto.rangeset import RangeSet
from shipproto.structure import Structure

log = logging.getLogger("shipd.serving")

_CONNECT_SECONDS: Final = 10.0
_BACKOFF: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Pauses between attempts to come back to the daemon; the last one repeats."""
_RELEASE_SECONDS: Final = 0.5
"""How often to look whether anybody still uses the tensors of a version that is no longer served."""
_LEAVE_SECONDS: Final = 10.0
"""How long an attempt to attach that has taken too long waits for somebody's load_weights to return."""


@dataclass(slots=True)
class _Image:
    fd: int
    size: int
    mapping: ImageMapping | None = None
    preparing: threading.Thread | None = None
    dropped: bool = False


class _Evicted(ConnectError):
    """The daemon has given up on this process; it attaches again."""


class Link:
    """The session thread of one resident model. ``start`` returns when the model is attached."""

    def __init__(
        self, follower: Follower, *, model: str, model_class: str, socket: Path, mode: str, pinned: bool
    ) -> None:
        self.connected = False
        self._follower = follower
        self._model = model
        self._model_class = model_class
        self._socket = socket
        self._mode = mode
        self._pinned = pinned
        self._lane: Lane | None = None
        self._waker = Waker()
        self._images: dict[int, _Image] = {}
        # By generation: what the daemon has named to this process, and not been told to be free again.
        self._leased: dict[int, tuple[int, ImageMapping]] = {}
        self._current: int | None = None
        self._staged: tuple[int, Version] | None = None
        self._releasing: list[int] = []
        # Whether there has been a swap since the follower settled.
        self._unsettled = False
        self._attached = threading.Event()
        self._refusal: BaseException | None = None
        self._stopping = False
        """A callback, which runs on this thread, has detached."""
        self._left_behind = False
        """The thread is inside a load_weights that does not return, and ends when that does."""
        self._thread = threading.Thread(target=self._run, name=f"shipd {model}", daemon=True)

    # --- other threads -------------------------------------------------------------------------------------

    def start(self, timeout: float) -> None:
        """Attach. Raises ShipError: ConnectError, TensorMismatch, MemoryLimit, Stalled, …"""
        start(self._thread, AttachError, f"model {self._model!r} cannot be attached")
        try:
            if not self._attached.wait(min(timeout, threading.TIMEOUT_MAX)):
                raise self._too_late(timeout)
            if self._refusal is not None:
                raise self._refusal
        except BaseException:
            # Ctrl-C as well: nothing of the attempt may go on in the background.
            self.stop()
            raise

    def _too_late(self, timeout: float) -> Stalled:
        """The error for an attempt that has taken too long; it is over, but for what somebody's load_weights does."""
        self.stop(_LEAVE_SECONDS if self._follower.delivered else None)
        why = "; its load_weights has not returned, and may yet load a version" if self._left_behind else ""
        return Stalled(
            f"{self._socket} did not attach model {self._model!r} within {timeout:g} s{why}", model=self._model
        )

    def stop(self, patience: float | None = None) -> None:
        """Detach and end the thread. A swap that is under way is finished first, if need be within ``patience``."""
        if not self._stopping:
            self._stopping = True
            self._waker.wake()
        if self._thread.ident is None:
            # It never came to that.
            self._waker.close()
        elif not self.runs_here and not self._left_behind:
            # Also the second time: whoever was interrupted while waiting must not go on before the thread has ended.
            self._thread.join(patience)
            self._left_behind = self._thread.is_alive()

    @property
    def runs_here(self) -> bool:
        """Whether the calling thread is the session's: inside a callback."""
        return threading.current_thread() is self._thread

    def abandon_after_fork(self) -> None:
        """In a forked child: the session belongs to the parent, which must be the only one to keep it open."""
        self._stopping = True
        self.connected = False
        if self._lane is not None:
            self._lane.close()
        for image in self._images.values():
            os.close(image.fd)
        self._images.clear()

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._follow_daemon()
        finally:
            self._waker.close()
            self._attached.set()

    def _follow_daemon(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                self._session()
            except Interrupted:
                break
            except ShipError as error:
                if not self._attached.is_set():
                    self._refusal = error
                    break
                failures = 0 if self.connected else failures + 1
                log.warning("lost the daemon; serving goes on", extra={"model": self._model, "why": str(error)})
            except BaseException as error:
                if not self._attached.is_set():
                    self._refusal = error
                    break
                # Whatever it was: not to follow any more would be to serve an old version for ever.
                failures += 1
                log.exception("the session failed unexpectedly", extra={"model": self._model})
            finally:
                self._end_session()
            if self._waker.wait(_BACKOFF[min(failures, len(_BACKOFF) - 1)]):
                self._let_go_of_the_lost()
                break
        self._follower.close()

    def _let_go_of_the_lost(self) -> None:
        """Detached while the daemon is away: nobody takes its last image back, and the model may live in it."""
        try:
            self._follower.let_go()
        except Exception:
            log.exception("the model stays in an image", extra={"model": self._model})

    def _session(self) -> None:
        lane = self._lane = Lane.open(self._socket, token=None, timeout=_CONNECT_SECONDS, waker=self._waker)
        held = self._follower.held()
        attach = Attach(
            delivered=self._follower.delivered,
            digest=bytes.fromhex(held.digest) if held else b"",
            label=held.label if held else "",
            mode=self._mode,
            model=self._model,
            model_class=self._model_class,
            pinned=self._pinned,
        )
        lane.connection.send(attach, self._follower.resident().encode())
        while True:
            try:
                events = lane.exchange(time.monotonic() + _RELEASE_SECONDS)
            except Stalled:
                # Nothing to do, which is the usual state of a session.
                events = iter(())
            self._handle_all(lane, events)
            if self._unsettled:
                # The daemon waits for SWAPPED, which must not wait for the old version's memory to be freed.
                self._handle_all(lane, lane.pump())
            self._release_settled(lane)

    def _end_session(self) -> None:
        """The daemon knows nothing of this process any more; mappings that are served from stay."""
        self.connected = False
        lane, self._lane = self._lane, None
        images, self._images = list(self._images.values()), {}
        try:
            # Not in the image of a daemon that may be away now and will be back.
            released = self._stopping and self._attached.is_set() and self._follower.let_go()
            if lane is not None and lane.connection.established and self._current is not None and released:
                if self._follower.settle():
                    # Else something still reads an image: the daemon must leave it alone while this process lives.
                    lane.connection.send(Detach())
                lane.close(flush=True)
            if self._staged is not None:
                self._follower.unstage()
            if self._unsettled:
                # Or what was replaced would be kept until the daemon is back.
                self._follower.settle()
                self._unsettled = False
        except Exception:
            log.exception("the session could not be ended as it should", extra={"model": self._model})
        finally:
            self._staged = self._current = None
            self._releasing.clear()
            self._leased.clear()
            if lane is not None:
                lane.close()
            for image in images:
                self._drop(image)

    def _drop(self, image: _Image) -> None:
        """This image is not going to be used any more, or will come again as new memory."""
        image.dropped = True
        if image.preparing is not None:
            image.preparing.join()
        os.close(image.fd)
        if image.mapping is not None:
            try:
                self._follower.forget(image.mapping)
            except RuntimeError:
                # CUDA says so when a context is broken; there is nothing left to keep it from.
                log.exception("an image could not be let go of", extra={"model": self._model})

    def _handle_all(self, lane: Lane, events: Iterator[Event]) -> None:
        try:
            for event in events:
                if isinstance(event, MessageArrived):
                    self._handle(lane, event.message, event.body)
        except ProtocolError as error:
            raise peer_error(error, str(self._socket)) from error

    def _handle(self, lane: Lane, message: Message, body: Buffer) -> None:
        if isinstance(message, LaidOut):
            self._lay_out(body)
        elif isinstance(message, Images):
            self._take_images(lane, message)
        elif isinstance(message, Fill):
            self._fill(lane, message)
        elif isinstance(message, Arriving):
            self._follower.arrived(
                self._mapping(message.slot, message.generation), RangeSet.decode(body, MAX_IMAGE_BYTES // LEAF_SIZE)
            )
        elif isinstance(message, Stage):
            self._stage(lane, message)
        elif isinstance(message, Swap):
            self._swap(lane, message)
        elif isinstance(message, Unstage):
            self._unstage(lane, message)
        elif isinstance(message, DigestRequest):
            self._read_back(lane, message)
        elif isinstance(message, Attached):
            self._follow(message)
        elif isinstance(message, Evicted):
            self._follower.fence(f"the daemon has given up on this process: {message.reason}")
            raise _Evicted(f"evicted: {message.reason}", model=self._model)
        elif isinstance(message, Abort):
            error = remote_error(read_abort(message, body), str(self._socket), model=self._model)
            raise error
        else:
            raise MalformedMessage(f"{type(message).__name__} to a serving process")

    # --- images --------------------------------------------------------------------------------------------

    def _lay_out(self, body: Buffer) -> None:
        self._follower.lay_out(Structure.decode(body))
        images, self._images = list(self._images.values()), {}
        # No version has been given to this process in this session: nothing that it serves is in them.
        self._leased.clear()
        self._releasing.clear()
        for image in images:
            self._drop(image)

    def _take_images(self, lane: Lane, message: Images) -> None:
        if len(lane.fds) < len(message.slots):
            raise MalformedMessage(f"{len(message.slots)} images and {len(lane.fds)} descriptors")
        for entry in message.slots:
            known = self._images.pop(entry.slot, None)
            if known is not None:
                self._drop(known)
            image = self._images[entry.slot] = _Image(lane.fds.popleft(), entry.size)
            if not entry.writable and not self._follower.private:
                image.mapping = self._follower.map(image.fd, image.size)
                self._prepare(image, image.mapping)

    def _prepare(self, image: _Image, mapping: ImageMapping) -> None:
        """Map the pages ahead of time, on a thread of its own: the first copy would take twice as long."""
        preparing = threading.Thread(
            target=self._follower.prepare,
            args=(mapping, lambda: image.dropped),
            name=f"shipd {self._model} prepare",
            daemon=True,
        )
        try:
            preparing.start()
        except RuntimeError as error:
            log.warning("an image is not prepared; the first swap will be slower", extra={"why": str(error)})
        else:
            image.preparing = preparing

    def _image(self, slot: int) -> _Image:
        image = self._images.get(slot)
        if image is None:
            raise MalformedMessage(f"slot {slot} has no image here")
        return image

    def _mapping(self, slot: int, generation: int) -> ImageMapping:
        """The mapping in which to read a generation of a slot."""
        if generation in self._leased:
            return self._leased[generation][1]
        image = self._image(slot)
        if image.mapping is None:
            image.mapping = self._follower.map(image.fd, image.size)
        self._leased[generation] = slot, image.mapping
        return image.mapping

    def _fill(self, lane: Lane, message: Fill) -> None:
        image = self._image(message.slot)
        mapping = ImageMapping.shared(image.fd, image.size)
        try:
            self._follower.fill(mapping.view)
        finally:
            mapping.close()
        lane.connection.send(Filled(generation=message.generation, slot=message.slot))

    # --- versions ------------------------------------------------------------------------------------------

    def _follow(self, message: Attached) -> None:
        if message.digest:
            self._current = message.generation
            version = Version(message.label, message.digest.hex())
            self._follower.adopt(self._mapping(message.slot, message.generation), version)
        else:
            self._follower.wait_for_version()
        self.connected = True
        self._attached.set()

    def _stage(self, lane: Lane, message: Stage) -> None:
        started = time.monotonic()
        error = ""
        try:
            self._follower.stage(self._mapping(message.slot, message.generation))
            self._staged = (message.generation, Version(message.label, message.digest.hex()))
        except ShipError as failure:
            log.warning(
                "a version could not be staged",
                extra={"model": self._model, "label": message.label, "why": str(failure)},
            )
            error = harmless(str(failure), MAX_TEXT)
        except Exception as failure:
            log.exception("a version could not be staged", extra={"model": self._model, "label": message.label})
            error = harmless(f"{type(failure).__name__}: {failure}", MAX_TEXT)
        lane.connection.send(
            StageReady(
                error=error,
                generation=message.generation,
                stage_seconds=time.monotonic() - started,
                transfer=message.transfer,
            )
        )

    def _swap(self, lane: Lane, message: Swap) -> None:
        if self._staged is None or self._staged[0] != message.generation:
            raise MalformedMessage(f"SWAP to generation {message.generation}, which is not staged")
        generation, version = self._staged
        try:
            times = self._follower.swap(version, message.timeout)
        except Exception as error:
            # The old version is live, unless it says Fenced.
            if not isinstance(error, ShipError):
                log.exception("a swap failed unexpectedly", extra={"model": self._model, "label": version.label})
            lane.connection.send(
                Swapped(
                    error=harmless(str(error) or repr(error), MAX_TEXT),
                    fenced=isinstance(error, Fenced),
                    generation=generation,
                    transfer=message.transfer,
                )
            )
            return
        self._staged = None
        self._unsettled = True
        if self._current is not None and self._current != generation:
            self._releasing.append(self._current)
        self._current = generation
        lane.connection.send(
            Swapped(
                copy_seconds=times.copy_seconds,
                generation=generation,
                pause_seconds=times.pause_seconds,
                transfer=message.transfer,
                wait_seconds=times.wait_seconds,
            )
        )

    def _unstage(self, lane: Lane, message: Unstage) -> None:
        self._follower.unstage()
        if self._staged is not None and self._staged[0] == message.generation:
            self._staged = None
        leased = self._leased.get(message.generation)
        if leased is None or message.generation == self._current:
            return
        if self._follower.reads(leased[1]):
            self._releasing.append(message.generation)
        else:
            self._release(lane, message.generation)

    def _release_settled(self, lane: Lane) -> None:
        if not self._releasing and not self._unsettled:
            return
        self._follower.settle()
        self._unsettled = False
        for generation in list(self._releasing):
            if not self._follower.reads(self._leased[generation][1]):
                self._releasing.remove(generation)
                self._release(lane, generation)

    def _release(self, lane: Lane, generation: int) -> None:
        leased = self._leased.pop(generation, None)
        if leased is None:
            return
        slot, mapping = leased
        image = self._images.get(slot)
        if self._follower.private and image is not None and image.mapping is mapping and not mapping.unwritten():
            # What the model has written to it would hide the next version.
            image.mapping = None
        lane.connection.send(Release(generation=generation, slot=slot))

    def _read_back(self, lane: Lane, message: DigestRequest) -> None:
        held = self._follower.held()
        label = held.label if held else ""
        try:
            if self._follower.delivered:
                digest = bytes.fromhex(held.digest) if held else b""
                answer = DigestIs(delivered=True, digest=digest, label=label, request=message.request)
            else:
                answer = DigestIs(digest=self._follower.read_back(), label=label, request=message.request)
        except ShipError as error:
            answer = DigestIs(error=harmless(str(error), MAX_TEXT), request=message.request)
        lane.connection.send(answer)
