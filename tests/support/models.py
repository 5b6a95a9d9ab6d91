"""Small models for the core's tests: structures, contents that everyone can compute, images, and a smaller leaf."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

from shipproto.layout import Layout
from shipproto.structure import Structure, TensorSpec
from tests.support.naive import Tensor


def content_of(name: str, size: int, version: int = 0) -> bytes:
    """The bytes of a tensor in the golden vectors: SHAKE-128 of its name, and of the version where it is not 0."""
    seed = name.encode() + (b"" if version == 0 else b"/%d" % version)
    return hashlib.shake_128(seed).digest(size)


def build(tensors: Iterable[Tensor]) -> Structure:
    """The structure of these rows."""
    return Structure.build(TensorSpec(tensor.name, tensor.dtype, tensor.shape, tensor.tied_to) for tensor in tensors)


def rows_of(structure: Structure) -> list[Tensor]:
    """The naive rows of a structure."""
    return [Tensor(spec.name, spec.dtype, spec.shape, spec.tied_to) for spec in structure.specs()]


def contents(structure: Structure, version: int = 0) -> dict[str, bytes]:
    """Bytes for every tensor; tied ones have those of the first of their group."""
    return {
        name: content_of(structure.names[int(structure.primary[row])], int(structure.nbytes[row]), version)
        for row, name in enumerate(structure.names)
    }


def make_image(layout: Layout, data: Mapping[str, bytes]) -> bytearray:
    """An image with these bytes; zeros between tensors."""
    image = bytearray(layout.size)
    for row, name in enumerate(layout.structure.names):
        start = int(layout.offsets[row])
        image[start : start + int(layout.structure.nbytes[row])] = data[name]
    return image


def read_image(layout: Layout, image: bytearray | memoryview) -> dict[str, bytes]:
    """The bytes of every tensor in an image."""
    starts = layout.offsets.tolist()
    sizes = layout.structure.nbytes.tolist()
    return {
        name: bytes(image[start : start + size])
        for name, start, size in zip(layout.structure.names, starts, sizes, strict=True)
    }


@contextmanager
def leaves_of(size: int) -> Iterator[None]:
    """Layouts with a smaller LEAF_SIZE, so that a few kilobytes make many chunks."""
    with mock.patch("shipproto.layout.LEAF_SIZE", size):
        yield


def floats(name: str, *shape: int, tied_to: str | None = None) -> Tensor:
    """A float32 tensor."""
    return Tensor(name, "float32", shape, tied_to)


SMALL: Sequence[Tensor] = (
    floats("embed.weight", 40, 8),
    floats("head.weight", 40, 8, tied_to="embed.weight"),
    floats("layer.0.weight", 24, 24),
    Tensor("layer.0.mask", "bool", (7,)),
    Tensor("layer.0.scale", "bfloat16", ()),
    Tensor("layer.0.empty", "float16", (0, 3)),
    Tensor("steps", "int64", (1,)),
)
"""A tied pair, a scalar, an empty tensor, odd sizes; 3.5 KB, some ten chunks with a leaf of 512 bytes."""
