"""Coded runs on their way into an image: decoded and digested on threads, from the current version into the next.

The loop hands runs over and is told when they are in their place. What waits is still encoded, and so small; where it
becomes too much, whoever brings more is made to wait.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import numpy as np

from shipd.codecs import registry
from shipd.codecs.codec import CodecError
from shipproto.agreement import Ability
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from shipproto.outcomes import RunToDecode

log = logging.getLogger("shipd.transfer")

MOST_WAITING: Final = 4 << 20
"""Bytes of payloads that wait to be decoded: beyond it nothing more is taken from connections that bring runs."""

_MOST_SHORTER: Final = 64
"""Times that a payload counts as shorter than its content, at most, when it waits: a sender that is made to wait takes
this side for dead after a while, and 4 MiB can stand for gigabytes, which without compiled code take that long."""

_AT_ONCE: Final = 2
"""Runs of one push that are decoded at the same time. Measured, one core decodes what 10 Gbit/s bring."""

_LOOK_SECONDS: Final = 0.01
"""How often a lane that is made to wait looks whether there is room."""

_SMOOTHING: Final = 0.5

_T = TypeVar("_T")


class Worker(Protocol):
    """Runs ``function`` off the loop."""

    async def __call__(self, function: Callable[..., _T], *arguments: object) -> _T: ...


class Speeds:
    """How fast each codec has been decoded here lately, in bytes of content a second; 0 until it has been.

    prepare  has the codecs' loops compiled, some time; called when the first run is to be decoded, since a daemon that
             never sees one should not take the memory
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._speeds: dict[int, float] = {}
        self._prepare: Callable[[], None] | None = prepare

    def expect(self) -> None:
        """A run is about to be decoded."""
        prepare, self._prepare = self._prepare, None
        if prepare is not None:
            prepare()

    def learn(self, codec: int, size: int, seconds: float) -> None:
        """``size`` bytes took so many seconds of a thread's time."""
        if seconds > 0 and size:
            speed = size / seconds
            self._speeds[codec] = self._speeds.get(codec, speed) * (1 - _SMOOTHING) + speed * _SMOOTHING

    def ability(self, base: "Ground | None") -> Ability:
        """What can be agreed on with a sender: every codec there is, and those that need a base where there is one."""
        deltas = {number for number, codec in registry.BY_NUMBER.items() if codec.delta}
        codecs = {
            number: int(self._speeds.get(number, 0.0) / 1e6)
            for number in registry.DECODABLE
            if base is not None or number not in deltas | {registry.SAME}
        }
        if base is None:
            return Ability(codecs=codecs)
        return Ability(base=base.digest, digests=base.digests, codecs=codecs, deltas=deltas)


@dataclass(frozen=True, slots=True)
class Ground:
    """What runs are decoded from: the current version, in an image of the same layout."""

    digest: bytes
    image: memoryview
    digests: LeafDigests


@dataclass(slots=True)
class Target:
    """Where runs are decoded into. ``before`` are the digests of what the image held until now, where that was whole:
    chunks that are the base's already need not be copied, but those that are ``touched`` since."""

    layout: Layout
    image: memoryview
    digests: LeafDigests
    before: LeafDigests | None
    touched: Callable[[int], bool]
    closed: threading.Event = field(default_factory=threading.Event)

    def decode(self, run: RunToDecode, base: Ground | None) -> tuple[int, float]:
        """Put a run into its place, and digest it: bytes of content, and what decoding them took of a thread's time.

        On any thread. Raises CodecError where the payload is none, or says that there is anything between two chunks:
        that would stay there, of no tensor and digested by nobody, and spoil the deltas of later versions.
        """
        if run.codec == registry.SAME:
            assert base is not None
            self._copy(run.chunks, base)
            return 0, 0.0
        start, end = self.layout.span(run.chunks)
        codec = registry.BY_NUMBER[run.codec]
        began = time.thread_time()
        codec.decode(run.payload, base.image[start:end] if base is not None else None, self.image[start:end])
        seconds = time.thread_time() - began
        if any(any(self.image[gap:after]) for gap, after in self.layout.gaps(run.chunks)):
            raise CodecError("something between two chunks")
        for chunk in run.chunks:
            first, size = self.layout.chunk(chunk)
            self.digests.record(chunk, self.image[first : first + size])
        return end - start, seconds

    def _copy(self, chunks: range, base: Ground) -> None:
        """The same as in the base, whose digests are known."""
        for chunk in chunks:
            if self.closed.is_set():
                return
            if self._has(chunk, base):
                continue
            start, size = self.layout.chunk(chunk)
            # numpy lets go of the GIL while it copies.
            np.copyto(
                np.frombuffer(self.image[start : start + size], dtype=np.uint8),
                np.frombuffer(base.image[start : start + size], dtype=np.uint8),
            )
        self.digests.adopt(chunks, base.digests)

    def _has(self, chunk: int, base: Ground) -> bool:
        """Whether the image has this chunk of the base already. Not where a damaged one was received over it."""
        before = self.before
        return (
            before is not None
            and not self.touched(chunk)
            and before.chunk_digest(chunk) == base.digests.chunk_digest(chunk)
        )


class Decoding:
    """The runs of one push. Belongs to the loop, but for ``admit``.

    took        is told of each run that is in its place
    refused     is told of each that does not decode
    hold_back   is told whether the push's own connection is to be read at the moment
    """

    def __init__(
        self,
        work: Worker,
        speeds: Speeds,
        *,
        took: Callable[[RunToDecode], None],
        refused: Callable[[RunToDecode], None],
        hold_back: Callable[[bool], None],
    ) -> None:
        self._work = work
        self._speeds = speeds
        self._took = took
        self._refused = refused
        self._hold_back = hold_back
        self._target: Target | None = None
        self._base: Ground | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0
        """Bytes, as ``_weight`` counts them; ``admit`` looks at them on other threads."""
        self.decoded_bytes = 0
        """Bytes of content that coded runs stood for, those of SAME included."""
        self.seconds = 0.0
        """What decoding took, added up over all threads."""

    def begin(self, target: Target, base: Ground | None) -> None:
        """Runs may arrive from here on."""
        self._target, self._base = target, base

    def submit(self, run: RunToDecode) -> None:
        """Decode a run as soon as there is a thread for it."""
        if run.codec != registry.SAME:
            self._speeds.expect()
        self._waiting += self._weight(run)
        if self._waiting > MOST_WAITING:
            self._hold_back(True)  # noqa: FBT003  named where it is defined
        task = asyncio.get_running_loop().create_task(self._decode(run), name="decode")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _weight(self, run: RunToDecode) -> int:
        """Bytes that a run counts for while it waits. What is the same costs little, however much it is."""
        if run.codec == registry.SAME or self._target is None:
            return 0
        start, end = self._target.layout.span(run.chunks)
        return max(len(run.payload), (end - start) // _MOST_SHORTER)

    def admit(self, stopping: Callable[[], bool]) -> None:
        """On a lane's thread: wait until there is room for what it has brought, or it is to end."""
        while self._waiting > MOST_WAITING and not stopping():
            time.sleep(_LOOK_SECONDS)

    async def end(self) -> None:
        """Until nothing writes into the image any more, which takes a moment at most."""
        if self._target is not None:
            self._target.closed.set()
        while self._running:
            # Whoever wants this over sooner would have the image given back too soon.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(self._running)
        # Whoever still refers to this push must not keep the images mapped.
        self._target = self._base = None

    async def _decode(self, run: RunToDecode) -> None:
        target = self._target
        assert target is not None
        done = False
        try:
            async with self._turns:
                if not target.closed.is_set():
                    size, seconds = await self._work(target.decode, run, self._base)
                    self._speeds.learn(run.codec, size, seconds)
                    self.seconds += seconds
                    done = True
        except CodecError as error:
            log.warning(
                "a coded run does not decode and is asked for as it is",
                extra={
                    "codec": registry.NAMES[run.codec],
                    "chunks": f"{run.chunks.start} to {run.chunks.stop - 1}",
                    "tensor": target.layout.chunk_names(run.chunks.start)[0],
                    "why": str(error),
                },
            )
        except Exception:
            log.exception("decoding failed unexpectedly")
        self._waiting -= self._weight(run)
        if self._waiting <= MOST_WAITING // 2:
            self._hold_back(False)  # noqa: FBT003
        if done:
            start, end = target.layout.span(run.chunks)
            self.decoded_bytes += end - start
            self._took(run)
        else:
            self._refused(run)
