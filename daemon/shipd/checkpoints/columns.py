"""The tensors of a state dict as columns: every refusal of what cannot be shipped, and how the tensors stand.

All of them are looked at together, a column at a time and without Python code for each, of which 20,000 tensors would
take hundreds of milliseconds. Only where something in a column is odd each is looked at by itself, to say what it is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import and_, attrgetter
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from shipd.checkpoints.wording import encodable, quoted
from shipd.errors import UnsupportedTensor
from shipproto.dtypes import BY_NAME
from shipproto.limits import MAX_NAME

_EXACT: Final = (Tensor, nn.Parameter, nn.Buffer)
"""Types whose bytes are all there is to them. Any other subclass may keep state elsewhere (DTensor does)."""

_NAMES: Final = {getattr(torch, name): name for name in BY_NAME if hasattr(torch, name)}

_COMPLEX: Final = frozenset(name for name in BY_NAME if name.startswith("complex"))

_BLOCK: Final = 256
"""Tensors looked at before the next column: what torch keeps of them stays in the cache meanwhile."""

_T = TypeVar("_T")

_dtype: Final[Callable[[Tensor], torch.dtype]] = attrgetter("dtype")
_shape: Final[Callable[[Tensor], torch.Size]] = attrgetter("shape")
_on_host: Final[Callable[[Tensor], bool]] = attrgetter("is_cpu")
_counter: Final[Callable[[Tensor], int]] = attrgetter("_version")


@dataclass(slots=True)
class Columns:
    """Tensors, checked, with one entry for each in every column.

    pointers, storages, versions  where each tensor's bytes are, what keeps them there, and how often they were
                                  written to as far as autograd was told (None: it keeps no count)
    direct                        whether the bytes lie in host memory as they travel
    """

    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    storages: list[torch.UntypedStorage] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    direct: list[bool] = field(default_factory=list)

    @classmethod
    def of(cls, named: Mapping[Any, object], origin: str) -> "Columns":
        """The columns of a state dict, in its order. Raises UnsupportedTensor for the first that cannot be shipped."""
        columns = cls(names=list(named), tensors=cast("list[Tensor]", list(named.values())))
        try:
            sound = columns._names_are_sound() and columns._fill() and columns._addresses_are_sound()
        except (RuntimeError, NotImplementedError, KeyError, TypeError):
            # What torch says of tensors that have no memory, no shape or a dtype of their own.
            sound = False
        if not sound:
            _check_each(columns.names, columns.tensors, origin)
            columns._fill_one_by_one()
        return columns

    def sort(self, order: Iterable[int]) -> None:
        """Put every column into another order."""
        at = list(order)

        def sorted_column(column: list[_T]) -> list[_T]:
            return list(map(column.__getitem__, at))

        self.names, self.tensors = sorted_column(self.names), sorted_column(self.tensors)
        self.dtypes, self.shapes = sorted_column(self.dtypes), sorted_column(self.shapes)
        self.pointers, self.storages = sorted_column(self.pointers), sorted_column(self.storages)
        self.versions, self.direct = sorted_column(self.versions), sorted_column(self.direct)

    def ties(self) -> dict[str, str]:
        """For each tensor that is the same memory as others: the one of them whose name comes first."""
        if len(set(self.pointers)) == len(self.pointers):
            return {}
        by_pointer: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor, pointer in zip(self.names, self.tensors, self.pointers, strict=True):
            by_pointer.setdefault(pointer, []).append((name, tensor))
        ties = {}
        for alike in by_pointer.values():
            if len(alike) == 1:
                continue
            first: dict[object, str] = {}
            for name, tensor in sorted(alike, key=lambda item: item[0]):
                if not tensor.numel():  # Empty tensors share the null pointer and nothing else.
                    continue
                storage = tensor.untyped_storage().data_ptr()
                place = (
                    tensor.device,
                    storage,
                    tensor.storage_offset(),
                    tensor.shape,
                    tensor.stride(),
                    tensor.dtype,
                )
                if (primary := first.setdefault(place, name)) != name:
                    ties[name] = primary
        return ties

    def _names_are_sound(self) -> bool:
        if not set(map(type, self.names)) <= {str}:
            return False
        joined = "\n".join(self.names)
        return encodable(joined) and "_extra_state" not in joined

    def _fill(self) -> bool:
        """Fill the columns; False where a tensor is one that cannot be shipped, or may be.

        Raises RuntimeError or KeyError for others of those.
        """
        reaching: list[bool] = []
        for start in range(0, len(self.tensors), _BLOCK):
            block = self.tensors[start : start + _BLOCK]
            if not set(map(type, block)).issubset(_EXACT):
                return False
            # Raises KeyError for what is quantised, and more of the like.
            dtypes = list(map(_NAMES.__getitem__, map(_dtype, block)))
            if any(map(Tensor.is_neg, block)) or (not _COMPLEX.isdisjoint(dtypes) and any(map(Tensor.is_conj, block))):
                return False
            # These raise RuntimeError for what is sparse or nested, or has no memory.
            shapes, pointers = list(map(_shape, block)), list(map(Tensor.data_ptr, block))
            contiguous, storages = list(map(Tensor.is_contiguous, block)), list(map(Tensor.untyped_storage, block))
            ends = np.fromiter(map(Tensor.storage_offset, block), dtype=np.int64, count=len(block))
            ends += np.fromiter(map(Tensor.numel, block), dtype=np.int64, count=len(block))
            if not all(contiguous):
                for at in (at for at, plain in enumerate(contiguous) if not plain):
                    ends[at] = _span(block[at])
            ends *= np.fromiter(map(Tensor.element_size, block), dtype=np.int64, count=len(block))
            stored = np.fromiter(map(torch.UntypedStorage.nbytes, storages), dtype=np.int64, count=len(block))
            reaching.append(bool((stored >= ends).all()))
            self.dtypes += dtypes
            self.shapes += shapes
            self.pointers += pointers
            self.storages += storages
            self.versions += counters(block)
            self.direct += map(and_, contiguous, map(_on_host, block))
        return all(reaching)

    def _addresses_are_sound(self) -> bool:
        """Whether what has no address is empty, and not on the meta device."""
        if 0 not in self.pointers:
            return True
        rows = [row for row, pointer in enumerate(self.pointers) if not pointer]
        return not any(_problem(self.names[row], self.tensors[row]) for row in rows)

    def _fill_one_by_one(self) -> None:
        """Fill the columns from tensors of which each has been checked."""
        self.dtypes = [_NAMES[tensor.dtype] for tensor in self.tensors]
        self.shapes = [tuple(tensor.shape) for tensor in self.tensors]
        self.pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.storages = [tensor.untyped_storage() for tensor in self.tensors]
        self.versions = counters(self.tensors)
        self.direct = [tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in self.tensors]


def counters(tensors: list[Tensor]) -> list[int | None]:
    """How often each of ``tensors`` was written to, as far as autograd was told; None where it keeps no count."""
    try:
        return list(map(_counter, tensors))
    except RuntimeError:  # Some were made in inference mode.
        return [None if tensor.is_inference() else _counter(tensor) for tensor in tensors]


def _check_each(names: Iterable[Any], values: Iterable[object], origin: str) -> None:
    """Raise UnsupportedTensor for the first that cannot be shipped."""
    for name, value in zip(names, values, strict=True):
        if not isinstance(name, str):
            kind = type(name).__name__
            raise UnsupportedTensor(f"{origin} has the key {name!r} of type {kind}; names are texts")
        if problem := _problem(name, value):
            raise UnsupportedTensor(f"tensor {quoted(name)} of {origin} {problem}", tensor=name[:MAX_NAME])


def _problem(name: str, value: object) -> str | None:
    """Why ``value`` cannot be shipped, as the end of a sentence that begins with its name."""
    if not encodable(name):
        return "has a name that is not valid text: rename it"
    if name == "_extra_state" or name.endswith("._extra_state"):
        return "is the extra state of a module, which is not a weight: leave it out of what is pushed"
    if not isinstance(value, Tensor):
        inside = f", or what is in it, with key={quoted(name)}" if isinstance(value, Mapping) else ""
        return f"is a {_type(value)} and no tensor: push a flat mapping of names to tensors, as of state_dict(){inside}"
    if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "is not initialised yet: run the lazy module once, or load weights into it"
    if type(value) not in _EXACT:
        return f"is of the subclass {_type(value)}: push plain tensors (of a DTensor its full_tensor())"
    return _unfit(value) or _unreadable(value)


def _unfit(tensor: Tensor) -> str | None:
    """What keeps ``tensor`` from being plain elements one after the other."""
    if tensor.is_meta:
        return "is on the meta device and has no content: load weights into it first"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}): push its dequantize()d values, or its int_repr() and scales"
    if tensor.is_nested:
        return "is nested: push its parts, or to_padded_tensor()"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout} and is not dense: push its to_dense()"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazily conjugated or negated view: push its resolve_conj().resolve_neg()"
    if tensor.dtype not in _NAMES:
        return f"has the dtype {tensor.dtype}, which cannot be shipped"
    return None


def _unreadable(tensor: Tensor) -> str | None:
    """What keeps the memory of ``tensor`` from being read. Without this, reading it could end the process."""
    try:
        reached = _span(tensor) * tensor.element_size()
        stored = tensor.untyped_storage().nbytes()
        tensor.data_ptr()
    except (RuntimeError, NotImplementedError) as error:
        return f"has no memory that can be read ({str(error).splitlines()[0][:200]})"
    if stored < reached:
        return (
            f"has storage of {stored} bytes and needs {reached}: it was freed or resized, as FSDP does with "
            "parameters that are sharded; gather it first"
        )
    return None


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _span(tensor: Tensor) -> int:
    """Elements from the storage's beginning to the last one that the tensor reaches."""
    if not tensor.numel():
        return 0
    start = int(tensor.storage_offset())
    if tensor.is_contiguous():
        return start + tensor.numel()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start + 1 + sum((size - 1) * stride for size, stride in steps)
