"""Reading live tensors back: their bytes into an image, and the digest that proves which version is live.

Works for every device and for non-contiguous tensors. Beyond the tensors it needs a few buffers of constant size and,
for a non-contiguous one, a contiguous copy of that one. Whoever calls sees to it that nothing is swapped meanwhile.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from shipd.serving.bits import copy_all, image_integers, integers
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE

BLOCK: Final = 16 * LEAF_SIZE
"""Bytes fetched at once from a device: enough for full bandwidth, little enough to keep aside."""


def version_digest(layout: Layout, live: Sequence[Tensor]) -> bytes:
    """The version digest of the values that ``live`` has now, one tensor for each row of the structure."""
    digests = LeafDigests(layout)
    for chunk, content in read_chunks(layout, live):
        digests.record(chunk, content)
    return digests.version_digest()


def read_chunks(layout: Layout, live: Sequence[Tensor]) -> Iterator[tuple[int, memoryview]]:
    """Every chunk with its bytes, in order. A chunk's bytes are valid until the next one is asked for."""
    device = live[0].device
    pinned = device.type == "cuda"
    bounce = torch.empty(BLOCK if pinned else 0, dtype=torch.uint8, pin_memory=pinned)
    chunk = 0
    for row in layout.large.tolist():
        whole = integers(live[row]).contiguous().view(-1).view(torch.uint8)
        for start in range(0, whole.numel(), BLOCK):
            block = _on_host(whole[start : start + BLOCK], bounce)
            for at in range(0, len(block), LEAF_SIZE):
                yield chunk, block[at : at + LEAF_SIZE]
                chunk += 1
    scratch = torch.zeros(LEAF_SIZE, dtype=torch.uint8, device=device)
    while chunk < layout.chunks:
        start, size = layout.chunk(chunk)
        rows = layout.chunk_tensors(chunk).tolist()
        scratch.zero_()
        copy_all(image_integers(scratch, layout, rows, start), [integers(live[row]) for row in rows])
        yield chunk, _on_host(scratch[:size], bounce)
        chunk += 1


def _on_host(content: Tensor, bounce: Tensor) -> memoryview:
    if content.device.type != "cpu":
        content = bounce[: content.numel()].copy_(content)
    return content.numpy().data
