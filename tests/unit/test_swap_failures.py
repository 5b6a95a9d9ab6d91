import copy
import weakref

import pytest
import torch
from torch import nn

from shipd.errors import AttachError, StageFailed, SwapFailed
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits, flip, scatter
from shipd.serving.gate import Gate
from shipd.serving.swap import Torn
from shipd.serving.version import Version
from tests.support.swapping import MODES, encoder, perturbed, properties, raws

pytest_plugins = ["tests.support.swapping"]

DEADLINE = 60.0


# Failures -----------------------------------------------------------------------------------------------------------


def crowd():
    """An encoder with many small tensors of two sizes beside it, evenly spaced in the image and not."""
    model = encoder()
    for number in range(40):
        model.register_buffer(f"even_{number:02}", torch.full((3,), float(number), dtype=torch.float64))
        model.register_buffer(f"odd_{number:02}", torch.full((20 if number % 7 else 40,), float(number)))
    return model


def changed(before, model):
    """Names of the tensors that are not what they were."""
    return {name for name, content in raws(model).items() if content != before[name]}


def watch_undo(swapper, model, before, monkeypatch):
    """What had been overwritten when undoing began, one number for each time."""
    counts: list[int] = []
    undo = swapper._undo

    def count():
        counts.append(len(changed(before, model)))
        undo()

    monkeypatch.setattr(swapper, "_undo", count)
    return counts


def break_writing(monkeypatch, mode):
    """Whatever writes a version into a model raises, also where one is undone."""

    def fail(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(*((torch, "_foreach_copy_") if mode != "flip" else (flip, "rebind")), fail)


@pytest.mark.parametrize("mode", ["copy", "direct"])
@pytest.mark.parametrize("adopted", [True, False])
def test_a_copy_that_fails_at_any_single_tensor_is_undone(mode, adopted, rig, monkeypatch):
    """The tensors before it have been overwritten by then, by torch's one call."""
    model = crowd()
    one = rig(model, mode)
    if adopted:
        one.adopt()
    before = raws(model)
    mapping = one.image_of(perturbed(model, 1.0))
    one.swapper.stage(mapping)
    singles = len(one.swapper._singles)
    assert 10 < singles < len(bits.primary_rows(one.layout))
    counts = watch_undo(one.swapper, model, before, monkeypatch)
    sources = one.swapper._sources_of(mapping)
    for failing in range(singles):
        views = list(sources.views)
        views[failing] = torch.zeros(12345, dtype=torch.int32)
        one.swapper._sources[mapping] = sources._replace(views=views)
        one.swapper.stage(mapping)
        with pytest.raises(SwapFailed, match=r"old version serves.*12345"):
            one.swapper.apply()
        assert not changed(before, model)
    # More of them each time; a tied weight is two names, and an integer tensor is the same in both versions.
    assert counts == sorted(counts)
    assert (counts[0], counts[-1] >= singles - 2) == (0, True)
    one.swapper._sources[mapping] = sources
    one.swapper.stage(mapping)
    one.swapper.apply()
    assert len(changed(before, model)) > singles


@pytest.mark.parametrize("mode", ["copy", "direct"])
@pytest.mark.parametrize("adopted", [True, False])
def test_a_copy_that_fails_at_any_of_many_small_tensors_is_undone(mode, adopted, rig, monkeypatch):
    model = crowd()
    one = rig(model, mode)
    if adopted:
        one.adopt()
    before = raws(model)
    mapping = one.image_of(perturbed(model, 1.0))
    one.swapper.stage(mapping)
    singles = len(one.swapper._singles)
    parts = one.swapper._sources_of(mapping).parts
    assert {part.source_index is None for part in parts} == {True, False}
    counts = watch_undo(one.swapper, model, before, monkeypatch)
    total = sum(len(part.index) for part in parts)
    assert singles + total == len(one.swapper._live)
    real = scatter.copy_parts
    for failing in range(total + 1):

        def break_off(parts, at=failing):
            for part in parts:
                some = slice(0, min(at, len(part.index)))
                source = part.source[some] if part.source_index is None else part.source[part.source_index[some]]
                part.target[part.index[some]] = source
                at -= len(part.index[some])
                if not at:
                    scatter.copy_parts = real
                    raise MemoryError("injected")

        one.swapper.stage(mapping)
        monkeypatch.setattr(scatter, "copy_parts", break_off)
        with pytest.raises(SwapFailed, match=r"old version serves.*injected"):
            one.swapper.apply()
        assert not changed(before, model)
    assert [count - counts[0] for count in counts] == list(range(total + 1))
    one.swapper.stage(mapping)
    one.swapper.apply()
    assert len(changed(before, model)) > total


@pytest.mark.parametrize("inference", [False, True])
def test_a_flip_that_fails_at_any_tensor_is_undone(inference, rig, monkeypatch):
    with torch.inference_mode(inference):
        model = encoder()
    one = rig(model, "flip")
    before = raws(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    moved: list[int] = []
    undo = flip.Bindings.undo

    def count(self):
        moved.append(sum(p.data_ptr() != a for p, a in zip(model.parameters(), addresses, strict=True)))
        undo(self)

    monkeypatch.setattr(flip.Bindings, "undo", count)
    total = len(addresses)
    for failing in range(total):
        one.swapper.stage(one.image_of(perturbed(model, 1.0)))
        bindings = one.swapper._staged.bindings
        if inference:
            live, old, _ = bindings.inference[failing]
            bindings.inference[failing] = (live, old, None)
        else:
            # Not a tensor: binding refuses it, when those before it are bound.
            bindings.news[failing] = None
        with pytest.raises(SwapFailed, match=r"old version serves.*Error"):
            one.swapper.apply()
        assert raws(model) == before
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert one.tensors.changed() == []
    assert moved == list(range(total))
    # The hook knows the model, which would keep the image.
    monkeypatch.undo()
    one.to(perturbed(model, 1.0))
    assert changed(before, model)


def test_what_a_flip_replaces_is_freed_when_the_gate_is_open(rig):
    model = nn.Linear(64, 64)
    one = rig(model, "flip")
    first = weakref.ref(model.weight.untyped_storage())
    content = model.weight.detach().clone()
    one.swapper.stage(one.image_of(perturbed(model, 1.0)))
    olds = one.swapper._staged.bindings.olds
    one.swapper.apply()
    assert one.swapper._replaced[0].olds is olds
    assert any(torch.equal(old, content) for old in olds)
    assert one.swapper.settle()
    assert one.swapper._replaced is None
    del olds
    assert first() is None


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_be_undone_is_torn(mode, rig, monkeypatch):
    model = encoder()
    one = rig(model, mode)
    one.adopt()
    one.swapper.stage(one.image_of(perturbed(model, 1.0)))
    break_writing(monkeypatch, mode)
    with pytest.raises(Torn, match="could not be undone"):
        one.swapper.apply()


@pytest.mark.parametrize("mode", MODES)
def test_a_torn_model_is_fenced_before_anyone_holds(mode, rig, monkeypatch):
    """How the pieces are meant to be put together."""
    gate = Gate(Version("old", ""))
    model = encoder()
    one = rig(model, mode)
    one.swapper.stage(one.image_of(perturbed(model, 1.0)))
    break_writing(monkeypatch, mode)

    def action():
        try:
            one.swapper.apply()
        except Torn as error:
            gate.fence(str(error))
            raise
        return Version("new", "")

    with pytest.raises(Torn):
        gate.swap(action, commit_timeout=DEADLINE, max_hold=DEADLINE)
    assert gate.shut
    assert gate.version.label == "old"


@pytest.mark.parametrize("mode", MODES)
def test_staging_and_discarding_touch_nothing(mode, rig):
    model = encoder()
    one = rig(model, mode)
    one.adopt()
    before = raws(model), properties(model), [p.data_ptr() for p in model.parameters()]
    mapping = one.image_of(perturbed(model, 1.0))
    one.swapper.prepare(mapping)
    one.swapper.arrived(mapping, [(0, one.layout.chunks)])
    one.swapper.stage(mapping)
    one.swapper.discard()
    assert (raws(model), properties(model), [p.data_ptr() for p in model.parameters()]) == before
    with pytest.raises(RuntimeError, match="nothing is staged"):
        one.swapper.apply()
    one.swapper.stage(mapping)
    one.swapper.forget(mapping)
    with pytest.raises(RuntimeError, match="nothing is staged"):
        one.swapper.apply()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_was_changed_cannot_be_staged_nor_proved(mode, rig):
    model = encoder()
    one = rig(model, mode)
    mapping = one.image_of()
    model.half()
    with pytest.raises(StageFailed, match=r"changed after it was attached: '.*float32.*float16.* and \d+ more"):
        one.swapper.stage(mapping)
    with pytest.raises(AttachError, match="changed after it was attached"):
        one.swapper.digest()


@pytest.mark.parametrize("mode", MODES)
def test_an_image_that_does_not_fit_cannot_be_staged(mode, rig):
    one = rig(encoder(), mode)
    other = rig(nn.Linear(500, 500), mode)
    with pytest.raises(StageFailed, match="are needed"):
        one.swapper.stage(other.image_of())
    _, fd = one.slot()
    wrong = Access.READ_ONLY if mode == "flip" else Access.PRIVATE
    with pytest.raises(StageFailed, match="are needed"):
        one.swapper.stage(ImageMapping(fd, one.layout.size, wrong))


def test_unknown_modes_are_refused(rig):
    with pytest.raises(AttachError, match="unknown mode 'swift'; there are auto, copy, direct, flip"):
        rig(nn.Linear(2, 2), "swift")
    assert rig(nn.Linear(2, 2), "auto").swapper.mode == "copy"
    for mode in MODES:
        assert rig(nn.Linear(2, 2), mode).swapper.mode == mode


# Leases -------------------------------------------------------------------------------------------------------------


def test_copy_needs_no_image_but_the_current(rig):
    model = encoder()
    one = rig(model, "copy")
    one.adopt()
    one.to(perturbed(model, 1.0))
    assert one.swapper.settle()


def test_flip_needs_an_image_for_as_long_as_anything_reads_it(rig):
    model = encoder()
    one = rig(model, "flip")
    one.adopt()
    one.to(perturbed(model, 1.0))
    assert one.swapper.settle()
    kept = model.norm.weight.detach()[:3]
    content = kept.clone()
    one.to(perturbed(model, 1.0))
    assert not one.swapper.settle()
    assert torch.equal(kept, content)
    one.to(perturbed(model, 1.0))
    # The version between the two is free, but one that is still read is enough.
    assert not one.swapper.settle()
    del kept
    assert one.swapper.settle()


@pytest.mark.parametrize("mode", MODES)
def test_letting_go_leaves_nothing_that_refers_to_an_image(mode, rig):
    model = encoder()
    one = rig(model, mode)
    one.adopt()
    one.to(perturbed(model, 1.0))
    before = raws(model)
    version = [p._version for p in model.parameters()]
    one.swapper.let_go()
    assert one.swapper.settle()
    assert raws(model) == before
    assert [p._version for p in model.parameters()] == version
    assert model.head.weight is model.embed.weight
    assert one.tensors.changed() == []
    # And it can go on.
    one.to(perturbed(model, 1.0))
    assert raws(model) != before


def test_a_deep_copy_of_a_flipped_model_is_its_own(rig):
    model = encoder()
    model.register_buffer("scale", torch.ones(3))
    one = rig(model, "flip")
    one.to(perturbed(model, 1.0))
    twin = copy.deepcopy(model)
    before = raws(twin)
    assert twin.get_buffer("scale").untyped_storage().nbytes() == 12
    one.to(perturbed(model, 1.0))
    assert raws(twin) == before != raws(model)
    assert one.swapper.settle()
