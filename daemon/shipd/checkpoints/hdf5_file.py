"""HDF5 files, as Keras and h5py write them; needs h5py (the extra ``hdf5``) and no torch.

Groups become dotted names: the dataset /encoder/dense/kernel is the tensor encoder.dense.kernel. Datasets that are
stored in one piece are mapped. Those in chunks, compressed ones included, are read slice by slice through the HDF5
library; one whose chunks do not fit its cache is unpacked whole while it is read.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shipd.checkpoints.arrays import Sliceable, read_slice, torch_dtype, travels_as_it_is
from shipd.checkpoints.mapped import MappedFile
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.wording import OPTIMIZER, listed, quoted
from shipd.errors import CheckpointError, TensorChanged, UnsupportedTensor
from shipproto.errors import ProtocolError
from shipproto.structure import Structure, TensorSpec

if TYPE_CHECKING:
    import h5py

_KERAS: Final = "model_weights"
"""The group of the model in what Keras 2 saves of a model and its optimizer."""

_DEEPEST: Final = 64
"""Groups inside one another."""

_CACHE: Final = 16 * 1024 * 1024
"""Bytes of unpacked chunks that are kept, of the one dataset that is being read."""

_DAMAGE: Final = (OSError, RuntimeError, ValueError, KeyError, TypeError)
"""What h5py raises where the library meets damage."""


class _Entry(NamedTuple):
    """One dataset: where it is in the file, what it is, and the offset of its bytes where it can be mapped."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    identity: int


class Hdf5File(MappedFile):
    """A ``Source`` over an HDF5 file. Takes ownership of ``file`` once it is constructed.

    key  the group that holds the tensors, as names joined by dots or slashes, "." for the root; None for the root, or
         for Keras's group of the model where that is all there is
    """

    def __init__(self, file: OpenFile, key: str | None = None) -> None:
        library = _import(file)
        try:
            # The library insists on the name of a file that has one.
            opened = library.File(file.stable_path if file.local else file.stream(), "r", rdcc_nbytes=_CACHE)
        except _DAMAGE as error:
            raise _damaged(file, error) from error
        try:
            entries = _entries(library, file, opened, key)
            structure, rows = _structure(file, entries)
            self._datasets = _Datasets(opened, file)
            streamed = {
                row: _Dataset(self._datasets, entry.path, structure.names[row])
                for row, entry in enumerate(rows)
                if entry.offset is None
            }
            super().__init__(file, structure, [entry.offset or 0 for entry in rows], streamed)
        except _DAMAGE as error:
            opened.close()
            raise _damaged(file, error) from error
        except BaseException:
            opened.close()
            raise
        if not streamed:
            opened.close()

    def close(self) -> None:
        """See ``Source.close``."""
        super().close()
        self._datasets.close()


class _Datasets:
    """The datasets of an open file, of which one is open: chunks of the others are not kept."""

    def __init__(self, opened: "h5py.File", file: OpenFile) -> None:
        self.file = file
        self._opened = opened
        self._lock = threading.Lock()
        self._path = ""
        self._array: Sliceable | None = None

    def read(self, path: str, start: int, stop: int) -> memoryview:
        with self._lock:
            if path != self._path or self._array is None:
                self._array = None
                dataset = self._opened[path]
                chunk = dataset.dtype.itemsize
                for size in dataset.chunks or ():
                    chunk *= size
                self._array = dataset[...] if chunk > _CACHE and dataset.shape else dataset
                self._path = path
            return read_slice(self._array, start, stop)

    def close(self) -> None:
        with self._lock:
            self._array = None
            self._opened.close()


class _Dataset:
    """A ``Content`` over a dataset that is not stored as it travels."""

    def __init__(self, datasets: _Datasets, path: str, tensor: str) -> None:
        self._datasets = datasets
        self._path = path
        self._tensor = tensor

    def read(self, start: int, stop: int) -> memoryview:
        """See ``Content.read``. Raises TensorChanged where the library does not find the bytes."""
        try:
            return self._datasets.read(self._path, start, stop)
        except _DAMAGE as error:
            raise TensorChanged(
                f"tensor {quoted(self._tensor)} of {quoted(self._datasets.file.path)} cannot be read "
                f"({quoted(str(error))}): the file is damaged, or was written to",
                tensor=self._tensor,
            ) from error


def _import(file: OpenFile) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError(
            f"{quoted(file.path)} is an HDF5 file, and to read those takes h5py: pip install 'shipd[hdf5]'"
        ) from error
    return h5py


def _damaged(file: OpenFile, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{quoted(file.path)} cannot be read by the HDF5 library ({quoted(str(error))}): it is truncated, damaged or "
        "being written to; fetch or save it again"
    )


def _entries(library: Any, file: OpenFile, opened: "h5py.File", key: str | None) -> Mapping[str, _Entry]:
    """The datasets by the names of their tensors."""
    group = opened if key is None else _chosen(library, file, opened, key)
    parts = [name for name in group if not OPTIMIZER.search(name)]
    if key is None and parts == [_KERAS]:
        group = group[_KERAS]
        parts = list(group)
    found: dict[str, _Entry] = {}
    for path, names, dataset in _datasets(library, file, group, parts):
        tensor = ".".join(names)
        if tensor in found:
            raise CheckpointError(
                f"{quoted(file.path)}: {quoted(found[tensor].path)} and {quoted(path)} would both be the tensor "
                f"{quoted(tensor)}; rename one of them"
            )
        found[tensor] = _entry(library, file, path, tensor, dataset)
    if not found:
        left_out = sorted(set(group) - set(parts))
        only = (
            f" but the state of an optimizer ({listed(map(quoted, left_out))}), which is never shipped"
            if left_out
            else ""
        )
        raise CheckpointError(f"{quoted(file.path)} holds no datasets{only}; save the model's weights")
    return found


def _chosen(library: Any, file: OpenFile, opened: "h5py.File", key: str) -> "h5py.Group":
    if key == ".":
        return opened
    for path in (key, key.replace(".", "/")):
        group = opened
        for name in path.strip("/").split("/"):
            # A link could lead into another file.
            if not name or not isinstance(group.get(name, getlink=True), library.HardLink):
                break
            group = group[name]
            if not isinstance(group, library.Group):
                break
        else:
            return group
    raise CheckpointError(
        f"{quoted(file.path)} has no group under the key {quoted(key)}; at its root are "
        f"{listed(quoted(name) for name in opened) or 'none'}"
    )


def _datasets(
    library: Any, file: OpenFile, group: "h5py.Group", parts: list[str], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], "h5py.Dataset"]]:
    """The path, the names that lead to it, and the object of each dataset in ``parts`` of ``group`` and below."""
    for name in parts:
        path = f"{group.name.rstrip('/')}/{name}"
        names = (*above, name)
        link = group.get(name, getlink=True)
        if not isinstance(link, library.HardLink):
            raise CheckpointError(
                f"{quoted(file.path)}: {quoted(path)} is a link to another place or file, which is not followed; save "
                "the dataset itself there"
            )
        inner = group[name]
        if isinstance(inner, library.Dataset):
            yield path, names, inner
        elif isinstance(inner, library.Group):
            if len(names) > _DEEPEST:
                raise CheckpointError(f"{quoted(file.path)} has more than {_DEEPEST} groups inside one another")
            yield from _datasets(library, file, inner, list(inner), names)


def _entry(library: Any, file: OpenFile, path: str, tensor: str, dataset: "h5py.Dataset") -> _Entry:
    """Raises UnsupportedTensor where the dataset cannot be a tensor, CheckpointError where it is not in this file."""
    what = f"tensor {quoted(tensor)} of {quoted(file.path)}"
    if dataset.shape is None:
        raise UnsupportedTensor(f"{what} has no elements and no shape either (H5S_NULL); leave it out", tensor=tensor)
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{what} is kept in other files, which are not read; save it in this one")
    stored = dataset.id.get_type()
    dtype = dataset.dtype
    if dtype.kind == "f" and not stored.equal(library.h5t.py_create(dtype)):
        raise UnsupportedTensor(
            f"{what} has floating-point numbers of {stored.get_size()} bytes in a format of their own (HDF5 has no "
            "bfloat16 and no float8); save it as float32, or the checkpoint as safetensors, which has them",
            tensor=tensor,
        )
    name = torch_dtype(dtype, file.path, tensor)
    offset = dataset.id.get_offset() if dataset.chunks is None and travels_as_it_is(dtype) else None
    if offset is not None and offset + dataset.nbytes > file.size:
        raise CheckpointError(f"{what} reaches beyond the end of the file, so it is truncated; fetch or save it again")
    return _Entry(path, name, tuple(dataset.shape), offset, hash(dataset.id))


def _structure(file: OpenFile, entries: Mapping[str, _Entry]) -> tuple[Structure, list[_Entry]]:
    """The structure, and the dataset of each of its rows. Names of one dataset are tied."""
    first: dict[int, str] = {}
    specs = []
    for tensor, entry in entries.items():
        root = first.setdefault(entry.identity, tensor)
        specs.append(TensorSpec(tensor, entry.dtype, entry.shape, None if root == tensor else root))
    try:
        structure = Structure.build(specs)
    except ProtocolError as error:
        raise CheckpointError(f"{quoted(file.path)}: {error}") from error
    return structure, [entries[name] for name in structure.names]
