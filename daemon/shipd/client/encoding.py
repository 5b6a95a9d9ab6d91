"""Encoding runs of chunks ahead of the connection that carries them, on threads that let go of the GIL.

    sender --a run--> read, digest --same as the receiver's?--> SAME
                                   --choose--> a codec, in pieces that fit a frame, or the bytes as they are
                                                                        --bounded queue--> whoever sends

Memory is bounded by what waits (``_WAITING`` frames) and two runs' worth of scratch for each thread.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.bases.base import Base, BaseLost
from shipd.checkpoints.waiting import while_waiting
from shipd.client.choice import RAW, Chooser
from shipd.client.chunks import ChunkReader
from shipd.codecs import registry
from shipd.codecs.codec import Codec
from shipd.errors import TransferFailed
from shipd.threads import no_thread
from shipd.transfer.times import Times
from shipproto.dtypes import ITEMSIZES
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE, MAX_PAYLOAD, MAX_RUN_BYTES
from shipproto.sender import Sender

log = logging.getLogger("shipd.client")

MAX_RUN: Final = MAX_RUN_BYTES // LEAF_SIZE
"""Chunks of a run."""

_WAITING: Final = 8
"""Frames that are ready and not sent yet: 4 MiB at most."""

_LOOK_SECONDS: Final = 0.05
"""How often a thread that waits for room looks whether it is to end."""

_SAMPLES: Final = 32
_SAMPLE: Final = 8192
"""Bytes of each sample that the density is taken from, and how many: a quarter of a mebibyte of a whole run."""

_PIECE_ROOM: Final = 0.8
"""How full of a frame a piece is planned to be: what is guessed is a little off, and too much is tried again."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Chunks ready to be sent. ``codec`` RAW is one chunk as it is."""

    chunks: range
    codec: int
    payload: "bytes | memoryview"
    size: int
    """Bytes of content that it stands for."""


class _Stopped(Exception):
    """What is being waited for is of no use any more."""


class Encoder:
    """Takes runs from ``sender`` until it has none, and gives what to send.

    lock    held for every call of the sender
    base    what deltas are made from; None: nothing but SAME and codecs that need none
    link    bytes a second, as far as is known by now
    plain   called when the bytes of a run are best sent as they are; whether nothing more is to be encoded for that
    Threads end by themselves when the sender has nothing more to hand out.
    """

    def __init__(
        self,
        sender: Sender,
        lock: threading.Lock,
        make_reader: Callable[[], ChunkReader],
        *,
        base: Base | None,
        chooser: Chooser,
        link: Callable[[], float],
        plain: Callable[[float], bool],
        threads: int,
    ) -> None:
        self._sender = sender
        self._lock = lock
        self._make_reader = make_reader
        self._base = base
        self._chooser = chooser
        self._link = link
        self._plain = plain
        self.times = Times()
        """What reading, digesting and encoding took on all threads; complete once they have been stopped."""
        self._ready: queue.Queue[Encoded | BaseException] = queue.Queue(_WAITING)
        self._stopping = threading.Event()
        self._stop_taking = threading.Event()
        self._choosing = threading.Lock()
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            thread = threading.Thread(target=self._run, name="shipd encoder", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # The system has no more for this process: those that there are do the work.
                if not self._threads:
                    raise no_thread(TransferFailed, "what has changed cannot be encoded") from error
                log.info("fewer threads encode than could", extra={"why": str(error)})
                break
            self._threads.append(thread)

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        # In this order: a thread that has ended has put everything before.
        return not any(thread.is_alive() for thread in self._threads) and self._ready.empty()

    def take(self, patience: float) -> Encoded | None:
        """What is ready, waiting at most so many seconds for it. Raises what ended a thread."""
        try:
            ready = self._ready.get(timeout=patience) if patience else self._ready.get_nowait()
        except queue.Empty:
            return None
        if isinstance(ready, BaseException):
            raise ready
        return ready

    def stop(self) -> None:
        """End every thread; what was ready is lost, and the sender's next connection hands it out again."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    # --- on the threads ------------------------------------------------------------------------------------

    def _run(self) -> None:
        # A source that is still being fetched may keep it waiting for as long as its server likes.
        with while_waiting(self._raise_if_stopping):
            self._take_runs()

    def _raise_if_stopping(self) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _take_runs(self) -> None:
        try:
            worker = _Worker(self._sender, self._make_reader(), self._base)
            while not self._stopping.is_set() and not self._stop_taking.is_set():
                with self._lock:
                    chunks = self._sender.next_chunks(MAX_RUN)
                    remaining = self._sender.waiting
                if not chunks:
                    break
                for encoded in self._encode(worker, chunks, remaining):
                    self._put(encoded)
                    if self._stopping.is_set():
                        return
            with self._choosing:
                self.times.add(worker.times)
        except BaseException as error:  # noqa: BLE001  raised by take, on the thread that asks
            self._put(error)

    def _put(self, ready: "Encoded | BaseException") -> None:
        while not self._stopping.is_set():
            try:
                self._ready.put(ready, timeout=_LOOK_SECONDS)
            except queue.Full:
                continue
            return

    def _encode(self, worker: "_Worker", chunks: range, remaining: int) -> Iterator[Encoded]:
        # As they are, even where they are the same: all of these chunks are, or none.
        raw_only = self._sender.raw_only(chunks[0])
        for part, same in worker.read(chunks):
            if raw_only:
                yield from worker.raw(part)
            elif same:
                yield Encoded(part, registry.SAME, b"", worker.size(part))
            else:
                yield from self._encode_part(worker, part, remaining)

    def _encode_part(self, worker: "_Worker", chunks: range, remaining: int) -> Iterator[Encoded]:
        """In pieces, each with the codec that is best by what is known when its turn comes."""
        while chunks:
            size = worker.size(chunks)
            density = worker.density(chunks)
            with self._choosing:
                choice = self._chooser.choose(
                    size,
                    worker.candidates(chunks),
                    link=self._link(),
                    density=density,
                    runs=1 + remaining // len(chunks),
                )
            number = choice.codec.number
            if number == RAW:
                if self._plain(choice.link):
                    # Whoever sends them as they are can look at the link between any two of them.
                    self._stop_taking.set()
                    with self._lock:
                        self._sender.put_back(chunks)
                else:
                    yield from worker.raw(chunks)
                return
            fits = int(_PIECE_ROOM * MAX_PAYLOAD / max(1.0, choice.codec.share * size) * len(chunks))
            piece = chunks[: max(1, min(len(chunks), fits))]
            codec = registry.BY_NUMBER[number]
            while True:
                began = time.thread_time()
                payload = worker.encode(codec, piece)
                seconds = time.thread_time() - began
                worker.times.encode += seconds
                with self._choosing:
                    learnt = len(payload) if payload is not None else MAX_PAYLOAD
                    self._chooser.codecs[number].learn(worker.size(piece), learnt, seconds, density)
                if payload is not None and len(payload) < worker.size(piece):
                    yield Encoded(piece, number, payload, worker.size(piece))
                    break
                if payload is not None or len(piece) == 1:
                    yield from worker.raw(piece)
                    break
                piece = piece[: (len(piece) + 1) // 2]
            chunks = chunks[len(piece) :]


class _Worker:
    """One thread's scratch: a run as it is, and as it was."""

    def __init__(self, sender: Sender, reader: ChunkReader, base: Base | None) -> None:
        self._sender = sender
        self._layout = sender.layout
        self._reader = reader
        self._base = base
        room = min(MAX_RUN_BYTES, self._layout.size)
        self._content = memoryview(bytearray(room))
        self._old = memoryview(bytearray(room)) if base is not None else None
        self._start = 0
        self._views: dict[int, memoryview] = {}
        self._dtypes = _chunk_dtypes(self._layout)
        self.times = Times()

    def read(self, chunks: range) -> Iterator[tuple[range, bool]]:
        """Read and digest a run; its parts, and whether the receiver has each of them already."""
        layout, sender = self._layout, self._sender
        self._start = layout.chunk(chunks[0])[0]
        self._views.clear()
        end = 0
        for chunk in chunks:
            asked = time.monotonic()
            content = self._reader.read(chunk)
            have = time.monotonic()
            sender.digest_chunk(chunk, content)
            self.times.digest += time.monotonic() - have
            self.times.read += have - asked
            begin = layout.chunk(chunk)[0] - self._start
            self._content[end:begin] = bytes(begin - end)
            end = begin + len(content)
            self._content[begin:end] = content
            if self._reader.lends(content):
                self._views[chunk] = content
        self._read_base(chunks, end)
        same = [self._same(chunk) for chunk in chunks]
        kinds = [None if equal else self._dtypes[chunk] for chunk, equal in zip(chunks, same, strict=True)]
        first = 0
        for at in range(1, len(kinds) + 1):
            if at == len(kinds) or kinds[at] != kinds[first]:
                yield chunks[first:at], same[first]
                first = at

    def _read_base(self, chunks: range, size: int) -> None:
        if self._base is None or self._old is None:
            return
        try:
            self._base.read(chunks[0], len(chunks), self._old[:size])
        except BaseLost as error:
            log.info("going on without the base", extra={"why": str(error)})
            self._base = self._old = None

    def _same(self, chunk: int) -> bool:
        """Whether the receiver's version has the same bytes."""
        if self._old is not None:
            place = self._place(range(chunk, chunk + 1))
            return bool(np.array_equal(_bytes(self._content[place]), _bytes(self._old[place])))
        told = self._sender.held_digest(chunk)
        return told is not None and told == self._sender.digests.chunk_digest(chunk)

    def _place(self, chunks: range) -> slice:
        start = self._layout.chunk(chunks[0])[0] - self._start
        last, size = self._layout.chunk(chunks[-1])
        return slice(start, last - self._start + size)

    def size(self, chunks: range) -> int:
        """Bytes of a run, the padding inside included."""
        place = self._place(chunks)
        return int(place.stop - place.start)

    def candidates(self, chunks: range) -> list[int]:
        """Codecs that can take these chunks."""
        size = self.size(chunks)
        codecs = registry.suited(self.dtype(chunks), base=self._old is not None)
        return [codec.number for codec in codecs if size % codec.word == 0]

    def dtype(self, chunks: range) -> int:
        """Number of the dtype that all tensors of these chunks have, which is one part's; 0 where there are several."""
        return self._dtypes[chunks[0]]

    def density(self, chunks: range) -> float | None:
        """Share of words that differ from the base, in a sample."""
        if self._old is None:
            return None
        place = self._place(chunks)
        new, old = _bytes(self._content[place]), _bytes(self._old[place])
        word = int(ITEMSIZES[self.dtype(chunks)]) or 1
        step = max(_SAMPLE, len(new) // _SAMPLES // _SAMPLE * _SAMPLE)
        changed = looked = 0
        for begin in range(0, len(new), step):
            one, other = new[begin : begin + _SAMPLE], old[begin : begin + _SAMPLE]
            usable = len(one) // word * word
            differs = (one[:usable] != other[:usable]).reshape(-1, word).any(axis=1)
            changed += int(np.count_nonzero(differs))
            looked += len(differs)
        return changed / looked if looked else 0.0

    def encode(self, codec: Codec, chunks: range) -> bytes | None:
        """The payload for these chunks, where it fits a frame."""
        place = self._place(chunks)
        old = self._old[place] if self._old is not None else None
        return codec.encode(self._content[place], old, dtype=self.dtype(chunks), most=MAX_PAYLOAD)

    def raw(self, chunks: range) -> Iterator[Encoded]:
        """These chunks as they are: views where the source lends its memory, else copies, since the scratch is used
        again before they are sent."""
        for chunk in chunks:
            one = range(chunk, chunk + 1)
            content = self._views.get(chunk)
            place = self._place(one)
            yield Encoded(one, RAW, content if content is not None else bytes(self._content[place]), self.size(one))


def _bytes(view: memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(view, dtype=np.uint8)


def _chunk_dtypes(layout: Layout) -> list[int]:
    """For each chunk the number of the dtype that its tensors have, 0 where there are several in it."""
    dtypes = layout.structure.dtypes
    large = [int(dtype) for dtype in dtypes[layout.leaf_rows()[: layout.large_chunks]]]
    # Small tensors lie in order of their dtypes, so a packed chunk's first and last one tell.
    ends = [layout.chunk_tensors(chunk)[[0, -1]] for chunk in range(layout.large_chunks, layout.chunks)]
    return large + [int(dtypes[first]) if dtypes[first] == dtypes[last] else 0 for first, last in ends]


def encoding_threads() -> int:
    """Threads worth having: one core is left to whoever sends."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores - 1))
