import gc
import gzip
import io
import json
import mmap
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from shipd.checkpoints.source import MAX_READ, Source, open_source
from shipd.errors import CheckpointError, TensorChanged, UnsupportedTensor
from shipproto.digests import digest_image
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def packed(header, data=b"", length=None):
    """A file of the format: its header as an object, a text or bytes, and whatever length it claims."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def content(source, row):
    size = int(source.structure.nbytes[row])
    return b"".join(bytes(source.read(row, at, min(at + LEAF_SIZE, size))) for at in range(0, size, LEAF_SIZE))


@pytest.fixture
def opened():
    sources = []

    def open_one(path):
        sources.append(open_source(path))
        return sources[-1]

    yield open_one
    for source in sources:
        source.close()


def deep(levels):
    return '{"w":' + "[" * levels + "]" * levels + "}"


MALFORMED = {
    "short": (b"\x08\0\0", "has only 3 bytes: its save or download was interrupted"),
    "only a length": (packed("", length=100), "has only 8 bytes: its save"),
    "header cut short": (
        packed(b'{"w"', length=900),
        "is truncated: its header alone needs 908 bytes and the file has 12",
    ),
    "header beyond the format": (packed(b"{", length=100_000_001), "header of 100000001 bytes by its own account"),
    "header beyond everything": (packed(b"{}", length=(1 << 48) - 1), "a header of 281474976710655 bytes"),
    "length that is text": (b"abcdefgh{}", "neither safetensors nor torch.save"),
    "header without a brace": (packed(b" {}"), "neither safetensors nor torch.save"),
    "header of a list": (packed(b"[]"), "neither safetensors nor torch.save"),
    "length without a header": (packed("", b"{}" + bytes(20), length=0), "header that does not begin with '{'"),
    "header without an end": (packed(b'{"w":'), "header that is not valid JSON"),
    "header with a tail": (packed(b"{} {}"), "header that is not valid JSON.*Extra data"),
    "header not UTF-8": (packed(b'{"\xff":1}'), "header that is not valid JSON.*utf-8"),
    "header nested deeply": (packed(deep(100_000)), "header that is not valid JSON.*recursion"),
    "header with NaN": (packed('{"w":NaN}'), "header that is not valid JSON.*NaN is no number"),
    "header with a long number": (packed('{"w":' + "1" * 5000 + "}"), "header that is not valid JSON"),
    "header of brackets": (
        packed('{"w":[' + "[]," * 4_200_000 + "[]]}"),
        "more than 1048576 tensors, or of something else",
    ),
    "name twice": (
        packed(f'{{"w":{json.dumps(F32)},"w":{json.dumps(F32)}}}', bytes(24)),
        "has 'w' twice in its header",
    ),
    "field twice": (
        packed('{"w":{"dtype":"F32","dtype":"I32","shape":[2,3],"data_offsets":[0,24]}}', bytes(24)),
        "has 'dtype' twice in its header",
    ),
    "metadata twice": (packed('{"__metadata__":{},"__metadata__":{}}'), "has '__metadata__' twice"),
    "metadata a list": (packed({"__metadata__": ["a"]}), "__metadata__ that is not an object of texts"),
    "metadata of numbers": (packed({"__metadata__": {"epoch": 3}}), "__metadata__ that is not an object of texts"),
    "entry a number": (packed({"w": 7}), "tensor 'w' must be described by dtype, shape and data_offsets, not by a int"),
    "entry empty": (packed({"w": {}}), "tensor 'w' must be described .* not by nothing"),
    "entry without dtype": (
        packed({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "described by .* not by 'shape', 'data_offsets'",
    ),
    "entry with more": (packed({"w": F32 | {"stride": [3, 1]}}, bytes(24)), "described by .* 'stride'"),
    "dtype a number": (packed({"w": F32 | {"dtype": 4}}, bytes(24)), "tensor 'w' has a dtype that is not a text"),
    "shape a text": (packed({"w": F32 | {"shape": "2,3"}}, bytes(24)), "tensor 'w' has a shape that is not a list"),
    "shape negative": (
        packed({"w": entry(shape=(-2, -3))}, bytes(24)),
        "tensor 'w' has a shape that is not a list of sizes",
    ),
    "shape fractional": (packed({"w": entry(shape=(2.0, 3))}, bytes(24)), "has a shape that is not a list of sizes"),
    "shape of bools": (packed({"w": entry(shape=(True,), offsets=(0, 4))}, bytes(4)), "has a shape that is not a list"),
    "shape huge": (packed({"w": entry(shape=(2**70, 0), offsets=(0, 0))}), "sizes from 0 to 4398046511104"),
    "shape overflowing": (
        packed({"w": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
        "F32 \\[4294967296, 4294967296\\] needs 73786976294838206464 bytes and its data_offsets give it 0",
    ),
    "shape long": (packed({"w": entry(shape=(1,) * 33, offsets=(0, 4))}, bytes(4)), "has 33 dimensions; at most 32"),
    "shape longer": (packed({"w": entry(shape=(1,) * 9999, offsets=(0, 4))}, bytes(4)), "has 9999 dimensions"),
    "offsets a number": (
        packed({"w": F32 | {"data_offsets": 24}}, bytes(24)),
        "data_offsets that are not two ascending",
    ),
    "offsets three": (packed({"w": entry(offsets=(0, 12, 24))}, bytes(24)), "data_offsets that are not two ascending"),
    "offsets reversed": (packed({"w": entry(offsets=(24, 0))}, bytes(24)), "data_offsets that are not two ascending"),
    "offsets negative": (packed({"w": entry(offsets=(-24, 0))}, bytes(24)), "data_offsets that are not two ascending"),
    "offsets huge": (packed({"w": entry(offsets=(2**64, 2**64 + 24))}, bytes(24)), "data_offsets that are not two"),
    "too few bytes": (
        packed({"w": entry(offsets=(0, 20))}, bytes(20)),
        "needs 24 bytes and its data_offsets give it 20",
    ),
    "too many bytes": (
        packed({"w": entry(offsets=(0, 28))}, bytes(28)),
        "needs 24 bytes and its data_offsets give it 28",
    ),
    "overlap": (
        packed({"a": entry(), "b": entry(offsets=(20, 44))}, bytes(44)),
        "tensors 'a' and 'b' overlap \\(the second begins at byte 20 of the data, before byte 24\\)",
    ),
    "same place": (packed({"a": entry(), "b": entry()}, bytes(24)), "tensors 'a' and 'b' overlap"),
    "empty inside another": (
        packed({"a": entry(), "b": entry(shape=(0,), offsets=(8, 8))}, bytes(24)),
        "tensors 'a' and 'b' overlap",
    ),
    "hole at the beginning": (
        packed({"a": entry(offsets=(8, 32))}, bytes(32)),
        "bytes 0 to 8 of the data, before tensor 'a', belong to no tensor",
    ),
    "hole in the middle": (
        packed({"a": entry(), "b": entry(offsets=(32, 56))}, bytes(56)),
        "bytes 24 to 32 of the data, before tensor 'b', belong to no tensor",
    ),
    "data cut short": (
        packed({"w": F32}, bytes(23)),
        "is truncated: its header describes 97 bytes and the file has 96",
    ),
    "data gone": (packed({"w": F32}), "is truncated: its header describes 97 bytes and the file has 73"),
    "data and more": (packed({"w": F32}, bytes(30)), "has 6 bytes more than the 97 that its header describes"),
    "no tensors and data": (packed({}, bytes(6)), "has 6 bytes more than the 10 that its header describes"),
    "name empty": (packed({"": F32}, bytes(24)), "tensor '' has a name that is not a text of 1 to 512 characters"),
    "name long": (packed({"n" * 513: F32}, bytes(24)), "has a name that is not a text of 1 to 512"),
    "name a surrogate": (packed('{"\\ud800":' + json.dumps(F32) + "}", bytes(24)), "has a name that is not a text"),
    "name with a newline": (packed({"a\nb": F32}, bytes(24)), "a tensor's name contains the control character"),
    "name with an escape": (packed({"a\x1b[2J": F32}, bytes(24)), "a tensor's name contains the control character"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(tmp_path, case):
    raw, message = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    told = str(caught.value)
    assert repr(str(path)) in told
    assert told.isprintable()
    assert len(told) < 600


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("F4", "tensor 'w' is F4, whose elements are less than a byte"),
        ("F6_E2M3", "is F6_E2M3, whose elements are less than a byte"),
        ("F6_E3M2", "is F6_E3M2, whose elements are less than a byte"),
        ("C128", "tensor 'w' has the dtype 'C128', which is not supported"),
        ("f32", "has the dtype 'f32'"),
        ("x" * 10_000, "has the dtype 'xxxx"),
    ],
)
def test_other_dtypes_are_refused_by_name(tmp_path, dtype, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"w": entry(dtype=dtype)}, bytes(24)))
    with pytest.raises(UnsupportedTensor, match=message) as caught:
        open_source(path)
    assert caught.value.tensor == "w"
    assert len(str(caught.value)) < 600


def archive(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, raw in members.items():
            file.writestr(name.replace("__", "."), raw)
    return out.getvalue()


def tarred():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return out.getvalue()


def saved_array():
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438007537\n"

FOREIGN = {
    "empty": (b"", "is empty: its save or download was interrupted"),
    "html": (b"\n<!DOCTYPE html><title>Sign in</title>", "is an HTML page: the download link probably led to a login"),
    "html without doctype": (b"<HTML><body>404", "is an HTML page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is an XML document"),
    "lfs": (POINTER, "is a git-LFS pointer of 74 bytes .* \\(which has 438.0 MB\\): run `git lfs pull`"),
    "lfs without a size": (POINTER[:60], "is a git-LFS pointer of 60 bytes and not the file it stands for: run"),
    "json": (b'{"error": "Repository not found"}', "is a JSON text: if it is an error message"),
    "index": (
        b'{"metadata": {}, "weight_map": {"w": "model-00001-of-00002.safetensors"}}',
        "is the index of a checkpoint in several files",
    ),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file, as Keras"),
    "gzip": (gzip.compress(b"model"), "is compressed with gzip: decompress it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "is compressed with zstd"),
    "xz": (b"\xfd7zXZ\x00" + bytes(20), "is compressed with xz"),
    "bzip2": (b"BZh91AY&SY" + bytes(20), "is compressed with bzip2"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(20), "is a GGUF file of llama.cpp"),
    "npy": (saved_array(), "is a single numpy array"),
    "npz": (archive(w__npy=saved_array()), "is an npz file of numpy arrays; save it as safetensors"),
    "zip": (archive(readme__txt=b"hello"), "is a zip archive, but not one of torch.save: it holds 'readme.txt'"),
    "zip cut short": (archive(w__npy=saved_array())[:60], "no readable table of contents at its end"),
    "tar": (tarred(), "is a tar archive: unpack it first"),
    "pickle": (
        b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94\x8c\x01w\x94K\x01s.",
        "is a bare pickle, which could run any code",
    ),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(20), "is a program or shared library"),
    "zeros": (bytes(5000), "begins with nothing but zeros: it was allocated and never written"),
    "noise": (bytes(range(128, 228)), "begins with b'.x80.*', which is neither safetensors nor torch.save"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_named(tmp_path, case):
    raw, message = FOREIGN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(str(path))
    assert str(caught.value).isprintable()
    assert repr(str(path)) in str(caught.value)


def test_beginnings_of_files_are_refused(tmp_path):
    path = tmp_path / "w"
    beginnings = [bytes([byte]) for byte in range(256)]
    beginnings += [raw[:size] for raw, _ in FOREIGN.values() for size in range(1, min(len(raw), 16))]
    for raw in beginnings:
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            open_source(path)


def test_paths_that_cannot_be_opened_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(packed({}))
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path, message in {
        tmp_path / "absent": "cannot open '.*absent': there is no such file: check the path",
        tmp_path / "file" / "inside": "a part of the path is a file and not a directory",
        tmp_path / "loop": "cannot open .*loop",
        tmp_path / ("n" * 300): "cannot open .*: File name too long",
        tmp_path / "pipe": "is a pipe, socket or device; a checkpoint must be a regular file",
        tmp_path / "a\0b": "cannot open .*null",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_source(path)

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(CheckpointError, match="permission to read it is missing: run as its owner"):
        open_source(tmp_path / "file")


def test_a_directory_is_told_which_of_its_files_to_name(tmp_path):
    with pytest.raises(CheckpointError, match="is a directory; name a file"):
        open_source(tmp_path)
    for name in ("b.safetensors", "a.pt", "config.json"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"is a directory; name one of the files in it: 'a.pt', 'b.safetensors'$"):
        open_source(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(CheckpointError, match=r"torch.distributed checkpoint"):
        open_source(tmp_path)


def test_an_input_output_error_is_told(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed({"w": F32}, bytes(24)))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(CheckpointError, match=r"reading '.*' failed at byte 0: Input/output error"):
        open_source(path)


def test_a_refused_file_is_closed_again(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed({"w": F32}, bytes(23)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for bad in (path, tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError):
            open_source(bad)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
}


@pytest.mark.parametrize("padding", [0, 1, 3, 7])
def test_every_dtype_is_read_bit_for_bit_at_any_alignment(tmp_path, opened, padding):
    rng = np.random.default_rng(1)
    header, data, expected = {}, b"", {}
    for at, (name, (_, size)) in enumerate(DTYPES.items()):
        raw = rng.bytes(6 * size)
        header[f"{(at * 7) % 19:02}.{name}"] = entry(name, (2, 3), (len(data), len(data) + len(raw)))
        expected[f"{(at * 7) % 19:02}.{name}"] = raw
        data += raw
    path = tmp_path / "any name at all"
    path.write_bytes(packed(json.dumps(header) + " " * padding, data))
    source = opened(path)
    assert isinstance(source, Source)
    assert source.origin == str(path)
    assert list(source.structure.names) == sorted(expected)
    for row, name in enumerate(source.structure.names):
        assert source.structure.dtype(row) == DTYPES[name[3:]][0]
        assert source.structure.shape(row) == (2, 3)
        assert content(source, row) == expected[name]


def test_scalars_empty_tensors_and_no_tensors_are_read(tmp_path, opened):
    path = tmp_path / "w.safetensors"
    header = {
        "scalar": entry(shape=(), offsets=(0, 4)),
        "empty": entry(shape=(0, 5), offsets=(4, 4)),
        "first": entry(shape=(0,), offsets=(0, 0)),
        "last": entry("U8", (3,), (4, 7)),
    }
    path.write_bytes(packed(header, b"abcdefg"))
    source = opened(path)
    shapes = {name: source.structure.shape(row) for name, row in source.structure.index.items()}
    assert shapes == {"scalar": (), "empty": (0, 5), "first": (0,), "last": (3,)}
    assert [content(source, row) for row in range(4)] == [b"", b"", b"efg", b"abcd"]
    path.write_bytes(packed({}))
    assert len(opened(path).structure) == 0


def test_what_the_reference_implementation_writes_is_read_alike(tmp_path, opened):
    rng = np.random.default_rng(2)
    arrays: dict[str, np.ndarray] = {
        "layers.1.w": rng.standard_normal((700, 300)),
        "layers.0.w": rng.standard_normal((4, 4)).astype(np.float16),
        "big": rng.integers(0, 255, 3 * LEAF_SIZE + 11, dtype=np.uint8),
        "flag": np.array([True, False]),
        "step": np.array(7),
    }
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    source = opened(path)
    layout = Layout(source.structure)
    image = bytearray(layout.size)
    for row, name in enumerate(source.structure.names):
        raw = content(source, row)
        assert raw == arrays[name].tobytes()
        image[layout.offsets[row] : layout.offsets[row] + len(raw)] = raw
    again = tmp_path / "again.safetensors"
    safetensors.numpy.save_file({name: arrays[name] for name in reversed(arrays)}, again)
    other = opened(again)
    assert other.structure.digest == source.structure.digest
    assert digest_image(layout, memoryview(image)).complete


def test_all_but_a_few_are_refused_by_the_reference_implementation_too(tmp_path):
    stricter = {
        # Forbidden by the format and read by its implementation all the same.
        "header without a brace", "name twice", "field twice", "metadata twice",
        # What the protocol, a terminal or this process's memory would not take.
        "header of brackets", "entry with more", "shape huge", "shape long", "shape longer",
        "name empty", "name long", "name with a newline", "name with an escape",
    }  # fmt: skip
    path = tmp_path / "w.safetensors"
    accepted = set()
    for case, (raw, _) in MALFORMED.items():
        path.write_bytes(raw)
        try:
            with safetensors.safe_open(path, "np"):
                accepted.add(case)
        except safetensors.SafetensorError:
            pass
    assert accepted <= stricter


def test_no_length_of_the_header_makes_a_file_look_like_another_kind(tmp_path, opened):
    path = tmp_path / "w.safetensors"
    lengths = [*range(72, 72 + 256), 0x8B1F, 0x0280, 0x4B50, 0x5A42]  # gzip, pickle, zip, bzip2
    for length in lengths:
        path.write_bytes(packed(json.dumps({"w": F32}).ljust(length), bytes(24)))
        assert path.read_bytes()[:2] == length.to_bytes(2, "little")
        source = opened(path)
        assert content(source, 0) == bytes(24)
        source.close()


def test_metadata_is_kept_as_far_as_a_version_holds_it(tmp_path, opened):
    path = tmp_path / "w.safetensors"
    path.write_bytes(
        packed({"__metadata__": {"format": "pt", "long": "x" * 257, "bad": "\ud800"}, "w": F32}, bytes(24))
    )
    assert opened(path).metadata == {"format": "pt"}
    path.write_bytes(packed({"__metadata__": {str(at): "x" for at in range(100)}}))
    assert opened(path).metadata == {str(at): "x" for at in range(32)}
    path.write_bytes(packed('{"__metadata__":null}'))
    assert opened(path).metadata == {}


def test_reads_are_views_that_outlive_the_source(tmp_path, opened):
    path = tmp_path / "w.safetensors"
    raw = np.random.default_rng(3).bytes(3 * MAX_READ)
    path.write_bytes(packed({"w": entry("U8", (len(raw),), (0, len(raw)))}, raw))
    source = opened(path)
    first, second = source.read(0, 5, 1005), source.read(0, MAX_READ, 2 * MAX_READ)
    assert first.readonly
    assert first.format == "B"
    assert source.read(0, 7, 7).nbytes == 0
    assert first.obj is second.obj
    source.close()
    source.close()
    path.unlink()
    gc.collect()
    assert first == raw[5:1005]
    assert second == raw[MAX_READ : 2 * MAX_READ]
    with pytest.raises(ValueError, match="is closed"):
        source.read(0, 0, 1)
    with pytest.raises(ValueError, match="is closed"):
        source.changed()


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 25), (5, 4), (25, 25)])
def test_ranges_outside_a_tensor_are_the_callers_mistake(tmp_path, opened, start, stop):
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed({"w": F32}, bytes(24)))
    with pytest.raises(ValueError, match=f"bytes {start} to {stop} of tensor 'w' \\(24 bytes\\) cannot be read"):
        opened(path).read(0, start, stop)


def test_reads_are_bounded(tmp_path, opened):
    path = tmp_path / "w.safetensors"
    size = MAX_READ + 1
    path.write_bytes(packed({"w": entry("U8", (size,), (0, size))}, bytes(size)))
    source = opened(path)
    assert source.read(0, 1, size).nbytes == MAX_READ
    with pytest.raises(ValueError, match=f"at most {MAX_READ} bytes"):
        source.read(0, 0, size)


def test_a_file_that_is_written_to_is_noticed(tmp_path, opened):
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed({"w": F32}, bytes(24)))
    os.utime(path, ns=(0, 1))
    source = opened(path)
    assert source.changed() is None
    with path.open("r+b") as file:
        file.seek(90)
        file.write(b"\1")
    assert source.changed() == f"the file {str(path)!r} (it was written to while it was being read)"
    with path.open("ab") as file:
        file.write(b"more")
    assert source.changed() == f"the file {str(path)!r} (it had 97 bytes and now has 101)"


def test_a_file_that_is_replaced_stays_as_it_was(tmp_path, opened):
    path, other = tmp_path / "w.safetensors", tmp_path / "new"
    path.write_bytes(packed({"w": F32}, b"a" * 24))
    source = opened(path)
    other.write_bytes(packed({"w": F32}, b"b" * 24))
    other.rename(path)
    assert source.changed() is None
    assert content(source, 0) == b"a" * 24


def test_a_file_cut_while_it_is_mapped_raises_instead_of_killing_the_process(tmp_path, opened):
    path = tmp_path / "w.safetensors"
    size = 4 * LEAF_SIZE
    path.write_bytes(packed({"w": entry("U8", (size,), (0, size))}, bytes(size)))
    whole = path.stat().st_size
    source = opened(path)
    os.truncate(path, LEAF_SIZE)
    with pytest.raises(TensorChanged, match=f"was cut from {whole} to {LEAF_SIZE} bytes while tensor 'w'") as caught:
        source.read(0, 2 * LEAF_SIZE, 3 * LEAF_SIZE)
    assert caught.value.tensor == "w"
    assert f"it had {whole} bytes and now has {LEAF_SIZE}" in source.changed()


def test_a_file_cut_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed({"w": F32}, bytes(24)))
    real = mmap.mmap

    def cut_first(*arguments, **options):
        os.truncate(path, 80)
        return real(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", cut_first)
    with pytest.raises(CheckpointError, match="cannot be mapped into memory: mmap length is greater than file size"):
        open_source(path)


@pytest.mark.parametrize("wrong", [None, 7, [1], b"path", io.BytesIO()], ids=lambda wrong: type(wrong).__name__)
def test_what_cannot_be_pushed_at_all_is_a_type_error(wrong):
    with pytest.raises(TypeError, match=r"what is pushed must be the path of a checkpoint, a mapping .* this is a "):
        open_source(wrong)


def test_a_path_of_bytes_is_a_type_error():
    class Place:
        def __fspath__(self):
            return b"/tmp/model"

    with pytest.raises(TypeError, match=r"must be text, not bytes: use os.fsdecode"):
        open_source(Place())


CHILD = """
import json, sys, xxhash
from shipd.checkpoints.source import open_source
import shipd.checkpoints.safetensors_file

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before = peak = anonymous()
source = open_source(sys.argv[1])
hasher, read = xxhash.xxh3_128(), 0
for row, size in enumerate(source.structure.nbytes.tolist()):
    for at in range(0, size, 1 << 19):
        view = source.read(row, at, min(at + (1 << 19), size))
        hasher.update(view)
        read += view.nbytes
        peak = max(peak, anonymous())
assert source.changed() is None
source.close()
print(json.dumps({"peak": peak - before, "read": read, "digest": hasher.hexdigest(), "torch": "torch" in sys.modules}))
"""


def in_a_process(path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_large_file_needs_neither_memory_nor_torch(tmp_path):
    path = tmp_path / "large.safetensors"
    block = np.random.default_rng(4).bytes(1 << 24)
    size = len(block) * 18
    with path.open("wb") as file:
        file.write(packed({"w": entry("BF16", (size // 2,), (0, size))}))
        for _ in range(18):
            file.write(block)
    found = in_a_process(path)
    path.unlink()
    assert found["read"] == size
    assert found["peak"] < 80 << 20
    assert not found["torch"]


def test_twenty_thousand_tensors_need_little_memory(tmp_path):
    path = tmp_path / "many.safetensors"
    header = {
        f"model.layers.{at}.experts.weight": entry("U8", (16, 4), (at * 64, at * 64 + 64)) for at in range(20_000)
    }
    path.write_bytes(packed(header, bytes(20_000 * 64)))
    found = in_a_process(path)
    assert found["read"] == 20_000 * 64
    assert found["peak"] < 80 << 20
