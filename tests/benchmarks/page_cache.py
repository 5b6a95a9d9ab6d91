"""What of a file is in the page cache: brought in, thrown out, and looked at, so that nobody has to believe either."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np

_ATTEMPTS: Final = 5
"""Where memory is short, what was read first may be gone when the rest has been read."""


def warm(path: Path) -> None:
    """Read the file, and raise AssertionError unless all of it is in the page cache then."""
    buffer = bytearray(1 << 22)
    share = 0.0
    for _ in range(_ATTEMPTS):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        if (share := cached(path)) == 1:
            return
    raise AssertionError(f"{path.name} does not stay in the page cache: {share:.2%} of it is there")


def cool(path: Path) -> None:
    """Throw the file out of the page cache, and raise AssertionError unless nothing of it is left there.

    It must have been written to the disk, and be mapped by nobody.
    """
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (share := cached(path)) > 0:
        raise AssertionError(f"{path.name} is still in the page cache: {share:.1%} of it is")


def cached(path: Path) -> float:
    """The share of a file's pages that are in the page cache: mincore(2) of a mapping that is never touched."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapping:
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        view = np.frombuffer(mapping, dtype=np.uint8)
        address = view.__array_interface__["data"][0]
        del view
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages.ctypes.data_as(ctypes.c_void_p)):
            raise OSError(ctypes.get_errno(), "mincore")
    return float((pages & 1).mean())
