"""What a checkpoint file is, judged by its first bytes and never by its name.

Everything that is none of the kinds is refused with a message that says what it looks like instead,
because the usual foreign file is a mishap: a login page saved as a model, a git-LFS pointer, half a download.
"""

import enum
import re
import struct
import zipfile
from typing import Final

from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.wording import listed, quoted
from shipd.errors import CheckpointError
from shipd.units import format_bytes

_OPENING: Final = 4096

_PICKLE_MAGIC: Final = bytes.fromhex("6cfc9c46f9206aa85019")
"""torch's legacy magic number as pickle writes it, within the first pickled object of the file."""

_PROTOCOLS: Final = (b"\x02", b"\x03", b"\x04", b"\x05")
"""Protocols of pickle, in a pickle's second byte."""

_MAX_PICKLE: Final = 256 * 1024 * 1024
"""Bytes of the pickle inside a torch.save file, which has no tensor content: a quarter kilobyte for each of
MAX_TENSORS names. torch reads it whole."""

MAX_INDEX: Final = 128 * 1024 * 1024
"""Bytes of an index: an eighth of a kilobyte for each of MAX_TENSORS. It is read whole."""

_SAVE_AS: Final = "save it as safetensors, or with torch.save(model.state_dict(), path)"

_FOREIGN: Final = (
    (b"\x1f\x8b", "compressed with gzip: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it first"),
    (b"\xfd7zXZ\x00", "compressed with xz: decompress it first"),
    (b"BZh", "compressed with bzip2: decompress it first"),
    (b"\x04\x22\x4d\x18", "compressed with lz4: decompress it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"GGUF", "a GGUF file of llama.cpp, whose quantised tensors have no torch dtype"),
    (b"\x93NUMPY", "a single numpy array, and nothing says which tensor it is: save it with numpy.savez, by name"),
    (b"\x7fELF", "a program or shared library"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
)

_WEIGHT_MAP: Final = b'"weight_map"'

_NOT_FETCHED: Final = "the download link probably led to a login or error page; download it again"


class Kind(enum.Enum):
    """The kinds of file that can be read, in the words of messages."""

    SAFETENSORS = "a safetensors file"
    INDEX = "the index of several files"
    TORCH_ZIP = "a file of torch.save"
    TORCHSCRIPT = "a TorchScript archive"
    NPZ = "an .npz archive of numpy"
    HDF5 = "an HDF5 file"
    TORCH_LEGACY = "a file of torch.save before 1.6"


def identify(file: OpenFile) -> Kind:
    """The kind of ``file``. Raises CheckpointError that names what it looks like where it is none of them."""
    opening = file.read_at(0, _OPENING)
    if not opening:
        raise CheckpointError(f"{quoted(file.path)} is empty: its save or download was interrupted")
    # Before all else: the length in front of the brace can look like the beginning of anything.
    if _headed(opening, 1 << 32):
        return Kind.SAFETENSORS
    if opening.startswith(b"PK\x03\x04"):
        return _identify_zip(file)
    if opening[:1] == b"\x80" and _PICKLE_MAGIC in opening[:32]:
        return Kind.TORCH_LEGACY
    if opening.startswith(b"\x89HDF\r\n\x1a\n"):
        return Kind.HDF5
    if _is_index(file, opening):
        return Kind.INDEX
    if problem := _foreign(opening, file.size):
        raise CheckpointError(f"{quoted(file.path)} is {problem}")
    if _headed(opening, 1 << 48):
        return Kind.SAFETENSORS  # With a damaged length: its reader says so.
    if not any(opening):
        problem = "begins with nothing but zeros: it was allocated and never written, or its disk lost the content"
    elif file.size <= 8:
        problem = f"has only {file.size} bytes: its save or download was interrupted"
    else:
        problem = f"begins with {opening[:16]!r}, which is neither safetensors nor torch.save; {_SAVE_AS}"
    raise CheckpointError(f"{quoted(file.path)} {problem}")


def _headed(opening: bytes, longest: int) -> bool:
    """Whether this is a length below ``longest`` and the brace of a header: text would be a longer one."""
    return opening[8:9] == b"{" and int.from_bytes(opening[:8], "little") < longest


def _is_index(file: OpenFile, opening: bytes) -> bool:
    """Whether this is a JSON object with the weight_map of a checkpoint in several files."""
    if not opening.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return False
    # Anything may stand before the map.
    return _WEIGHT_MAP in opening or (file.size <= MAX_INDEX and _WEIGHT_MAP in file.read_at(0, file.size))


def _foreign(opening: bytes, size: int) -> str | None:
    """What the file is, as the end of a sentence, where its opening tells."""
    for magic, what in _FOREIGN:
        if opening.startswith(magic):
            return what
    if opening[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    text = opening.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        stands_for = re.search(rb"\nsize (\d{1,18})\n", opening)
        told = f" (which has {format_bytes(int(stands_for[1]))})" if stands_for else ""
        return f"a git-LFS pointer of {size} bytes and not the file it stands for{told}: run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return f"an HTML page: {_NOT_FETCHED}"
    if text.startswith(b"<"):
        return f"an XML document: {_NOT_FETCHED}"
    if text.startswith(b"{"):
        return f"a JSON text: if it is an error message, {_NOT_FETCHED}"
    if opening[:1] == b"\x80" and opening[1:2] in _PROTOCOLS:
        return f"a bare pickle, which could run any code when it is read; where you trust it, {_SAVE_AS}"
    return None


def _identify_zip(file: OpenFile) -> Kind:
    """The kind of a zip archive. Raises CheckpointError where it is none, or torch could not map it as it is."""
    path = quoted(file.path)
    try:
        with file.stream() as raw, zipfile.ZipFile(raw) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError) as error:
        raise CheckpointError(
            f"{path} begins like a torch.save file but has no readable table of contents at its end "
            f"({format_bytes(file.size)}, {quoted(str(error))}): its save or download was interrupted, or it "
            "is damaged; fetch or save it again"
        ) from error
    names = {member.filename for member in members}
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" not in inner:
        if any(name.endswith(".npy") for name in names):
            return Kind.NPZ
        if "archive_format" in inner:
            what = "an exported program of torch.export"
        else:
            what = f"a zip archive, but not one of torch.save: it holds {listed(map(quoted, sorted(names)))}"
        raise CheckpointError(f"{path} is {what}; {_SAVE_AS}")
    _require_small_pickle(path, members)
    if "constants.pkl" in inner:
        return Kind.TORCHSCRIPT
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise CheckpointError(
                f"{path} has been repacked: its member {quoted(member.filename)} is compressed or encrypted, "
                "which torch.save never does; save it again with torch.save"
            )
    return Kind.TORCH_ZIP


def _require_small_pickle(path: str, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        if member.file_size > _MAX_PICKLE and member.filename.endswith("/data.pkl"):
            raise CheckpointError(
                f"{path} has {format_bytes(member.file_size)} of pickled objects besides its tensors, and at "
                f"most {format_bytes(_MAX_PICKLE)} are read; {_SAVE_AS}"
            )
