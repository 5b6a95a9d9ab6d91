"""Which dtypes become which others where a push casts: numbers of one kind, of another width.

Floats and complex numbers are rounded, integers must fit, which only their values tell: that is checked where they are
read. Nothing becomes another kind of number, and bool is none.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shipproto.dtypes import BY_NAME

_FLOATS: Final = (
    *("float64", "float32", "float16", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
_INTEGERS: Final = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
_COMPLEX: Final = ("complex128", "complex64", "complex32")


def _table() -> npt.NDArray[np.bool_]:
    table = np.zeros((256, 256), dtype=np.bool_)
    for kind in (_FLOATS, _INTEGERS, _COMPLEX):
        codes = [BY_NAME[name].code for name in kind]
        table[np.ix_(codes, codes)] = True
    # A power of two, of no sign and without zero: what it holds fits elsewhere, and no weight fits it.
    for name in _FLOATS:
        table[BY_NAME["float8_e8m0fnu"].code, BY_NAME[name].code] = True
    np.fill_diagonal(table, val=False)
    table.flags.writeable = False
    return table


_CASTABLE: Final = _table()


def castable(given: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """bool[k]: whether a tensor of the dtype ``given[k]`` is cast to ``wanted[k]``, which are wire numbers."""
    found: npt.NDArray[np.bool_] = _CASTABLE[given, wanted]
    return found
