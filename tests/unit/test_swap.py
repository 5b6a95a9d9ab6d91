import contextlib
import functools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import silero_vad
import torch
from torch import nn

from shipd.errors import AttachError
from shipd.serving import bits
from shipd.serving.gate import Gate
from shipd.serving.hooks import Hooks, find_calls
from shipd.serving.version import Version
from shipproto.digests import digest_image
from tests.support.gates import Worker
from tests.support.swapping import MODES, Everything, encoder, perturbed, properties, randomised, raw, raws

pytest_plugins = ["tests.support.swapping"]

DEADLINE = 60.0
PACE = 0.0003
"""Seconds that readers leave to others between two answers."""


# Bits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_bit_of_every_dtype_arrives(mode, rig):
    model = Everything()
    one = rig(model, mode)
    before = raws(model)
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    one.adopt()
    state = randomised(model)
    one.to(state)
    assert raws(model) == {name: raw(value) for name, value in state.items()}
    assert {name: value.stride() for name, value in model.state_dict().items()} == strides
    assert raws(model) != before
    digest = one.swapper.digest()
    assert digest == digest_image(one.layout, one.image_of(state).view).version_digest()
    one.swapper.settle()


@pytest.mark.parametrize("mode", MODES)
def test_filling_gives_the_live_bytes_and_zeros_between(mode, rig):
    model = Everything()
    one = rig(model, mode)
    daemon, fd = one.slot()
    np.frombuffer(daemon.raw, dtype=np.uint8)[:] = 0xAA
    one.swapper.fill(daemon.view)
    expected = bytearray(one.layout.size)
    for name, content in raws(model).items():
        start = int(one.layout.offsets[one.layout.structure.index[name]])
        expected[start : start + len(content)] = content
    assert bytes(daemon.view) == bytes(expected)
    assert one.swapper.digest() == digest_image(one.layout, daemon.view).version_digest()
    for value in model.state_dict().values():
        if value.numel():
            bits.integers(value).zero_()
    one.swapper.stage(one.map(fd))
    one.swapper.apply()
    assert raws(model)["float32_matrix"].strip(b"\0")
    assert one.swapper.digest() == digest_image(one.layout, daemon.view).version_digest()


@pytest.mark.parametrize("mode", MODES)
def test_negative_zero_nan_payloads_and_odd_bools_survive(mode, rig):
    model = nn.Module()
    nan = torch.tensor([0x7FA00001, -0x7FFFFFFF - 1, 0x7FC0DEAD], dtype=torch.int32).view(torch.float32)
    half = torch.tensor([0x7D01, -0x8000], dtype=torch.int16).view(torch.float16)
    odd = torch.tensor([2, 255, 0, 1], dtype=torch.uint8).view(torch.bool)
    for name, value in (("nan", nan), ("short", half), ("odd", odd)):
        model.register_buffer(name, torch.zeros_like(value))
    one = rig(model, mode)
    one.to({"nan": nan, "short": half, "odd": odd})
    assert {name: raw(value) for name, value in (("nan", nan), ("short", half), ("odd", odd))} == raws(model)


@pytest.mark.parametrize("mode", MODES)
def test_many_small_tensors(mode, rig):
    model = nn.Module()
    for number in range(3000):
        model.register_buffer(f"t{number:04}", torch.full((number % 70,), float(number)))
    one = rig(model, mode)
    one.adopt()
    one.to(perturbed(model, 1.0))
    assert all(bool((value == int(name[1:]) + 1).all()) for name, value in model.state_dict().items())
    assert one.swapper.digest() == digest_image(one.layout, one.image_of().view).version_digest()


# What stays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_what_stays_and_what_changes(mode, rig):
    model = encoder()
    model.norm.bias.requires_grad = False
    one = rig(model, mode)
    one.adopt()
    before = properties(model)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    training = [module.training for module in model.modules()]
    for step in range(1, 4):
        one.to(perturbed(model, 0.125))
        assert properties(model) == before
        assert [module.training for module in model.modules()] == training
        assert model.head.weight is model.embed.weight
        same = {name for name, p in model.named_parameters() if p.data_ptr() == addresses[name]}
        assert same == (set() if mode == "flip" else set(addresses))
        assert one.swapper.settle() or step
        assert one.tensors.changed() == []


@pytest.mark.parametrize("mode", MODES)
def test_ties_between_separate_objects_stay(mode, rig):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = nn.Parameter(first.weight.detach())
    assert second.weight is not first.weight
    model = nn.Sequential(first, second)
    one = rig(model, mode)
    one.to({name: value for name, value in perturbed(model, 1.0).items() if name != "1.weight"})
    assert second.weight.data_ptr() == first.weight.data_ptr()
    assert torch.equal(second.weight, first.weight)


@pytest.mark.parametrize("mode", MODES)
def test_inference_tensors_can_be_swapped_from_any_thread(mode, rig):
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    one = rig(model, mode)
    state = randomised(model)
    Worker(lambda: one.to(state)).finish()
    assert raws(model) == {name: raw(value) for name, value in state.items()}
    assert model.weight.is_inference()
    with torch.inference_mode():
        model(torch.ones(4))


def test_views_of_parameters_follow_in_copy(rig):
    model = nn.Linear(4, 4)
    row = model.weight.detach()[1]
    one = rig(model, "copy")
    state = perturbed(model, 1.0)
    one.to(state)
    assert torch.equal(row, state["weight"][1])


def test_flip_refuses_what_it_would_part(rig):
    model = nn.Linear(4, 4)
    model.register_buffer("first", model.weight.detach()[0], persistent=False)
    with pytest.raises(AttachError, match="'first'"):
        rig(model, "flip")
    rig(model, "copy")


def test_batch_norm_trains_on_a_flipped_image(rig):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    one = rig(model, "flip")
    mapping = one.image_of(perturbed(model, 1.0))
    shared = bytes(mapping.view)
    one.swapper.stage(mapping)
    one.swapper.apply()
    pushed = one.swapper.digest()
    before = raws(model)
    for _ in range(3):
        model(torch.randn(8, 4))
    assert raws(model)["1.running_mean"] != before["1.running_mean"]
    assert int(model.get_buffer("1.num_batches_tracked")) == 3
    # What was written is this process's own: neither the image nor another process's view of it has changed.
    assert bytes(one.map(one.fds[-1]).view) == shared
    assert one.swapper.digest() != pushed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_silero_vad(mode, rig):
    model = torch.jit.load(Path(silero_vad.__file__).parent / "data" / "silero_vad.jit").eval()
    one = rig(model, mode)
    one.adopt()
    speech = torch.linspace(-1, 1, 512).unsqueeze(0)

    def listen():
        model.reset_states()
        with torch.no_grad():
            return model(speech, 16000)

    first = listen()
    original = one.image_of()
    one.to({name: value * 0.5 for name, value in model.state_dict().items() if value.is_floating_point()})
    assert not torch.equal(listen(), first)
    one.swapper.stage(original)
    one.swapper.apply()
    assert torch.equal(listen(), first)


# Under load ---------------------------------------------------------------------------------------------------------


def answers_of(states, ids):
    """What a model that nobody swaps answers, for each state."""
    answers = {}
    for label, state in states.items():
        reference = encoder()
        reference.load_state_dict(state)
        with torch.inference_mode():
            answers[label] = reference(ids)
    return answers


@pytest.mark.parametrize("how", ["hold", "hooks"])
@pytest.mark.parametrize("mode", ["copy", "flip"])
def test_a_thousand_swaps_under_eight_readers_and_none_sees_a_mix(mode, how, rig):
    model = encoder()
    ids = torch.arange(8).view(1, 8)
    states = {"a": perturbed(model, 0.0), "b": perturbed(model, 0.25)}
    answers = answers_of(states, ids)
    assert not torch.equal(answers["a"], answers["b"])
    one = rig(model, mode)
    slots = {label: one.slot() for label in states}
    for label, (daemon, _) in slots.items():
        source = rig(encoder(), "copy")
        source.model.load_state_dict(states[label])
        source.swapper.fill(daemon.view)
    mapped = {label: one.map(fd) for label, (_, fd) in slots.items()}
    one.swapper.adopt(mapped["a"])
    gate = Gate(Version("a", ""), calls=find_calls)
    if how == "hooks":
        Hooks(model, gate)
    stop = threading.Event()
    answered = dict.fromkeys(range(8), 0)

    def read(index):
        with torch.inference_mode():
            # Without a pause, flip mode has to wait for a hundred answers between two swaps, and nothing is seen by it.
            while not stop.wait(PACE):
                # Without a hold of one's own one does not learn which version answered, only that it was one.
                with gate.hold() if how == "hold" else contextlib.nullcontext() as version:
                    answer = model(ids)
                expected = [answers[version.label]] if version else list(answers.values())
                assert any(torch.equal(answer, each) for each in expected), "a mix"
                answered[index] += 1

    readers = [Worker(functools.partial(read, index), f"reader {index}") for index in answered]
    for number in range(1000):
        label = "ba"[number % 2]
        one.swapper.stage(mapped[label] if mode != "flip" else one.map(slots[label][1]))

        def action(label=label):
            one.swapper.apply()
            return Version(label, "")

        pause = gate.swap(action, commit_timeout=DEADLINE, max_hold=DEADLINE)
        assert pause.attempts == 1
        one.swapper.settle()
    stop.set()
    for reader in readers:
        reader.finish()
    assert min(answered.values()) > 0
    with gate.hold():
        assert one.swapper.digest() == digest_image(one.layout, slots["a"][0].view).version_digest()


def test_a_copy_is_one_call_and_does_not_suffer_beside_a_busy_thread(rig, monkeypatch):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(256)))
    one = rig(model, "copy")
    one.adopt()
    mapping = one.image_of(perturbed(model, 1.0))
    calls: list[int] = []
    real = torch._foreach_copy_

    def count(targets, sources):
        calls.append(len(targets))
        real(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", count)
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            pass

    busy = threading.Thread(target=spin)
    busy.start()
    try:
        best = DEADLINE
        for _ in range(5):
            one.swapper.stage(mapping)
            calls.clear()
            started = time.perf_counter()
            one.swapper.apply()
            best = min(best, time.perf_counter() - started)
            # The biases are many small ones of one size.
            assert calls == [256]
    finally:
        stop.set()
        busy.join()
    # 512 tensors: a loop of copies would wait for the GIL 512 times, 5 ms each.
    assert best < 0.5
