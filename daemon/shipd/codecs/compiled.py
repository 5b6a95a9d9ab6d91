"""The loader of compiled loops: numba, if it is there and works, and only when deltas are in use.

numba costs a second and a hundred megabytes to import and fails in more ways than by not being installed: with OSError
where memory may not be made executable (systemd's MemoryDenyWriteExecute), with RuntimeError where a version of it and
one of numpy or llvmlite do not fit. Whatever it is, the codecs work without it, and ``status`` says why they do.

No push waits for a compiler: until ``warm_up`` has come to its end somewhere else, numpy does the work.

What it compiles is kept on disk where it finds a place that can be written: beside the module, the user's cache, or
NUMBA_CACHE_DIR. Never parallel=True, whose threads do not survive a fork; never fastmath.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from shipd.codecs.egr_format import Engine
    from shipd.codecs.plane_kernels import PlaneKernels

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The modules of compiled loops."""

    egr: "Engine"
    planes: "PlaneKernels"


class _Loader:
    def __init__(self) -> None:
        self.reason = ""
        self.kernels: Kernels | None = None
        self._lock = threading.Lock()
        self._tried = False

    def load(self) -> Kernels | None:
        with self._lock:
            if not self._tried:
                self.kernels = self._load()
                self._tried = True
        return self.kernels

    def _load(self) -> Kernels | None:
        try:
            from shipd.codecs import egr_compiled, planes_compiled

            egr_compiled.warm_up()
            _let_go_of_compiler()
        except Exception as error:  # noqa: BLE001 - whatever it is, there is something that works without it
            self.reason = f"{type(error).__name__}: {error}"
            return None
        return Kernels(egr=egr_compiled, planes=planes_compiled)


def _let_go_of_compiler() -> None:
    """Everything is compiled: give back what LLVM's own code takes, some 50 MiB, and what compiling has left behind.

    Its pages are those of a file and were never written to. Should they be needed again, they are read again.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_, path = line.split(maxsplit=5) if line.count("/") else (line, "", "")
        if permissions == "r-xp" and "llvmlite" in path:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


_loader: Final = _Loader()


def kernels() -> Kernels | None:
    """The compiled loops; None where there are none, or not yet."""
    return _loader.kernels


def warm_up() -> bool:
    """Import and compile everything now, which takes seconds where nothing is cached. Whether there are compiled loops.

    Safe to call from several threads: the others wait for the first. Later calls cost nothing.
    """
    return _loader.load() is not None


def why_not() -> str:
    """Why there are no compiled loops, in words; empty where there are, or where nobody has asked for them yet."""
    return _loader.reason


def kernel(signature: object = None) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Compile a function, at once where its ``signature`` is given; without one it is part of those that call it.

    For the modules with compiled loops alone: it imports numba. What is compiled lets go of the GIL.
    """
    import numba

    def compile_it(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        try:
            compiled = numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):
            # There is no place for a cache, or none that can be written: it is compiled again by every process.
            compiled = numba.njit(signature, nogil=True)(function)
        return cast("Callable[_Arguments, _Result]", compiled)

    return compile_it
