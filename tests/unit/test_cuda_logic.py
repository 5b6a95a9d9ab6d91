"""What the CUDA swapper decides, run on the CPU with a CUDA that does everything at once. What CUDA itself does with
it is for tests/gpu."""

import contextlib
import itertools
import os

import pytest
import torch
from torch import nn

from shipd.errors import AttachError, SwapFailed
from shipd.images.memory import ImageMapping, create_memfd, open_read_only
from shipd.serving import bits, cuda, cuda_direct
from shipd.serving.cuda import CudaCopySwap, NoRoom, spans
from shipd.serving.cuda_direct import CudaDirectSwap, cut
from shipd.serving.swap import Torn, make_swapper
from shipd.serving.tensors import ModelTensors
from shipproto.digests import digest_image
from shipproto.layout import Layout

SLICE = 1 << 19


class FakeEvent:
    def synchronize(self):
        pass

    def record(self, stream):
        pass


class FakeStream(FakeEvent):
    def __init__(self, device):
        pass


class FakeRuntime:
    """Counts registrations; refuses from the one numbered ``refuse`` on."""

    def __init__(self):
        self.registered = {}
        self.refuse = 1 << 30
        self.calls = []

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        self.calls.append((address, size, flags))
        if len(self.calls) > self.refuse:
            return 1
        assert address not in self.registered
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        return 0 if self.registered.pop(address, None) else 1


@pytest.fixture
def runtime(monkeypatch):
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(cuda, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(cuda, "LOCK_SLICE", SLICE)
    monkeypatch.setattr(cuda, "RING_BUFFER", 100_000)
    monkeypatch.setattr(cuda_direct, "STRAIGHT", 1_250_000)
    monkeypatch.setattr(cuda_direct, "WINDOW", 300_000)
    return fake


def tensors_of_a_model():
    """Large and small, contiguous and not, of several dtypes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 500), nn.BatchNorm1d(500), nn.Linear(500, 700))
    model.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
    model.register_buffer("large_turned", torch.arange(300_000.0).view(500, 600).t())
    model.register_buffer("flags", torch.ones(31, dtype=torch.bool))
    model.register_buffer("odd", torch.zeros(77_777, 9, dtype=torch.uint8).t())
    model.register_buffer("complex", torch.zeros(5, 3, dtype=torch.complex128).t())
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("scalar", torch.tensor(3))
    return ModelTensors(model)


@pytest.fixture(params=[CudaCopySwap, CudaDirectSwap], ids=["copy", "direct"])
def swapper(request, runtime):
    tensors = tensors_of_a_model()
    made = request.param(tensors, Layout(tensors.structure))
    yield made
    made.close()
    assert runtime.registered == {}


@pytest.fixture
def direct(runtime):
    tensors = tensors_of_a_model()
    made = CudaDirectSwap(tensors, Layout(tensors.structure))
    yield made
    made.close()


@pytest.fixture
def full(monkeypatch, runtime):
    """A device with room for ``full[0]`` bytes in one piece."""
    room = [0]
    real = torch.zeros

    def zeros(*shape, device=None, **options):
        if device is not None and shape[0] > room[0]:
            raise torch.cuda.OutOfMemoryError("no")
        return real(*shape, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room[0], 1 << 30))
    return room


@pytest.fixture
def images(request):
    fds: list[int] = []
    swapper = request.getfixturevalue("direct" if "direct" in request.fixturenames else "swapper")

    def make(change=None):
        """An image of the live tensors, every large one changed by ``change``, and the daemon's mapping of it."""
        fd = create_memfd("shipd-test-cuda", swapper.layout.size)
        fds.extend((fd, open_read_only(fd)))
        daemon = ImageMapping.shared(fd, swapper.layout.size)
        swapper.fill(daemon.view)
        if change is not None:
            for at in range(0, swapper.layout.size, 4096):
                daemon.view[at] = change
        return daemon, ImageMapping.read_only(fds[-1], swapper.layout.size)

    yield make
    for fd in fds:
        os.close(fd)


def live_digest(swapper):
    return swapper.digest()


def digest_of(swapper, daemon):
    return digest_image(swapper.layout, daemon.view).version_digest()


@pytest.mark.parametrize("locking", ["works", "refused", "refused later"])
@pytest.mark.parametrize("arriving", ["nothing", "everything", "in pieces", "twice"])
def test_whatever_has_arrived_the_staged_version_is_whole(locking, arriving, swapper, images, runtime):
    runtime.refuse = {"works": 1 << 30, "refused": 0, "refused later": 2}[locking]
    _, current = images()
    swapper.prepare(current)
    swapper.adopt(current)
    daemon, mapping = images(3)
    swapper.prepare(mapping)
    assert swapper.page_locked is (locking == "works")
    chunks = swapper.layout.chunks
    assert chunks > 5
    if arriving == "everything":
        swapper.arrived(mapping, [(0, chunks)])
    elif arriving == "in pieces":
        swapper.arrived(mapping, [(3, 4), (1, 2)])
        swapper.arrived(mapping, [(chunks - 1, chunks)])
    elif arriving == "twice":
        good = bytes(daemon.view[:4096])
        daemon.view[:4096] = bytes(4096)
        swapper.arrived(mapping, [(0, 2)])
        daemon.view[:4096] = good
        swapper.arrived(mapping, [(0, 1)])
    before = live_digest(swapper)
    swapper.stage(mapping)
    assert live_digest(swapper) == before
    swapper.apply()
    assert live_digest(swapper) == digest_of(swapper, daemon) != before
    assert swapper.settle()
    swapper.forget(current)
    swapper.forget(mapping)
    assert runtime.registered == {}


def test_what_was_discarded_is_not_taken_for_what_arrives_later(swapper, images):
    daemon, mapping = images(3)
    swapper.arrived(mapping, [(0, swapper.layout.chunks)])
    swapper.discard()
    for at in range(0, swapper.layout.size, 4096):
        daemon.view[at] = 4
    swapper.stage(mapping)
    swapper.apply()
    assert live_digest(swapper) == digest_of(swapper, daemon)


@pytest.mark.parametrize("adopted", [True, False])
def test_a_failed_copy_is_undone_from_the_image_before(adopted, swapper, images, monkeypatch):
    _, current = images()
    if adopted:
        swapper.adopt(current)
    before = live_digest(swapper)
    daemon, mapping = images(3)
    real = torch._foreach_copy_
    for at in range(2):
        calls: list[int] = []

        def fail(targets, sources, calls=calls, at=at):
            calls.append(1)
            real(targets, sources)
            if len(calls) == at + 1:
                raise RuntimeError("injected")

        swapper.stage(mapping)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", fail)
            with pytest.raises(SwapFailed, match="injected"):
                swapper.apply()
        assert live_digest(swapper) == before
    swapper.stage(mapping)
    swapper.apply()
    assert live_digest(swapper) == digest_of(swapper, daemon)


def test_page_locking_covers_the_image_in_slices(swapper, images, runtime):
    _, mapping = images()
    swapper.prepare(mapping)
    swapper.prepare(mapping)
    sizes = [size for _, size, _ in runtime.calls]
    assert sum(sizes) == mapping.size
    assert max(sizes) == SLICE
    assert runtime.registered[mapping.address]
    assert {flags for *_, flags in runtime.calls} == {cuda._REGISTER_READ_ONLY}


def test_page_locking_can_be_given_up_and_ends_when_the_mapping_is_forgotten(swapper, images, runtime):
    _, mapping = images()
    swapper.prepare(mapping, lambda: len(runtime.calls) == 1)
    assert len(runtime.registered) == 1
    swapper.forget(mapping)
    _, other = images()

    def forget():
        if len(runtime.registered) == 1:
            swapper.forget(other)
        return False

    swapper.prepare(other, forget)
    assert runtime.registered == {}


def test_live_tensors_are_copied_in_few_calls(runtime):
    tensors = tensors_of_a_model()
    swapper = CudaCopySwap(tensors, Layout(tensors.structure))
    assert len(swapper._groups) == len({(live.dtype, live.is_contiguous()) for live in swapper._live})
    assert sum(len(live) for live, _ in swapper._groups) == len(swapper.tensors.live)
    swapper.close()


# Direct -------------------------------------------------------------------------------------------------------------


def test_direct_moves_every_byte_once_and_only_large_ones_by_themselves(direct):
    layout = direct.layout
    straight = [load for load in direct._loads if not load.pairs]
    packed = [load for load in direct._loads if load.pairs]
    assert len(straight) == 1
    assert len(packed) > 3
    assert all(load.stop - load.start <= cuda_direct.WINDOW for load in packed)
    assert direct._window.numel() <= cuda_direct.WINDOW
    covered = sum(load.stop - load.start for load in straight)
    covered += sum(live.numel() * live.element_size() for load in packed for lives, _ in load.pairs for live in lives)
    assert covered == sum(layout.structure.nbytes.tolist())
    assert sum(len(lives) for load in packed for lives, _ in load.pairs) > len(layout.structure)


def test_direct_needs_no_memory_on_the_device_but_the_window(full):
    full[0] = cuda_direct.WINDOW
    tensors = tensors_of_a_model()
    layout = Layout(tensors.structure)
    with pytest.raises(NoRoom, match=f"copy needs a shadow of {layout.size} bytes"):
        CudaCopySwap(tensors, layout)
    CudaDirectSwap(tensors, layout).close()
    full[0] = 1000
    with pytest.raises(NoRoom, match="direct needs a window"):
        CudaDirectSwap(tensors, layout)


def test_auto_is_direct_where_the_device_has_no_room_for_a_shadow(full, monkeypatch):
    tensors = tensors_of_a_model()
    layout = Layout(tensors.structure)
    monkeypatch.setattr(tensors, "device", torch.device("cuda:0"))
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device=None: real(*shape, dtype=dtype))
    full[0] = cuda_direct.WINDOW
    assert make_swapper(tensors, layout, "auto").mode == "direct"
    assert make_swapper(tensors, layout, "direct").mode == "direct"
    with pytest.raises(AttachError, match="needs a shadow"):
        make_swapper(tensors, layout, "copy")
    full[0] = layout.size
    assert make_swapper(tensors, layout, "auto").mode == "copy"
    assert make_swapper(tensors, layout, "direct").mode == "direct"
    with pytest.raises(AttachError, match="on the CPU"):
        make_swapper(tensors, layout, "flip")


@pytest.mark.parametrize("locking", ["works", "refused"])
@pytest.mark.parametrize("adopted", [True, False])
def test_direct_that_fails_at_any_transfer_or_tensor_is_undone(adopted, locking, direct, images, runtime, monkeypatch):
    runtime.refuse = 1 << 30 if locking == "works" else 0
    _, current = images()
    direct.prepare(current)
    if adopted:
        direct.adopt(current)
    before = direct.digest()
    kept = [live.clone() for live in direct._live]
    daemon, mapping = images(3)
    direct.prepare(mapping)
    assert direct.page_locked is (locking == "works")
    steps: list[str] = []
    failing = -1
    transfer, copy_all = direct._transfer, bits.copy_all

    def step(name):
        steps.append(name)
        if len(steps) == failing + 1:
            raise RuntimeError("injected")

    def failing_transfer(target, source):
        step("transfer")
        transfer(target, source)

    def failing_copy(targets, sources):
        # At every tensor: one after the other, as torch does it.
        for target, source in zip(targets, sources, strict=True):
            step("tensor")
            copy_all([target], [source])

    monkeypatch.setattr(direct, "_transfer", failing_transfer)
    count = 0
    while failing < count:
        failing += 1
        direct.stage(mapping)
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(bits, "copy_all", failing_copy)
            if failing == count and count:
                # Beyond the last step.
                direct.apply()
                break
            with pytest.raises(SwapFailed, match=r"old version serves.*injected"):
                direct.apply()
        # Undone by as many steps as there are.
        count = len(steps) - failing - 1
        assert all(torch.equal(live, old) for live, old in zip(direct._live, kept, strict=True))
    assert count > 20
    assert direct.digest() == digest_of(direct, daemon) != before


def test_direct_that_cannot_be_undone_is_torn(direct, images, monkeypatch):
    _, current = images()
    direct.adopt(current)
    _, mapping = images(3)
    direct.stage(mapping)
    calls: list[int] = []
    transfer = direct._transfer

    def fail(target, source):
        calls.append(1)
        if len(calls) in (2, 4):
            raise RuntimeError("injected")
        transfer(target, source)

    monkeypatch.setattr(direct, "_transfer", fail)
    with pytest.raises(Torn, match="could not be undone"):
        direct.apply()
    # Its image is still known: the next version can be installed, and this one be undone to.
    assert direct._current is current
    direct.stage(mapping)
    direct.apply()


def test_direct_touches_nothing_before_it_is_applied_and_keeps_one_copy_for_one_swap(direct, images):
    before = direct.digest()
    daemon, mapping = images(3)
    direct.arrived(mapping, [(0, direct.layout.chunks)])
    direct.stage(mapping)
    assert direct.digest() == before
    assert [saved.numel() for saved in direct._saved] == [direct.layout.size]
    direct.discard()
    assert direct._saved == []
    direct.stage(mapping)
    direct.apply()
    assert direct._saved == []
    assert direct.digest() == digest_of(direct, daemon)
    direct.stage(mapping)
    assert direct._saved == []
    direct.discard()


def test_cutting_gives_every_element_its_place():
    flat = torch.arange(5 * 7 * 3, dtype=torch.int16)
    for tensor in (flat.view(5, 7, 3), flat.view(5, 7, 3).permute(2, 0, 1), flat.view(3, 35).t(), flat, flat[4]):
        want = tensor.contiguous().view(-1)
        for limit in (2, 3, 6, 10, 40, 1000):
            got = torch.full_like(want, -1)
            for start, part in cut(tensor, 64, limit):
                assert part.numel() * 2 <= max(2, limit)
                at = (start - 64) // 2
                got[at : at + part.numel()] = part.reshape(-1)
            assert torch.equal(got, want)


def test_spans_cover_the_chunks_and_cross_no_slice(swapper):
    layout = swapper.layout
    everything = list(spans(layout, [(0, layout.chunks)], 1000))
    assert everything[0][0] == layout.chunk(0)[0]
    assert everything[-1][1] == sum(layout.chunk(layout.chunks - 1))
    assert all(start < stop and start // 1000 == (stop - 1) // 1000 for start, stop in everything)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(everything))
    for number in range(layout.chunks):
        start, size = layout.chunk(number)
        pieces = list(spans(layout, [(number, number + 1)], 1000))
        assert (pieces[0][0], pieces[-1][1]) == (start, start + size)
    assert list(spans(layout, [(3, 3)], 1000)) == []
