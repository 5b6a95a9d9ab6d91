"""Safetensors files, memory-mapped and checked in full before anything is believed; needs no torch.

The format (https://huggingface.co/docs/safetensors/index#format): eight bytes of little-endian header length,
a JSON object {name: {"dtype", "shape", "data_offsets": [begin, end]}} with an optional "__metadata__" of
texts, then the tensors' bytes, which the offsets must cover without overlaps and without holes.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, NoReturn

from shipd.checkpoints.mapped import MappedFile
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.plain_header import METADATA, Header, read_plain
from shipd.checkpoints.wording import encodable, listed, quoted
from shipd.errors import CheckpointError, UnsupportedTensor
from shipproto.dtypes import BY_NAME
from shipproto.errors import ProtocolError
from shipproto.limits import (
    MAX_DIMENSIONS,
    MAX_IMAGE_BYTES,
    MAX_METADATA_ENTRIES,
    MAX_METADATA_TEXT,
    MAX_NAME,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
)
from shipproto.structure import Structure, TensorSpec

_MAX_HEADER: Final = 100_000_000
"""The format's own limit."""

_MAX_BRACKETS: Final = 4 * MAX_TENSORS
"""A tensor's entry has one brace and two brackets. More would cost gigabytes to parse, for nothing."""

_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}

_SUB_BYTE: Final = frozenset({"F4", "F6_E2M3", "F6_E3M2"})

_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


class SafetensorsFile(MappedFile):
    """A ``Source`` over a safetensors file. Takes ownership of ``file`` once it is constructed.

    metadata  the file's own, as far as it fits a version's: the first entries that are short enough
    """

    def __init__(self, file: OpenFile) -> None:
        raw, data = _header(file)
        header = read_plain(raw, _DTYPES)
        if header is None:
            header = _read_each(file, raw, data)
        _require_size(file, data + header.end)
        self.metadata: Mapping[str, str] = _shortened(header.metadata)
        super().__init__(file, header.structure, [data + start for start in header.starts])


def _header(file: OpenFile) -> tuple[bytes, int]:
    """The header's JSON text and the offset at which the tensors' bytes begin."""
    path = quoted(file.path)
    if file.size < 8:
        raise CheckpointError(f"{path} has only {file.size} bytes: its save or download was interrupted")
    size = int.from_bytes(file.read_at(0, 8), "little")
    if size > _MAX_HEADER:
        raise CheckpointError(
            f"{path} has a header of {size} bytes by its own account, and safetensors allows {_MAX_HEADER}: "
            "it is damaged or no safetensors file"
        )
    if 8 + size > file.size:
        raise CheckpointError(
            f"{path} is truncated: its header alone needs {8 + size} bytes and the file has {file.size}; "
            "fetch or save it again"
        )
    raw = file.read_at(8, size)
    if raw[:1] != b"{":
        raise CheckpointError(f"{path} has a header that does not begin with '{{': it is damaged")
    if raw.count(b"{") + raw.count(b"[") > _MAX_BRACKETS:
        raise CheckpointError(f"{path} has a header of more than {MAX_TENSORS} tensors, or of something else")
    return raw, 8 + size


def _read_each(file: OpenFile, raw: bytes, data: int) -> Header:
    """What the header says, checked tensor by tensor. Raises CheckpointError or UnsupportedTensor."""
    fields = _fields(file, raw)
    metadata = _metadata(file, fields)
    specs, begins, end = _tensors(file, fields)
    _require_size(file, data + end)
    try:
        structure = Structure.build(specs)
    except ProtocolError as error:
        raise CheckpointError(f"{quoted(file.path)}: {error}") from error
    return Header(metadata, structure, [begins[name] for name in structure.names], end)


def _fields(file: OpenFile, raw: bytes) -> dict[str, Any]:
    """The header's JSON object."""
    path = quoted(file.path)
    try:
        fields: dict[str, Any] = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Repeated as error:
        raise CheckpointError(f"{path} has {error} twice in its header: it was written wrongly") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not valid JSON ({str(error)[:200]})") from error
    return fields


class _Repeated(Exception):
    """A key that an object has twice. Two readers would take a different one each."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(quoted(key))
            seen.add(key)
    return fields


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _metadata(file: OpenFile, fields: dict[str, Any]) -> dict[str, str]:
    found = fields.pop(METADATA, None)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{quoted(file.path)} has a __metadata__ that is not an object of texts")
    return found


def _shortened(found: Mapping[str, str]) -> dict[str, str]:
    """As much of a file's metadata as fits a version's."""
    short = (
        (key, value)
        for key, value in found.items()
        if len(key) <= MAX_METADATA_TEXT and len(value) <= MAX_METADATA_TEXT and encodable(key + value)
    )
    return dict(itertools.islice(short, MAX_METADATA_ENTRIES))


def _tensors(file: OpenFile, fields: dict[str, Any]) -> tuple[list[TensorSpec], dict[str, int], int]:
    """Every tensor, where each begins in the data, and how many bytes of data they describe."""
    specs, placed = [], []
    for name, entry in fields.items():
        spec, begin, end = _tensor(file, name, entry)
        specs.append(spec)
        placed.append((begin, end, name))
    placed.sort()
    covered, previous = 0, ""
    for begin, end, name in placed:
        if begin < covered:
            raise CheckpointError(
                f"{quoted(file.path)}: tensors {quoted(previous)} and {quoted(name)} overlap (the second "
                f"begins at byte {begin} of the data, before byte {covered})"
            )
        if begin > covered:
            raise CheckpointError(
                f"{quoted(file.path)}: bytes {covered} to {begin} of the data, before tensor {quoted(name)}, "
                "belong to no tensor, which safetensors forbids"
            )
        covered, previous = end, name
    return specs, {name: begin for begin, _, name in placed}, covered


class _Subject(NamedTuple):
    """What a message is about; put into words only where there is a message."""

    path: str
    tensor: str

    def __str__(self) -> str:
        return f"{quoted(self.path)}: tensor {quoted(self.tensor)}"


def _tensor(file: OpenFile, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """One entry of the header, checked by itself: the tensor, and where it begins and ends in the data."""
    what = _Subject(file.path, name)
    if not 0 < len(name) <= MAX_NAME or not encodable(name):
        raise CheckpointError(f"{what} has a name that is not a text of 1 to {MAX_NAME} characters")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = listed(map(quoted, entry)) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        found = found or "nothing"
        raise CheckpointError(f"{what} must be described by dtype, shape and data_offsets, not by {found}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{what} has a dtype that is not a text")
    if dtype in _SUB_BYTE:
        raise UnsupportedTensor(f"{what} is {dtype}, whose elements are less than a byte: not supported", tensor=name)
    if dtype not in _DTYPES:
        raise UnsupportedTensor(f"{what} has the dtype {quoted(dtype)}, which is not supported", tensor=name)
    if isinstance(shape, list) and len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{what} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are supported")
    if not _sizes(shape, MAX_TENSOR_BYTES):
        raise CheckpointError(f"{what} has a shape that is not a list of sizes from 0 to {MAX_TENSOR_BYTES}")
    if not _sizes(offsets, MAX_IMAGE_BYTES) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has data_offsets that are not two ascending positions")
    needed = BY_NAME[_DTYPES[dtype]].itemsize
    for size in shape:
        needed *= size
    begin, end = offsets
    if end - begin != needed:
        raise CheckpointError(
            f"{what} of {dtype} {shape} needs {needed} bytes and its data_offsets give it {end - begin}"
        )
    return TensorSpec(name, _DTYPES[dtype], tuple(shape)), begin, end


def _sizes(value: object, largest: int) -> bool:
    """Whether ``value`` is a list of sizes. bool is a kind of int in Python, and not one here."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= largest for size in value)


def _require_size(file: OpenFile, needed: int) -> None:
    path = quoted(file.path)
    if needed == file.size:
        return
    if needed > file.size:
        raise CheckpointError(
            f"{path} is truncated: its header describes {needed} bytes and the file has {file.size}; "
            "fetch or save it again"
        )
    raise CheckpointError(
        f"{path} has {file.size - needed} bytes more than the {needed} that its header describes: it is "
        "damaged or was written by something else than safetensors"
    )
