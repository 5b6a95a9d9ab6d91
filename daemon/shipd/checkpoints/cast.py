"""Numbers of one dtype as those of another, slice by slice: what a model wants that has other dtypes than a checkpoint.

Floats and complex numbers are rounded to the nearest, ties to even, by torch; integers become the same integers. A
number that the other dtype cannot hold is refused. All NaNs of what was cast are alike, since which bits torch gives
them depends on where in a slice they are.
"""

import ctypes
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LIMITS: Final = {
    "float64": float("inf"),
    "float32": float(2**128 - 2**103),
    "bfloat16": float(2**128 - 2**119),
    "float16": 65520.0,
    "float8_e5m2": 61440.0,
    "float8_e5m2fnuz": 61440.0,
    "float8_e4m3fnuz": 248.0,
    # What lies halfway to the number after the largest is rounded down here: that one would be even, and is none.
    "float8_e4m3fn": float(np.nextafter(464.0, np.inf)),
}
"""The smallest numbers that are rounded to none: the largest number of each dtype and half a step."""

_NANS: Final = {
    "float64": (torch.int64, 0x7FF8 << 48),
    "float32": (torch.int32, 0x7FC00000),
    "bfloat16": (torch.int16, 0x7FC0),
    "float16": (torch.int16, 0x7E00),
    "float8_e5m2": (torch.uint8, 0x7F),
    "float8_e5m2fnuz": (torch.uint8, 0x80),
    "float8_e4m3fnuz": (torch.uint8, 0x80),
    "float8_e4m3fn": (torch.uint8, 0x7F),
}
"""The NaN that all become, as an integer of that size."""

_INFINITE: Final = ("float64", "float32", "bfloat16", "float16", "float8_e5m2")
"""Dtypes that have infinity."""

_BLOCK: Final = 32768
"""Elements that are cast at once: with as many torch stays on the calling thread, more it shares with others,
for which the threads of a push would wait. They are also still in the cache when they are looked at twice."""

_REAL: Final = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
"""Dtypes of the parts of complex numbers, which are cast each for itself."""


class Misfit(Exception):
    """A number that the other dtype does not have: the element that it is (or is a part of), and its value."""

    def __init__(self, element: int, value: "int | float") -> None:
        super().__init__(f"{value} does not fit")
        self.element = element
        self.value = value


def holds(dtype: str) -> str:
    """The smallest and the largest number of a dtype, by torch's name, as "-128 to 127"."""
    dtype = _REAL.get(dtype, dtype)
    if dtype in _LIMITS:
        limits = torch.finfo(getattr(torch, dtype))
        return f"{limits.min:.8g} to {limits.max:.8g}"
    whole = np.iinfo(dtype)
    return f"{whole.min} to {whole.max}"


def cast(content: memoryview, given: str, wanted: str, out: bytearray, at: int) -> None:
    """Write the elements of ``content`` to ``out``, from byte ``at`` on: they are of the dtype ``given`` and become
    ``wanted``, both by torch's names.

    Raises Misfit.
    """
    if not len(content):
        return
    if given in _REAL:
        try:
            _cast_floats(content, _REAL[given], _REAL[wanted], out, at)
        except Misfit as misfit:
            raise Misfit(misfit.element // 2, misfit.value) from None
    elif given.startswith("float") or given == "bfloat16":
        _cast_floats(content, given, wanted, out, at)
    else:
        _cast_integers(content, given, wanted, out, at)


def _cast_integers(content: memoryview, given: str, wanted: str, out: bytearray, at: int) -> None:
    numbers = np.frombuffer(content, dtype=given)
    limits = np.iinfo(wanted)
    for number in (int(numbers.min()), int(numbers.max())):
        if not limits.min <= number <= limits.max:
            # The first one, not the worst one: it is the one to be found again.
            wrong = np.zeros(len(numbers), dtype=np.bool_)
            if int(numbers.min()) < limits.min:
                wrong |= numbers < limits.min
            if int(numbers.max()) > limits.max:
                wrong |= numbers > limits.max
            first = int(np.argmax(wrong))
            raise Misfit(first, int(numbers[first]))
    place: npt.NDArray[Any] = np.frombuffer(out, dtype=wanted, count=len(numbers), offset=at)
    place[:] = numbers


def _cast_floats(content: memoryview, given: str, wanted: str, out: bytearray, at: int) -> None:
    numbers = _tensor(content, given)
    place = torch.frombuffer(out, dtype=getattr(torch, wanted), count=numbers.numel(), offset=at)
    with torch.no_grad():
        for start in range(0, numbers.numel(), _BLOCK):
            try:
                _cast_block(numbers[start : start + _BLOCK], given, wanted, place[start : start + _BLOCK])
            except Misfit as misfit:
                raise Misfit(start + misfit.element, misfit.value) from None


def _cast_block(numbers: Tensor, given: str, wanted: str, place: Tensor) -> None:
    if given.startswith("float8"):
        # Exact, and has all the operations that are needed here.
        numbers = numbers.to(torch.float32)
    elif given == "float64" and wanted != "float32":
        # As torch does it; a number that only becomes too large here must be seen by what follows.
        _check(numbers, "float32")
        numbers = numbers.to(torch.float32)
    ordinary = _check(numbers, wanted)
    place.copy_(numbers)
    if not ordinary:
        integer, bits = _NANS[wanted]
        place.view(integer)[numbers.isnan()] = bits


def _check(numbers: Tensor, wanted: str) -> bool:
    """Whether all are finite. Raises Misfit for the first that ``wanted`` does not have."""
    lowest, highest = (float(bound) for bound in torch.aminmax(numbers))
    limit = _LIMITS[wanted]
    if max(-lowest, highest) < limit:
        return True
    wide = numbers.to(torch.float64)
    wrong = (wide.abs() >= limit) & wide.isfinite()
    if wanted not in _INFINITE:
        wrong |= wide.isinf()
    if bool(wrong.any()):
        first = int(wrong.to(torch.uint8).argmax())
        raise Misfit(first, float(wide[first]))
    return False


def _tensor(content: memoryview, dtype: str) -> Tensor:
    """The elements of ``content``, which nobody may write to.

    Not from the memoryview itself: of memory that is read-only torch warns. That of a mapped file may begin anywhere.
    """
    size = getattr(torch, dtype).itemsize
    address = np.frombuffer(content, dtype=np.uint8).ctypes.data
    if address % size:
        return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype))
    block = (ctypes.c_char * len(content)).from_address(address)
    return torch.frombuffer(block, dtype=getattr(torch, dtype))
