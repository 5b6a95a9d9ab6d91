"""Slices of tensors that do not lie in host memory as they travel: strided, expanded, or on a GPU.

A slice in row-major order of a strided tensor is covered by at most two boxes of whole rows. Each is copied
into a buffer, and the slice is a part of that: less work than to pick single elements at both ends.
"""

import math
import threading
from typing import Final

import torch
from torch import Tensor

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SMALLEST: Final = 4096
"""Bytes of the smallest buffer."""


def bits(tensor: Tensor) -> Tensor:
    """``tensor`` without gradient, its elements seen as integers: a copy of those is exact for every dtype.

    complex128 has no integer of its size and becomes two for each element, in one more dimension.
    """
    tensor = tensor.detach()
    if tensor.dtype is torch.complex128:
        tensor = torch.view_as_real(tensor)
    integer = _INTEGERS[tensor.element_size()]
    return tensor if tensor.dtype is integer else tensor.view(integer)


def gather(words: Tensor, start: int, stop: int, buffers: threading.local) -> memoryview:
    """Bytes [start, stop) of ``words`` in row-major order, in a buffer of the calling thread's.

    The buffer has at most three times the bytes asked for, and is used again by the thread's next call with
    the same ``buffers``.
    """
    if start == stop:
        return memoryview(b"")
    size = words.element_size()
    first, last = start // size, -(-stop // size)
    boxes, skipped = _boxes(words, first, last)
    count = sum(box.numel() for box in boxes)
    pinned = words.device.type == "cuda"
    out = _buffer(buffers, "pinned" if pinned else "rows", count * size)
    elements = out.view(words.dtype)
    at = 0
    for box in boxes:
        place = elements[at : at + box.numel()].view(box.shape)
        if words.device.type == "cpu" and (order := _by_stride(box)):
            # In the source's own order first, then transposed inside the cache: three to eight times as fast.
            turned = box.permute(order)
            beside = _buffer(buffers, "turned", box.numel() * size).view(words.dtype)
            beside = beside[: box.numel()].view(turned.shape).copy_(turned)
            place.permute(order).copy_(beside)
        else:
            place.copy_(box)
        at += box.numel()
    offset = start - (first - skipped) * size
    content: memoryview = out.numpy().data
    return content[offset : offset + stop - start].toreadonly()


def _boxes(rows: Tensor, first: int, last: int) -> tuple[list[Tensor], int]:
    """Boxes that hold elements [first, last) of ``rows``, and how many others precede them in the first."""
    while rows.dim() > 1:
        inner = math.prod(rows.shape[1:])
        begin, end = first // inner, -(-last // inner)
        if end - begin > 1 and inner <= last - first:
            return [rows[begin:end]], first - begin * inner
        if end - begin > 1:
            # The end of one row and the beginning of the next, both shorter than a row.
            head, skipped = _boxes(rows[begin], first - begin * inner, inner)
            tail, _ = _boxes(rows[begin + 1], 0, last - (begin + 1) * inner)
            return head + tail, skipped
        rows = rows[begin]
        first, last = first - begin * inner, last - begin * inner
    return [rows.reshape(-1)[first:last]], 0


def _by_stride(box: Tensor) -> tuple[int, ...]:
    """The order of dimensions in which ``box`` lies in memory; empty where its last one is the densest."""
    strides = box.stride()
    real = [dim for dim in range(box.dim()) if box.shape[dim] > 1 and strides[dim]]
    if not real or min(real, key=lambda dim: (strides[dim], -dim)) == real[-1]:
        return ()
    # What an expanded dimension repeats is repeated outermost.
    return tuple(sorted(range(box.dim()), key=lambda dim: -strides[dim] if strides[dim] else -math.inf))


def _buffer(buffers: threading.local, name: str, size: int) -> Tensor:
    """The calling thread's buffer of that name, u8 and of at least ``size`` bytes, a multiple of eight."""
    held: Tensor | None = getattr(buffers, name, None)
    if held is None or held.numel() < size:
        held = None
        setattr(buffers, name, None)
        held = _allocate(max(_SMALLEST, 1 << (size - 1).bit_length()), pinned=name == "pinned")
        setattr(buffers, name, held)
    return held


def _allocate(size: int, *, pinned: bool) -> Tensor:
    # A tensor made under inference_mode could not be written to outside it.
    with torch.inference_mode(mode=False):
        if pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError:  # No page-locked memory left: an ordinary buffer is slower and as good.
                pass
        return torch.empty(size, dtype=torch.uint8, device="cpu")
