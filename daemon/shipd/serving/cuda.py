"""``copy`` on CUDA: a flat shadow of the image on the device, filled while the rest of the version still arrives.

    image (host, page-locked) --side stream, chunk by chunk--> shadow --inside the closed gate--> live tensors

Belongs here: what all swaps on CUDA have in common (page-locking, and getting bytes to the device), and ``copy``.
Addresses of live tensors stay, so CUDA graphs stay valid.

Page-locking belongs to this process and its CUDA context, so each process locks its own mapping, and only a shared one:
locking a private mapping would copy every page. Where it is refused, a small page-locked ring carries the bytes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from shipd.errors import AttachError
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits
from shipd.serving.copy_swap import CopySwap
from shipd.serving.staging import check_unchanged, clear_padding, never
from shipd.serving.tensors import ModelTensors
from shipproto.layout import Layout

LOCK_SLICE: Final = 256 * 1024 * 1024
"""Bytes page-locked in one call, during which other threads' CUDA calls may have to wait. No copy may cross from one
slice into the next: to CUDA they are two allocations."""

RING_BUFFER: Final = 8 * 1024 * 1024
RING_BUFFERS: Final = 4
"""One is filled while the others are on their way; more would not be faster."""

_REGISTER_READ_ONLY: Final = 0x08
"""cudaHostRegisterReadOnly: what a mapping without PROT_WRITE needs, on devices that support it."""


def spans(layout: Layout, chunks: Iterable[tuple[int, int]], slice_size: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of the image that hold these ranges of chunks, cut at every multiple of ``slice_size``."""
    for first, stop in chunks:
        if first >= stop:
            continue
        yield from cuts(layout.chunk(first)[0], sum(layout.chunk(stop - 1)), slice_size)


def cuts(start: int, end: int, slice_size: int) -> Iterator[tuple[int, int]]:
    """The bytes from ``start`` to ``end`` of the image, cut at every multiple of ``slice_size``."""
    while start < end:
        cut = min(end, (start // slice_size + 1) * slice_size)
        yield start, cut
        start = cut


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _Ring:
    """Page-locked buffers of constant size, for images that could not be page-locked themselves."""

    def __init__(self) -> None:
        self._buffers = [_pinned(RING_BUFFER) for _ in range(RING_BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in range(RING_BUFFERS)]
        self._next = 0

    def send(self, target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
        """Copy host bytes to the device on ``stream``; ``source`` may change as soon as this returns."""
        for start in range(0, source.numel(), RING_BUFFER):
            part = source[start : start + RING_BUFFER]
            buffer, sent = self._buffers[self._next], self._sent[self._next]
            self._next = (self._next + 1) % RING_BUFFERS
            # An event that was never recorded counts as complete.
            sent.synchronize()
            buffer[: part.numel()].copy_(part)
            target[start : start + part.numel()].copy_(buffer[: part.numel()], non_blocking=True)
            sent.record(stream)


class NoRoom(AttachError):
    """The device has no room for what a way of swapping needs there."""


class CudaSwap(CopySwap):
    """What ``copy`` and ``direct`` have in common for a model on one CUDA device.

    page_locked   whether images are page-locked; None before the first was tried
    """

    def __init__(self, tensors: ModelTensors, layout: Layout, mode: str) -> None:
        super().__init__(tensors, layout, mode)
        self.device = tensors.device
        self.page_locked: bool | None = None
        self._stream = torch.cuda.Stream(self.device)
        # Addresses of the slices of each mapping that are page-locked, which happens on another thread.
        self._locked: dict[ImageMapping, list[int]] = {}
        self._locking = threading.Lock()
        self._ring: _Ring | None = None

    def _reserve(self, size: int, purpose: str) -> Tensor:
        """``size`` zero bytes on the device. Raises NoRoom."""
        try:
            with self._on_stream():
                return torch.zeros(size, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise NoRoom(
                f"mode {self.mode} needs {purpose} of {size} bytes on {self.device}; {free} of {total} are free: "
                f"{error}"
            ) from error

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def prepare(self, mapping: ImageMapping, cancelled: Callable[[], bool] = never) -> None:
        """See Swapper. Page-locks the mapping, which also populates it."""
        with self._locking:
            if mapping in self._locked or mapping.access is Access.PRIVATE:
                return
            self._locked[mapping] = []
        flags = _REGISTER_READ_ONLY if mapping.access is Access.READ_ONLY else 0
        with torch.cuda.device(self.device):
            for start in range(0, mapping.size, LOCK_SLICE):
                # What is locked in part works as well: CUDA copies from ordinary memory too, only more slowly.
                if cancelled() or not self._lock(mapping, start, flags):
                    break
        if self.page_locked is False:
            mapping.populate(cancelled)

    def _lock(self, mapping: ImageMapping, start: int, flags: int) -> bool:
        """Page-lock one slice. False where that is refused, or the mapping has been forgotten meanwhile."""
        with self._locking:
            addresses = self._locked.get(mapping)
            if addresses is None:
                return False
            address, size = mapping.address + start, min(LOCK_SLICE, mapping.size - start)
            self.page_locked = int(torch.cuda.cudart().cudaHostRegister(address, size, flags)) == 0
            if self.page_locked:
                addresses.append(address)
                return True
            self._clear_error()
            self._unlock(addresses)
            return False

    def _clear_error(self) -> None:
        """The runtime keeps a thread's last error, and the next launch would report it as its own: make one that
        may."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)

    def _unlock(self, addresses: list[int]) -> None:
        with torch.cuda.device(self.device):
            while addresses:
                if int(torch.cuda.cudart().cudaHostUnregister(addresses.pop())) != 0:
                    self._clear_error()

    def _get_ring(self) -> None:
        """Have a ring where page-locking was refused."""
        if self.page_locked is False and self._ring is None:
            self._ring = _Ring()

    def _transfer(self, target: Tensor, source: Tensor) -> None:
        """Send bytes of an image to the device on the current stream. They must not cross from slice to slice."""
        if self._ring is None:
            target.copy_(source, non_blocking=True)
        else:
            self._ring.send(target, source, self._stream)

    def _undo(self) -> None:
        # What did not fail of the failed copy may still be under way, on another stream.
        torch.cuda.synchronize(self.device)
        if self._current is not None:
            self._make_ready(self._current)
        super()._undo()
        torch.cuda.synchronize(self.device)

    def forget(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        super().forget(mapping)
        self._stream.synchronize()
        with self._locking:
            self._unlock(self._locked.pop(mapping, []))

    def digest(self) -> bytes:
        """See Swapper."""
        torch.cuda.synchronize(self.device)
        return super().digest()

    def close(self) -> None:
        """See Swapper."""
        self._stream.synchronize()
        with self._locking:
            for addresses in self._locked.values():
                self._unlock(addresses)
            self._locked.clear()
        super().close()
        self._ring = None


class CudaCopySwap(CudaSwap):
    """``copy`` for a model on one CUDA device. Raises NoRoom where the device has none for the shadow."""

    def __init__(self, tensors: ModelTensors, layout: Layout) -> None:
        super().__init__(tensors, layout, "copy")
        self._shadow = self._reserve(layout.size, "a shadow")
        shadows = bits.image_integers(self._shadow, layout, self._rows)
        self._groups = group(self._live, shadows)
        # What the shadow holds: which image, and which of its chunks.
        self._source: ImageMapping | None = None
        self._present = bytearray(layout.chunks)

    def fill(self, image: memoryview) -> None:
        """See Swapper."""
        check_unchanged(self.tensors)
        self._source = None
        torch.cuda.synchronize(self.device)
        with self._on_stream():
            for live, shadow in self._groups:
                bits.copy_all(shadow, live)
            bits.flat_bytes(image).copy_(self._shadow)
        self._stream.synchronize()
        clear_padding(self.layout, image)

    def arrived(self, mapping: ImageMapping, chunks: Iterable[tuple[int, int]]) -> None:
        """See Swapper. Sends them on; returns before they have reached the device."""
        if self._source is not mapping:
            self._source = mapping
            self._present = bytearray(self.layout.chunks)
        ranges = list(chunks)
        self._send(mapping, ranges)
        for first, stop in ranges:
            self._present[first:stop] = b"\x01" * (stop - first)

    def discard(self) -> None:
        """See Swapper."""
        super().discard()
        self._source = None

    def _send(self, mapping: ImageMapping, ranges: Sequence[tuple[int, int]]) -> None:
        image = bits.flat_bytes(mapping.raw)
        self._get_ring()
        with self._on_stream():
            for start, stop in spans(self.layout, ranges, LOCK_SLICE):
                self._transfer(self._shadow[start:stop], image[start:stop])

    def _prepare(self, mapping: ImageMapping) -> None:
        """Send what has not been sent yet, and wait until all of it is on the device."""
        self.arrived(mapping, ())
        missing = []
        at = self._present.find(0)
        while at >= 0:
            stop = self._present.find(1, at)
            stop = len(self._present) if stop < 0 else stop
            missing.append((at, stop))
            at = self._present.find(0, stop)
        self.arrived(mapping, missing)
        self._stream.synchronize()

    def _make_ready(self, mapping: ImageMapping) -> None:
        if self._source is not mapping or self._present.find(0) >= 0:
            self._prepare(mapping)
        # Holds are over, but what they launched may still be running and reading.
        torch.cuda.synchronize(self.device)

    def _write(self, mapping: ImageMapping) -> None:  # noqa: ARG002  the shadow has its bytes: see _make_ready
        with self._on_stream():
            for live, shadow in self._groups:
                bits.copy_all(live, shadow)
        # Waited for inside the gate: later holds may use any stream, and what goes wrong must come out now.
        self._stream.synchronize()

    def forget(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        if self._source is mapping:
            self._source = None
        super().forget(mapping)

    def close(self) -> None:
        """See Swapper."""
        super().close()
        self._groups = []
        self._source = None
        self._shadow = torch.empty(0, dtype=torch.uint8)


def group(live: Sequence[Tensor], shadows: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs by dtype and contiguity: one tensor that does not fit makes many slow kernels of a call's one fast."""
    groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(live, shadows, strict=True):
        targets, sources = groups.setdefault((target.dtype, target.is_contiguous()), ([], []))
        targets.append(target)
        sources.append(source)
    return list(groups.values())
