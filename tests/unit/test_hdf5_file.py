import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shipd.checkpoints import hdf5_file
from shipd.checkpoints.source import Source, open_source
from shipd.errors import TensorChanged, UnsupportedTensor
from tests.support.checkpoints import MIB, Content, content, random_bytes, tiny
from tests.support.containers import CONTAINERS
from tests.support.naive import Tensor
from tests.support.processes import Helper
from tests.support.reading import content_of, digest_of, read_through, refused
from tests.unit.test_npz_file import as_it_travels, every_kind, noise


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Callable[[h5py.File], object]], Path]:
    def write_one(fill: Callable[[h5py.File], object]) -> Path:
        with h5py.File(tmp_path / "w", "w") as file:
            fill(file)
        return tmp_path / "w"

    return write_one


Write = Callable[[Callable[[h5py.File], object]], Path]


def digest(path: Path, key: str | None = None) -> str:
    source = open_source(path, key=key)
    try:
        return digest_of(source)
    finally:
        source.close()


# --- what is read ----------------------------------------------------------------------------------------------------

STORED: dict[str, dict[str, Any]] = {
    "in one piece": {},
    "in chunks": {"chunks": True},
    "compressed": {"compression": "gzip"},
    "shuffled": {"compression": "lzf", "shuffle": True, "fletcher32": True},
}


@pytest.mark.parametrize("stored", STORED)
def test_every_dtype_is_read_in_every_storage(tmp_path: Path, stored: str) -> None:
    arrays = every_kind()
    with h5py.File(tmp_path / "model.safetensors", "w") as file:
        for name, array in arrays.items():
            plain = not array.ndim or not array.size
            file.create_dataset(name.replace(".", "/"), data=array, **({} if plain else STORED[stored]))
    source = open_source(tmp_path / "model.safetensors")
    assert isinstance(source, Source)
    assert source.origin == str(tmp_path / "model.safetensors")
    assert source.structure.names == tuple(sorted(arrays))
    for row, name in enumerate(source.structure.names):
        assert source.structure.shape(row) == arrays[name].shape
        assert source.structure.dtype(row) == name.partition(".")[0]
        assert content_of(source, row) == as_it_travels(arrays[name]), name
    rows = [source.structure.index[f"int16.{kind}"] for kind in ("swapped", "plain")]
    contents = [as_it_travels(arrays[source.structure.names[row]]) for row in rows]
    assert source.read_packed(rows, [3]) == contents[0] + bytes(3) + contents[1]
    assert source.changed() is None
    source.close()
    source.close()


def test_what_is_stored_in_one_piece_is_read_in_place(write: Write) -> None:
    def fill(file: h5py.File) -> None:
        file["a/plain"] = noise("float32", (100,))
        file.create_dataset("a/packed", data=noise("float32", (100,)), compression="gzip")

    source = open_source(write(fill))
    plain = source.read(source.structure.index["a.plain"], 4, 40)
    assert plain == noise("float32", (100,)).tobytes()[4:40]
    assert plain.readonly
    assert source.lends(plain)
    assert not source.lends(source.read(source.structure.index["a.packed"], 4, 40))
    source.close()
    assert plain == noise("float32", (100,)).tobytes()[4:40]
    for row in range(2):
        with pytest.raises(ValueError, match="is closed"):
            source.read(row, 0, 1)


@pytest.mark.parametrize("cache", [hdf5_file._CACHE, 100], ids=["chunks that fit", "chunks that do not"])
def test_any_slice_is_that_of_the_whole(write: Write, monkeypatch: pytest.MonkeyPatch, cache: int) -> None:
    monkeypatch.setattr(hdf5_file, "_CACHE", cache)
    array = noise("int32", (7, 5, 4))
    source = open_source(write(lambda file: file.create_dataset("w", data=array, chunks=(4, 3, 4), compression="gzip")))
    whole = array.tobytes()
    for start in range(0, len(whole), 3):
        assert source.read(0, start, len(whole)) == whole[start:]
        assert source.read(0, 0, start) == whole[:start]
    source.close()


def test_what_was_never_written_is_zeros(write: Write) -> None:
    source = open_source(write(lambda file: file.create_dataset("w", shape=(4, 4), dtype="f4")))
    assert content_of(source, 0) == bytes(64)
    source.close()


def test_one_dataset_under_two_names_is_tied(write: Write) -> None:
    def fill(file: h5py.File) -> None:
        file["b/w"] = noise("float32", (100,))
        file["a"] = file["b/w"]

    source = open_source(write(fill))
    assert source.structure.spec(1).tied_to == "a"
    assert content_of(source, 0) == content_of(source, 1) == noise("float32", (100,)).tobytes()
    source.close()


def test_keras_weights_become_dotted_names(write: Write) -> None:
    """As Keras 2 nests them: layer, layer again, weight with its output's number."""

    def fill(file: h5py.File) -> None:
        file["model_weights/dense/dense/kernel:0"] = np.ones((2, 3), dtype="f4")
        file["model_weights/dense/dense/bias:0"] = np.ones(3, dtype="f4")
        file["model_weights/top_level_model_weights/scale"] = np.ones((), dtype="f4")
        file["model_weights"].attrs["layer_names"] = ["dense"]
        file["optimizer_weights/adam/m:0"] = np.ones(3, dtype="f4")

    path = write(fill)
    for key in (None, "model_weights"):
        source = open_source(path, key=key)
        assert source.structure.names == ("dense.dense.bias:0", "dense.dense.kernel:0", "top_level_model_weights.scale")
        source.close()
    for key in ("model_weights.dense", "model_weights/dense", "/model_weights/dense/"):
        source = open_source(path, key=key)
        assert source.structure.names == ("dense.bias:0", "dense.kernel:0")
        source.close()


def test_the_root_can_be_asked_for(write: Write) -> None:
    source = open_source(write(lambda file: file.__setitem__("model_weights/w", np.ones(3))), key=".")
    assert source.structure.names == ("model_weights.w",)
    source.close()


def test_the_optimizer_of_keras_3_is_left_out(write: Write) -> None:
    def fill(file: h5py.File) -> None:
        file["layers/dense/vars/0"] = np.ones((2, 3), dtype="f4")
        file["optimizer/vars/0"] = np.ones((), dtype="i8")
        file["vars/0"] = np.ones((), dtype="f4")

    source = open_source(write(fill))
    assert source.structure.names == ("layers.dense.vars.0", "vars.0")
    source.close()


@pytest.mark.parametrize("container", ["HDF5", "HDF5, compressed"])
def test_a_large_file_needs_neither_memory_nor_torch(tmp_path: Path, container: str) -> None:
    rows = tuple(Tensor(f"layer.{at}.weight", "float16", (5_000, 8_192)) for at in range(4))
    # What repeats itself is packed and unpacked ten times as fast as noise, and is as many bytes.
    whole = Content(rows, {row.name: random_bytes(row.name, 16_384) * 5_000 for row in rows})
    path = CONTAINERS[container](tmp_path / "w", whole)
    with Helper(read_through, path, "hdf5_file") as reader:
        found = reader.next(90)
        assert reader.wait() == 0
    assert found["read"] == whole.nbytes > 300 * MIB
    assert found["digest"] == whole.digest
    assert found["growth"] <= 80 * MIB
    assert not found["torch"]


# --- what is refused -------------------------------------------------------------------------------------------------


def bfloat16(file: h5py.File) -> None:
    """As libraries write it that give HDF5 a floating-point type of their own."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(file.id, b"bad", kind, space)


UNSUPPORTED: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "bfloat16": (
        bfloat16,
        r"has floating-point numbers of 2 bytes in a format of their own \(HDF5 has no bfloat16",
    ),
    "opaque": (
        lambda file: file.create_dataset("bad", data=np.zeros(2, dtype="V2")),
        "has elements of 2 bytes that are no number of numpy's",
    ),
    "texts": (
        lambda file: file.create_dataset("bad", data=["a", "b"]),
        "is an array of Python objects or texts",
    ),
    "records": (
        lambda file: file.create_dataset("bad", data=np.zeros(2, dtype=[("a", "f4"), ("b", "i2")])),
        "has the dtype .* which torch does not have; save it with a dtype of numbers",
    ),
    "references": (
        lambda file: file.create_dataset("bad", data=np.array([file.ref]), dtype=h5py.ref_dtype),
        "is an array of Python objects or texts",
    ),
    "nothing": (
        lambda file: file.create_dataset("bad", data=h5py.Empty("f4")),
        r"has no elements and no shape either \(H5S_NULL\)",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_can_be_no_tensor_is_refused_by_name(write: Write, case: str) -> None:
    fill, message = UNSUPPORTED[case]
    told = refused(write(fill), message, UnsupportedTensor)
    assert "tensor 'bad' of " in told


def linked(file: h5py.File) -> None:
    file["w"] = np.ones(3)
    file["bad"] = h5py.SoftLink("/w")


def linked_elsewhere(file: h5py.File) -> None:
    file["bad"] = h5py.ExternalLink("/etc/passwd", "/w")


def stored_elsewhere(file: h5py.File) -> None:
    file.create_dataset("bad", shape=(100,), dtype="u1", external=[("/etc/passwd", 0, 100)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "w", shape=(4,))
    file.create_virtual_dataset("bad", layout)


def ambiguous(file: h5py.File) -> None:
    file["a.b"] = np.ones(1)
    file["a/b"] = np.ones(1)


def circular(file: h5py.File) -> None:
    file["a/w"] = np.ones(1)
    file["a/b"] = file["a"]


REFUSED: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "link": (linked, "'/bad' is a link to another place or file, which is not followed; save the dataset itself"),
    "external link": (linked_elsewhere, "'/bad' is a link to another place or file, which is not followed"),
    "external storage": (stored_elsewhere, "tensor 'bad' of .* is kept in other files, which are not read"),
    "virtual": (virtual, "tensor 'bad' of .* is kept in other files, which are not read"),
    "ambiguous": (ambiguous, r"'/a/b' and '/a\.b' would both be the tensor 'a\.b'; rename one of them"),
    "circular": (circular, "has more than 64 groups inside one another"),
    "empty": (lambda _: None, "holds no datasets; save the model's weights"),
    "optimizer": (
        lambda file: file.__setitem__("optimizer/m", np.ones(3)),
        r"holds no datasets but the state of an optimizer \('optimizer'\), which is never shipped; save the model's",
    ),
    "long name": (lambda file: file.__setitem__("n" * 600, np.ones(1)), "name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_models_tensors_is_refused(write: Write, case: str) -> None:
    fill, message = REFUSED[case]
    refused(write(fill), message)


@pytest.mark.parametrize("key", ["modl", "model_weights.w", "", "/", "w", "w.x", "link"])
def test_keys_that_lead_to_no_group_are_told(write: Write, key: str) -> None:
    def fill(file: h5py.File) -> None:
        file["model_weights/w"] = np.ones(3)
        file["w"] = np.ones(3)
        file["link"] = h5py.SoftLink("/model_weights")

    refused(write(fill), f"has no group under the key '{key}'; at its root are 'link', 'model_weights', 'w'", key=key)


def test_without_h5py_it_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = CONTAINERS["HDF5"](tmp_path / "w", tiny())
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(path, r"is an HDF5 file, and to read those takes h5py: pip install 'shipd\[hdf5\]'")


@pytest.mark.parametrize("part", [0.3, 0.6, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, part: float) -> None:
    path = CONTAINERS["HDF5"](tmp_path / "w", tiny())
    os.truncate(path, int(path.stat().st_size * part))
    refused(path, "cannot be read by the HDF5 library .*truncated")


@pytest.mark.parametrize("container", ["HDF5", "HDF5, compressed"])
def test_a_file_that_is_cut_raises_instead_of_killing_the_process(tmp_path: Path, container: str) -> None:
    path = CONTAINERS[container](tmp_path / "w", content([Tensor("w", "uint8", (3 * MIB,))]))
    source = open_source(path)
    os.truncate(path, 3000)
    with pytest.raises(TensorChanged, match="was cut from"):
        source.read(0, MIB, MIB + 1)
    assert source.changed() is not None
    source.close()


def test_a_chunk_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = CONTAINERS["HDF5, compressed"](tmp_path / "w", content([Tensor("w", "float32", (100_000,))]))
    raw = bytearray(path.read_bytes())
    raw[200_000:200_100] = bytes(100)
    path.write_bytes(raw)
    source = open_source(path)
    with pytest.raises(TensorChanged, match=r"tensor 'w' of '.*' cannot be read .*: the file is damaged"):
        digest_of(source)
    source.close()


def test_a_file_that_is_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = CONTAINERS["HDF5, compressed"](tmp_path / "w", tiny(0))
    source = open_source(path)
    CONTAINERS["HDF5, compressed"](tmp_path / "new", tiny(1)).rename(path)
    assert source.changed() is None
    assert digest_of(source) == tiny(0).digest
    source.close()


def test_files_are_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for container in ("HDF5", "HDF5, compressed", "HDF5 of Keras"):
        assert digest(CONTAINERS[container](tmp_path / container, tiny())) == tiny().digest
        refused(tmp_path / container, "has no group under the key 'x'", key="x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
