"""Checkpoints in several files, with an index that says which file has which tensor.

The index is what transformers, diffusers and accelerate write: a JSON object with a ``weight_map`` of
{tensor name: file name}, the files beside it (model.safetensors.index.json, pytorch_model.bin.index.json).
Index and files must agree in full: a tensor too many or too few is another save's, or half a download.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import Any, Final

from shipd.checkpoints.content import MAX_INDEX, Kind, identify
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.parts import Parts
from shipd.checkpoints.source import Source, open_identified
from shipd.checkpoints.wording import listed, quoted
from shipd.errors import CheckpointError
from shipd.units import format_bytes

_TOGETHER: Final = "index and files are not of one save; download or save all of them again, together"

_SHARDS: Final = (Kind.SAFETENSORS, Kind.TORCH_ZIP, Kind.TORCH_LEGACY)


def open_sharded(index: OpenFile) -> Source:
    """All files that ``index`` names, as one source. Closes ``index`` then, which is not needed any more.

    Raises CheckpointError where the index is damaged or names a file outside its directory, where a file is missing,
    or where index and files do not agree; and whatever the files themselves raise.
    """
    weight_map = read_index(index)
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, []).append(tensor)
    _require_files(index, sorted(files))
    with ExitStack() as opened:
        shards: dict[str, Source] = {}
        for name in sorted(files):
            shards[name] = _open_shard(index, name)
            opened.callback(shards[name].close)
        _require_agreement(index.path, weight_map, files, shards)
        whole = Parts(list(shards.values()), index.path)
        opened.pop_all()
    index.close()
    return whole


def read_index(index: OpenFile) -> Mapping[str, str]:
    """The file of each tensor, a relative path that stays in the index's directory. Raises CheckpointError."""
    path = quoted(index.path)
    if index.size > MAX_INDEX:
        raise CheckpointError(
            f"{path} looks like the index of a checkpoint in several files, but has {format_bytes(index.size)}, and at "
            f"most {format_bytes(MAX_INDEX)} are read"
        )
    try:
        fields = json.loads(index.read_at(0, index.size), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is the index of a checkpoint in several files, and damaged ({quoted(str(error))}); "
            "fetch or save it again"
        ) from error
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has a weight_map that is not an object of file names; fetch or save it again")
    for tensor, name in weight_map.items():
        # Symbolic links are followed: a download cache consists of them.
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise CheckpointError(
                f"{path} says that tensor {quoted(tensor)} is in {quoted(name)}: only files in the directory of the "
                "index and below it are read. Put index and files into one directory, named without '..'"
            )
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has {twice!r} twice")
    return fields


def _require_files(index: OpenFile, names: Sequence[str]) -> None:
    path = quoted(index.path)
    if not names:
        raise CheckpointError(f"{path} is an index that names no tensors; fetch or save it again")
    missing = index.missing_beside(names)
    if missing:
        remedy = "Fetch what is missing into that directory" if index.local else "Upload what is missing to there"
        are = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"of the files that {path} names, {len(missing)} of {len(names)} {are} missing in "
            f"{quoted(index.folder)}: {listed(map(quoted, missing))}. "
            f"{remedy}, or push a checkpoint that is whole"
        )


def _open_shard(index: OpenFile, name: str) -> Source:
    file = index.open_beside(name)
    try:
        kind = identify(file)
        if kind not in _SHARDS:
            raise CheckpointError(
                f"{quoted(file.path)} is {kind.value}: what an index names must be files of safetensors or "
                "torch.save; push it by itself"
            )
        return open_identified(file, kind)
    except BaseException:
        file.close()
        raise


def _require_agreement(
    index: str, weight_map: Mapping[str, str], files: Mapping[str, Sequence[str]], shards: Mapping[str, Source]
) -> None:
    """Raise CheckpointError unless every file has exactly the tensors that the index gives it."""
    found: dict[str, str] = {}
    for name, shard in shards.items():
        for tensor in shard.structure.names:
            if (other := found.setdefault(tensor, name)) != name:
                raise CheckpointError(
                    f"{quoted(index)}: tensor {quoted(tensor)} is in {quoted(other)} and in {quoted(name)} as well, "
                    f"and only one of them can be right: {_TOGETHER}"
                )
    for name, tensors in files.items():
        absent = sorted(tensor for tensor in tensors if found.get(tensor) != name)
        if absent:
            where = found.get(absent[0])
            instead = f"which is in {quoted(where)}" if where else "which is in none of the files"
            more = f" ({len(absent)} tensors in all)" if len(absent) > 1 else ""
            raise CheckpointError(
                f"{quoted(index)} says that {quoted(name)} has tensor {quoted(absent[0])}, {instead}{more}: {_TOGETHER}"
            )
    if len(found) > len(weight_map):
        unnamed = sorted(tensor for tensor in found if tensor not in weight_map)
        raise CheckpointError(
            f"{quoted(index)} does not name {len(unnamed)} of the tensors in its files: "
            f"{listed(f'{quoted(tensor)} in {quoted(found[tensor])}' for tensor in unnamed)}; {_TOGETHER}"
        )
