"""Which file of a directory is its checkpoint.

Exactly one must be: the files that an index names count as one with it. Safetensors comes before all else, because a
trainer's directory also has its optimizer's state and its arguments, in files of torch.save.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from shipd.checkpoints.content import Kind, identify
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.sharded import read_index
from shipd.checkpoints.wording import listed, quoted
from shipd.errors import CheckpointError

_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".h5", ".hdf5")
"""What checkpoints are usually called; used to say why none was found, never to decide anything."""

_INDEX: Final = ".index.json"
"""And their indexes."""

_ENTRIES: Final = 1000
"""Entries of a directory that are looked at."""

_SHARD: Final = re.compile(r"-0*(\d{1,6})-of-0*(\d{1,6})\b")
"""Number and count in the name of a file of a sharded checkpoint; used to say what is missing."""


class Folder(Protocol):
    """A directory. ``path`` is what it is called in messages."""

    @property
    def path(self) -> str: ...

    def names(self) -> list[str]:
        """Of all files directly in it, sorted. Raises CheckpointError."""
        ...

    def open(self, name: str) -> OpenFile:
        """One of them. Raises CheckpointError."""
        ...


class LocalFolder:
    """A ``Folder`` of this host."""

    def __init__(self, path: str) -> None:
        self.path = path

    def names(self) -> list[str]:
        """See ``Folder.names``; of at most as many as are looked at, and then one more."""
        try:
            with os.scandir(self.path) as entries:
                names = sorted(entry.name for entry, _ in zip(entries, range(_ENTRIES + 1), strict=False))
                files = [name for name in names if (Path(self.path) / name).is_file()]
        except OSError as error:
            raise CheckpointError(f"the directory {quoted(self.path)} cannot be read: {error.strerror}") from error
        return names if len(names) > _ENTRIES else files

    def open(self, name: str) -> OpenFile:
        """See ``Folder.open``."""
        return OpenFile.open(str(Path(self.path) / name))


def checkpoint_in(folder: Folder) -> str:
    """The name of the one checkpoint that lies directly in ``folder``.

    Raises CheckpointError where there is none, more than one, or only a part of one.
    """
    path, names = folder.path, folder.names()
    if len(names) > _ENTRIES:
        raise CheckpointError(
            f"{quoted(path)} is a directory of more than {_ENTRIES} entries; push the checkpoint's file or its index"
        )
    if ".metadata" in names:
        raise CheckpointError(
            f"{quoted(path)} is a directory; it looks like a torch.distributed checkpoint: turn it into one file with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save, and push the model's part of it"
        )
    kinds: dict[str, Kind] = {}
    indexes: dict[str, frozenset[str]] = {}
    refused: list[str] = []
    for name in names:
        try:
            kinds[name], indexes[name] = _look(folder, name)
        except CheckpointError as error:
            if Path(name).suffix in _SUFFIXES or name.endswith(_INDEX):
                refused.append(str(error))
    shards = frozenset().union(*indexes.values())
    whole = [name for name in kinds if name not in shards]
    candidates = [name for name in whole if _is_safetensors(name, kinds, indexes)] or whole
    if len(candidates) == 1 and kinds[candidates[0]] is Kind.INDEX:
        return candidates[0]
    _refuse_half_a_set(path, candidates)
    if len(candidates) > 1:
        raise CheckpointError(
            f"{quoted(path)} is a directory of {len(candidates)} checkpoints: {listed(map(quoted, candidates))}; "
            "push one of these files"
        )
    if not candidates:
        others = f", and neither can {len(refused) - 1} more" if len(refused) > 1 else ""
        why = f"no file in it can be read as one: {refused[0]}{others}" if refused else "it has none; name a file"
        raise CheckpointError(f"{quoted(path)} is a directory and not a checkpoint; {why}")
    return candidates[0]


def _look(folder: Folder, name: str) -> tuple[Kind, frozenset[str]]:
    """What the file is, and the files that it is the index of. Raises CheckpointError where it is no checkpoint."""
    file = folder.open(name)
    try:
        kind = identify(file)
        if kind is not Kind.INDEX:
            return kind, frozenset()
        try:
            return kind, frozenset(read_index(file).values())
        except CheckpointError:
            return kind, frozenset()  # It is said when the index is opened.
    finally:
        file.close()


def _is_safetensors(name: str, kinds: Mapping[str, Kind], indexes: Mapping[str, frozenset[str]]) -> bool:
    """Whether these are the bytes of a safetensors file, or an index of some."""
    return any(kinds.get(part) is Kind.SAFETENSORS for part in {name, *indexes[name]})


def _refuse_half_a_set(path: str, candidates: Sequence[str]) -> None:
    """Refuse what calls itself one of several files and has no index."""
    numbered = {name: match for name in candidates if (match := _SHARD.search(name))}
    if not numbered or len(numbered) < len(candidates):
        return
    count = max(int(match[2]) for match in numbered.values())
    missing = sorted(set(range(1, count + 1)) - {int(match[1]) for match in numbered.values()})
    if count < 2:
        return
    lacks = f", of which {len(missing)} are missing (numbers {listed(map(str, missing))})" if missing else ""
    raise CheckpointError(
        f"{quoted(path)} has {listed(map(quoted, numbered))} of a checkpoint in {count} files{lacks}, and no index "
        "that says which file has which tensor; fetch all of them and the index (such as model.safetensors.index.json)"
    )
