"""Tensors as plain integers: bit-exact views of live tensors and of images, and the one call that copies them.

Belongs here: what the ways of swapping have in common below the level of versions.

Reinterpreted as integers, because copy_ turns every bool byte but 0 into 1 and may change NaNs.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from shipproto.dtypes import ITEMSIZES
from shipproto.layout import Layout

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDEST: Final = 8


def integers(tensor: Tensor) -> Tensor:
    """A tensor of integers over the same memory, with the same strides.

    It shares the memory and nothing else: neither autograd's version counter nor the ban on changing inference
    tensors. An element of 16 bytes (complex128) becomes two, in a last dimension of its own.
    """
    size = tensor.element_size()
    shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()
    if size > _WIDEST:
        shape, stride = (*shape, 2), (*(step * 2 for step in stride), 1)
        offset, size = offset * 2, _WIDEST
    view = torch.empty(0, dtype=_INTEGERS[size], device=tensor.device)
    return view.set_(tensor.untyped_storage(), offset, shape, stride)


def image_integers(image: Tensor, layout: Layout, rows: Sequence[int], start: int = 0) -> list[Tensor]:
    """The tensors in ``rows`` where they lie in ``image``, in the form of ``integers``: contiguous, and of the same
    shape. ``image`` is a flat tensor of bytes, from byte ``start`` of an image on."""
    structure = layout.structure
    flat = {size: image[: image.numel() // size * size].view(dtype) for size, dtype in _INTEGERS.items()}
    views = []
    for row in rows:
        shape = structure.shape(row)
        size = int(ITEMSIZES[structure.dtypes[row]])
        if size > _WIDEST:
            shape, size = (*shape, 2), _WIDEST
        # An empty tensor may lie at the very end, where a view could not begin.
        offset = (int(layout.offsets[row]) - start) // size if structure.nbytes[row] else 0
        views.append(flat[size].as_strided(shape, _contiguous_strides(shape), offset))
    return views


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]


def flat_bytes(memory: memoryview) -> Tensor:
    """A tensor of bytes over ``memory``, which must claim to be writable; it lives as long as the tensor."""
    return torch.frombuffer(memory, dtype=torch.uint8)


def primary_rows(layout: Layout) -> list[int]:
    """Rows that have bytes of their own in an image: all but the tied ones."""
    primary = layout.structure.primary.tolist()
    return [row for row, root in enumerate(primary) if row == root]


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy every source into its target. One call, which lets go of the GIL once and not once for each tensor:
    beside a busy Python thread a loop takes 5 ms a turn, and 0.5 to 2.6 s a gigabyte."""
    if targets:
        torch._foreach_copy_(targets, sources)
