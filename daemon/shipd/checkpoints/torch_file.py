"""Files written by torch.save, read by torch's own loader and never with a pickle that may run code.

Files in the zip format (torch 1.6 and later) are mapped, so that they cost no memory of the process. Files in
the older format cannot be mapped: torch reads them whole, and they cost their size in memory.

torch's loader checks the zip's checksums of the names and shapes, but not those of mapped tensors: content
that was damaged on the disk is sent as it is found, as it would be loaded.
"""

import re
from collections.abc import Sequence
from typing import Final

import torch

from shipd.checkpoints.extents import Extent, MappedRanges
from shipd.checkpoints.nested import state_dict_in
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.state_dict import StateDict
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError
from shipproto.structure import Structure

_SAFE_SINCE: Final = (2, 10)
"""Earlier releases can be made to run code or to corrupt memory in spite of weights_only=True
(CVE-2025-32434, CVE-2026-24747)."""

_CLASS: Final = re.compile(r"GLOBAL (.+?) (?:was not an allowed|whose module)")

_REFUSED: Final = re.compile(r"WeightsUnpickler error:\s*(.+)")

_AGAIN: Final = (
    "Where you trust the file, load it once with torch.load(path, map_location='cpu', weights_only=False), in a "
    "process that can import its classes; then torch.save(model.state_dict(), other_path), of the module in it, and "
    "push that"
)


class TorchFile:
    """A ``Source`` over a file of torch.save. Takes ownership of ``file`` once it is constructed.

    mapped  whether the file is in the zip format, and so read through a mapping
    key     where in what the file holds the state dict is, see ``nested``; None where there is only one
    """

    def __init__(self, file: OpenFile, *, mapped: bool, key: str | None = None) -> None:
        _require_safe_torch(file.path)
        self.origin = file.path
        self._file = file
        self._mapped = mapped
        self._ranges: MappedRanges | None = None
        tensors = state_dict_in(_load(file, mapped=mapped), quoted(file.path), key)
        if what := file.changed():
            raise CheckpointError(f"{what} changed while it was being opened; push it when it is complete")
        self._tensors = StateDict(tensors, origin=quoted(file.path))
        self.structure: Structure = self._tensors.structure
        if not mapped:
            file.close()  # Everything is in memory, so nothing can change any more.

    def read(self, row: int, start: int, stop: int) -> memoryview:
        """See ``Source.read``; of a mapped file's contiguous tensors a view of the mapping."""
        if self._mapped:
            self._file.require_whole(self.structure.names[row])
        return self._tensors.read(row, start, stop)

    def read_packed(self, rows: Sequence[int], gaps: list[int] | None) -> memoryview:
        """See ``Source.read_packed``; always a copy."""
        if self._mapped:
            self._file.require_whole(self.structure.names[rows[0]])
        return self._tensors.read_packed(rows, gaps)

    def extent(self, row: int) -> Extent | None:
        """See ``InFiles``; of a mapped file, by where torch has mapped it."""
        if not self._mapped or not self._file.local:
            return None
        if self._ranges is None:
            self._ranges = MappedRanges(self._file)
        place = self._tensors.place(row)
        offset = None if place is None else self._ranges.offset(*place)
        return None if offset is None else Extent(self._file.descriptor, offset)

    def lends(self, content: memoryview) -> bool:
        """See ``Source.lends``."""
        return self._tensors.lends(content)

    def changed(self) -> str | None:
        """See ``Source.changed``; by the file's size and time of change."""
        return self._file.changed() if self._mapped else None

    def close(self) -> None:
        """See ``Source.close``."""
        self._tensors.close()
        self._file.close()


def _require_safe_torch(path: str) -> None:
    installed = torch.__version__
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < _SAFE_SINCE:
        raise CheckpointError(
            f"{quoted(path)} was written by torch.save, and torch {installed} cannot read such files safely "
            "(CVE-2025-32434, CVE-2026-24747): update torch to 2.10 or later, or push a safetensors file"
        )


def _load(file: OpenFile, *, mapped: bool) -> object:
    try:
        return torch.load(file.stable_path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # The loader meets damage with whatever the damage provokes.
        raise CheckpointError(f"{quoted(file.path)} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why torch did not load the file, as the end of a sentence that begins with its path."""
    text = str(error)
    if found := _CLASS.search(text):
        return (
            f"holds an object of {quoted(found[1])} and not tensors alone; to read such objects is to run their "
            f"code, so it is not done. {_AGAIN}"
        )
    if found := _REFUSED.search(text):
        # Of the whole message only this: the rest recommends to switch the safety off.
        return (
            f"is damaged, or needs more of pickle than torch's safe reader has ({_brief(found[1])}); save it again "
            "with torch's default pickle_protocol, the state dict alone"
        )
    what = f"{type(error).__name__}: {_brief(text)}"
    return f"cannot be read by torch, so it is probably truncated or damaged ({what}); fetch or save it again"


def _brief(text: str) -> str:
    """The line that says most of one of torch's messages, which can be pages and quote what the file holds."""
    return quoted((text.strip().splitlines() or ["no reason given"])[0])
