"""Memory of images: sealed memfds and mappings of them. Belongs here: all that asks the kernel for image memory.

A memfd is made by the daemon and mapped by both sides. Its seals promise every side that it never changes size,
so that no access through a mapping can ever end in SIGBUS. Who may write is decided by the descriptor: peers get
a read-only one.

Mappings are made with mmap(2) through ctypes and not with ``mmap.mmap``, which keeps a duplicate of the
descriptor, does not tell its address, and can be unmapped by ``close()`` under a tensor that still uses it (torch
keeps a reference to the buffer's object but no export of it). Here memory is unmapped when the last object that
refers to it is gone, and by nothing else.
"""

import ctypes
import enum
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Final, Self

import numpy as np

_MFD_NOEXEC_SEAL: Final = 0x0008
"""Weights are never code. Required where vm.memfd_noexec is 2; kernels before 6.3 do not know it."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14. Not in Python's mmap module before 3.14."""

POPULATE_SLICE: Final = 4 * 1024 * 1024
"""Bytes populated in one call: 2 to 12 ms of fresh pages. The kernel keeps the process's memory map locked meanwhile,
so this is how long other threads may wait for a new mapping: with 64 MiB the event loop stood still for 80 ms."""

_PAGEMAP_SLICE: Final = 64 * 1024
"""Pages looked up at once: 512 KiB of what the kernel says of them."""

_PM_SWAP: Final = np.uint64(62)
_PM_FILE: Final = np.uint64(1 << 61)
"""Of an entry of /proc/PID/pagemap: bit 63 and 62, in memory or swapped out; bit 61, of a file or shared."""

_FAULT_AROUND: Final = 64 * 1024
"""Bytes around an address that Linux maps when it is read and their pages are in memory (fault_around_bytes)."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
# CDLL releases the GIL during a call: populating takes seconds a gigabyte and must not stop other threads.
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.restype = ctypes.c_int
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class Access(enum.Enum):
    """What a mapping may be used for."""

    READ_WRITE = "shared, read and write"
    """The daemon's own, and that of a serving process whose CUDA needs it for page-locking."""
    READ_ONLY = "shared, read only"
    PRIVATE = "private, copy on write"
    """Starts as the image and diverges from it where it is written. It must not outlive one version unless it is
    ``unwritten``: pages that were written keep hiding what the image holds later."""


def create_memfd(name: str, size: int) -> int:
    """A new sealed memfd of ``size`` zero bytes, open for reading and writing. ``name`` shows in /proc.

    Raises OSError. Memory is not taken before it is touched.
    """
    if size <= 0:
        raise ValueError(f"an image of {size} bytes")
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)
    try:
        # The mode decides who may open /proc/PID/fd/N anew, whatever the descriptor itself allows.
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_read_only(fd: int) -> int:
    """A descriptor of the same memory through which nothing can be written. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _never() -> bool:
    return False


class ImageMapping:
    """An image mapped into this process. The descriptor may be closed afterwards: a mapping needs none.

    The memory stays mapped while anything refers to it: this object until ``close()``, any memoryview, and any
    array or tensor made from one.
    """

    __slots__ = ("__weakref__", "_exporter", "access", "address", "size")

    def __init__(self, fd: int, size: int, access: Access) -> None:
        """Map the first ``size`` bytes of ``fd``. Raises OSError, also where the file could change its size."""
        if size <= 0:
            raise ValueError(f"an image of {size} bytes")
        actual = os.fstat(fd).st_size
        if actual < size:
            raise OSError(errno.EINVAL, f"the image has {actual} bytes where {size} are expected")
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise OSError(errno.EPERM, "the image's memory is not sealed: it could shrink while it is being read")
        writable = access is not Access.READ_ONLY
        address = _libc.mmap(
            None,
            size,
            mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
            mmap.MAP_PRIVATE if access is Access.PRIVATE else mmap.MAP_SHARED,
            fd,
            0,
        )
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), f"cannot map an image of {size} bytes ({access.value})")
        self.address: int = address
        self.size = size
        self.access = access
        exporter = (ctypes.c_ubyte * size).from_address(address)
        # Everything that uses the memory refers to this object, directly or through memoryviews.
        finalizer = weakref.finalize(exporter, _libc.munmap, address, size)
        # At exit other threads may still be reading; the kernel unmaps soon enough.
        finalizer.atexit = False
        self._exporter: ctypes.Array[ctypes.c_ubyte] | None = exporter

    @classmethod
    def shared(cls, fd: int, size: int) -> Self:
        """Map for reading and writing; what is written is seen by every other mapping."""
        return cls(fd, size, Access.READ_WRITE)

    @classmethod
    def read_only(cls, fd: int, size: int) -> Self:
        """Map for reading; a write through ``raw`` ends the process."""
        return cls(fd, size, Access.READ_ONLY)

    @classmethod
    def private(cls, fd: int, size: int) -> Self:
        """Map copy on write: possible on a read-only descriptor, and nobody else sees what is written."""
        return cls(fd, size, Access.PRIVATE)

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._exporter is None

    @property
    def raw(self) -> memoryview:
        """The bytes as a new memoryview that claims to be writable even where the memory is not.

        For building tensors, which torch does with a warning from a memoryview that says the truth.
        """
        if self._exporter is None:
            raise ValueError("the mapping is closed")
        return memoryview(self._exporter).cast("B")

    @property
    def view(self) -> memoryview:
        """The bytes as a new memoryview, read-only where the mapping is."""
        return self.raw.toreadonly() if self.access is Access.READ_ONLY else self.raw

    def populate(self, cancelled: Callable[[], bool] = _never) -> bool:
        """Touch every page now, so that nobody waits for it later. Long: 0.5 to 3 s a gigabyte of fresh pages.

        A shared image's pages are allocated; content never changes. Runs without the GIL. Asks ``cancelled()``
        between slices and returns False where it was given up. Raises OSError where memory runs out.
        """
        view = self.raw
        advice = _MADV_POPULATE_WRITE if self.access is Access.READ_WRITE else _MADV_POPULATE_READ
        for start in range(0, self.size, POPULATE_SLICE):
            if cancelled():
                return False
            length = min(POPULATE_SLICE, self.size - start)
            if _libc.madvise(self.address + start, length, advice) == 0:
                continue
            error = ctypes.get_errno()
            if error != errno.EINVAL:
                raise OSError(error, f"cannot populate {length} bytes of an image: {os.strerror(error)}")
            # Before Linux 5.14: read a byte of each page, which allocates pages of a shared file as well.
            np.frombuffer(view[start : start + length], dtype=np.uint8)[:: mmap.PAGESIZE].max()
        return True

    def own(self, start: int, stop: int) -> None:
        """Have these bytes of a PRIVATE mapping, and those on the same pages, stay what they are now, whatever is
        written into the image later: they become memory of this process alone. Raises OSError, before Linux 5.14
        always; then nothing is known of them.
        """
        if self.access is not Access.PRIVATE:
            raise ValueError("only a private mapping has pages of its own")
        first = start - start % mmap.PAGESIZE
        for at in range(first, stop, POPULATE_SLICE):
            length = min(POPULATE_SLICE, stop - at)
            # As if each page were written to, which copies it.
            if _libc.madvise(self.address + at, length, _MADV_POPULATE_WRITE):
                error = ctypes.get_errno()
                raise OSError(error, f"cannot copy {length} bytes of an image: {os.strerror(error)}")

    def touch(self, start: int, stop: int) -> None:
        """Map the pages of bytes [start, stop), which must be there: others share them already.

        Half as long as ``populate``, 40 ms a gigabyte, which has the kernel look for every page by itself; here it maps
        those around each that is read. Holds the GIL for 0.2 ms at a time.
        """
        view = self.raw
        for first in range(start, stop, POPULATE_SLICE):
            np.frombuffer(view[first : min(first + POPULATE_SLICE, stop)], dtype=np.uint8)[::_FAULT_AROUND].max()

    def unwritten(self) -> bool:
        """Whether no page of a private mapping was written to, so that all of it is still what the image holds.

        From /proc/self/pagemap: 5 ms a gigabyte. False where the kernel does not tell.
        """
        pages = -(-self.size // mmap.PAGESIZE)
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:  # noqa: PTH123
                for first in range(0, pages, _PAGEMAP_SLICE):
                    count = min(_PAGEMAP_SLICE, pages - first)
                    entries = np.frombuffer(
                        os.pread(file.fileno(), 8 * count, 8 * (self.address // mmap.PAGESIZE + first)), dtype="<u8"
                    )
                    # In memory or swapped out, and not the file's: the copy that a write has made.
                    if len(entries) < count or np.any((entries >> _PM_SWAP != 0) & (entries & _PM_FILE == 0)):
                        return False
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of the memory. Views of it, and tensors made from them, stay valid: the last one unmaps it."""
        self._exporter = None
