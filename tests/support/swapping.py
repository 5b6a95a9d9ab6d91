"""Models with every kind of tensor, and what is needed to swap them without a daemon.

    rig        a fixture: ``rig(model, mode)`` gives the model a swapper, and makes images to swap it to
    models     ``Everything``, ``Tiny``
    states     of a model: ``raws``, ``randomised``, ``perturbed``, ``properties``

Test modules say ``pytest_plugins = ["tests.support.swapping"]`` and import names from here as well, so pytest comes too
late to rewrite this module's asserts, and would warn: PYTEST_DONT_REWRITE.
"""

import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shipd.images.memory import ImageMapping, create_memfd, open_read_only
from shipd.serving.swap import make_swapper
from shipd.serving.tensors import ModelTensors
from shipproto.dtypes import DTYPES
from shipproto.layout import Layout

MODES = ("copy", "direct", "flip")
"""Of a model in memory."""

_MEMFD = "shipd-test-swap"


class Rig:
    """A model with a swapper, and images to swap it to."""

    def __init__(self, model: nn.Module, mode: str) -> None:
        self.model = model
        self.tensors = ModelTensors(model)
        self.layout = Layout(self.tensors.structure)
        self.swapper = make_swapper(self.tensors, self.layout, mode)
        self.fds: list[int] = []

    def slot(self) -> tuple[ImageMapping, int]:
        """A new image: the daemon's mapping of it, and its read-only descriptor."""
        fd = create_memfd(_MEMFD, self.layout.size)
        self.fds += [fd, open_read_only(fd)]
        return ImageMapping.shared(fd, self.layout.size), self.fds[-1]

    def map(self, fd: int) -> ImageMapping:
        """Map an image as a serving process does."""
        return ImageMapping(fd, self.layout.size, self.swapper.access)

    def image_of(self, state: Mapping[str, Tensor] | None = None) -> ImageMapping:
        """An image with the tensors of ``state``, or with the live ones, as a serving process maps it."""
        daemon, fd = self.slot()
        if state is None:
            self.swapper.fill(daemon.view)
        else:
            for name, value in state.items():
                row = self.layout.structure.index[name]
                start, size = int(self.layout.offsets[row]), int(self.layout.structure.nbytes[row])
                daemon.view[start : start + size] = raw(value)
        return self.map(fd)

    def adopt(self) -> None:
        """Have an image of what is live."""
        self.swapper.adopt(self.image_of())

    def to(self, state: Mapping[str, Tensor]) -> None:
        """Swap to ``state``, without a gate."""
        self.swapper.stage(self.image_of(state))
        self.swapper.apply()

    def close(self) -> None:
        """Give everything back."""
        self.swapper.close()
        for fd in self.fds:
            os.close(fd)


class Rigs:
    """Makes rigs and closes them."""

    def __init__(self) -> None:
        self._made: list[Rig] = []

    def __call__(self, model: nn.Module, mode: str) -> Rig:
        self._made.append(Rig(model, mode))
        return self._made[-1]

    def close(self) -> None:
        """Close all of them; then no image may be mapped any more."""
        while self._made:
            self._made.pop().close()


@pytest.fixture
def rig() -> Iterator[Rigs]:
    """Makes rigs; at the end no image of theirs may be mapped any more."""
    made = Rigs()
    yield made
    made.close()
    gc.collect()
    assert _MEMFD not in Path("/proc/self/maps").read_text()


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes in C order, by a way of its own."""
    tensor = tensor.detach()
    if not tensor.numel():
        return b""
    size = tensor.element_size()
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()[tensor.storage_offset() * size :]
    strides = (*(step * size for step in tensor.stride()), 1)
    return np.lib.stride_tricks.as_strided(memory, (*tensor.shape, size), strides).tobytes()


def raws(model: nn.Module) -> dict[str, bytes]:
    """Every tensor's bytes."""
    return {name: raw(value) for name, value in model.state_dict().items()}


def randomised(model: nn.Module) -> dict[str, Tensor]:
    """A state of the same form with other values: any bytes at all, so NaNs, bools above 1 and the like."""
    generator = np.random.default_rng(7)
    state = {}
    for name, value in model.state_dict().items():
        content = torch.from_numpy(generator.integers(0, 256, value.numel() * value.element_size(), dtype=np.uint8))
        state[name] = content.view(value.dtype).view(value.shape) if value.numel() else value
    return state


def perturbed(model: nn.Module, by: float) -> dict[str, Tensor]:
    """A state in which every floating point number is larger."""
    return {
        name: value + by if value.is_floating_point() else value.clone() for name, value in model.state_dict().items()
    }


def properties(model: nn.Module) -> list[tuple[object, ...]]:
    """What a swap must not change about the tensors."""
    return [
        (name, id(p), p.requires_grad, p.is_leaf, p._version, p.grad is None, p.stride())
        for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    ]


def channels_last(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with its weight in that order of memory."""
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return layer


class Tiny(nn.Module):
    """Tied embedding, attention, normalisation and a non-persistent buffer: a small encoder as they all are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.register_buffer("position_ids", torch.arange(8), persistent=False)
        self.positions = nn.Embedding(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.positions(self.get_buffer("position_ids")[: ids.shape[1]])
        return self.head(self.norm(self.block(hidden)))


class Everything(nn.Module):
    """Every dtype, and every shape of memory that a tensor can have."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in DTYPES:
            kind = getattr(torch, dtype.name)
            content = torch.arange(24 * dtype.itemsize, dtype=torch.uint8)
            self.register_buffer(f"{dtype.name}_matrix", content.view(kind).view(2, 3, 4))
            self.register_buffer(f"{dtype.name}_scalar", content[: dtype.itemsize].clone().view(kind).view(()))
            self.register_buffer(f"{dtype.name}_turned", content.clone().view(kind).view(4, 6).t())
            self.register_buffer(f"{dtype.name}_empty", content.clone().view(kind)[:0].view(0, 5))
        self.register_buffer("large", torch.arange(400_000, dtype=torch.float32))
        self.register_buffer("large_turned", torch.arange(600_000, dtype=torch.float64).view(600, 1000).t())
        whole = torch.zeros(6, 8)
        self.register_buffer("left", whole[:, :3])
        self.register_buffer("right", whole[:, 3:])
        self.conv = channels_last(nn.Conv2d(3, 5, 3))


def encoder() -> Tiny:
    """One of them, always the same."""
    torch.manual_seed(0)
    return Tiny().eval()
