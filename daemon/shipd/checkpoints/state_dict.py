"""Tensors in memory as a source: a state dict or a module, contiguous or not, on any device.

Contiguous tensors in host memory are handed out as views of their own memory. Everything else passes, slice
by slice, through a buffer of the reading thread; there is never a copy of a whole tensor.
"""

import ctypes
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from operator import add, ne, or_
from typing import Any, Final

import torch
from torch import Tensor, nn

from shipd.checkpoints import known
from shipd.checkpoints.columns import Columns, counters
from shipd.checkpoints.gather import bits, gather
from shipd.checkpoints.source import MAX_READ, check_range, join, pick
from shipd.checkpoints.wording import quoted
from shipd.errors import TensorChanged, UnsupportedTensor
from shipproto.errors import ProtocolError
from shipproto.frame import Buffer

_BLOCK: Final = 1024
"""Tensors compared at once, while what torch keeps of them is in the cache."""

_MEMORY: Final = memoryview((ctypes.c_char * sys.maxsize).from_address(0)).cast("B").toreadonly()
"""All addresses of the process: a slice of this costs a fifth of a view of its own for each tensor."""


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
        columns = Columns.of(_state(tensors) if isinstance(tensors, nn.Module) else tensors, origin)
        ties = columns.ties()
        try:
            self.structure, order = known.structure_of(columns.names, columns.dtypes, columns.shapes, ties)
        except ProtocolError as error:
            raise UnsupportedTensor(f"{origin}: {error}") from error
        if order is not None:
            columns.sort(order)
        if not all(columns.direct):
            for device in {tensor.device for tensor in columns.tensors if tensor.device.type == "cuda"}:
                # Whatever still computes these tensors, on any stream, is done before another thread reads them.
                torch.cuda.synchronize(device)
        if snapshot:
            copies = {
                name: _copy(tensor)
                for name, tensor in zip(columns.names, columns.tensors, strict=True)
                if name not in ties
            }
            columns = Columns.of({name: copies[ties.get(name, name)] for name in columns.names}, origin)
        self._tensors = columns.tensors
        self._pointers = columns.pointers
        self._versions = columns.versions
        self._storages = columns.storages
        self._sizes: list[int] = self.structure.nbytes.tolist()
        # Of what has to be gathered: its elements as integers.
        self._words = {row: bits(columns.tensors[row]) for row, direct in enumerate(columns.direct) if not direct}
        self._views: dict[int, memoryview] = {}
        self._buffers = threading.local()

    def read(self, row: int, start: int, stop: int) -> memoryview:
        """See ``Source.read``; a view of the tensor's own memory where it is contiguous and on the host."""
        size = self._sizes[row]
        if not 0 <= start <= stop <= size or stop - start > MAX_READ:
            check_range(self.structure, row, size, start, stop)
        if self._tensors[row].data_ptr() != self._pointers[row]:
            raise self._moved(row)
        if row in self._words:
            return gather(self._words[row], start, stop, self._buffers)
        view = self._views.get(row)
        if view is None:
            view = self._views[row] = _view(self._pointers[row], size, self._storages[row])
        return view[start:stop]

    def read_packed(self, rows: Sequence[int], gaps: list[int] | None) -> memoryview:
        """See ``Source.read_packed``; always a copy."""
        # What keeps the memory where it is, also if the source is closed meanwhile.
        storages = self._storages
        pointers, sizes = pick(self._pointers, rows), pick(self._sizes, rows)
        if list(map(Tensor.data_ptr, pick(self._tensors, rows))) != pointers:
            raise self._moved(next(row for row in rows if self._tensors[row].data_ptr() != self._pointers[row]))
        parts: Iterable[Buffer]
        if not self._words or self._words.keys().isdisjoint(rows):
            parts = map(_MEMORY.__getitem__, map(slice, pointers, map(add, pointers, sizes)))
        else:
            # bytes(): one that is gathered comes in the same buffer as the one before.
            parts = (bytes(self.read(row, 0, size)) for row, size in zip(rows, sizes, strict=True))
        content = join(parts, gaps)
        del storages
        return content

    def place(self, row: int) -> tuple[int, int] | None:
        """Address and size of the tensor's bytes in host memory; None where they do not lie there as they travel."""
        return None if row in self._words else (self._pointers[row], self._sizes[row])

    def lends(self, content: memoryview) -> bool:
        """See ``Source.lends``; whether it is a tensor's memory, see ``_view``."""
        return isinstance(content.obj, ctypes.Array)

    def changed(self) -> str | None:
        """See ``Source.changed``; by torch's version counters and by where the tensors' memory lies.

        Half a microsecond a tensor. Tensors made in inference mode have no counter.
        """
        for start in range(0, len(self._tensors), _BLOCK):
            block = slice(start, start + _BLOCK)
            tensors = self._tensors[block]
            pointers, versions = list(map(Tensor.data_ptr, tensors)), counters(tensors)
            if pointers != self._pointers[block] or versions != self._versions[block]:
                moved = map(ne, pointers, self._pointers[block])
                written = map(ne, versions, self._versions[block])
                return self.structure.names[start + list(map(or_, moved, written)).index(True)]
        return None

    def _moved(self, row: int) -> TensorChanged:
        name = self.structure.names[row]
        return TensorChanged(
            f"tensor {quoted(name)} of {self.origin} was given other memory while it was being read; "
            "leave the tensors alone until the push returns, or push with snapshot=True",
            tensor=name,
        )

    def close(self) -> None:
        """See ``Source.close``."""
        self._tensors, self._pointers, self._versions, self._storages = [], [], [], []
        self._words, self._views = {}, {}
        self._buffers = threading.local()


def _state(module: nn.Module) -> Mapping[str, Any]:
    """The module's state dict. Of its own tensors, where nobody has redefined what it is: 20,000 others of the same
    memory would take 30 ms."""
    if type(module).state_dict is nn.Module.state_dict:
        return module.state_dict(keep_vars=True)
    return module.state_dict()


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, as integers: to copy bools turns their bytes 2..255 into 1."""
    with torch.inference_mode(mode=False), torch.no_grad():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        bits(copy).copy_(bits(tensor))
    return copy


def _view(pointer: int, size: int, storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a tensor, whose memory the view keeps alive.

    Not through numpy: Tensor.numpy() makes the storage unresizable for good, and the tensor is the user's.
    """
    if not size:
        return memoryview(b"")
    block = (ctypes.c_char * size).from_address(pointer)
    block.storage = storage  # type: ignore[attr-defined]
    return memoryview(block).cast("B").toreadonly()
