import os
import threading

import numpy as np
import pytest
import torch
from torch import nn

from shipd.errors import AttachError, SwapFailed
from shipd.images.memory import Access, ImageMapping, create_memfd, open_read_only
from shipd.serving import bits, cuda, cuda_direct
from shipd.serving.gate import Gate
from shipd.serving.swap import make_swapper
from shipd.serving.tensors import ModelTensors
from shipd.serving.version import Version
from shipproto.digests import digest_image
from shipproto.dtypes import DTYPES
from shipproto.layout import Layout
from tests.support.gates import Worker
from tests.support.swapping import channels_last

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEADLINE = 60.0


class Rig:
    """A model on the device, its swapper, and images to swap it to."""

    def __init__(self, model, mode):
        self.model = model
        self.tensors = ModelTensors(model)
        self.layout = Layout(self.tensors.structure)
        self.swapper = make_swapper(self.tensors, self.layout, mode)
        assert self.swapper.mode == mode
        self.fds = []
        self.mappings = []

    def slot(self, access=Access.READ_WRITE):
        fd = create_memfd("shipd-test-cuda", self.layout.size)
        self.fds += [fd, open_read_only(fd)]
        daemon = ImageMapping.shared(fd, self.layout.size)
        mapping = ImageMapping(fd if access is Access.READ_WRITE else self.fds[-1], self.layout.size, access)
        self.mappings.append(mapping)
        return daemon, mapping

    def random_version(self, seed, access=Access.READ_WRITE):
        """An image of random bytes in place of every tensor."""
        daemon, mapping = self.slot(access)
        self.swapper.fill(daemon.view)
        generator = np.random.default_rng(seed)
        flat = np.frombuffer(daemon.raw, dtype=np.uint8)
        for start, size in zip(self.layout.offsets.tolist(), self.layout.structure.nbytes.tolist(), strict=True):
            flat[start : start + size] = generator.integers(0, 256, size, dtype=np.uint8)
        return daemon, mapping

    def digest_of(self, daemon):
        return digest_image(self.layout, daemon.view).version_digest()

    def adopt(self):
        daemon, mapping = self.slot()
        self.swapper.fill(daemon.view)
        self.swapper.adopt(mapping)
        return daemon

    def close(self):
        for mapping in self.mappings:
            self.swapper.forget(mapping)
        self.swapper.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture(params=["copy", "direct"])
def mode(request):
    return request.param


@pytest.fixture
def rig(mode):
    rigs = []

    def make(model):
        rigs.append(Rig(model, mode))
        return rigs[-1]

    yield make
    while rigs:
        rigs.pop().close()


class Everything(nn.Module):
    """Every dtype, small and large, contiguous and not."""

    def __init__(self):
        super().__init__()
        for dtype in DTYPES:
            kind = getattr(torch, dtype.name)
            content = torch.arange(24 * dtype.itemsize, dtype=torch.uint8, device="cuda")
            self.register_buffer(f"{dtype.name}_matrix", content.view(kind).view(2, 3, 4))
            self.register_buffer(f"{dtype.name}_turned", content.clone().view(kind).view(4, 6).t())
            self.register_buffer(f"{dtype.name}_scalar", content[: dtype.itemsize].clone().view(kind).view(()))
            self.register_buffer(f"{dtype.name}_empty", content.clone().view(kind)[:0].view(0, 5))
        self.register_buffer("large", torch.arange(3_000_000, dtype=torch.float32, device="cuda"))
        self.register_buffer(
            "large_turned", torch.arange(600_000, dtype=torch.float64, device="cuda").view(600, 1000).t()
        )
        self.conv = channels_last(nn.Conv2d(3, 5, 3, device="cuda"))


def perceptron(width=512):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).cuda().eval()


def test_every_bit_of_every_dtype_arrives(rig):
    one = rig(Everything())
    initial = one.adopt()
    assert one.swapper.digest() == one.digest_of(initial)
    addresses = [tensor.data_ptr() for tensor in one.tensors.live]
    versions = [tensor._version for tensor in one.tensors.live]
    for seed in range(3):
        daemon, mapping = one.random_version(seed)
        one.swapper.prepare(mapping)
        one.swapper.stage(mapping)
        one.swapper.apply()
        assert one.swapper.digest() == one.digest_of(daemon)
        assert one.swapper.settle()
    assert [tensor.data_ptr() for tensor in one.tensors.live] == addresses
    assert [tensor._version for tensor in one.tensors.live] == versions
    assert one.tensors.changed() == []


@pytest.mark.parametrize("access", [Access.READ_ONLY, Access.READ_WRITE])
def test_images_are_page_locked_or_carried_by_the_ring(access, rig):
    one = rig(perceptron())
    one.adopt()
    daemon, mapping = one.random_version(1, access)
    one.swapper.prepare(mapping)
    locked = one.swapper.page_locked
    print(f"{access.value}: {'page-locked' if locked else 'refused, by way of the ring'}")
    assert locked or access is Access.READ_ONLY
    assert torch.frombuffer(mapping.raw, dtype=torch.uint8).is_pinned() == locked
    # A refused registration must not come out of somebody else's next launch.
    assert float(torch.ones(4, device="cuda").sum()) == 4.0
    one.swapper.stage(mapping)
    one.swapper.apply()
    assert one.swapper.digest() == one.digest_of(daemon)
    one.swapper.forget(mapping)
    assert not torch.frombuffer(mapping.raw, dtype=torch.uint8).is_pinned()


def test_slices_and_the_ring_give_the_same_bytes(rig, monkeypatch):
    monkeypatch.setattr(cuda, "LOCK_SLICE", 1 << 20)
    monkeypatch.setattr(cuda, "RING_BUFFER", 300_000)
    one = rig(Everything())
    one.adopt()
    for seed, refused in ((1, False), (2, True)):
        daemon, mapping = one.random_version(seed)
        one.swapper.prepare(mapping)
        if refused:
            one.swapper.page_locked = False
        chunks = one.layout.chunks
        one.swapper.arrived(mapping, [(chunks // 2, chunks)])
        one.swapper.arrived(mapping, [(0, chunks // 3)])
        one.swapper.stage(mapping)
        one.swapper.apply()
        assert one.swapper.digest() == one.digest_of(daemon)


def test_nothing_live_is_touched_before_the_swap(rig):
    one = rig(perceptron())
    initial = one.adopt()
    _, mapping = one.random_version(1)
    one.swapper.arrived(mapping, [(0, one.layout.chunks)])
    one.swapper.stage(mapping)
    torch.cuda.synchronize()
    assert one.swapper.digest() == one.digest_of(initial)
    one.swapper.discard()


@pytest.mark.parametrize("adopted", [True, False])
def test_a_swap_that_fails_at_any_tensor_is_undone(adopted, rig, monkeypatch):
    """The tensors before it have been overwritten by then, and wait for nobody to synchronise."""
    one = rig(Everything())
    if adopted:
        one.adopt()
    before = one.swapper.digest()
    daemon, mapping = one.random_version(1)
    real = bits.copy_all
    done: list[int] = []

    def fail(targets, sources):
        for target, source in zip(targets, sources, strict=True):
            if len(done) == failing:
                done.append(-1)
                raise RuntimeError("injected")
            done.append(1)
            real([target], [source])

    failing = 0
    while True:
        one.swapper.stage(mapping)
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(bits, "copy_all", fail)
            try:
                one.swapper.apply()
            except SwapFailed as error:
                assert "injected" in str(error)  # noqa: PT017  the last one succeeds
            else:
                break
        assert one.swapper.digest() == before
        failing += 1
    assert failing > 30
    assert one.swapper.digest() == one.digest_of(daemon)


def test_direct_takes_no_more_of_the_device_than_its_window():
    model = perceptron(4096)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    one = Rig(model, "direct")
    assert torch.cuda.memory_allocated() - before <= cuda_direct.WINDOW + (1 << 20)
    daemon, mapping = one.random_version(1)
    one.swapper.prepare(mapping)
    torch.cuda.reset_peak_memory_stats()
    one.swapper.stage(mapping)
    one.swapper.apply()
    assert torch.cuda.max_memory_allocated() - before <= 2 * cuda_direct.WINDOW
    assert one.swapper.digest() == one.digest_of(daemon)
    one.close()


def test_a_hold_ends_when_its_kernels_have(rig):
    """The hold is left while its kernels are still queued behind a long one, on a stream of the reader's own."""
    model = perceptron(2048)
    one = rig(model)
    one.adopt()
    x = torch.randn(64, 2048, device="cuda")
    expected = model(x)
    daemon, mapping = one.slot()
    one.swapper.fill(daemon.view)
    np.frombuffer(daemon.raw, dtype=np.uint8)[:] = 0
    one.swapper.stage(mapping)
    gate = Gate(Version("old", ""))
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream), gate.hold():
        torch.cuda._sleep(200_000_000)
        answer = model(x)

    def action():
        one.swapper.apply()
        return Version("new", "")

    gate.swap(action, commit_timeout=DEADLINE, max_hold=DEADLINE)
    torch.cuda.synchronize()
    assert torch.equal(answer, expected)
    with torch.inference_mode(), gate.hold():
        assert not bool(model(x).any())


def test_a_captured_graph_serves_the_new_version(rig):
    model = perceptron()
    one = rig(model)
    one.adopt()
    x = torch.randn(8, 512, device="cuda")
    with torch.inference_mode():
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):
            model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = model(x)
    daemon, mapping = one.slot()
    one.swapper.fill(daemon.view)
    flat = torch.frombuffer(daemon.raw, dtype=torch.float32)
    flat.mul_(0.5)
    one.swapper.stage(mapping)
    one.swapper.apply()
    graph.replay()
    torch.cuda.synchronize()
    with torch.inference_mode():
        assert torch.equal(answer, model(x))


def test_a_hundred_swaps_under_readers_and_none_sees_a_mix(rig):
    model = perceptron()
    one = rig(model)
    x = torch.randn(8, 512, device="cuda")
    images = []
    answers = {}
    for factor in (1.0, 0.5):
        daemon, mapping = one.slot()
        one.swapper.fill(daemon.view)
        torch.frombuffer(daemon.raw, dtype=torch.float32).mul_(factor)
        one.swapper.prepare(mapping)
        images.append(mapping)
    for label, mapping in zip("ba", reversed(images), strict=True):
        one.swapper.stage(mapping)
        one.swapper.apply()
        with torch.inference_mode():
            answers[label] = model(x)
        torch.cuda.synchronize()
    gate = Gate(Version("a", ""))
    stop = threading.Event()

    def read():
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                with gate.hold() as version:
                    answer = model(x)
                assert torch.equal(answer, answers[version.label]), "a mix"

    readers = [Worker(read, f"reader {index}") for index in range(4)]
    for number in range(1, 101):
        mapping = images[number % 2]
        one.swapper.arrived(mapping, [(0, one.layout.chunks)])
        one.swapper.stage(mapping)

        def action(label="ab"[number % 2]):
            one.swapper.apply()
            return Version(label, "")

        gate.swap(action, commit_timeout=DEADLINE, max_hold=DEADLINE)
    stop.set()
    for reader in readers:
        reader.finish()


def test_a_model_for_which_the_device_has_no_room_is_refused(monkeypatch):
    model = perceptron()
    tensors = ModelTensors(model)

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(AttachError, match="needs a shadow"):
        make_swapper(tensors, Layout(tensors.structure), "copy")


def test_auto_is_direct_where_the_shadow_does_not_fit(monkeypatch):
    model = perceptron(4096)
    tensors = ModelTensors(model)
    layout = Layout(tensors.structure)
    real = torch.zeros

    def crowded(*shape, **options):
        if shape[0] == layout.size:
            raise torch.cuda.OutOfMemoryError("full")
        return real(*shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", crowded)
        crowded_out = make_swapper(tensors, layout, "auto")
    assert crowded_out.mode == "direct"
    crowded_out.close()
    roomy = make_swapper(tensors, layout, "auto")
    assert roomy.mode == "copy"
    roomy.close()


def test_flip_and_mixed_devices_are_refused():
    from shipd.errors import UnsupportedTensor

    model = perceptron()
    tensors = ModelTensors(model)
    with pytest.raises(AttachError, match="on the CPU"):
        make_swapper(tensors, Layout(tensors.structure), "flip")
    model.register_buffer("here", torch.ones(3))
    with pytest.raises(UnsupportedTensor, match="all must be on one device"):
        ModelTensors(model)
