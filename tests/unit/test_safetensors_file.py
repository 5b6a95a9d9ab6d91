import gc
import json
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from shipd.checkpoints.source import MAX_READ, Source, open_source
from shipd.errors import CheckpointError, TensorChanged
from shipproto.digests import digest_image
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE
from tests.support.safetensors_files import F32, entry, packed


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
