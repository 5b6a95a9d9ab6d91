"""Structures in a few words, for tests of what becomes what."""

from collections.abc import Mapping
from typing import Final

from shipproto.structure import Structure, TensorSpec

NOTHING: Final = Structure.build(())


def floats(*names: str, size: int = 2) -> Structure:
    """Tensors of ``size`` floats."""
    return Structure.build(TensorSpec(name, "float32", (size,)) for name in names)


def of(tensors: Mapping[str, tuple[str, tuple[int, ...]] | str]) -> Structure:
    """Tensors as (dtype, shape), or as the name of the one that they are tied to."""
    specs = {name: TensorSpec(name, *what) for name, what in tensors.items() if not isinstance(what, str)}
    ties = {name: root for name, root in tensors.items() if isinstance(root, str)}
    tied = [TensorSpec(name, specs[root].dtype, specs[root].shape, root) for name, root in ties.items()]
    return Structure.build([*specs.values(), *tied])
