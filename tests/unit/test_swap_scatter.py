"""Many small tensors at once: which they are, and that they and nothing else is written."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from shipd.errors import StageFailed, SwapFailed
from shipd.images.memory import ImageMapping, create_memfd, open_read_only
from shipd.serving import bits, scatter
from shipd.serving.scatter import Scatter, copy_parts
from shipd.serving.swap import Torn
from shipproto.layout import Layout
from shipproto.structure import Structure, TensorSpec
from tests.support.swapping import perturbed, raws

pytest_plugins = ["tests.support.swapping"]


@pytest.fixture
def image():
    """An image of random bytes of the size of a layout, mapped as a serving process does."""
    fds: list[int] = []

    def make(layout):
        fds.append(create_memfd("shipd-test-scatter", layout.size))
        fds.append(open_read_only(fds[-1]))
        daemon = ImageMapping.shared(fds[-2], layout.size)
        content = np.random.default_rng(3).integers(0, 256, layout.size, dtype=np.uint8)
        np.frombuffer(daemon.raw, dtype=np.uint8)[:] = content
        return content, ImageMapping.read_only(fds[-1], layout.size)

    yield make
    for fd in fds:
        os.close(fd)


def guarded(count, length, step):
    """Tensors of ``length`` bytes every ``step`` bytes of one memory, and that memory, which is all 0xEE."""
    memory = torch.full((count * step + 64,), 0xEE, dtype=torch.uint8)
    return [memory[64 + at * step :][:length] for at in range(count)], memory


def layout_of(lives):
    return Layout(Structure.build(TensorSpec(f"t{at:05}", "uint8", (live.numel(),)) for at, live in enumerate(lives)))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("length", [1, 3, 64, 100, 4096, 65536])
def test_every_byte_of_the_tensors_and_none_between_them(length, shuffled, image):
    lives, memory = guarded(70, length, length + 13)
    if shuffled:
        order = np.random.default_rng(1).permutation(len(lives))
        lives = [lives[at] for at in order]
    layout = layout_of(lives)
    rows = list(range(len(lives)))
    made = Scatter(layout, rows, lives)
    assert all(made.taken)
    content, mapping = image(layout)
    (part,) = made.parts(mapping)
    assert part.source_index is None
    copy_parts([part])
    for live, start in zip(lives, layout.offsets.tolist(), strict=True):
        assert live.numpy().tobytes() == content[start : start + length].tobytes()
        live.fill_(0xEE)
    assert bool((memory == 0xEE).all())


def test_unevenly_spaced_sources_go_in_batches(image, monkeypatch):
    monkeypatch.setattr(scatter, "BATCH", 1000)
    sizes = np.random.default_rng(2).choice([96, 192, 320], 400).tolist()
    memories = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    layout = layout_of(memories)
    content, mapping = image(layout)
    made = Scatter(layout, list(range(len(sizes))), memories)
    parts = made.parts(mapping)
    assert sum(part.source_index is not None for part in parts) == 3
    copy_parts(parts)
    for live, start in zip(memories, layout.offsets.tolist(), strict=True):
        assert live.numpy().tobytes() == content[start : start + live.numel()].tobytes()


def test_tensors_on_both_sides_of_an_image_are_copied_without_copying_the_image_first(image):
    """numpy copies a source that may overlap its target, and judges by first and last address."""
    layout = layout_of([torch.zeros(128, dtype=torch.uint8)] * 80)
    content, _ = image(layout)
    # Where the memory of tensors lies is malloc's choice; here it is on both sides of the image.
    fd = create_memfd("shipd-test-scatter", 2 * 5120 + layout.size)
    whole = ImageMapping.shared(fd, 2 * 5120 + layout.size)
    os.close(fd)
    flat = bits.flat_bytes(whole.raw)
    lives = [flat[at * 128 :][:128] for at in range(40)]
    lives += [flat[5120 + layout.size + at * 128 :][:128] for at in range(40)]
    middle = flat[5120 : 5120 + layout.size]
    middle.copy_(torch.from_numpy(content))

    class Middle(ImageMapping):
        def __init__(self):
            self.address = middle.data_ptr()

        @property
        def raw(self):
            return middle.numpy().data

    parts = Scatter(layout, list(range(80)), lives).parts(Middle())
    assert [len(part.index) for part in parts] == [40, 40]
    assert not any(np.may_share_memory(part.target, part.source) for part in parts)
    copy_parts(parts)
    for live, start in zip(lives, layout.offsets.tolist(), strict=True):
        assert live.numpy().tobytes() == content[start : start + 128].tobytes()


def test_only_many_small_contiguous_ones_are_taken(rig):
    model = nn.Module()
    for number in range(scatter.MANY):
        model.register_buffer(f"small_{number}", torch.zeros(5))
        model.register_buffer(f"turned_{number}", torch.zeros(4, 3).t())
        model.register_buffer(f"empty_{number}", torch.zeros(0))
        model.register_buffer(f"large_{number}", torch.zeros(scatter.SMALL + 1, dtype=torch.uint8))
    for number in range(scatter.MANY - 1):
        model.register_buffer(f"few_{number}", torch.zeros(6))
    one = rig(model, "copy")
    taken = [
        name.partition("_")[0]
        for name, is_taken in zip(one.layout.structure.names, one.swapper._scatter.taken, strict=True)
        if is_taken
    ]
    assert taken == ["small"] * scatter.MANY
    state = perturbed(model, 1.0)
    one.to(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_ten_thousand_small_tensors_are_one_call(rig, monkeypatch):
    model = nn.Module()
    for number in range(10_000):
        model.register_buffer(f"t{number:05}", torch.full((16,), float(number)))
    one = rig(model, "copy")
    one.adopt()
    mapping = one.image_of(perturbed(model, 1.0))
    one.swapper.stage(mapping)
    sources = one.swapper._sources_of(mapping)
    assert (len(sources.views), sum(len(part.index) for part in sources.parts)) == (0, 10_000)
    assert len(sources.parts) <= 2

    def refuse(*_):
        raise AssertionError("one by one")

    monkeypatch.setattr(torch, "_foreach_copy_", refuse)
    before = raws(model)
    one.swapper.apply()
    monkeypatch.undo()
    assert not set(before.items()) & set(raws(model).items())


def crowd():
    """Tensors that are scattered into, and one that is not."""
    model = nn.Module()
    for number in range(40):
        model.register_buffer(f"small_{number:02}", torch.full((20,), float(number)))
    model.register_buffer("single", torch.zeros(7))
    return model


def refuse_to_copy(parts):
    """In the place of ``copy_parts``: what a wrong address would do to the heap is not to be tried."""
    raise AssertionError("written")


@pytest.mark.parametrize("adopted", [True, False])
def test_memory_that_torch_has_replaced_is_not_written(adopted, rig, monkeypatch):
    """The storages have other memory now, and what they had before has been freed."""
    model = crowd()
    one = rig(model, "copy")
    if adopted:
        one.adopt()
    one.swapper.stage(one.image_of(perturbed(model, 1.0)))
    before = raws(model)
    monkeypatch.setattr(scatter, "copy_parts", refuse_to_copy)
    model.share_memory()
    with pytest.raises(SwapFailed, match=r"did not begin; the old version serves.*share_memory"):
        one.swapper.apply()
    assert raws(model) == before
    with pytest.raises(StageFailed, match="changed after it was attached"):
        one.swapper.stage(one.image_of(perturbed(model, 1.0)))


@pytest.mark.parametrize("adopted", [True, False])
def test_memory_that_torch_replaces_during_a_swap_leaves_it_torn(adopted, rig, monkeypatch):
    model = crowd()
    one = rig(model, "copy")
    if adopted:
        one.adopt()
    one.swapper.stage(one.image_of(perturbed(model, 1.0)))

    def move(*_):
        model.share_memory()
        raise MemoryError("injected")

    monkeypatch.setattr(bits, "copy_all", move)
    monkeypatch.setattr(scatter, "copy_parts", refuse_to_copy)
    with pytest.raises(Torn, match=r"injected.*could not be undone.*share_memory"):
        one.swapper.apply()
    # It refers to the model, which must not be there any more when leaks are looked for.
    monkeypatch.undo()


def test_tensors_that_torch_copies_may_get_other_memory(rig):
    """Its views follow the storages."""
    model = nn.Linear(40, 30)
    one = rig(model, "copy")
    one.adopt()
    assert not any(one.swapper._scatter.taken)
    state = perturbed(model, 1.0)
    one.swapper.stage(one.image_of(state))
    model.share_memory()
    one.swapper.apply()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
