"""Arrays of numpy and h5py as tensors: their dtypes, and their bytes where these do not lie as they travel.

What travels is little-endian and row-major. Arrays in Fortran's order, big-endian ones and datasets in chunks are read
slice by slice: a slice in row-major order is covered by at most two boxes of whole rows for each dimension.
"""

import math
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from shipd.checkpoints.wording import quoted
from shipd.errors import UnsupportedTensor

_NAMES: Final = {
    np.dtype(name): name
    for name in (
        *("float64", "float32", "float16", "complex128", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}


class Sliceable(Protocol):
    """An array of numpy, or a dataset of h5py."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def torch_dtype(dtype: np.dtype[Any], origin: str, tensor: str) -> str:
    """torch's name for a dtype of numpy. Raises UnsupportedTensor, naming the tensor, where it has none."""
    name = _NAMES.get(dtype.newbyteorder("<"))
    if name is not None:
        return name
    what = f"tensor {quoted(tensor)} of {quoted(origin)}"
    if dtype.hasobject:
        problem = (
            "is an array of Python objects or texts, and to unpickle objects is to run their code, so it is not done; "
            "save it with a dtype of numbers, or leave it out"
        )
    elif dtype.kind == "V" and dtype.names is None:
        problem = (
            f"has elements of {dtype.itemsize} bytes that are no number of numpy's (bfloat16 and float8 are none); "
            "save it as float32, or the checkpoint as safetensors, which has them"
        )
    else:
        problem = f"has the dtype {quoted(str(dtype))}, which torch does not have; save it with a dtype of numbers"
    raise UnsupportedTensor(f"{what} {problem}", tensor=tensor)


def travels_as_it_is(dtype: np.dtype[Any]) -> bool:
    """Whether elements of ``dtype`` are little-endian, or one byte."""
    return dtype == dtype.newbyteorder("<")


class ArrayContent:
    """A ``Content`` over an array in any order of dimensions and of bytes."""

    def __init__(self, array: Sliceable) -> None:
        self._array = array

    def read(self, start: int, stop: int) -> memoryview:
        """See ``Content.read``. Takes at most four times the memory of what it returns."""
        return read_slice(self._array, start, stop)


def read_slice(array: Sliceable, start: int, stop: int) -> memoryview:
    """Bytes [start, stop) of the elements of ``array``, little-endian and row-major; of memory of their own."""
    if start == stop:
        return memoryview(b"")
    size = array.dtype.itemsize
    first, last = start // size, -(-stop // size)
    boxes, skipped = _boxes(array.shape, first, last)
    parts = [_as_they_travel(array[box], array.dtype) for box in boxes]
    offset = start - (first - skipped) * size
    joined = parts[0].data if len(parts) == 1 else memoryview(b"".join(part.data for part in parts))
    return joined[offset : offset + stop - start].toreadonly()


def _as_they_travel(elements: Any, dtype: np.dtype[Any]) -> npt.NDArray[np.uint8]:
    """u8[n], the bytes of ``elements``."""
    whole = np.ascontiguousarray(elements, dtype=dtype)
    if not travels_as_it_is(dtype):
        # Bytes and not values: a conversion may change the bits of NaNs.
        whole = whole.byteswap()
    return whole.reshape(-1).view(np.uint8)


def _boxes(shape: tuple[int, ...], first: int, last: int) -> tuple[list[tuple[int | slice, ...]], int]:
    """Indices of boxes that hold elements [first, last), and how many others precede them in the first."""
    outer: tuple[int | slice, ...] = ()
    while len(shape) > 1:
        inner = math.prod(shape[1:])
        begin, end = first // inner, -(-last // inner)
        if end - begin > 1 and inner <= last - first:
            return [(*outer, slice(begin, end))], first - begin * inner
        if end - begin > 1:
            # The end of one row and the beginning of the next, both shorter than a row.
            head, skipped = _boxes(shape[1:], first - begin * inner, inner)
            tail, _ = _boxes(shape[1:], 0, last - (begin + 1) * inner)
            return [(*outer, begin, *box) for box in head] + [(*outer, begin + 1, *box) for box in tail], skipped
        outer, shape = (*outer, begin), shape[1:]
        first, last = first - begin * inner, last - begin * inner
    return [(*outer, slice(first, last)) if shape else ()], 0
