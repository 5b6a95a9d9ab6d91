"""Many small tensors of one size, copied out of an image by one call for all of them.

torch copies a list of tensors one by one, at 2 µs each: for tensors of 4 KiB three times what their bytes take. numpy
copies a list of *indices* in one loop that costs nothing beside the bytes. So the memory that the tensors lie in is
seen as one array of overlapping blocks, one beginning at every byte, and the tensors are elements of it. Only those
elements are ever touched; what lies between them is neither read nor written.

Belongs here: choosing the tensors for which that is possible, and copying them. Any other way of copying is ``bits``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shipd.images.memory import ImageMapping
from shipproto.layout import Layout

SMALL: Final = 64 * 1024
"""Bytes of the largest tensor that is copied like this. Above, torch is as fast."""

MANY: Final = 16
"""Tensors of one size that there must be: a call costs as much as several tensors."""

BATCH: Final = 1024 * 1024
"""Bytes copied by way of memory of numpy's own, where the sources are not evenly spaced: they stay in the cache."""

_Blocks = npt.NDArray[np.void]
_Indices = npt.NDArray[np.int64]


class _Memory:
    """What numpy makes an array of memory from that belongs to ``owner``."""

    def __init__(self, address: int, count: int, stride: int, size: int, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (count,),
            "strides": (stride,),
            "typestr": f"|V{size}",
            "version": 3,
        }


def _blocks(address: int, count: int, stride: int, size: int, owner: object) -> _Blocks:
    """``count`` blocks of ``size`` bytes, one every ``stride`` bytes. ``owner`` lives as long as the array."""
    return np.asarray(_Memory(address, count, stride, size, owner))


def _window(first: int, last: int, size: int, owner: object) -> _Blocks:
    """A block of ``size`` bytes at every address from ``first`` to ``last``."""
    return _blocks(first, last - first + 1, 1, size, owner)


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one size: ``target[index[i]]`` becomes ``source[i]``, or ``source[source_index[i]]``."""

    target: _Blocks
    index: _Indices
    source: _Blocks
    source_index: _Indices | None

    def copy(self) -> None:
        """Copy them, without the GIL."""
        if self.source_index is None:
            self.target[self.index] = self.source
            return
        step = max(1, BATCH // self.target.itemsize)
        for start in range(0, len(self.index), step):
            some = slice(start, start + step)
            self.target[self.index[some]] = self.source[self.source_index[some]]


class Scatter:
    """The small tensors among ``live``, each in the row that stands beside it in ``rows``.

    taken   whether it is one of them, for each of ``live``
    """

    def __init__(self, layout: Layout, rows: Sequence[int], live: Sequence[Tensor]) -> None:
        self.taken = [False] * len(live)
        # Sizes, with the addresses and the places in the image of the tensors that have them.
        self._groups: list[tuple[int, _Indices, _Indices]] = []
        self._owner: list[Tensor] = []
        self._addresses: list[int] = []
        sizes = layout.structure.nbytes[rows]
        for size in np.unique(sizes[(sizes > 0) & (sizes <= SMALL)]).tolist():
            those = [at for at in np.flatnonzero(sizes == size).tolist() if _is_plain(live[at])]
            if len(those) < MANY:
                continue
            for at in those:
                self.taken[at] = True
                self._owner.append(live[at])
            found = [live[at].data_ptr() for at in those]
            self._addresses += found
            addresses = np.array(found, dtype=np.int64)
            places = layout.offsets[[rows[at] for at in those]]
            # In the order of the image, which the next version is read in.
            order = np.argsort(places)
            self._groups.append((size, addresses[order], places[order]))

    def check(self) -> None:
        """Raise RuntimeError where a tensor is not in the memory any more in which ``parts`` would write it.

        torch takes other memory for a storage without anybody replacing a tensor: ``model.share_memory()``, or a
        tensor that is put on a queue of torch.multiprocessing. What it was in before has been freed.
        """
        if list(map(Tensor.data_ptr, self._owner)) != self._addresses:
            raise RuntimeError(
                "tensors have moved to other memory since the model was attached, by share_memory() or "
                "torch.multiprocessing perhaps; attach the model after that"
            )

    def parts(self, mapping: ImageMapping) -> list[Part]:
        """What to copy from an image."""
        raw = mapping.raw
        parts: list[Part] = []
        for size, addresses, places in self._groups:
            # numpy copies the source first where the two may overlap, which it judges by their ends alone.
            below = addresses < mapping.address
            parts.extend(
                self._part(mapping.address, size, addresses[side], places[side], raw)
                for side in (below, ~below)
                if side.any()
            )
        return parts

    def _part(self, image: int, size: int, addresses: _Indices, places: _Indices, raw: memoryview) -> Part:
        base = int(addresses.min())
        target = _window(base, int(addresses.max()), size, self._owner)
        first = int(places[0])
        strides = np.diff(places)
        if not len(strides) or (strides == strides[0]).all():
            step = int(strides[0]) if len(strides) else size
            return Part(target, addresses - base, _blocks(image + first, len(places), step, size, raw), None)
        source = _window(image + first, image + int(places[-1]), size, raw)
        return Part(target, addresses - base, source, places - first)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def copy_parts(parts: Sequence[Part]) -> None:
    """Copy all of them."""
    for part in parts:
        part.copy()
