"""The tensors of a model that is to be resident: which, of what shape, and whether they are still the same.

Belongs here: everything that reads a model's state, and every refusal of a tensor that cannot be shipped.
Refusals name the tensor, and come when the model is attached, not with the first push.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor, nn

from shipd.errors import AttachError, UnsupportedTensor
from shipd.serving.tree import ModuleTree
from shipd.serving.wrappers import CanonicalNames, freezes_weights, sharding
from shipproto.dtypes import BY_NAME
from shipproto.errors import ProtocolError
from shipproto.structure import Structure

_EXTRA_STATE: Final = "_extra_state"
_DEVICES: Final = ("cpu", "cuda")
_BLOCK: Final = 256
"""Tensors of which one property after the other is read, while what torch keeps of them is in the cache."""
_SHARDED: Final = (
    "its parameters are sharded over processes ({}), and no process has a whole version to swap. Attach an object "
    "whose load_weights(weights) copies this process's part out of every whole tensor instead"
)
_OVERLAPS: Final = 1
"""What torch._debug_has_internal_overlap says of a tensor with two elements in one place for certain."""


@dataclass(frozen=True, slots=True)
class Transient:
    """A non-persistent buffer: not part of a version, but a checkpoint may contain it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes are and what they mean."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Place":
        return cls(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.device)

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)} on {self.device}"


_dtype: Final[Callable[[Tensor], torch.dtype]] = attrgetter("dtype")
_shape: Final[Callable[[Tensor], torch.Size]] = attrgetter("shape")
_device: Final[Callable[[Tensor], torch.device]] = attrgetter("device")


class Places:
    """Where many tensors are, as columns: to compare those takes a tenth of the time of as many ``_Place``."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._dtypes = list(map(_dtype, tensors))
        self._shapes = list(map(_shape, tensors))
        self._strides = list(map(Tensor.stride, tensors))
        self._devices = list(map(_device, tensors))
        self._contiguous = list(map(Tensor.is_contiguous, tensors))
        # An address is one device's only, and what is contiguous needs no strides.
        self._odd = [row for row, plain in enumerate(self._contiguous) if not plain or not self._addresses[row]]

    def __iter__(self) -> Iterator[_Place]:
        return map(_Place, self._addresses, self._dtypes, self._shapes, self._strides, self._devices)

    def are_those_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are still where they were."""
        for start in range(0, len(tensors), _BLOCK):
            rows = slice(start, start + _BLOCK)
            block = tensors[rows]
            if (
                list(map(Tensor.data_ptr, block)) != self._addresses[rows]
                or list(map(_dtype, block)) != self._dtypes[rows]
                or list(map(_shape, block)) != self._shapes[rows]
                or list(map(Tensor.is_contiguous, block)) != self._contiguous[rows]
            ):
                return False
        return all(
            tensors[row].stride() == self._strides[row] and tensors[row].device == self._devices[row]
            for row in self._odd
        )


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype, as the protocol uses it."""
    return str(dtype).removeprefix("torch.")


class ModelTensors:
    """A model's shippable state: ``model.state_dict()``, with the live tensors behind it.

    Everything is called what it would be called without wrappers, see ``wrappers``.

    structure   names, dtypes, shapes and ties
    live        the live tensors in the structure's order, tied ones included
    transient   non-persistent buffers
    device      where all of them are

    Raises UnsupportedTensor, naming the tensor, or AttachError.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        _check_whole(model)
        canonical, state = _state(model)
        if not state:
            raise AttachError(
                f"the model ({type(model).__name__}) has no parameters or buffers: there is nothing to swap. A frozen "
                "ScriptModule keeps its weights as constants; attach it before torch.jit.freeze."
            )
        for name, value in state.items():
            _check_one(name, value)
        names = sorted(state)
        self.live: list[Tensor] = [state[name] for name in names]
        self.device = _common_device(names, self.live)
        _check_alive(model, names, self.live)
        ties = _find_ties(names, self.live)
        _check_apart(names, self.live, ties)
        try:
            self.structure = Structure.of_columns(
                names, [dtype_name(tensor.dtype) for tensor in self.live], [tensor.shape for tensor in self.live], ties
            )
        except ProtocolError as error:
            raise UnsupportedTensor(f"the model cannot be shipped: {error}") from error
        buffers = ((canonical.of(name), buffer) for name, buffer in model.named_buffers(remove_duplicate=False))
        self._transient = {name: buffer for name, buffer in buffers if name not in state}
        self.transient: tuple[Transient, ...] = tuple(
            Transient(name, dtype_name(buffer.dtype), tuple(buffer.shape))
            for name, buffer in sorted(self._transient.items())
        )
        self._tree = ModuleTree.of(model)
        self.places = Places(self.live)
        """Where the live tensors belong: whoever moves them says so here. Not looked up afterwards, when the user may
        have moved some as well."""

    def changed(self) -> list[str]:
        """What the user has replaced, moved, added or removed since, one text each; empty where nothing was.

        ``model.half()``, ``model.to(...)``, ``parameter.data = ...`` and ``module.weight = nn.Parameter(...)`` all
        leave shipd with tensors that the model does not use any more.
        """
        if self._tree is not None and self._tree.unchanged() and self.places.are_those_of(self.live):
            return []
        _, state = _state(self.model)
        problems = []
        for name, place in zip(self.structure.names, self.places, strict=True):
            value = state.pop(name, None)
            if not isinstance(value, Tensor):
                problems.append(f"{name!r} is gone")
            elif (now := _Place.of(value)) != place:
                moved = f"was {place} and is {now}" if str(now) != str(place) else "has other memory"
                problems.append(f"{name!r} {moved}")
        problems.extend(f"{name!r} is new" for name in state)
        return problems

    def sharing_transients(self) -> list[str]:
        """Non-persistent buffers that share memory with a shipped tensor: rebinding would part them."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in self.live if tensor.numel()}
        return [
            name
            for name, buffer in self._transient.items()
            if _is_plain(buffer) and buffer.numel() and buffer.untyped_storage().data_ptr() in storages
        ]


def _state(model: nn.Module) -> tuple[CanonicalNames, dict[str, Any]]:
    state = model.state_dict(keep_vars=True)
    canonical = CanonicalNames(model, state)
    return canonical, {canonical.of(name): value for name, value in state.items()}


def _check_whole(model: nn.Module) -> None:
    """Refuse a model whose state_dict() is not what it computes with."""
    if (path := sharding(model)) is not None:
        where = f"module {path!r}" if path else "the model"
        raise UnsupportedTensor(f"{where} cannot be attached: {_SHARDED.format('FullyShardedDataParallel')}")
    if freezes_weights(model):
        raise AttachError(
            "this model is compiled and torch._inductor.config.freezing is set: weights that torch.compile has made "
            "constants of do not change with the parameters. Switch that off and compile the model again"
        )


def places(tensors: Iterable[Tensor]) -> set[int]:
    """Addresses of those that have bytes of their own."""
    return {tensor.data_ptr() for tensor in tensors if _is_plain(tensor) and tensor.numel()}


def _overlap(tensor: Tensor) -> int:
    """0 where all elements have places of their own, _OVERLAPS where they have not, else it is too hard to say."""
    return torch._debug_has_internal_overlap(tensor)  # noqa: SLF001


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _check_one(name: str, value: object) -> None:
    """Refuse what has no plain bytes, or whose bytes are not its values."""
    if problem := _problem(name, value):
        raise UnsupportedTensor(f"tensor {name!r} cannot be shipped: {problem}", tensor=name)


def _problem(name: str, value: object) -> str | None:
    if name.rpartition(".")[2] == _EXTRA_STATE:
        return "it is a module's extra state, which only that module can read"
    if not isinstance(value, Tensor):
        return f"it is no tensor but {type(value).__name__}"
    if type(value).__module__.startswith("torch.distributed."):
        return _SHARDED.format(type(value).__name__)
    if type(value) not in (Tensor, nn.Parameter):
        return f"it is of the subclass {type(value).__name__}"
    if value.is_quantized:
        return f"it is quantised ({value.dtype})"
    if value.is_nested or value.layout is not torch.strided:
        return f"it is not dense ({'nested' if value.is_nested else value.layout})"
    if value.is_meta:
        return "it is on the meta device and has no values"
    if dtype_name(value.dtype) not in BY_NAME:
        return f"its dtype is {dtype_name(value.dtype)}"
    if value.is_conj() or value.is_neg():
        return "it is a lazy conjugate or negative view; use resolve_conj() or resolve_neg()"
    if _overlap(value) == _OVERLAPS:
        return "several of its elements share one place in memory (expand()); use contiguous()"
    return None


def _common_device(names: Sequence[str], tensors: Sequence[Tensor]) -> torch.device:
    device = tensors[0].device
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device.type not in _DEVICES:
            raise UnsupportedTensor(f"tensor {name!r} is on {tensor.device}: only CPU and CUDA models", tensor=name)
        if tensor.device != device:
            raise UnsupportedTensor(
                f"tensor {name!r} is on {tensor.device} and {names[0]!r} on {device}: all must be on one device",
                tensor=name,
            )
    return device


def _check_alive(model: nn.Module, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Refuse a state_dict() of copies: what is written into them would never reach the model."""
    own: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    storages = {tensor.untyped_storage().data_ptr() for tensor in own if _is_plain(tensor)}
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in storages:
            raise UnsupportedTensor(
                f"tensor {name!r} cannot be shipped: state_dict() gives a copy of it and not the model's own memory",
                tensor=name,
            )


def _find_ties(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, str]:
    """For each tensor that is the same memory as an earlier one, the first of them. Empty tensors share nothing."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    ties: dict[str, str] = {}
    if len(set(addresses)) == len(addresses):
        return ties
    first: dict[_Place, str] = {}
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.numel():
            root = first.setdefault(_Place.of(tensor), name)
            if root != name:
                ties[name] = root
    return ties


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of the memory that a non-empty tensor reaches."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _check_apart(names: Sequence[str], tensors: Sequence[Tensor], ties: Mapping[str, str]) -> None:
    """Refuse tensors that share part of their memory without being tied: a version could hold two values for it."""
    spans = sorted(
        (*_extent(tensor), name, tensor)
        for name, tensor in zip(names, tensors, strict=True)
        if tensor.numel() and name not in ties
    )
    group: list[tuple[int, int, str, Tensor]] = []
    end = 0
    for span in spans:
        if span[0] >= end:
            _check_group(group)
            group = []
        group.append(span)
        end = max(end, span[1])
    _check_group(group)


def _check_group(group: Sequence[tuple[int, int, str, Tensor]]) -> None:
    """Extents may overlap where the elements do not, as with the columns of one matrix: count the bytes."""
    if len(group) < 2 and not any(_overlap(tensor) for *_, tensor in group):
        return
    base = group[0][0]
    marks = torch.zeros(max(end for _, end, *_ in group) - base, dtype=torch.uint8)
    total = 0
    for start, _, _, tensor in group:
        size = tensor.element_size()
        strides = (*(stride * size for stride in tensor.stride()), 1)
        marks.as_strided((*tensor.shape, size), strides, start - base).fill_(1)
        total += tensor.numel() * size
    if int(marks.count_nonzero()) != total:
        named = ", ".join(repr(name) for *_, name, _ in group)
        raise UnsupportedTensor(
            f"these tensors cannot be shipped, because they share parts of their memory and are not tied: {named}",
            tensor=group[0][2],
        )
