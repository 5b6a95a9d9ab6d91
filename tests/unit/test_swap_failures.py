import copy

import pytest
import torch
from torch import nn

from shipd.errors import AttachError, StageFailed, SwapFailed
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits, flip
from shipd.serving.gate import Gate
from shipd.serving.swap import Torn
from shipd.serving.version import Version
from tests.support.swapping import encoder, perturbed, properties, raws, rigs

MODES = ("copy", "flip")
DEADLINE = 60.0


@pytest.fixture
def rig():
    with rigs() as made:
        yield made


# Failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adopted", [True, False])
def test_a_copy_that_fails_at_any_tensor_is_undone(adopted, rig, monkeypatch):
    model = encoder()
    one = rig(model, "copy")
    if adopted:
        one.adopt()
    before = raws(model)
    mapping = one.image_of(perturbed(model, 1.0))
    real = torch._foreach_copy_
    calls = []
    for failing in range(len(bits.primary_rows(one.layout)) + 1):

        def break_off(targets, sources, at=failing):
            calls.append(len(targets))
            if len(calls) > 1:
                return real(targets, sources)
            if at:
                real(targets[:at], sources[:at])
            raise RuntimeError("injected")

        calls.clear()
        one.swapper.stage(mapping)
        monkeypatch.setattr(torch, "_foreach_copy_", break_off)
        with pytest.raises(SwapFailed, match=r"old version serves.*injected"):
            one.swapper.apply()
        monkeypatch.undo()
        assert raws(model) == before
        assert len(calls) == 2
    one.swapper.stage(mapping)
    one.swapper.apply()
    assert raws(model) != before


def test_a_flip_that_fails_at_any_tensor_is_undone(rig, monkeypatch):
    model = encoder()
    one = rig(model, "flip")
    before = raws(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    real = flip.bind
    for failing in range(len(list(model.parameters()))):
        calls: list[torch.Tensor] = []

        def break_off(live, replacement, calls=calls, at=failing):
            calls.append(live)
            if len(calls) == at + 1:
                raise RuntimeError("injected")
            real(live, replacement)

        one.swapper.stage(one.image_of(perturbed(model, 1.0)))
        monkeypatch.setattr(flip, "bind", break_off)
        with pytest.raises(SwapFailed, match=r"old version serves.*injected"):
            one.swapper.apply()
        monkeypatch.undo()
        assert raws(model) == before
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert one.tensors.changed() == []


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_be_undone_is_torn(mode, rig, monkeypatch):
    model = encoder()
    one = rig(model, mode)
    one.adopt()
    one.swapper.stage(one.image_of(perturbed(model, 1.0)))

    def fail(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(*((torch, "_foreach_copy_") if mode == "copy" else (flip, "bind")), fail)
    with pytest.raises(Torn, match="could not be undone"):
        one.swapper.apply()


@pytest.mark.parametrize("mode", MODES)
def test_a_torn_model_is_fenced_before_anyone_holds(mode, rig, monkeypatch):
    """How the pieces are meant to be put together."""
    gate = Gate(Version("old", ""))
    model = encoder()
    one = rig(model, mode)
    one.swapper.stage(one.image_of(perturbed(model, 1.0)))

    def fail(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(*((torch, "_foreach_copy_") if mode == "copy" else (flip, "bind")), fail)

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
    wrong = Access.PRIVATE if mode == "copy" else Access.READ_ONLY
    with pytest.raises(StageFailed, match="are needed"):
        one.swapper.stage(ImageMapping(fd, one.layout.size, wrong))


def test_unknown_modes_are_refused(rig):
    with pytest.raises(AttachError, match="unknown mode 'direct'"):
        rig(nn.Linear(2, 2), "direct")
    assert rig(nn.Linear(2, 2), "auto").swapper.mode == "copy"


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
