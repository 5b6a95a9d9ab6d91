"""A model whose answers say which version each of its rows is of, so that a mix of two is seen for certain.

Every weight and bias of version N is the same number, and every row of every layer has an output of its own: a row of
another version, or a part of one, is another output. All sums are whole numbers below 2^24, so float32 is exact.
"""

import functools

import torch
from torch import nn

from tests.support import naive
from tests.support.naive import Tensor

WIDTH = 256
LAYERS = 8
"""2 MiB in five chunks."""
CROWD = 40
"""Small tensors, of two sizes in turn: so many that a swap writes those of one size all at once."""

_CYCLE = 1000

_SMALL = [(3, 50)[at % 2] for at in range(CROWD)]

ROWS: tuple[Tensor, ...] = (
    Tensor("count", "int64", (3,)),
    *(Tensor(f"crowd.{at}", "float32", (length,)) for at, length in enumerate(_SMALL)),
    *(Tensor(f"layers.{at}.bias", "float32", (WIDTH,)) for at in range(LAYERS)),
    *(Tensor(f"layers.{at}.weight", "float32", (WIDTH, WIDTH)) for at in range(LAYERS)),
    Tensor("scale", "bfloat16", (5,)),
)


def _number(version: int) -> int:
    return version % _CYCLE + 1


class Striped(nn.Module):
    """Answers with the sums of all rows of all layers, and with its version."""

    def __init__(self, version: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.count: torch.Tensor
        self.crowd = nn.ParameterList(torch.zeros(length) for length in _SMALL)
        self.register_buffer("scale", torch.zeros(5, dtype=torch.bfloat16))
        self.load_state_dict(state(version))
        self.eval().requires_grad_(False)

    def forward(self, ones: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # As if each were a row's bias, so that the sums of a version are the same number everywhere.
        crowd = torch.cat(list(self.crowd)) * (WIDTH + 1)
        return torch.cat([*(layer(ones) for layer in self.layers), crowd]), self.count.clone()


QUESTION = torch.ones(WIDTH)


def state(version: int) -> dict[str, torch.Tensor]:
    """The state dict of a version."""
    number = float(_number(version))
    made = {
        "count": torch.full((3,), version),
        "scale": torch.full((5,), version % 256, dtype=torch.bfloat16),
    }
    for at in range(LAYERS):
        made[f"layers.{at}.weight"] = torch.full((WIDTH, WIDTH), number)
        made[f"layers.{at}.bias"] = torch.full((WIDTH,), number)
    for at, length in enumerate(_SMALL):
        made[f"crowd.{at}"] = torch.full((length,), number)
    return made


def fault(answer: tuple[torch.Tensor, torch.Tensor], label: str | None) -> str:
    """What is wrong with an answer that was given under ``label``; nothing, where it is whole and that version's.

    Without a label it only has to be whole. So does "initial": which version that is depends on who came first.
    """
    sums, counts = answer
    version = int(counts[0])
    low, high = float(sums.min()), float(sums.max())
    expected = float(_number(version) * (WIDTH + 1))
    if bool((counts != version).any()) or low != expected or high != expected:
        return f"counts {counts.tolist()}, sums from {low} to {high} where {expected} was due, under {label!r}"
    if label not in (None, "initial") and label != label_of(version):
        return f"version {version} under {label!r}"
    return ""


def label_of(version: int) -> str:
    """The label that a version is pushed under."""
    return f"v{version}"


@functools.lru_cache(maxsize=64)
def digest_of(version: int) -> str:
    """Its digest by the second implementation, hexadecimal."""
    data = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in state(version).items()}
    return naive.version_digest(ROWS, data).hex()


def image_size() -> int:
    """Bytes of one image, by the second implementation."""
    return naive.picture(ROWS).size
