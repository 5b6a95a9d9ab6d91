import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError
from tests.support.safetensors_files import F32, packed


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
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "cannot be read by the HDF5 library"),
    "gzip": (gzip.compress(b"model"), "is compressed with gzip: decompress it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "is compressed with zstd"),
    "xz": (b"\xfd7zXZ\x00" + bytes(20), "is compressed with xz"),
    "bzip2": (b"BZh91AY&SY" + bytes(20), "is compressed with bzip2"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(20), "is a GGUF file of llama.cpp"),
    "npy": (saved_array(), "is a single numpy array, .*: save it with numpy.savez, by name$"),
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

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(CheckpointError, match="permission to read it is missing: run as its owner"):
        open_source(tmp_path / "file")


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
