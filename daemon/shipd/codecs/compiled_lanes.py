"""What compiled loops do with 64 bytes or words at once: masks of 64 bits, made and read by LLVM's own instructions.

numba has no vectors; LLVM has them on every machine, and makes of them what the processor can: one comparison with
AVX-512, two with AVX2, more elsewhere. Importing this imports numba: shipd.codecs.compiled does it, once.
"""

from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES: Final = 64

Integer: TypeAlias = Any
"""A number in a loop. It has the width that the signature says or that it was last cut to: numba checks that, mypy and
Python's own numbers know nothing of it."""


def array(item: types.Type, dimensions: int = 1, *, written: bool = False) -> types.Array:
    """The type of an argument: contiguous and aligned, and read-only or not."""
    return types.Array(item, dimensions, "C", readonly=not written)


def _vector(context: Any, builder: Any, kind: Any, array: Any, at: Any, bits: int) -> Any:
    """LLVM's vector of the LANES elements of ``array`` from ``at`` on."""
    first = builder.gep(context.make_array(kind)(context, builder, array).data, [at])
    pointer = ir.VectorType(ir.IntType(bits), LANES).as_pointer()
    return builder.load(builder.bitcast(first, pointer), align=bits // 8)


def _equal(_typing: Any, array: Any, at: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _vector(context, builder, signature.args[0], arguments[0], arguments[1], 8)
        undefined = ir.Constant(lanes.type, ir.Undefined)
        index = ir.IntType(32)
        one = builder.insert_element(undefined, arguments[2], ir.Constant(index, 0))
        every = builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))
        return builder.bitcast(builder.icmp_unsigned("==", lanes, every), ir.IntType(64))

    return types.uint64(array, at, value), generate


def _unequal(_typing: Any, first: Any, second: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = _vector(context, builder, signature.args[0], arguments[0], arguments[2], 16)
        other = _vector(context, builder, signature.args[1], arguments[1], arguments[2], 16)
        return builder.bitcast(builder.icmp_unsigned("!=", one, other), ir.IntType(64))

    return types.uint64(first, second, at), generate


def _count(_typing: Any, _mask: Any) -> Any:
    return types.uint64(types.uint64), lambda _context, builder, _signature, arguments: builder.ctpop(arguments[0])


def _lowest(_typing: Any, _mask: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


_Words = npt.NDArray[np.uint16]

# Which of the 64 bytes from a place on have a value; which of the 64 words from a place on differ. Bit 0 is the first.
equal = cast("Callable[[npt.NDArray[np.uint8], Integer, Integer], np.uint64]", intrinsic(_equal))
unequal = cast("Callable[[_Words, _Words, Integer], np.uint64]", intrinsic(_unequal))
# How many bits are set; the place of the lowest, 64 where none is.
count = cast("Callable[[Integer], np.uint64]", intrinsic(_count))
lowest = cast("Callable[[Integer], np.uint64]", intrinsic(_lowest))
