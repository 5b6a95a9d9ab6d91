"""Lending the files of a checkpoint to a daemon on the same host, which reads them itself; nothing of them travels.

Both sides read and digest every byte, at the same time and each for itself: what FINISH says of a tensor is what this
side has read of it.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from shipd.checkpoints.extents import Extent, extents
from shipd.checkpoints.source import Source
from shipd.checkpoints.wording import quoted
from shipd.client.sending import RUN
from shipd.errors import CheckpointError, TensorChanged
from shipd.transfer.lane import Lane
from shipd.transfer.lent_files import CutShort, LentFiles
from shipproto.capabilities import LEND
from shipproto.digests import leaf_digest
from shipproto.lent import NOT_LENT, Lent
from shipproto.limits import LEAF_SIZE, MAX_LENT_FILES
from shipproto.sender import Sender


class Loan:
    """The files of one source, lent over one connection. Owns ``fds``, which are open in its own right: two sides that
    read the same open file in turns would each take the other's place for its own, and read ahead of neither."""

    def __init__(self, sender: Sender, source: Source, lent: Lent, fds: Sequence[int]) -> None:
        self._sender = sender
        self._source = source
        self._fds = tuple(fds)
        self._files = LentFiles(lent, self._fds)
        self.bytes = int(lent.layout.chunk_sizes[lent.chunks].sum())
        """Of all chunks that are lent."""
        self._undigested = iter(lent.runs(RUN))
        self._buffer = memoryview(bytearray(LEAF_SIZE))

    @classmethod
    def of(cls, sender: Sender, source: Source, lane: Lane) -> Self | None:
        """Lend what can be lent of what WANT has asked for, with a message that the lane writes next.

        None where the daemon takes no such thing, or the source is in no files.
        """
        if LEND not in lane.connection.peer.capabilities:
            return None
        descriptors, lent = _table(sender, source)
        if not lent.chunks:
            return None
        fds: list[int] = []
        try:
            fds.extend(map(_opened_anew, descriptors))
        except OSError:
            # No descriptors left, or no /proc: the bytes travel.
            for fd in fds:
                os.close(fd)
            return None
        loan = cls(sender, source, lent, fds)
        lane.send_with_fds(lambda: sender.lend(lent, len(fds)), fds)
        return loan

    def digest(self, lane: Lane) -> bool:
        """Read and digest the next few chunks. False where there are none left.

        Raises TensorChanged where the file has been cut, CheckpointError where it cannot be read, and TransferError if
        a tensor's bytes have changed.
        """
        chunks = next(self._undigested, None)
        if chunks is None:
            return False
        digests: list[bytes] = []
        large = chunks.start < self._sender.layout.large_chunks
        for chunk in chunks:
            content = self._buffer[: self._sender.layout.chunk(chunk)[1]]
            began = time.monotonic()
            self._read(chunk, content)
            read = time.monotonic()
            if large:
                digests.append(leaf_digest(content))
            else:
                self._sender.digest_chunk(chunk, content)
            lane.times.read += read - began
            lane.times.digest += time.monotonic() - read
        if large:
            self._sender.digested(chunks, digests)
        return True

    def _read(self, chunk: int, content: memoryview) -> None:
        try:
            self._files.read(chunk, content)
        except CutShort as error:
            name = self._sender.layout.chunk_names(chunk)[0]
            raise TensorChanged(
                f"{quoted(self._source.origin)} was cut while tensor {quoted(name)} was being read; save to a new file "
                "and rename it instead, then push again",
                tensor=name,
            ) from error
        except OSError as error:
            raise CheckpointError(f"reading {quoted(self._source.origin)} failed: {error.strerror}") from error

    def close(self) -> None:
        """The daemon has descriptors of its own."""
        for fd in self._fds:
            os.close(fd)
        self._fds = ()


def _table(sender: Sender, source: Source) -> tuple[list[int], Lent]:
    """The descriptors of the source's files, and where in them the tensors lie in the ruling structure's order."""
    structure = sender.layout.structure
    count = len(structure)
    files = np.full(count, NOT_LENT, dtype=np.uint8)
    offsets = np.zeros(count, dtype=np.int64)
    numbers: dict[int, int] = {}
    # Tied tensors lie where the first of them does.
    rows = np.flatnonzero((structure.primary == np.arange(count)) & (structure.nbytes > 0)).tolist()
    places: list[Extent | None] = extents(source, sender.source_rows[rows].tolist())
    for row, place in zip(rows, places, strict=True):
        if place is None:
            continue
        number = numbers.setdefault(place.descriptor, len(numbers))
        if number < MAX_LENT_FILES:
            files[row], offsets[row] = number, place.offset
    return list(numbers)[:MAX_LENT_FILES], Lent(sender.layout, files, offsets)


def _opened_anew(descriptor: int) -> int:
    return os.open(Path("/proc/self/fd") / str(descriptor), os.O_RDONLY | os.O_CLOEXEC)
