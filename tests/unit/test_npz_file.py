import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipd.checkpoints.arrays import read_slice
from shipd.checkpoints.source import MAX_READ, Source, open_source
from shipd.errors import CheckpointError, TensorChanged, UnsupportedTensor
from tests.support.checkpoints import MIB, content
from tests.support.containers import CONTAINERS
from tests.support.naive import Tensor
from tests.support.processes import Helper
from tests.support.reading import content_of, digest_of, read_through, refused

DTYPES = (
    *("float64", "float32", "float16", "complex128", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)


def noise(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    made = np.dtype(dtype)
    raw = np.random.default_rng(7).bytes(int(np.prod(shape)) * made.itemsize)
    return np.frombuffer(raw, dtype=made).reshape(shape)


def every_kind() -> dict[str, Any]:
    """Every dtype as it travels, big-endian, in Fortran's order, 0-dim and empty."""
    arrays: dict[str, Any] = {}
    for name in DTYPES:
        plain = noise(name, (3, 5, 2))
        arrays |= {
            f"{name}.plain": plain,
            f"{name}.swapped": plain.astype(plain.dtype.newbyteorder(">")),
            f"{name}.turned": np.asfortranarray(plain),
            f"{name}.both": np.asfortranarray(plain.astype(plain.dtype.newbyteorder(">"))),
            f"{name}.scalar": plain[1, 1, 1],
            f"{name}.empty": plain[:0],
        }
    return arrays


def as_it_travels(array: Any) -> bytes:
    whole = np.ascontiguousarray(array)
    return (whole if array.dtype.isnative else whole.byteswap()).tobytes()


def save(path: Path, arrays: Mapping[str, Any], *, compressed: bool = False) -> Path:
    with path.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return path


@pytest.fixture
def arrays_file(tmp_path: Path) -> Iterator[tuple[dict[str, np.ndarray], Source]]:
    arrays = every_kind()
    source = open_source(save(tmp_path / "w", arrays))
    yield arrays, source
    source.close()


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_every_dtype_is_read_in_every_order(tmp_path: Path, compressed: bool) -> None:
    arrays = every_kind()
    source = open_source(save(tmp_path / "model.safetensors", arrays, compressed=compressed))
    assert isinstance(source, Source)
    assert source.origin == str(tmp_path / "model.safetensors")
    assert source.structure.names == tuple(sorted(arrays))
    for row, name in enumerate(source.structure.names):
        assert source.structure.shape(row) == arrays[name].shape
        assert source.structure.dtype(row) == name.partition(".")[0]
        assert content_of(source, row) == as_it_travels(arrays[name]), name
    rows = [source.structure.index[f"int16.{kind}"] for kind in ("turned", "plain", "both")]
    contents = [as_it_travels(arrays[source.structure.names[row]]) for row in rows]
    assert source.read_packed(rows, [3, 60]) == contents[0] + bytes(3) + contents[1] + bytes(60) + contents[2]
    assert source.changed() is None
    source.close()
    source.close()


def test_stored_arrays_are_read_in_place(arrays_file: tuple[dict[str, np.ndarray], Source]) -> None:
    _, source = arrays_file
    row = source.structure.index["float32.plain"]
    view = source.read(row, 1, 50)
    assert view.readonly
    assert view.obj is source.read(row, 0, 4).obj
    assert source.lends(view)
    assert not source.lends(source.read(source.structure.index["float32.turned"], 0, 4))


def test_any_slice_is_that_of_the_whole(arrays_file: tuple[dict[str, np.ndarray], Source]) -> None:
    arrays, source = arrays_file
    for name in ("float32.plain", "float32.both", "complex128.turned", "bool.turned", "int64.swapped"):
        whole, row = as_it_travels(arrays[name]), source.structure.index[name]
        for start in range(len(whole) + 1):
            assert source.read(row, start, len(whole)) == whole[start:]
            assert source.read(row, 0, start) == whole[:start]
        with pytest.raises(ValueError, match=f"bytes 0 to {len(whole) + 1} of tensor '{name}'"):
            source.read(row, 0, len(whole) + 1)


@given(st.lists(st.integers(0, 6), max_size=5), st.data())
def test_any_slice_of_any_shape(shape: list[int], data: st.DataObject) -> None:
    array = np.arange(int(np.prod(shape)), dtype=">u2").reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    array = array.transpose(order)
    whole = as_it_travels(array)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert read_slice(array, start, stop) == whole[start:stop]


def test_views_outlive_the_source(tmp_path: Path) -> None:
    array = noise("uint8", (3 * MAX_READ,))
    path = save(tmp_path / "w", {"w": array, "t": array.reshape(2, -1, 2).T})
    source = open_source(path)
    view, copy = source.read(1, 5, 1005), source.read(0, 0, 1000)
    source.close()
    path.unlink()
    assert view == array.tobytes()[5:1005]
    assert copy == array.reshape(2, -1, 2).T.tobytes()[:1000]
    with pytest.raises(ValueError, match="is closed"):
        source.read(0, 0, 1)


def test_a_file_that_is_cut_raises_instead_of_killing_the_process(tmp_path: Path) -> None:
    path = save(tmp_path / "w", {"w": noise("uint8", (3 * MIB,)), "t": noise("uint8", (1024, 3 * 1024)).T})
    source = open_source(path)
    os.truncate(path, 1000)
    for row in range(2):
        with pytest.raises(TensorChanged, match="was cut from"):
            source.read(row, MIB, MIB + 1)
    assert source.changed() is not None
    source.close()


def test_other_names_are_kept(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "w", {"a/b": np.ones(1), "w.npy": np.ones(1)}))
    assert source.structure.names == ("a/b", "w.npy")
    source.close()
    with (tmp_path / "w").open("wb") as file:
        np.savez(file, np.ones(1), np.zeros(2))
    source = open_source(tmp_path / "w")
    assert source.structure.names == ("arr_0", "arr_1")
    source.close()


@pytest.mark.parametrize("turned", [False, True], ids=["plain", "turned"])
def test_a_large_archive_needs_neither_memory_nor_torch(tmp_path: Path, turned: bool) -> None:
    whole = content(Tensor(f"layer.{at}.weight", "float16", (5_000, 8_192)) for at in range(4))
    if turned:
        raw = {name: np.frombuffer(data, dtype="float16") for name, data in whole.data.items()}
        save(tmp_path / "w", {name: np.asfortranarray(array.reshape(5_000, 8_192)) for name, array in raw.items()})
    else:
        CONTAINERS["npz"](tmp_path / "w", whole)
    with Helper(read_through, tmp_path / "w", "npz_file") as reader:
        found = reader.next(90)
        assert reader.wait() == 0
    assert found["read"] == whole.nbytes > 300 * MIB
    assert found["digest"] == whole.digest
    assert found["growth"] <= 80 * MIB
    assert not found["torch"]


# --- what is refused -------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_object_arrays_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    bad = np.array([Payload(tmp_path / "trace"), None], dtype=object)
    np.savez(tmp_path / "w.npz", good=np.ones(1), bad=bad, allow_pickle=True)
    refused(
        tmp_path / "w.npz",
        r"tensor 'bad' of '.*' is an array of Python objects or texts, and to unpickle objects is to run their code",
        UnsupportedTensor,
    )
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(["a"]), r"has the dtype '<U1', which torch does not have; save it with a dtype of numbers"),
        (np.array([b"a"]), r"has the dtype '.S1', which torch does not have"),
        (np.zeros(2, dtype="datetime64[s]"), r"has the dtype 'datetime64\[s\]', which torch does not have"),
        (np.zeros(2, dtype=[("a", "f4"), ("b", "i2")]), r"has the dtype .*'a', '<f4'.*, which torch does not have"),
        (np.zeros(2, dtype="longdouble"), "has the dtype 'float128', which torch does not have"),
        (
            np.zeros(2, dtype="V2"),
            r"has elements of 2 bytes that are no number of numpy's .bfloat16 and float8 are none",
        ),
    ],
)
def test_dtypes_that_torch_lacks_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = save(tmp_path / "w", {"bad": array})
    assert "tensor 'bad' of " in refused(path, message, UnsupportedTensor)


def archive(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, raw in members.items():
            made.writestr(name, raw)
    return path


def npy(header: bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


GOOD = io.BytesIO()
np.save(GOOD, np.ones(3))

BAD = {
    "foreign member": (
        {"w.npy": GOOD.getvalue(), "readme": b"x"},
        "holds 'readme', which is no array; push an",
    ),
    "no array": ({"w.npy": b"hello"}, "is damaged"),
    "nothing": ({"w.npy": b""}, "is damaged"),
    "version": (
        {"w.npy": GOOD.getvalue().replace(b"NUMPY\1\0v\0", b"NUMPY\4\0v\0\0\0", 1)},
        r"is of version \(4, 0\) of numpy's format, which is not known here",
    ),
    "header": ({"w.npy": npy(b"{")}, "is damaged"),
    "code": ({"w.npy": npy(b"__import__('os').abort()")}, "is damaged"),
    "short": ({"w.npy": GOOD.getvalue()[:-1]}, r"'w.npy' of .* needs 24 bytes for its shape \[3\] and has 23"),
    "long": ({"w.npy": GOOD.getvalue() + b"x"}, r"needs 24 bytes for its shape \[3\] and has 25: it is damaged"),
    "negative": (
        {"w.npy": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, -1)}", bytes(12))},
        "has a shape that is no list of sizes",
    ),
    "bool": (
        {"w.npy": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}", bytes(12))},
        "has a shape that is no list of sizes|is damaged",
    ),
    "gigantic": (
        {"w.npy": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999999999)}")},
        "needs 39.* bytes for its shape",
    ),
    "nameless": ({".npy": GOOD.getvalue()}, "name"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("case", BAD)
def test_damaged_archives_are_refused(tmp_path: Path, case: str, method: int) -> None:
    members, message = BAD[case]
    refused(archive(tmp_path / "w", members, method), message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w", "w") as made:
        for _ in range(2):
            made.writestr("w.npy", GOOD.getvalue())
    refused(tmp_path / "w", "holds 'w' twice: it was written wrongly")


def test_encrypted_archives_are_refused(tmp_path: Path) -> None:
    raw = bytearray(archive(tmp_path / "w", {"w.npy": GOOD.getvalue()}).read_bytes())
    central = raw.index(b"PK\x01\x02")
    raw[central + 8] |= 1
    (tmp_path / "w").write_bytes(raw)
    refused(tmp_path / "w", "'w.npy' of .* is encrypted; save it again with numpy.savez")


def test_a_compressed_array_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "w", {"w": noise("uint8", (10_000,))}, compressed=True)
    raw = bytearray(path.read_bytes())
    raw[5_000] ^= 1
    path.write_bytes(raw)
    refused(path, "is damaged")


def test_a_member_that_lies_about_its_checksum_is_refused(tmp_path: Path) -> None:
    """Of a compressed array zlib may find nothing wrong; the archive's checksum does."""
    path = archive(tmp_path / "w", {"w.npy": GOOD.getvalue()}, zipfile.ZIP_DEFLATED)
    raw = path.read_bytes()
    checksum = struct.pack("<I", zlib.crc32(GOOD.getvalue()))
    assert raw.count(checksum) == 2
    path.write_bytes(raw.replace(checksum, bytes(4)))
    refused(path, "is damaged .*CRC")


def test_no_damage_is_worse_than_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "w", {"w": np.arange(6.0), "t": np.asfortranarray(np.arange(6.0).reshape(2, 3))})
    whole = path.read_bytes()
    told = []
    for at in range(4, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            source = open_source(path)
            digest_of(source)
            source.close()
        except (CheckpointError, UnsupportedTensor) as error:
            told.append(str(error))
    assert len(told) > 100
    assert all(text.isprintable() and len(text) < 900 for text in told)


def test_it_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an \.npz archive of numpy, which has no parts to choose from"):
        open_source(save(tmp_path / "w", {"w": np.ones(1)}), key="model")


def test_files_are_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    open_source(save(tmp_path / "w", {"w": np.ones(1), "t": np.ones((2, 3)).T})).close()
    refused(archive(tmp_path / "v", {"w.npy": GOOD.getvalue()[:-1]}), "is damaged")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
