"""NumPy's .npz: arrays in a zip archive, mapped where they are stored as they are; needs no torch, and never unpickles.

An array that is compressed (numpy.savez_compressed) is read whole when the archive is opened, and costs its size in
memory. The archive's checksums are only checked of those.
"""

import math
import struct
import zipfile
import zlib
from typing import Any, Final, NamedTuple

import numpy as np

from shipd.checkpoints.arrays import ArrayContent, torch_dtype, travels_as_it_is
from shipd.checkpoints.mapped import Content, MappedFile
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError
from shipproto.errors import ProtocolError
from shipproto.structure import Structure, TensorSpec

_SUFFIX: Final = ".npy"

_LOCAL: Final = struct.Struct("<4s22xHH")
"""The header in front of a member: its signature, and the lengths of the name and of the extra field behind it."""


class _Array(NamedTuple):
    """One array of the archive.

    header  bytes of its member in front of the elements
    turned  whether it is in Fortran's order
    """

    member: zipfile.ZipInfo
    header: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    turned: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile(MappedFile):
    """A ``Source`` over an .npz archive. Takes ownership of ``file`` once it is constructed."""

    def __init__(self, file: OpenFile) -> None:
        path = quoted(file.path)
        try:
            with open(file.descriptor, "rb", closefd=False) as raw, zipfile.ZipFile(raw) as archive:
                arrays = _arrays(file, archive)
                structure = Structure.build(
                    TensorSpec(name, torch_dtype(array.dtype, file.path, name), array.shape)
                    for name, array in arrays.items()
                )
                in_order = [arrays[name] for name in structure.names]
                unpacked = {
                    row: _unpacked(file, archive, array)
                    for row, array in enumerate(in_order)
                    if array.member.compress_type != zipfile.ZIP_STORED
                }
        except ProtocolError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({quoted(str(error))}); fetch or save it again") from error
        starts = [0 if row in unpacked else _start(file, array) for row, array in enumerate(in_order)]
        super().__init__(file, structure, starts)
        self._others = {
            row: content
            for row, array in enumerate(in_order)
            if (content := self._content(array, starts[row], unpacked.get(row))) is not None
        }

    def _content(self, array: _Array, start: int, unpacked: bytes | None) -> Content | None:
        """What reads ``array``; None where it can be read in place."""
        if unpacked is None and not array.turned and travels_as_it_is(array.dtype):
            return None
        order: Any = "F" if array.turned else "C"
        if unpacked is None:
            return ArrayContent(np.ndarray(array.shape, array.dtype, self._map, start, order=order))
        return ArrayContent(np.ndarray(array.shape, array.dtype, unpacked, order=order))


def _arrays(file: OpenFile, archive: zipfile.ZipFile) -> dict[str, _Array]:
    """The arrays by name, none of them read yet."""
    arrays: dict[str, _Array] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(_SUFFIX)
        if name == member.filename:
            raise CheckpointError(
                f"{quoted(file.path)} holds {quoted(name)}, which is no array; push an archive of numpy.savez alone"
            )
        if name in arrays:
            raise CheckpointError(f"{quoted(file.path)} holds {quoted(name)} twice: it was written wrongly")
        arrays[name] = _described(file, archive, member)
    return arrays


def _described(file: OpenFile, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Array:
    what = f"{quoted(member.filename)} of {quoted(file.path)}"
    if member.flag_bits & 1:
        raise CheckpointError(f"{what} is encrypted; save it again with numpy.savez")
    try:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            # The third version differs from the second in the names of fields alone, and structures are refused.
            first = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, turned, dtype = read(stream)
            array = _Array(member, stream.tell(), shape, dtype, turned and len(shape) > 1)
    except Exception as error:  # numpy tries several parsers of Python's on what it does not understand.
        raise CheckpointError(f"{what} is damaged ({quoted(str(error))}); fetch or save it again") from error
    if version > (3, 0):
        raise CheckpointError(f"{what} is of version {version} of numpy's format, which is not known here")
    if any(type(size) is not int or size < 0 for size in shape):
        raise CheckpointError(f"{what} has a shape that is no list of sizes: it is damaged")
    if not dtype.hasobject and member.file_size != array.header + array.nbytes:
        raise CheckpointError(
            f"{what} needs {array.nbytes} bytes for its shape {list(shape)} and has "
            f"{member.file_size - array.header}: it is damaged"
        )
    return array


def _start(file: OpenFile, array: _Array) -> int:
    """Where in the file the elements of a stored array begin."""
    offset = array.member.header_offset
    signature, name, extra = _LOCAL.unpack(file.read_at(offset, _LOCAL.size).ljust(_LOCAL.size, b"\0"))
    start = offset + _LOCAL.size + int(name) + int(extra) + array.header
    if signature != b"PK\x03\x04" or start + array.nbytes > file.size:
        raise CheckpointError(
            f"{quoted(array.member.filename)} of {quoted(file.path)} does not lie where the archive says; fetch or "
            "save it again"
        )
    return start


def _unpacked(file: OpenFile, archive: zipfile.ZipFile, array: _Array) -> bytes:
    with archive.open(array.member) as stream:
        stream.read(array.header)
        elements = stream.read()
    if len(elements) != array.nbytes:
        raise CheckpointError(
            f"{quoted(array.member.filename)} of {quoted(file.path)} has {len(elements)} bytes and needs "
            f"{array.nbytes}: it is damaged"
        )
    return elements
