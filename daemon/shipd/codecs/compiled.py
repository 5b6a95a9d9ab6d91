"""The loader of compiled loops: numba, if it is there and works, asked for once and only when deltas are in use.

numba costs a second and a hundred megabytes to import and fails in more ways than by not being installed: with OSError
where memory may not be made executable, with RuntimeError where there is no place for its cache or its parts do not fit
each other. Whatever it is, the codecs work without it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from shipd.codecs.plane_kernels import PlaneKernels

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The modules of compiled loops."""

    planes: "PlaneKernels"


@functools.cache
def kernels() -> Kernels | None:
    """The compiled loops; None where there are none. The first call takes seconds where nothing is cached."""
    try:
        from shipd.codecs import planes_compiled
    except Exception:  # noqa: BLE001 - whatever it is, there is something that works without it
        return None
    return Kernels(planes=planes_compiled)


def kernel(signature: object = None) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Compile a function, at once where its ``signature`` is given; without one it is part of those that call it.

    For the modules with compiled loops alone: it imports numba. What is compiled lets go of the GIL.
    """
    import numba

    def compile_it(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        try:
            compiled = numba.njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:
            # There is no place for a cache that can be written: it is compiled again by every process.
            compiled = numba.njit(signature, nogil=True)(function)
        return cast("Callable[_Arguments, _Result]", compiled)

    return compile_it
