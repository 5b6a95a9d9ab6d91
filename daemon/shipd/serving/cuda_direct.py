"""``direct`` on CUDA: from the image straight into the live tensors, inside the closed gate; no shadow on the device.

    image (host, page-locked) --large contiguous tensors--------> live tensors
                              --everything else--> a window -----> live tensors

The pause is what the bytes take from host to device. The image of the version before is the undo, which is why its
lease must not end before the swap has succeeded: the link sees to that. Where there is none, because the model came
with weights of its own that no image has, a copy of them is kept on the host for that one swap.

The window is a little memory on the device: small tensors go there many at a time, because each transfer costs some
microseconds, and tensors that are not contiguous are put in order from there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from shipd.images.memory import ImageMapping
from shipd.serving import bits, cuda
from shipd.serving.readback import read_chunks
from shipd.serving.staging import check_unchanged, clear_padding
from shipd.serving.tensors import ModelTensors
from shipproto.layout import Layout
from shipproto.limits import TENSOR_ALIGNMENT

WINDOW: Final = 32 * 1024 * 1024
"""Bytes on the device for what cannot go straight to its place: a millisecond's worth of a fast bus."""

STRAIGHT: Final = 1024 * 1024
"""Bytes from which on a contiguous tensor is a transfer of its own."""


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes ``start`` to ``stop`` of the image. Where ``pairs`` is empty they go into ``target``, bytes of a live
    tensor; else ``target`` is part of the window, and is copied into live tensors from there."""

    start: int
    stop: int
    target: Tensor
    pairs: list[tuple[list[Tensor], list[Tensor]]]


class CudaDirectSwap(cuda.CudaSwap):
    """``direct`` for a model on one CUDA device. Raises NoRoom where not even the window fits."""

    def __init__(self, tensors: ModelTensors, layout: Layout) -> None:
        super().__init__(tensors, layout, "direct")
        places = sorted((int(layout.offsets[row]), at) for at, row in enumerate(self._rows))
        pieces: list[tuple[int, Tensor]] = []
        self._loads: list[Load] = []
        for start, at in places:
            live = self._live[at]
            if not live.numel():
                continue
            if live.is_contiguous() and _nbytes(live) >= STRAIGHT:
                self._loads.append(Load(start, start + _nbytes(live), live.view(-1).view(torch.uint8), []))
            else:
                # Half a window, so that two of any size fit into one that begins at an aligned place.
                pieces.extend(cut(live, start, WINDOW // 2))
        packs = list(_pack(pieces))
        size = max((_end(pack) - _begin(pack) for pack in packs), default=0)
        self._window = self._reserve(size, "a window")
        self._loads.extend(self._load(pack) for pack in packs)

    def _load(self, pack: Sequence[tuple[int, Tensor]]) -> Load:
        begin, end = _begin(pack), _end(pack)
        lives = [live for _, live in pack]
        staged = [
            self._window[start - begin : start - begin + _nbytes(live)].view(live.dtype).view(live.shape)
            for start, live in pack
        ]
        return Load(begin, end, self._window[: end - begin], cuda.group(lives, staged))

    def fill(self, image: memoryview) -> None:
        """See Swapper."""
        check_unchanged(self.tensors)
        torch.cuda.synchronize(self.device)
        for chunk, content in read_chunks(self.layout, self.tensors.live):
            start, size = self.layout.chunk(chunk)
            image[start : start + size] = content
        clear_padding(self.layout, image)

    def _prepare(self, mapping: ImageMapping) -> None:  # noqa: ARG002  the same loads for every image
        self._get_ring()

    def _make_ready(self, mapping: ImageMapping) -> None:  # noqa: ARG002  it is where it is read from
        # Holds are over, but what they launched may still be running and reading.
        torch.cuda.synchronize(self.device)

    def _write(self, mapping: ImageMapping) -> None:
        self._install(bits.flat_bytes(mapping.raw))

    def _install(self, image: Tensor) -> None:
        """Overwrite the live tensors with a version in memory of the host, all of it in order on one stream."""
        with self._on_stream():
            for load in self._loads:
                for start, stop in cuda.cuts(load.start, load.stop, cuda.LOCK_SLICE):
                    self._transfer(load.target[start - load.start : stop - load.start], image[start:stop])
                for lives, staged in load.pairs:
                    bits.copy_all(lives, staged)
        # Waited for inside the gate: later holds may use any stream, and what goes wrong must come out now.
        self._stream.synchronize()

    def _save(self) -> list[Tensor]:
        saved = torch.empty(self.layout.size, dtype=torch.uint8)
        self.fill(saved.numpy().data)
        return [saved]

    def _restore(self, saved: list[Tensor]) -> None:
        self._install(saved[0])

    def close(self) -> None:
        """See Swapper."""
        super().close()
        self._loads = []
        self._window = torch.empty(0, dtype=torch.uint8)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def cut(tensor: Tensor, start: int, limit: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of ``tensor``, each of at most ``limit`` bytes, with their places in the image, where the tensor begins at
    ``start`` and has its elements in C order. A limit below one element counts as one."""
    size = _nbytes(tensor)
    if size <= limit or not tensor.dim():
        yield start, tensor
        return
    row = size // tensor.shape[0]
    rows = limit // row
    for at in range(0, tensor.shape[0], max(1, rows)):
        if rows:
            yield start + at * row, tensor[at : at + rows]
        else:
            yield from cut(tensor[at], start + at * row, limit)


def _begin(pack: Sequence[tuple[int, Tensor]]) -> int:
    # Aligned, so that every element is where its dtype wants it in the window.
    return pack[0][0] // TENSOR_ALIGNMENT * TENSOR_ALIGNMENT


def _end(pack: Sequence[tuple[int, Tensor]]) -> int:
    start, tensor = pack[-1]
    return start + _nbytes(tensor)


def _pack(pieces: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Runs of neighbours in the image, each of at most a window."""
    pack: list[tuple[int, Tensor]] = []
    for piece in pieces:
        if pack and (piece[0] - _end(pack) >= TENSOR_ALIGNMENT or _end([piece]) - _begin(pack) > WINDOW):
            yield pack
            pack = []
        pack.append(piece)
    if pack:
        yield pack
