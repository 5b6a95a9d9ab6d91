"""Files that a sender on this host has lent: their chunks are read into an image on threads, and digested there.

The threads are the push's own. Where a file system hangs, a read of it cannot be ended: the push is, after a while
without progress, and the thread stays where it is, with the descriptors and with the memory that it reads into.
"""

import asyncio
import contextlib
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from shipd.transfer.lent_files import CutShort, LentFiles
from shipd.transfer.times import Times
from shipproto.digests import LeafDigests, leaf_digest
from shipproto.errors import AbortCode, TransferError
from shipproto.outcomes import RunToDecode

log = logging.getLogger("shipd.transfer")

_READERS: Final = 2
"""Threads that read for one push."""

_GRACE_SECONDS: Final = 1.0
"""How long a push that has ended waits for what is being read: half a megabyte for each thread."""


class Lending:
    """What has been lent to one push. Belongs to the loop.

    stall    seconds without a chunk read after which the push fails
    took     is told of each run that is in its place, digested
    dropped  is told of each that is not, when everything is over
    failed   is told why the push cannot go on
    """

    def __init__(
        self,
        stall: float,
        *,
        took: Callable[[RunToDecode], None],
        dropped: Callable[[RunToDecode], None],
        failed: Callable[[TransferError], None],
    ) -> None:
        self.times = Times()
        """What reading took, over all threads."""
        self.left: Callable[[], None] | None = None
        """Called when the last thread is gone, where it outlives ``end``."""
        self._stall = stall
        self._took = took
        self._dropped = dropped
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._jobs: set[_Job] = set()
        self._runs: set[RunToDecode] = set()
        self._over = False
        self._gone: asyncio.Future[None] | None = None
        """Done when the last thread is gone."""
        self._watch: asyncio.TimerHandle | None = None

    @property
    def reading(self) -> bool:
        """Whether threads may be writing into the image."""
        return bool(self._jobs)

    def begin(self, files: LentFiles, runs: list[RunToDecode], image: memoryview, digests: LeafDigests) -> None:
        """Read these runs of what was lent into ``image``. The descriptors are closed when that is done."""
        job = _Job(files, runs, image, digests, self._on_loop)
        self._jobs.add(job)
        self._runs.update(runs)
        if self._watch is None:
            self._watch = self._loop.call_later(self._stall, self._look)
        job.start()

    def _on_loop(self, job: "_Job", what: RunToDecode | Exception | None) -> None:
        """On a job's thread: a run is in its place, reading has failed, or the last thread has ended."""
        # A daemon that has stopped meanwhile, because of a thread that hung, has no loop any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._hear, job, what)

    def _hear(self, job: "_Job", what: RunToDecode | Exception | None) -> None:
        if what is None:
            self._jobs.discard(job)
            self.times.add(job.times)
            if not self._jobs:
                self._stop_watching()
                if self._gone is not None:
                    self._gone.set_result(None)
                    self._gone = None
                if self._over and self.left is not None:
                    self.left()
        elif self._over:
            return
        elif isinstance(what, RunToDecode):
            self._runs.discard(what)
            self._took(what)
        elif isinstance(what, TransferError):
            self._failed(what)
        else:
            log.error("reading what was lent failed unexpectedly", exc_info=what)
            self._failed(TransferError(AbortCode.INTERNAL, "the daemon failed; its log says how"))

    def _look(self) -> None:
        self._watch = None
        left = max((job.moved for job in self._jobs), default=0.0) + self._stall - time.monotonic()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
            return
        tensor = next((name for job in self._jobs for name in job.under_way()), "")
        self._failed(
            TransferError(
                AbortCode.STALLED,
                f"the daemon has waited {self._stall:g} s for bytes of a file that the sender opened (of tensor "
                f"{tensor!r}): its file system does not answer. Push again when it does, or push a copy of the file on "
                "a local disk",
                tensor=tensor,
            )
        )

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def rest(self) -> None:
        """Everything has been read: until the threads are gone, so that the end of the push has not to wait for them.
        Until one that hangs is, which had nothing to read, only for a moment."""
        await self._until_left(_GRACE_SECONDS)

    async def _until_left(self, seconds: float) -> None:
        if self._jobs:
            if self._gone is None:
                self._gone = self._loop.create_future()
            await asyncio.wait({self._gone}, timeout=seconds)

    async def end(self) -> None:
        """Until nothing reads into the image any more, or only a thread that hangs: see ``reading``."""
        self._stop_watching()
        for job in self._jobs:
            job.stopping.set()
        deadline = self._loop.time() + _GRACE_SECONDS
        while self._jobs and (left := deadline - self._loop.time()) > 0:
            # Whoever wants this over sooner would have the image given back too soon.
            with contextlib.suppress(asyncio.CancelledError):
                await self._until_left(left)
        self._over = True
        if self._jobs:
            log.error(
                "a read of a lent file hangs: its memory is left to it",
                extra={"tensor": next((name for job in self._jobs for name in job.under_way()), "")},
            )
        for run in self._runs:
            self._dropped(run)
        self._runs.clear()


class _Job:
    """One LEND: its descriptors, what is to be read from them, and the threads that do."""

    def __init__(
        self,
        files: LentFiles,
        runs: list[RunToDecode],
        image: memoryview,
        digests: LeafDigests,
        tell: Callable[["_Job", Any], None],
    ) -> None:
        self.stopping = threading.Event()
        self.times = Times()
        self.moved = time.monotonic()
        """When a chunk was last read."""
        self._files = files
        self._lent = files.lent
        self._waiting = deque(runs)
        self._image = image
        self._digests = digests
        self._tell = partial(tell, self)
        self._lock = threading.Lock()
        self._threads = 1
        self._at: dict[int, int] = {}
        """The chunk that each thread is reading."""

    def start(self) -> None:
        """Begin to read."""
        try:
            self._spawn(self._check_and_read)
        except RuntimeError as error:
            self._leave()
            self._tell(TransferError(AbortCode.BUSY, f"the daemon cannot read what was lent: {error}"))

    def _spawn(self, target: Callable[[], None]) -> None:
        threading.Thread(target=self._run, args=(target,), name="shipd-lent", daemon=True).start()

    def under_way(self) -> list[str]:
        """A tensor for each read that is under way."""
        return [self._lent.layout.chunk_names(chunk)[0] for chunk in list(self._at.values())]

    # --- on its threads ------------------------------------------------------------------------------------

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  told to the loop, where the push ends with it
            self.stopping.set()
            self._tell(error)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._threads -= 1
            last = not self._threads
        if last:
            for fd in self._files.descriptors:
                os.close(fd)
            # Not kept mapped by whoever still refers to this.
            self._image = memoryview(b"")
            self._tell(None)

    def _check_and_read(self) -> None:
        # Here and not on the loop: even to ask for a file's size may take for ever.
        for fd, end in zip(self._files.descriptors, self._lent.ends(len(self._files.descriptors)), strict=True):
            _check(fd, end)
        for _ in range(min(_READERS, len(self._waiting)) - 1):
            with self._lock:
                self._threads += 1
            try:
                self._spawn(self._read)
            except RuntimeError:
                with self._lock:
                    self._threads -= 1
        self._read()

    def _read(self) -> None:
        layout, digests, image, thread = self._lent.layout, self._digests, self._image, threading.get_ident()
        times = Times()
        while not self.stopping.is_set():
            try:
                run = self._waiting.popleft()
            except IndexError:
                break
            large = run.chunks.start < layout.large_chunks
            found: list[bytes] = []
            for chunk in run.chunks:
                if self.stopping.is_set():
                    break
                self._at[thread] = chunk
                start, size = layout.chunk(chunk)
                place = image[start : start + size]
                began = time.monotonic()
                try:
                    self._files.read(chunk, place)
                except (CutShort, OSError) as error:
                    raise _failure(error, layout.chunk_names(chunk)[0]) from error
                self.moved = read = time.monotonic()
                if large:
                    found.append(leaf_digest(place))
                else:
                    digests.record(chunk, place)
                times.receive += read - began
                times.digest += time.monotonic() - read
            else:
                if large:
                    digests.note(run.chunks.start, run.chunks.stop, b"".join(found))
                self._tell(run)
        self._at.pop(thread, None)
        with self._lock:
            self.times.add(times)


def _check(fd: int, end: int) -> None:
    """Raise TransferError unless this is a regular file of at least ``end`` bytes."""
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise _failure(error, "") from error
    if not stat.S_ISREG(status.st_mode):
        raise TransferError(
            AbortCode.PROTOCOL, "what was lent is a pipe, a socket, a directory or a device, and not a regular file"
        )
    if status.st_size < end:
        raise TransferError(
            AbortCode.TENSOR_CHANGED,
            f"the file that was lent has {status.st_size} bytes, and tensors that are said to lie in it reach to byte "
            f"{end}: it has been cut. Save to a new file and rename it instead, then push again",
        )


def _failure(error: CutShort | OSError, tensor: str) -> TransferError:
    if isinstance(error, CutShort):
        return TransferError(
            AbortCode.TENSOR_CHANGED,
            f"the file that was lent ends before the last byte of tensor {tensor!r}: it was cut while it was being "
            "read. Save to a new file and rename it instead, then push again",
            tensor=tensor,
        )
    of_tensor = f" (tensor {tensor!r})" if tensor else ""
    return TransferError(
        AbortCode.INTERNAL,
        f"the daemon cannot read the file that was lent{of_tensor}: {error.strerror}. Push a copy of it that lies on "
        "another disk",
        tensor=tensor,
    )
