"""The dtypes that can travel: a wire number, torch's name and the size of one element.

A number is never reused. Quantised, sub-byte, sparse and subclassed tensors have none and are refused.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: ``code`` on the wire, ``name`` as in ``torch.<name>``, ``itemsize`` in bytes."""

    code: int
    name: str
    itemsize: int


DTYPES: Final = tuple(
    DType(code, name, itemsize)
    for code, name, itemsize in (
        (1, "float64", 8),
        (2, "float32", 4),
        (3, "float16", 2),
        (4, "bfloat16", 2),
        (5, "float8_e4m3fn", 1),
        (6, "float8_e5m2", 1),
        (7, "float8_e4m3fnuz", 1),
        (8, "float8_e5m2fnuz", 1),
        (9, "float8_e8m0fnu", 1),
        (16, "int64", 8),
        (17, "int32", 4),
        (18, "int16", 2),
        (19, "int8", 1),
        (20, "uint64", 8),
        (21, "uint32", 4),
        (22, "uint16", 2),
        (23, "uint8", 1),
        (24, "bool", 1),
        (32, "complex128", 16),
        (33, "complex64", 8),
        (34, "complex32", 4),
    )
)

BY_NAME: Final = {dtype.name: dtype for dtype in DTYPES}
BY_CODE: Final = {dtype.code: dtype for dtype in DTYPES}

ITEMSIZES: Final = np.zeros(256, dtype=np.int64)
"""Element size by wire number; 0 marks a number that no dtype has."""
for _dtype in DTYPES:
    ITEMSIZES[_dtype.code] = _dtype.itemsize
ITEMSIZES.flags.writeable = False
