import collections
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from shipd.checkpoints import content as content_module
from shipd.checkpoints.source import MAX_READ, Source, open_source
from shipd.checkpoints.state_dict import StateDict
from shipd.errors import CheckpointError, TensorChanged, UnsupportedTensor
from shipproto.digests import digest_image
from shipproto.dtypes import BY_NAME
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE
from tests.support.reading import refused

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def content(source, row):
    size = int(source.structure.nbytes[row])
    return b"".join(bytes(source.read(row, at, min(at + LEAF_SIZE, size))) for at in range(0, size, LEAF_SIZE))


def version_digest(source):
    layout = Layout(source.structure)
    image = bytearray(layout.size)
    for row in range(len(source.structure)):
        raw = content(source, row)
        image[layout.offsets[row] : layout.offsets[row] + len(raw)] = raw
    return digest_image(layout, memoryview(image)).version_digest()


def noise(size):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def every_kind(*, legacy):
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype in BY_NAME.items():
        if legacy and getattr(torch, name) in torch.storage._new_dtypes():
            continue  # torch does not load these from the old format.
        plain = noise(12 * dtype.itemsize).view(getattr(torch, name)).view(3, 4)
        tensors |= {f"{name}.plain": plain, f"{name}.turned": plain.t(), f"{name}.scalar": plain[1, 1].clone()}
    tensors["tied"] = tensors["float32.plain"]
    tensors["empty"] = torch.empty(0, 3)
    tensors["big"] = noise(3 * LEAF_SIZE + 5)
    return tensors


@pytest.fixture
def opened():
    sources = []

    def open_one(path):
        sources.append(open_source(path))
        return sources[-1]

    yield open_one
    for source in sources:
        source.close()


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request):
    return request.param


def save(obj, path, *, legacy=False):
    torch.save(obj, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "no suffix"])
def test_every_dtype_is_read_as_it_was_in_memory(tmp_path, opened, legacy, name):
    tensors = every_kind(legacy=legacy)
    path = save(tensors, tmp_path / name, legacy=legacy)
    source, memory = opened(path), StateDict(tensors)
    assert isinstance(source, Source)
    assert source.origin == str(path)
    assert source.structure.digest == memory.structure.digest
    assert source.structure.spec(source.structure.index["tied"]).tied_to == "float32.plain"
    assert [content(source, row) for row in range(len(tensors))] == [
        content(memory, row) for row in range(len(tensors))
    ]
    assert version_digest(source) == version_digest(memory)
    assert source.changed() is None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_protocols_are_read_as_far_as_torch_reads_them_safely(tmp_path, opened, legacy):
    path = tmp_path / "w.pt"
    for protocol in (2, 3):
        torch.save({"w": torch.ones(3)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
        assert content(opened(path), 0) == b"\0\0\x80?" * 3
    torch.save({"w": torch.ones(3)}, path, pickle_protocol=4, _use_new_zipfile_serialization=not legacy)
    told = refused(
        path, r"needs more of pickle than torch's safe reader has \('Unsupported operand 149'\); save it again"
    )
    assert "weights_only" not in told


def test_a_models_state_dict_is_read(tmp_path, opened, legacy):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = save(model.state_dict(), tmp_path / "model.pt", legacy=legacy)
    assert version_digest(opened(path)) == version_digest(open_source(model))
    path = save(dict(model.named_parameters()), tmp_path / "parameters.pt", legacy=legacy)
    assert opened(path).structure.names == tuple(sorted(name for name, _ in model.named_parameters()))


def test_other_flat_mappings_are_read(tmp_path, opened):
    path = save(collections.OrderedDict(w=torch.ones(1)), tmp_path / "w.pt")
    assert opened(path).structure.names == ("w",)
    assert opened(save({}, tmp_path / "none.pt")).structure.names == ()


def test_contiguous_tensors_of_a_mapped_file_are_read_in_place(tmp_path, opened):
    path = save({"w": torch.zeros(1000), "t": torch.zeros(50, 20).t()}, tmp_path / "w.pt")
    source = opened(path)
    first, second = source.read(1, 0, 10), source.read(1, 20, 30)
    assert first.readonly
    assert first.obj is second.obj
    assert source.read(0, 0, 0).nbytes == 0
    source.close()
    path.unlink()
    assert bytes(first) == bytes(10)
    with pytest.raises(ValueError, match="is closed"):
        source.read(0, 0, 1)


TRACE = Path(tempfile.gettempdir()) / f"shipd-test-ran-code-{os.getpid()}"


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


class Settings:
    def __init__(self):
        self.rate = 0.1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: {"w": torch.ones(1), "run": Payload()}, "posix.system"),
        (lambda: {"w": torch.ones(1), "settings": Settings()}, r"test_torch_file\.Settings"),
        (lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (lambda: {"w": torch.ones(1).numpy()}, r"numpy.*"),
    ],
    ids=["code", "class", "module", "array"],
)
def test_pickled_objects_are_refused_by_the_name_of_their_class(tmp_path, legacy, make, name):
    path = save(make(), tmp_path / "model.pt", legacy=legacy)
    told = refused(path, f"holds an object of '[^']*{name}[^']*' and not tensors alone")
    assert "load it once with torch.load(path, map_location='cpu', weights_only=False), in a process that can" in told
    assert told.endswith("then torch.save(model.state_dict(), other_path), of the module in it, and push that")
    assert not TRACE.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "has the layout torch.sparse_coo"),
        (lambda: torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8), "is quantised"),
        (lambda: torch.empty(3, device="meta"), "is on the meta device"),
        (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "is a lazily conjugated"),
    ],
    ids=["sparse", "quantised", "meta", "conjugated"],
)
def test_tensors_that_cannot_be_shipped_are_refused_by_name(tmp_path, make, message):
    path = save({"layer.w": make()}, tmp_path / "model.pt")
    refused(path, f"tensor 'layer.w' of '.*model.pt' {message}", UnsupportedTensor)


def test_extra_state_is_refused_by_name(tmp_path):
    path = save({"w": torch.ones(1), "norm._extra_state": {"scale": 1}}, tmp_path / "model.pt")
    refused(path, "tensor 'norm._extra_state' of .* is the extra state of a module", UnsupportedTensor)


def test_an_exported_program_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/models/model.json", "{}")
    refused(tmp_path / "model.pt2", "is an exported program of torch.export; save it as safetensors")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, legacy, part):
    path = save({"w": noise(100_000), "v": noise(5000)}, tmp_path / "model.pt", legacy=legacy)
    os.truncate(path, int(path.stat().st_size * part))
    refused(path, "truncated|interrupted")


def test_damaged_pickles_are_refused(tmp_path, legacy):
    path = save({"weight": torch.ones(2)}, tmp_path / "model.pt", legacy=legacy)
    whole = path.read_bytes()
    name = whole.index(b"weight")
    for at in range(max(name - 60, 12), name + 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        told = ""
        try:
            open_source(path).close()
        except (CheckpointError, UnsupportedTensor) as error:
            told = str(error)
        # Some damage is only another name or size, and shows in the digests.
        assert not told or (repr(str(path)) in told and len(told) < 900)


def repacked(path, method=zipfile.ZIP_STORED, change=lambda name, raw: raw):
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", method) as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))
    path.write_bytes(out.getvalue())
    return path


def test_repacked_archives_are_refused(tmp_path):
    path = save({"w": torch.ones(200)}, tmp_path / "model.pt")
    told = refused(repacked(path, zipfile.ZIP_DEFLATED), "has been repacked: its member 'model/")
    assert "compressed or encrypted, which torch.save never does" in told


def test_a_tensor_larger_than_its_record_is_refused(tmp_path):
    path = save({"w": torch.ones(200)}, tmp_path / "model.pt")
    # 200 elements in the pickle become 65480, far beyond the file.
    repacked(path, change=lambda name, raw: raw.replace(b"K\xc8", b"M\xc8\xff") if name.endswith("data.pkl") else raw)
    refused(path, "cannot be read by torch, so it is probably truncated or damaged")


def test_a_pickle_out_of_proportion_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(content_module, "_MAX_PICKLE", 50)
    path = save({"w": torch.ones(2)}, tmp_path / "model.pt")
    refused(path, "of pickled objects besides its tensors, and at most 50 B are read")


def test_versions_of_torch_with_known_holes_are_not_used(tmp_path, monkeypatch):
    path = save({"w": torch.ones(2)}, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu126")
    refused(path, r"torch 2.9.1\+cu126 cannot read such files safely \(CVE-2025-32434, CVE-2026-24747\)")


def test_a_file_that_is_replaced_while_it_is_opened_is_read_as_it_was(tmp_path, opened, monkeypatch):
    path = save({"w": torch.ones(2)}, tmp_path / "model.pt")
    other = save({"v": torch.zeros(2)}, tmp_path / "other.pt")
    load = torch.load

    def replace_first(*arguments, **options):
        other.rename(path)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", replace_first)
    source = opened(path)
    assert source.structure.names == ("w",)
    assert source.changed() is None


def test_a_file_that_is_written_while_it_is_opened_is_refused(tmp_path, legacy, monkeypatch):
    path = save({"w": torch.ones(2)}, tmp_path / "model.pt", legacy=legacy)
    load = torch.load

    def write_after(*arguments, **options):
        loaded = load(*arguments, **options)
        with path.open("ab") as file:
            file.write(b"more")
        return loaded

    monkeypatch.setattr(torch, "load", write_after)
    refused(path, r"the file '.*' \(it had \d+ bytes and now has \d+\) changed while it was being opened")


def test_a_mapped_file_that_is_written_to_is_noticed(tmp_path, opened):
    path = save({"w": torch.ones(2)}, tmp_path / "model.pt")
    os.utime(path, ns=(0, 1))
    source = opened(path)
    assert source.changed() is None
    os.utime(path, ns=(0, 2))
    assert source.changed() == f"the file {str(path)!r} (it was written to while it was being read)"


def test_a_mapped_file_that_is_cut_raises_instead_of_killing_the_process(tmp_path, opened):
    path = save({"t": noise(4 * LEAF_SIZE).view(1024, 2048).t(), "w": noise(4 * LEAF_SIZE)}, tmp_path / "model.pt")
    source = opened(path)
    os.truncate(path, LEAF_SIZE)
    for row, name in enumerate("tw"):
        with pytest.raises(TensorChanged, match=f"was cut from .* to {LEAF_SIZE} bytes while tensor '{name}'"):
            source.read(row, 2 * LEAF_SIZE, 3 * LEAF_SIZE)


def test_a_legacy_file_is_in_memory_once_it_is_open(tmp_path, opened):
    path = save({"w": torch.ones(2)}, tmp_path / "model.pt", legacy=True)
    source = opened(path)
    path.write_bytes(b"")
    assert source.changed() is None
    assert content(source, 0) == b"\0\0\x80?" * 2


def test_files_are_closed(tmp_path, legacy):
    path = save({"w": torch.ones(2)}, tmp_path / "model.pt", legacy=legacy)
    bad = save([1], tmp_path / "bad.pt", legacy=legacy)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = open_source(path)
    source.close()
    source.close()
    with pytest.raises(CheckpointError):
        open_source(bad)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_ranges_are_checked(tmp_path, opened):
    source = opened(save({"w": torch.zeros(MAX_READ)}, tmp_path / "model.pt"))
    for start, stop in ((-1, 1), (2, 1), (0, MAX_READ + 1), (4 * MAX_READ, 4 * MAX_READ + 1)):
        with pytest.raises(ValueError, match=f"bytes {start} to {stop} of tensor 'w'"):
            source.read(0, start, stop)


CHILD = """
import json, sys, xxhash
import shipd.checkpoints.torch_file
from shipd.checkpoints.source import open_source

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before = peak = anonymous()
source = open_source(sys.argv[1])
read = 0
for row, size in enumerate(source.structure.nbytes.tolist()):
    for at in range(0, size, 1 << 19):
        view = source.read(row, at, min(at + (1 << 19), size))
        xxhash.xxh3_128_digest(view)
        read += view.nbytes
        peak = max(peak, anonymous())
assert source.changed() is None
source.close()
print(json.dumps({"peak": peak - before, "read": read}))
"""


def test_a_large_file_needs_no_memory(tmp_path):
    path = tmp_path / "large.pt"
    block = noise(1 << 24).view(torch.float32)
    plain, turned = block.repeat(11), block.repeat(7).view(1 << 13, -1).t()
    size = 4 * (plain.numel() + turned.numel())
    torch.save({"plain": plain, "turned": turned}, path)
    del plain, turned
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, path], env=environment, capture_output=True, text=True
    )
    path.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["read"] == size > 300_000_000
    assert found["peak"] < 80 << 20
