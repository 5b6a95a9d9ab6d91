import ctypes
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from shipd.checkpoints import gather
from shipd.checkpoints.source import MAX_READ, Source, open_source
from shipd.checkpoints.state_dict import StateDict
from shipd.errors import TensorChanged, UnsupportedTensor
from shipproto.digests import digest_image
from shipproto.dtypes import BY_NAME
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def reference(tensor):
    """The tensor's bytes by a way that shares nothing with the reader: torch's contiguous copy, byte for byte."""
    if tensor.dtype is torch.bool:
        tensor = tensor.view(torch.uint8)
    whole = tensor.detach().contiguous()
    return ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()) if whole.numel() else b""


def content(source, row, step=LEAF_SIZE):
    size = int(source.structure.nbytes[row])
    return b"".join(bytes(source.read(row, at, min(at + step, size))) for at in range(0, size, step))


def version_digest(structure, contents):
    layout = Layout(structure)
    image = bytearray(layout.size)
    for row, raw in enumerate(contents):
        image[layout.offsets[row] : layout.offsets[row] + len(raw)] = raw
    return digest_image(layout, memoryview(image)).version_digest()


def require_exact(tensors):
    source = StateDict(tensors)
    names = source.structure.names
    found = [content(source, row) for row in range(len(names))]
    expected = [reference(tensors[name]) for name in names]
    assert found == expected
    assert version_digest(source.structure, found) == version_digest(source.structure, expected)
    assert source.changed() is None
    return source


def of_bytes(raw, dtype, shape):
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).view(shape)


def noise(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_dtype_is_read_bit_for_bit(name):
    dtype = getattr(torch, name)
    size = BY_NAME[name].itemsize
    plain = noise(6 * 5 * 4 * size).view(dtype).view(6, 5, 4)
    tensors = {
        "plain": plain,
        "scalar": noise(size).view(dtype).view(()),
        "empty": torch.empty(0, 3, dtype=dtype),
        "turned": plain.permute(2, 0, 1),
        "sliced": plain[1:5:2, :, 1:3],
        "expanded": plain[:, :1].expand(6, 7, 4),
        "column": plain[:, 0, 0],
    }
    source = require_exact(tensors)
    for row, tensor_name in enumerate(source.structure.names):
        assert source.structure.dtype(row) == name
        assert source.structure.shape(row) == tuple(tensors[tensor_name].shape)


@pytest.mark.parametrize("transposed", [False, True])
def test_nan_payloads_and_negative_zeros_survive(transposed):
    patterns = {
        torch.float32: [0x7FC00001, 0xFFC0DEAD, 0x7F800001, 0x80000000, 0x00000001, 0xFF800000],
        torch.float64: [0x7FF8000000000001, 0xFFF80000DEADBEEF, 0x7FF0000000000001, 0x8000000000000000, 1, 0xFFF << 52],
        torch.bfloat16: [0x7FC1, 0xFFDE, 0x7F81, 0x8000, 0x0001, 0xFF80],
        torch.float16: [0x7E01, 0xFEDE, 0x7C01, 0x8000, 0x0001, 0xFC00],
        torch.float8_e4m3fn: [0x7F, 0xFF, 0x80, 0x01, 0x7E, 0x81],
        torch.complex64: [0x7FC00001_80000000, 0x80000000_7F800001, 1, 2, 3, 4],
    }
    tensors = {}
    for dtype, words in patterns.items():
        raw = b"".join(word.to_bytes(dtype.itemsize, "little") for word in words)
        tensor = of_bytes(raw, dtype, (2, 3))
        tensors[str(dtype)] = tensor.t() if transposed else tensor
    source = require_exact(tensors)
    row = source.structure.index["torch.float32"]
    first = int.from_bytes(content(source, row)[:4], "little")
    assert first == 0x7FC00001


def test_bytes_of_bools_are_not_made_ones():
    odd = torch.arange(256, dtype=torch.uint8).view(torch.bool).view(16, 16)
    source = require_exact({"plain": odd, "turned": odd.t()})
    assert content(source, source.structure.index["plain"]) == bytes(range(256))
    copied = StateDict({"turned": odd.t()}, snapshot=True)
    assert content(copied, 0) == reference(odd.t())


def strided():
    base = noise(3 << 20)
    floats = base.view(torch.float32)
    return {
        "transposed": floats[: 700 * 900].view(700, 900).t(),
        "transposed bytes": base[: 900 * 1100].view(900, 1100).t(),
        "transposed doubles": base.view(torch.float64)[: 300 * 500].view(300, 500).t(),
        "transposed complex": base.view(torch.complex128)[: 300 * 400].view(300, 400).t(),
        "channels last": floats[: 96 * 64 * 9].view(96, 64, 3, 3).to(memory_format=torch.channels_last),
        "every other": floats[: 600 * 800].view(600, 800)[:, ::2],
        "columns": floats[: 600 * 800].view(600, 800)[:, 13:500],
        "rows of one": floats[:: 1 << 8].view(-1, 1),
        "permuted": floats[: 60 * 70 * 80].view(60, 70, 80).permute(2, 0, 1),
        "expanded rows": floats[:900].view(1, 900).expand(400, 900),
        "expanded columns": floats[:400].view(400, 1).expand(400, 900),
        "expanded scalar": floats[0].expand(300_000),
        "overlapping": floats.as_strided((500, 600), (7, 3)),
        "deep": base[: 1 << 16].view([2] * 16).permute(*reversed(range(16))),
        "ones": floats[:3000].view(1, 30, 1, 100, 1).permute(4, 3, 2, 1, 0),
    }


@pytest.mark.parametrize("case", strided())
def test_strided_tensors_are_gathered(case):
    tensor = strided()[case]
    assert not tensor.is_contiguous()
    require_exact({"w": tensor})
    source, expected = StateDict({"w": tensor}), reference(tensor)
    size = len(expected)
    for step in (1 << 16, 100_003, MAX_READ):
        assert content(source, 0, step) == expected
    edges = [0, 1, 7, 8, size // 3, size // 2 - 5, size // 2, size - 9, size - 1, size]
    for start in edges:
        for stop in edges:
            if start <= stop <= start + MAX_READ:
                assert bytes(source.read(0, start, stop)) == expected[start:stop]


def test_gathering_is_bounded_however_large_the_rows_are():
    wide = noise(8 << 20).view(2, 4 << 20)
    for tensor in (
        wide[:, :-1],
        wide.t(),
        wide.view(1 << 12, 1 << 11).t(),
        wide.view(2, 1 << 11, 1 << 11).transpose(1, 2),
    ):
        source = StateDict({"w": tensor})
        size = int(source.structure.nbytes[0])
        for start in range(0, size, 300_007):
            source.read(0, start, min(start + LEAF_SIZE, size))
        kept = {name: buffer.numel() for name, buffer in vars(source._buffers).items()}
        assert set(kept) <= {"rows", "turned"}
        assert max(kept.values()) <= 4 * LEAF_SIZE


def test_contiguous_tensors_are_read_in_place():
    tensor = torch.zeros(2 * LEAF_SIZE // 4)
    source = StateDict({"w": tensor})
    before = source.read(0, 4, 12)
    assert before.readonly
    assert before.format == "B"
    tensor.view(torch.int32)[1] = 0x01020304
    assert bytes(before) == bytes([4, 3, 2, 1, 0, 0, 0, 0])
    assert source.read(0, 4, 8).obj is before.obj
    assert source.read(0, 5, 5).nbytes == 0


def test_views_keep_the_memory_alive():
    tensors = {"w": noise(1000), "t": noise(1000).view(10, 100).t()}
    expected = {name: reference(tensor) for name, tensor in tensors.items()}
    died = weakref.ref(tensors["w"])
    source = StateDict(tensors)
    view, gathered = source.read(1, 0, 1000), source.read(0, 0, 1000)
    tensors.clear()
    source.close()
    source.close()
    del source
    gc.collect()
    assert died() is None
    torch.zeros(1000)  # Would take the freed memory.
    assert view == expected["w"]
    assert gathered == expected["t"]


def test_reading_leaves_the_tensors_as_they_were():
    weight = nn.Parameter(torch.randn(8, 8))
    source = StateDict({"w": weight})
    content(source, 0)
    assert weight.requires_grad
    assert weight.grad_fn is None
    assert source.changed() is None
    source.close()
    # What Tensor.numpy() would have made impossible for good, and FSDP does all the time.
    weight.untyped_storage().resize_(0)


def test_ties_are_found():
    weight = torch.randn(4, 4)
    other = torch.randn(4, 4)
    tensors = {
        "z": weight,
        "b": weight,
        "a": weight.detach(),
        "c": nn.Parameter(weight),
        "turned": weight.t(),
        "part": weight[:2],
        "flat": weight.view(-1),
        "whole": weight.view(torch.int32),
        "other": other,
        "copy": other.clone(),
        "empty 1": torch.empty(0),
        "empty 2": torch.empty(0),
    }
    source = require_exact(tensors)
    tied = {spec.name: spec.tied_to for spec in source.structure.specs() if spec.tied_to}
    assert tied == {"b": "a", "c": "a", "z": "a"}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_module_is_its_state_dict():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("positions", torch.arange(10), persistent=False)

    model = Tied()
    source = open_source(model)
    assert isinstance(source, Source)
    assert source.origin == "state dict"
    assert sorted(model.state_dict()) == list(source.structure.names)
    assert source.structure.spec(source.structure.index["head.weight"]).tied_to == "embed.weight"
    assert source.changed() is None
    model.norm(torch.randn(3, 4))
    assert source.changed() == "norm.num_batches_tracked"
    script = torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3))
    assert open_source(script).structure.names == ("bias", "weight")


class Marked(torch.Tensor):
    pass


def freed():
    tensor = torch.randn(10)
    tensor.untyped_storage().resize_(0)
    return tensor


def quantised():
    return torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8)


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def compressed():
    return torch.eye(3).to_sparse_csr()


UNSUPPORTED = {
    "none": (lambda: None, "is a builtins.NoneType and no tensor: push a flat mapping"),
    "dict": (lambda: {"w": torch.zeros(1)}, "is a builtins.dict and no tensor"),
    "list": (lambda: [1.0], "is a builtins.list and no tensor"),
    "array": (lambda: torch.zeros(1).numpy(), "is a numpy.ndarray and no tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "has the layout torch.sparse_coo and is not dense: push its to_dense"),
    "csr": (compressed, "has the layout torch.sparse_csr"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "has the layout torch._mkldnn"),
    "quantised": (quantised, "is quantised \\(torch.qint8\\): push its dequantize"),
    "meta": (lambda: torch.empty(3, device="meta"), "is on the meta device and has no content"),
    "subclass": (lambda: torch.zeros(3).as_subclass(Marked), "is of the subclass .*Marked: push plain tensors"),
    "marked parameter": (lambda: nn.Parameter(torch.zeros(3).as_subclass(Marked)), "is of the subclass .*Marked"),
    "uninitialised": (lambda: nn.LazyLinear(3).weight, "is not initialised yet: run the lazy module once"),
    "conjugated": (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "is a lazily conjugated or negated view"),
    "negated": (lambda: torch.zeros(3, dtype=torch.complex64).conj().imag, "is a lazily conjugated or negated view"),
    "sub-byte": (lambda: torch.empty(3, dtype=torch.float4_e2m1fn_x2), "has the dtype torch.float4_e2m1fn_x2"),
    "bits": (lambda: torch.empty(3, dtype=torch.bits8), "has the dtype torch.bits8, which cannot be shipped"),
    "nested": (nested, "is nested: push its parts"),
    "freed": (freed, "has storage of 0 bytes and needs 40: it was freed or resized, as FSDP does"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_shipped_is_refused_by_name(case):
    make, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedTensor, match="^tensor 'layer.w' of state dict (" + message + ")") as caught:
        open_source({"layer.a": torch.zeros(1), "layer.w": make()})
    assert caught.value.tensor == "layer.w"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (7, "state dict has the key 7 of type int; names are texts"),
        ("norm._extra_state", "is the extra state of a module, which is not a weight"),
        ("_extra_state", "is the extra state of a module"),
        ("\ud800", "has a name that is not valid text: rename it"),
        ("", "state dict: a tensor's name has 0 characters; 1 to 512"),
        ("n" * 513, "state dict: a tensor's name has 513 characters"),
        ("a\nb", "state dict: a tensor's name contains the control character"),
    ],
)
def test_names_that_cannot_be_shipped_are_refused(name, message):
    with pytest.raises(UnsupportedTensor, match=message):
        open_source({name: torch.zeros(1)})


def test_too_many_dimensions_are_refused():
    with pytest.raises(UnsupportedTensor, match="state dict: tensor 'w' has 33 dimensions; at most 32"):
        open_source({"w": torch.zeros([1] * 33)})


def test_other_byte_orders_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UnsupportedTensor, match="this host is big-endian"):
        StateDict({"w": torch.zeros(1)})


def test_changes_are_noticed():
    tensors = {"a": torch.zeros(3), "b": torch.zeros(4, 4).t(), "c": nn.Parameter(torch.zeros(3))}
    for change, name in (
        (lambda: tensors["a"].add_(1), "a"),
        (tensors["b"].zero_, "b"),
        (lambda: torch.optim.SGD([tensors["c"]], lr=1.0).step(), "c"),
        (lambda: setattr(tensors["c"], "data", torch.zeros(3)), "c"),
    ):
        tensors["c"].grad = torch.ones(3)
        source = StateDict(tensors)
        assert source.changed() is None
        change()
        assert source.changed() == name


def test_memory_that_went_away_is_not_read():
    direct, turned = torch.randn(100), torch.randn(10, 10).t()
    source = StateDict({"direct": direct, "turned": turned})
    for row in range(2):
        source.read(row, 0, 100)
    for tensor in (direct, turned):
        tensor.untyped_storage().resize_(0)
    for row, name in enumerate(source.structure.names):
        with pytest.raises(TensorChanged, match=f"tensor '{name}' of state dict was given other memory") as caught:
            source.read(row, 0, 100)
        assert caught.value.tensor == name
    assert source.changed() == "direct"


def test_a_snapshot_stays_as_it_was():
    weight = torch.randn(6, 7)
    tensors = {
        "a": weight,
        "b": weight,
        "t": torch.randn(5, 4).t(),
        "e": torch.randn(1, 3).expand(4, 3),
        "0": torch.empty(0),
    }
    expected = {name: reference(tensor) for name, tensor in tensors.items()}
    source = open_source(tensors, snapshot=True)
    for tensor in (weight, tensors["t"]):
        tensor.zero_()
    weight.untyped_storage().resize_(0)
    assert source.changed() is None
    assert {name: content(source, row) for name, row in source.structure.index.items()} == expected
    assert source.structure.spec(source.structure.index["b"]).tied_to == "a"
    assert source.read(source.structure.index["a"], 0, 4).obj is not None


def test_inference_tensors_and_inference_mode_are_fine():
    with torch.inference_mode():
        made = {
            "w": torch.randn(64, 64),
            "t": torch.randn(64, 64).t(),
            "c": torch.randn(4, 4, dtype=torch.complex128).t(),
        }
    require_exact(made)
    with torch.inference_mode():
        inside = require_exact(made)
        copied = StateDict(made, snapshot=True)
    # A buffer made inside must take content outside, and the other way round.
    for source in (inside, copied):
        for row, name in enumerate(source.structure.names):
            assert content(source, row, 1000) == reference(made[name])
    outside = StateDict(made)
    content(outside, 0)
    with torch.inference_mode():
        assert content(outside, 0) == reference(made["c"])


def test_the_default_device_does_not_matter():
    tensor = torch.randn(64, 64).t()
    with torch.device("meta"):
        source = StateDict({"w": tensor})
        copied = StateDict({"w": tensor}, snapshot=True)
        assert content(source, 0) == content(copied, 0)


def test_without_page_locked_memory_an_ordinary_buffer_serves(monkeypatch):
    empty = torch.empty

    def refuse(*arguments, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("no page-locked memory left")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    assert gather._allocate(4096, pinned=True).numel() == 4096


def test_threads_do_not_share_buffers():
    tensor = noise(4 << 20).view(2048, 2048).t()
    source, expected = StateDict({"w": tensor}), reference(tensor)
    together = threading.Barrier(4)

    def read(first):
        together.wait()
        for at in range(first * LEAF_SIZE, len(expected), 4 * LEAF_SIZE):
            view = source.read(0, at, at + LEAF_SIZE)
            together.wait()
            if view != expected[at : at + LEAF_SIZE]:
                return False
            together.wait()
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 65), (9, 8), (65, 65)])
def test_ranges_outside_a_tensor_are_the_callers_mistake(start, stop):
    source = StateDict({"a": torch.zeros(4, 4), "b": torch.zeros(4, 4).t()})
    for row, name in enumerate("ab"):
        with pytest.raises(
            ValueError, match=rf"bytes {start} to {stop} of tensor '{name}' \(64 bytes\) cannot be read"
        ):
            source.read(row, start, stop)


@pytest.mark.parametrize("turned", [False, True])
def test_reads_are_bounded(turned):
    tensor = torch.zeros(2, MAX_READ, dtype=torch.uint8)
    source = StateDict({"w": tensor.t() if turned else tensor})
    assert source.read(0, 5, 5 + MAX_READ).nbytes == MAX_READ
    with pytest.raises(ValueError, match=f"at most {MAX_READ} bytes"):
        source.read(0, 5, 6 + MAX_READ)


def test_an_empty_state_dict_is_a_source():
    source = open_source({})
    assert len(source.structure) == 0
    assert source.changed() is None
