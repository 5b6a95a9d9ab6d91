"""The threads that fetch: a few for all files of one push, each with a connection of its own.

What a reader waits for is fetched first, and then, of files that are to be read, the rest from there on. What breaks
off is asked for again, from the byte at which it broke off, until the server has failed a few times in a row without a
byte more. Nobody waits for ever: see ``Fetching``.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

from shipd.checkpoints.remote.download import Download, Part
from shipd.checkpoints.remote.server import Answer, Broken, Refusal, Remote, Silent, changed
from shipd.checkpoints.remote.spool import Spool
from shipd.checkpoints.waiting import ACT_SECONDS, awaited
from shipd.checkpoints.wording import quoted
from shipd.errors import Interrupted, Stalled, TransferFailed
from shipd.threads import no_thread, start
from shipd.units import format_bytes

log = logging.getLogger("shipd.checkpoints")

_CONNECTIONS: Final = 4
"""Parts that are fetched at once, fewer than the six of browsers. One connection is left to what a reader waits for."""

_BUFFER: Final = 64 * 1024
"""Bytes that a thread reads at once. A server that takes the whole stall deadline for so few is as good as silent."""

_SMALLEST: Final = 1 << 20
_LARGEST: Final = 16 << 20
"""Bytes of a part: as many as come in a second, within these. A reader waits that long for its turn."""

_PAUSES: Final = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Seconds between attempts, while not a byte more comes."""

_REPORT_SECONDS: Final = 0.1

_LOOK_BYTES: Final = 64 * 1024 * 1024
"""Bytes of a file of unknown size after which the room on the disk is looked at again."""

_MORE_TIME: Final = "try again, with more time (stall=, --stall) where the server is only slow"

_GOODBYE_SECONDS: Final = 0.5
"""How long a file that is closed waits for threads that are in the middle of it."""


class _Closable(Protocol):
    def close(self) -> None: ...


_C = TypeVar("_C", bound=_Closable)
_T = TypeVar("_T")


class _Closed(Exception):
    """The file was closed while it was being fetched."""


class Fetching:
    """Fetches the files of one push, or of whatever opens files by URL. All methods may be called on any thread.

    stall        seconds without a byte after which a reader gives up, with Stalled
    timeout      seconds from now on after which it does in any case; None for as long as it takes
    on_progress  called with the bytes that are there and those of the file (0 where that is not known), by a thread
                 that waits for a whole file, some ten times a second
    pauses       seconds between attempts; when they are used up, the file is given up

    Threads end when there is nothing to fetch, connections are closed with the last file.
    """

    def __init__(
        self,
        *,
        stall: float = 30.0,
        timeout: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        pauses: Sequence[float] = _PAUSES,
    ) -> None:
        self.stall = stall
        self._timeout = timeout
        self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self._on_progress = on_progress
        self._pauses = pauses
        self._lock = threading.Condition()
        """Held for whatever is done to downloads; notified whenever one of them is another than before."""
        self._downloads: list[Download] = []
        self._threads: set[threading.Thread] = set()
        self._shared: dict[type, Any] = {}
        self._cancelled = False
        self._moved: dict[str, float] = {}
        """When bytes came from each server: what one of them sends is no sign of life of another."""
        self._piece = _SMALLEST

    # --- for files -----------------------------------------------------------------------------------------

    def start(self, remote: Remote) -> Download:
        """Begin to fetch the opening of a file, and whatever of it anyone waits for. The caller closes it."""
        download = Download(remote, Spool())
        try:
            with self._lock:
                self._downloads.append(download)
                self._employ()
        except BaseException:
            self.close(download)
            raise
        return download

    def describe(self, download: Download) -> None:
        """Wait until it is known of how many bytes the file is, and whether there is one.

        Raises CheckpointError, TensorChanged, Stalled or Interrupted, as ``wait`` does.
        """
        self._until(download, lambda: download.described)

    def wait(self, download: Download, start: int, stop: int, tensor: str | None = None) -> None:
        """Wait until bytes [start, stop) are there, which belong to ``tensor``.

        Raises CheckpointError where the server refuses or keeps breaking off, TensorChanged where the file has changed
        meanwhile, Stalled where nothing comes for too long, Interrupted once ``cancel`` was called. What is there can
        be had in any case.
        """
        with self._lock:
            if download.has(start, stop):
                return
            download.want(start, stop)
        try:
            self._until(download, lambda: download.has(start, stop), tensor)
        finally:
            with self._lock:
                download.wants.remove((start, stop))

    def load(self, download: Download) -> None:
        """Go on fetching until everything is there, whoever waits. Raises CheckpointError where the disk has too little
        room for that."""
        with self._lock:
            if not download.everything:
                download.everything = True
                try:
                    self._require_room(download)
                except Refusal as error:
                    download.everything = False
                    raise error.kind(str(error)) from None
            self._employ()

    def wait_for_all(self, download: Download) -> None:
        """Wait until everything is there, and report how it gets on. Raises what ``wait`` raises."""
        self._until(download, lambda: download.complete, report=True)

    def close(self, download: Download) -> None:
        """Give a file up. Harmless when repeated."""
        until = time.monotonic() + _GOODBYE_SECONDS
        with self._lock:
            if download.closed:
                return
            download.closed = True
            self._downloads.remove(download)
            for part in download.flying:
                if part.line is not None:
                    part.line.abort()
            self._lock.notify_all()
            while download.flying and (left := until - time.monotonic()) > 0:
                self._lock.wait(left)
            if not download.flying:
                download.spool.close()  # Otherwise the last one who is at it does that.
            ended = [] if self._downloads else [*self._threads]
            if not self._downloads:
                for shared in self._shared.values():
                    shared.close()
        for thread in ended:
            thread.join(max(0.0, until - time.monotonic()))

    def call(self, work: Callable[[], _T], shown: str) -> _T:
        """What ``work`` returns, a question to a server. Raises what ``wait`` raises, and then leaves behind the thread
        that asks."""
        results: list[_T] = []
        failures: list[Exception] = []

        def run() -> None:
            try:
                results.append(work())
            except Exception as error:  # noqa: BLE001  raised by whoever waits
                failures.append(error)
            with self._lock:
                self._lock.notify_all()

        thread = threading.Thread(target=run, name="shipd asking", daemon=True)
        start(thread, TransferFailed, f"{quoted(shown)} cannot be fetched")
        until = min(self._deadline, time.monotonic() + self.stall)
        with self._lock:
            while not results and not failures:
                if self._cancelled:
                    raise self._interrupted(shown)
                if (now := time.monotonic()) >= self._deadline:
                    raise self._late(shown)
                if now >= until:
                    raise Stalled(f"{quoted(shown)}: no answer came for {self.stall:g} s; {_MORE_TIME}")
                self._lock.wait(min(until - now, threading.TIMEOUT_MAX))
        thread.join()
        for error in failures:
            if isinstance(error, Refusal):
                raise error.kind(str(error)) from error
            raise error
        return results[0]

    def cancel(self) -> None:
        """Whoever waits raises Interrupted, from now on and at once."""
        with self._lock:
            self._cancelled = True
            for download in self._downloads:
                for part in download.flying:
                    if part.line is not None:
                        part.line.abort()
            self._lock.notify_all()

    def shared(self, kind: type[_C]) -> _C:
        """The one object of that kind that all files have in common; closed whenever the last of them is."""
        with self._lock:
            found: _C = self._shared.get(kind) or self._shared.setdefault(kind, kind())
            return found

    # --- waiting -------------------------------------------------------------------------------------------

    def _until(
        self, download: Download, ready: Callable[[], bool], tensor: str | None = None, *, report: bool = False
    ) -> None:
        began = time.monotonic()
        with self._lock:
            self._employ()
        act = awaited()
        most = _REPORT_SECONDS if report else ACT_SECONDS if act else threading.TIMEOUT_MAX
        while True:
            with self._lock:
                if ready():
                    return
                self._raise_if_over(download, began, tensor)
                until = min(self._deadline, self._heard(download, began) + self.stall)
                left = max(0.0, until - time.monotonic())
                self._lock.wait(min(left, most))
                held, size = len(download.held), download.size or 0
            if report and self._on_progress is not None:
                self._on_progress(held, size)
            if act:
                act()

    def _raise_if_over(self, download: Download, began: float, tensor: str | None) -> None:
        shown = download.remote.shown
        now = time.monotonic()
        if download.closed:
            raise ValueError(f"{quoted(shown)} is closed")
        if self._cancelled:
            raise self._interrupted(shown)
        if download.failure is not None:
            raise download.failure.kind(str(download.failure), tensor=tensor)
        if now >= self._deadline:
            raise self._late(shown)
        if now >= self._heard(download, began) + self.stall:
            why = f" ({download.trouble})" if download.failures and download.trouble else ""
            raise Stalled(
                f"fetching {quoted(shown)} has stalled: nothing came for {self.stall:g} s{why}, and "
                f"{download.so_far}; {_MORE_TIME}",
                tensor=tensor,
            )

    def _heard(self, download: Download, began: float) -> float:
        """When its server last sent anything, of this file or another; or when somebody ``began`` to wait."""
        return max(self._moved.get(_server(download), began), began)

    def _interrupted(self, shown: str) -> Interrupted:
        return Interrupted(f"interrupted while {quoted(shown)} was being fetched; nothing was swapped")

    def _late(self, shown: str) -> Stalled:
        return Stalled(f"{quoted(shown)} was still being fetched when the timeout of {self._timeout:g} s was over")

    # --- the threads ---------------------------------------------------------------------------------------

    def _employ(self) -> None:
        """Have one more thread, where there is something for it to do, and those look that wait out a pause."""
        self._lock.notify_all()
        # Also for what is left alone for now: it waits for that.
        if len(self._threads) < _CONNECTIONS and self._take_next(float("inf"), take=False) is not None:
            thread = threading.Thread(target=self._work, name="shipd fetching", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError as error:
                self._threads.discard(thread)
                if not self._threads:
                    raise no_thread(TransferFailed, "nothing can be fetched") from error

    def _work(self) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        while True:
            with self._lock:
                job = self._next_job()
                if job is None:
                    self._threads.discard(threading.current_thread())
                    return
                self._employ()
            self._fetch(*job, buffer)

    def _next_job(self) -> tuple[Download, Part] | None:
        """What to fetch now, after waiting out a pause; None where there is nothing."""
        while not self._cancelled:
            now = time.monotonic()
            job = self._take_next(now, take=True)
            if job is not None:
                return job
            # Those of which something is left, but that are left alone for now.
            pauses = [one.resume_at for one in self._downloads if one.resume_at > now and one.next_part(1) is not None]
            if not pauses:
                return None
            self._lock.wait(min(pauses) - now)
        return None

    def _take_next(self, now: float, *, take: bool) -> tuple[Download, Part] | None:
        """Of the files of which something is wanted by a reader, and then of all others, the first in order."""
        ready = [download for download in self._downloads if download.resume_at <= now]
        ahead = sum(len(download.flying) for download in self._downloads) < _CONNECTIONS - 1
        for download in sorted(ready, key=lambda one: one.described and not one.wants):
            part = download.next_part(self._piece, ahead=ahead)
            if part is not None:
                if take:
                    download.flying.append(part)
                return download, part
        return None

    def _fetch(self, download: Download, part: Part, buffer: memoryview) -> None:
        """Fetch one part, as far as it goes."""
        line = download.remote.line()
        began, first = time.monotonic(), part.at
        whole = False
        try:
            with self._lock:
                self._go_on(download)
                part.line = line
            self._learn(download, part, line.ask(part.at, part.stop))
            while part.stop is None or part.at < part.stop:
                room = len(buffer) if part.stop is None else min(len(buffer), part.stop - part.at)
                count = line.read(buffer[:room])
                if not count:
                    break
                self._store(download, part, buffer[:count])
            with self._lock:
                self._go_on(download)
                download.end(part)
            whole = True
        except _Closed:
            pass
        except Broken as error:
            self._broke(download, part, error)
        except Refusal as error:
            self._give_up(download, error)
        except Exception as error:  # Whoever waits is told; he would wait for ever.
            log.exception("fetching failed")
            self._give_up(
                download,
                Refusal(
                    f"{quoted(download.remote.shown)} cannot be fetched ({type(error).__name__}: {quoted(str(error))})"
                ),
            )
        finally:
            with self._lock:
                download.flying.remove(part)
                if whole and self._downloads:
                    line.done()
                else:
                    line.close()
                if download.closed and not download.flying:
                    download.spool.close()
                self._learn_rate(part.at - first, time.monotonic() - began)
                self._lock.notify_all()

    def _go_on(self, download: Download) -> None:
        """With the lock held."""
        if download.closed or self._cancelled:
            raise _Closed

    def _learn_rate(self, count: int, seconds: float) -> None:
        if count >= _SMALLEST:
            self._piece = min(_LARGEST, max(_SMALLEST, int(count / max(seconds, 1e-3))))

    def _learn(self, download: Download, part: Part, answer: Answer) -> None:
        """The server has answered."""
        with self._lock:
            self._go_on(download)
            if not download.failures:
                # Else a server that answers, and then sends nothing, could keep everybody waiting by being asked again.
                self._moved[_server(download)] = time.monotonic()
            if download.learn(part, answer) and not download.in_parts:
                # It comes in one go.
                download.everything = True
                self._require_room(download)
            self._lock.notify_all()

    def _require_room(self, download: Download) -> None:
        """Raise Refusal where what is to be fetched, of all files, does not fit the disk."""
        missing = sum(max(0, (one.size or 0) - len(one.held)) for one in self._downloads if one.everything)
        missing = max(missing, _LOOK_BYTES if download.size is None else 0)
        free = download.spool.free()
        if missing > free:
            raise Refusal(
                f"{quoted(download.remote.shown)} does not fit the disk: it is kept in a temporary file while it is "
                f"pushed, which needs {missing} bytes ({format_bytes(missing)}) in {quoted(download.spool.folder)}, "
                f"and {free} ({format_bytes(free)}) are free there. Set TMPDIR to a directory on a disk with more room"
            )

    def _store(self, download: Download, part: Part, content: memoryview) -> None:
        """Keep the next bytes of a part. What is there already, of a file that came from its beginning again, must be
        the same: it may have been sent."""
        part_end = part.at + len(content)
        again = content[: 0 if download.in_parts else max(0, min(len(download.held) - part.at, len(content)))]
        if again and not download.spool.holds(part.at, again):
            raise changed(download.remote.shown, f"its bytes from {part.at} on are others than before")
        if len(again) < len(content):
            download.spool.write(part.at + len(again), content[len(again) :])
        with self._lock:
            self._go_on(download)
            if download.size is None and part_end // _LOOK_BYTES != part.at // _LOOK_BYTES:
                self._require_room(download)
                download.require_possible(part_end, "so far")
            last = download.size is not None and len(download.held) + len(content) - len(again) == download.size
            if not last:
                self._keep(download, part, part_end)
        if last:
            # Only one thread comes to this: it is under the lock that bytes are added.
            download.remote.confirm()
            with self._lock:
                self._go_on(download)
                self._keep(download, part, part_end)

    def _keep(self, download: Download, part: Part, stop: int) -> None:
        """Bytes up to ``stop`` are there."""
        if download.keep(part, stop):
            self._moved[_server(download)] = time.monotonic()
        if download.wants or download.complete:
            self._lock.notify_all()

    # --- failures ------------------------------------------------------------------------------------------

    def _broke(self, download: Download, part: Part, error: Broken) -> None:
        with self._lock:
            if download.closed or self._cancelled or part.outages != download.outages:
                # One failure of the server ends all parts that were under way.
                return
            log.info("a download broke off", extra={"url": download.remote.shown, "why": str(error)})
            download.outages += 1
            download.failures += 1
            download.trouble = "" if isinstance(error, Silent) else str(error)
            if download.failures > len(self._pauses):
                times = f"{download.failures} times" if download.failures > 1 else "once"
                self._give_up(
                    download,
                    Refusal(
                        f"{quoted(download.remote.shown)} cannot be fetched: {error}. It was tried {times} without a "
                        f"byte more, and {download.so_far}. Try again later, or download the file and push that"
                    ),
                )
            else:
                download.resume_at = time.monotonic() + self._pauses[download.failures - 1]

    def _give_up(self, download: Download, why: Refusal) -> None:
        with self._lock:
            download.failure = download.failure or why
            self._lock.notify_all()


def _server(download: Download) -> str:
    """Scheme, host and port that it comes from."""
    return "/".join(download.remote.folder.split("/", 3)[:3])
