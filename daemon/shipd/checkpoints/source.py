"""What a push reads from, and how whatever a user hands over becomes one.

``open_source`` imports torch only where it must: safetensors files need none.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, assert_never, runtime_checkable

from shipd.checkpoints.content import Kind, identify
from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.remote.location import is_url, local_path, scheme_of, was_url
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError
from shipproto.frame import Buffer
from shipproto.limits import LEAF_SIZE, TENSOR_ALIGNMENT
from shipproto.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor, nn

    Checkpoint = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]
    """What can be pushed, and be a base: a state dict, a module, or the path or URL of a checkpoint."""

_T = TypeVar("_T")

MAX_READ: Final = 4 * LEAF_SIZE
"""Bytes of one read. What is not contiguous in host memory passes through a buffer of this order."""


def check_range(structure: Structure, row: int, size: int, start: int, stop: int) -> None:
    """Raise ValueError where [start, stop) may not be read of the ``size`` bytes of the tensor in ``row``."""
    if not 0 <= start <= stop <= size or stop - start > MAX_READ:
        raise ValueError(
            f"bytes {start} to {stop} of tensor {quoted(structure.names[row])} ({size} bytes) cannot be "
            f"read: a read lies inside the tensor and has at most {MAX_READ} bytes"
        )


def pick(column: list[_T], rows: Sequence[int]) -> list[_T]:
    """The entries of ``rows``, which may be a range."""
    if isinstance(rows, range):
        return column[rows.start : rows.stop]
    return list(map(column.__getitem__, rows))


def join(parts: Iterable[Buffer], gaps: list[int] | None) -> memoryview:
    """``parts`` one after the other, with ``gaps[k]`` bytes of zeros after the k-th of them, none after the last."""
    if gaps is None:
        return memoryview(b"".join(parts))
    between = (_ZEROS[:gap] for gap in gaps)
    return memoryview(b"".join(chain.from_iterable(zip_longest(parts, between, fillvalue=b""))))


_KEYED: Final = (Kind.TORCH_ZIP, Kind.TORCH_LEGACY, Kind.HDF5)
"""Kinds of file that can hold more than one version's tensors."""

_ZEROS: Final = bytes(TENSOR_ALIGNMENT)


@runtime_checkable
class Source(Protocol):
    """The tensors of one version, readable in any order and from several threads.

    structure  names, dtypes, shapes and ties, sorted by name; rows are counted in it
    origin     where they come from, for messages: a path, or ``"state dict"``
    """

    @property
    def structure(self) -> Structure: ...

    @property
    def origin(self) -> str: ...

    def read(self, row: int, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the tensor in ``row``, at most MAX_READ; little-endian, row-major.

        A read-only view of the source's memory where that allows it; otherwise of a buffer that is the
        calling thread's and valid until the same thread's next read of this source. Raises TensorChanged
        where the bytes are gone, ValueError for a range that does not lie in the tensor.
        """
        ...

    def read_packed(self, rows: Sequence[int], gaps: list[int] | None) -> memoryview:
        """All bytes of the tensors in ``rows``, one after the other, with zeros between them: ``gaps[k]`` bytes after
        the k-th, fewer than TENSOR_ALIGNMENT, and none after the last; None for none at all. At most MAX_READ in all.
        As a range, of step 1, ``rows`` are quicker found.

        A view of the source's memory where they lie there like that; otherwise a copy, and not of a buffer that is
        used again. Raises TensorChanged where the bytes are gone.
        """
        ...

    def lends(self, content: memoryview) -> bool:
        """Whether ``content``, which ``read`` has returned, is the source's own memory and no buffer or copy.

        Then it keeps its bytes until the push is over, as long as the user keeps to what a push asks for.
        """
        ...

    def changed(self) -> str | None:
        """The name of a tensor or a description of the file that is known to have changed since opening.

        None says that no change is known: what leaves no trace (a fused optimiser's step, a write within the
        resolution of a file's time stamp) only shows in the digests.
        """
        ...

    def close(self) -> None:
        """Let go of the file or the tensors. Views already handed out stay valid. Harmless when repeated."""
        ...


def open_source(
    obj: "Checkpoint", *, key: str | None = None, snapshot: bool = False, fetching: Fetching | None = None
) -> Source:
    """The source for a checkpoint's path or URL, a state dict or a module.

    A text that begins with a scheme, such as "https://" or "s3://", is a URL, whatever files there are: one that is
    really called so is meant by "./" in front of its name. ``fetching`` is what fetches from URLs; None for a new one.
    ``key`` says where in it the state dict is, as names joined by dots, where it holds more than one.
    ``snapshot`` copies the tensors of a state dict or module to host memory first: training may go on.
    A file is not copied: once open it cannot be replaced, and ``changed`` tells when it is written to.

    Raises CheckpointError for a file that cannot be read or fetched and for a ``key`` that is needed or leads nowhere,
    Stalled and Interrupted where ``fetching`` does, UnsupportedTensor for a tensor that cannot be shipped, TypeError
    where ``obj`` is none of these.
    """
    if isinstance(obj, (str, os.PathLike)):
        path = os.fspath(obj)
        if not isinstance(path, str):
            raise TypeError(f"a checkpoint's path must be text, not bytes: use os.fsdecode on {path!r}")
        if isinstance(obj, str) and is_url(path):
            return _open_url(path, key, fetching or Fetching())
        return _open_path(path, key)
    torch = sys.modules.get("torch")
    if not isinstance(obj, Mapping) and (torch is None or not isinstance(obj, torch.nn.Module)):
        raise TypeError(
            "what is pushed must be the path of a checkpoint, a mapping of names to tensors or an nn.Module; "
            f"this is a {type(obj).__module__}.{type(obj).__qualname__}"
        )
    from shipd.checkpoints.state_dict import StateDict

    if key is not None:
        from shipd.checkpoints.nested import state_dict_in

        if not isinstance(obj, Mapping):
            raise CheckpointError(f"a module has no parts to choose from: push it without key={quoted(key)}")
        obj = state_dict_in(obj, "this mapping", key)
    return StateDict(obj, snapshot=snapshot)


def _open_path(path: str, key: str | None) -> Source:
    if os.path.isdir(path):  # noqa: PTH112  a path with a NUL is none; Path raises ValueError
        from shipd.checkpoints.directory import LocalFolder, checkpoint_in

        path = os.path.join(path, checkpoint_in(LocalFolder(path)))  # noqa: PTH118  as above
    elif was_url(path) and not os.path.lexists(path):
        raise CheckpointError(
            f"cannot open {quoted(path)}: there is no such file. If it is meant to be a URL, pass it as text: a Path "
            "takes away one of its slashes"
        )
    return _open_file(OpenFile.open(path), key)


def _open_url(url: str, key: str | None, fetching: Fetching) -> Source:
    if scheme_of(url) == "file":
        return _open_path(local_path(url), key)
    from shipd.checkpoints.remote.opening import open_url

    return _open_file(open_url(url, fetching), key)


def _open_file(file: OpenFile, key: str | None) -> Source:
    try:
        return open_identified(file, identify(file), key)
    except BaseException:
        file.close()
        raise


def open_identified(file: OpenFile, kind: Kind, key: str | None = None) -> Source:
    """The source for a file of that kind. It owns ``file`` unless this raises."""
    if key is not None and kind not in _KEYED:
        raise CheckpointError(
            f"{quoted(file.path)} is {kind.value}, which has no parts to choose from: push it without key={quoted(key)}"
        )
    # Of safetensors any tensor can be read by itself, once its own bytes are there.
    file.load(whole=kind is not Kind.SAFETENSORS)
    match kind:
        case Kind.SAFETENSORS:
            from shipd.checkpoints.safetensors_file import SafetensorsFile

            return SafetensorsFile(file)
        case Kind.INDEX:
            from shipd.checkpoints.sharded import open_sharded

            return open_sharded(file)
        case Kind.TORCH_ZIP | Kind.TORCH_LEGACY:
            from shipd.checkpoints.torch_file import TorchFile

            return TorchFile(file, mapped=kind is Kind.TORCH_ZIP, key=key)
        case Kind.TORCHSCRIPT:
            from shipd.checkpoints.script_file import ScriptFile

            return ScriptFile(file)
        case Kind.NPZ:
            from shipd.checkpoints.npz_file import NpzFile

            return NpzFile(file)
        case Kind.HDF5:
            from shipd.checkpoints.hdf5_file import Hdf5File

            return Hdf5File(file, key)
        case _:
            assert_never(kind)
