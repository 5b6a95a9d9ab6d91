"""Tensors in memory as a source: a state dict or a module, contiguous or not, on any device.

Contiguous tensors in host memory are handed out as views of their own memory. Everything else passes, slice
by slice, through a buffer of the reading thread; there is never a copy of a whole tensor.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from shipd.checkpoints.gather import bits, gather
from shipd.checkpoints.source import MAX_READ, check_range
from shipd.checkpoints.wording import encodable, quoted
from shipd.errors import TensorChanged, UnsupportedTensor
from shipproto.dtypes import BY_NAME
from shipproto.errors import ProtocolError
from shipproto.limits import MAX_NAME
from shipproto.structure import Structure, TensorSpec

_EXACT: Final = (Tensor, nn.Parameter, nn.Buffer)
"""Types whose bytes are all there is to them. Any other subclass may keep state elsewhere (DTensor does)."""

_NAMES: Final = {getattr(torch, name): name for name in BY_NAME if hasattr(torch, name)}


@dataclass(slots=True)
class _Held:
    """One tensor: what the user handed over, and how it stood when the source was opened.

    words  the tensor's elements as integers, where they have to be gathered; None where its memory is read
    view   that memory, mapped at the first read
    """

    tensor: Tensor
    version: int | None
    pointer: int
    nbytes: int
    words: Tensor | None
    view: memoryview | None = None


class StateDict:
    """A ``Source`` over tensors in memory, which must not change until the push returns.

    It holds references to the tensors. With ``snapshot`` it holds copies instead, in host memory.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor] | nn.Module, *, origin: str = "state dict", snapshot: bool = False
    ) -> None:
        if sys.byteorder != "little":
            raise UnsupportedTensor("this host is big-endian; tensors are sent from little-endian hosts only")
        self.origin = origin
        named: Mapping[Any, object] = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
        checked = sorted(_checked(named, origin), key=lambda item: item[0])
        ties = _ties(checked)
        try:
            self.structure = Structure.build(
                TensorSpec(name, _NAMES[tensor.dtype], tuple(tensor.shape), ties.get(name)) for name, tensor in checked
            )
        except ProtocolError as error:
            raise UnsupportedTensor(f"{origin}: {error}") from error
        for device in {tensor.device for _, tensor in checked if tensor.device.type == "cuda"}:
            # Whatever still computes these tensors, on any stream, is done before another thread reads them.
            torch.cuda.synchronize(device)
        if snapshot:
            copies = {name: _copy(tensor) for name, tensor in checked if name not in ties}
            checked = [(name, copies[ties.get(name, name)]) for name, _ in checked]
        self._held = [_hold(tensor) for _, tensor in checked]
        self._buffers = threading.local()

    def read(self, row: int, start: int, stop: int) -> memoryview:
        """See ``Source.read``; a view of the tensor's own memory where it is contiguous and on the host."""
        held = self._held[row]
        if not 0 <= start <= stop <= held.nbytes or stop - start > MAX_READ:
            check_range(self.structure, row, held.nbytes, start, stop)
        if held.tensor.data_ptr() != held.pointer:
            name = self.structure.names[row]
            raise TensorChanged(
                f"tensor {quoted(name)} of {self.origin} was given other memory while it was being read; "
                "leave the tensors alone until the push returns, or push with snapshot=True",
                tensor=name,
            )
        if held.words is None:
            if held.view is None:
                held.view = _memory(held)
            return held.view[start:stop]
        return gather(held.words, start, stop, self._buffers)

    def lends(self, content: memoryview) -> bool:
        """See ``Source.lends``; whether it is a tensor's memory, see ``_memory``."""
        return isinstance(content.obj, ctypes.Array)

    def changed(self) -> str | None:
        """See ``Source.changed``; by torch's version counters and by where the tensors' memory lies.

        Half a microsecond a tensor. Tensors made in inference mode have no counter.
        """
        for name, held in zip(self.structure.names, self._held, strict=False):
            if held.tensor.data_ptr() != held.pointer:
                return name
            if held.version != _version(held.tensor):
                return name
        return None

    def close(self) -> None:
        """See ``Source.close``."""
        self._held = []
        self._buffers = threading.local()


def _checked(named: Mapping[Any, object], origin: str) -> Iterator[tuple[str, Tensor]]:
    """Every entry, if it can be shipped. Raises UnsupportedTensor for the first that cannot."""
    for name, value in named.items():
        if not isinstance(name, str):
            kind = type(name).__name__
            raise UnsupportedTensor(f"{origin} has the key {name!r} of type {kind}; names are texts")
        if problem := _problem(name, value):
            raise UnsupportedTensor(f"tensor {quoted(name)} of {origin} {problem}", tensor=name[:MAX_NAME])
        yield name, cast(Tensor, value)


def _problem(name: str, value: object) -> str | None:
    """Why ``value`` cannot be shipped, as the end of a sentence that begins with its name."""
    if not encodable(name):
        return "has a name that is not valid text: rename it"
    if name == "_extra_state" or name.endswith("._extra_state"):
        return "is the extra state of a module, which is not a weight: leave it out of what is pushed"
    if not isinstance(value, Tensor):
        return f"is a {_type(value)} and no tensor: push a flat mapping of names to tensors, as of state_dict()"
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


def _ties(tensors: list[tuple[str, Tensor]]) -> dict[str, str]:
    """For each tensor that is the same memory as an earlier one in the list: that one's name."""
    by_pointer: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.numel():  # Empty tensors share the null pointer and nothing else.
            by_pointer.setdefault(tensor.data_ptr(), []).append((name, tensor))
    ties = {}
    for alike in by_pointer.values():
        if len(alike) == 1:
            continue
        first: dict[object, str] = {}
        for name, tensor in alike:
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


def _hold(tensor: Tensor) -> _Held:
    contiguous = tensor.is_contiguous()
    direct = contiguous and tensor.device.type == "cpu"
    words = None if direct else bits(tensor)
    return _Held(
        tensor=tensor,
        version=_version(tensor),
        pointer=tensor.data_ptr(),
        nbytes=tensor.numel() * tensor.element_size(),
        words=words.view(-1) if words is not None and contiguous else words,
    )


def _version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written to, as far as autograd was told."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - it has no public name


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, as integers: to copy bools turns their bytes 2..255 into 1."""
    with torch.inference_mode(mode=False), torch.no_grad():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        bits(copy).copy_(bits(tensor))
    return copy


def _memory(held: _Held) -> memoryview:
    """The tensor's memory, kept alive by the view.

    Not through numpy: Tensor.numpy() makes the storage unresizable for good, and the tensor is the user's.
    """
    if not held.nbytes:
        return memoryview(b"")
    block = (ctypes.c_char * held.nbytes).from_address(held.pointer)
    block.storage = held.tensor.untyped_storage()  # type: ignore[attr-defined]
    return memoryview(block).cast("B").toreadonly()
