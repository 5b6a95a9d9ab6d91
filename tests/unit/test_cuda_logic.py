"""What the CUDA swapper decides, run on the CPU with a CUDA that does everything at once. What CUDA itself does with
it is for tests/gpu."""

import contextlib
import itertools
import os

import pytest
import torch
from torch import nn

from shipd.errors import SwapFailed
from shipd.images.memory import ImageMapping, create_memfd, open_read_only
from shipd.serving import cuda
from shipd.serving.cuda import CudaCopySwap, spans
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
    return fake


@pytest.fixture
def swapper(runtime):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 500), nn.BatchNorm1d(500), nn.Linear(500, 700))
    model.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
    tensors = ModelTensors(model)
    made = CudaCopySwap(tensors, Layout(tensors.structure))
    yield made
    made.close()
    assert runtime.registered == {}


@pytest.fixture
def images(swapper):
    fds: list[int] = []

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


def test_live_tensors_are_copied_in_few_calls(swapper):
    assert len(swapper._groups) == 3
    assert sum(len(live) for live, _ in swapper._groups) == len(swapper.tensors.live)


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
