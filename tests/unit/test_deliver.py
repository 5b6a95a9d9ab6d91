import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shipd.errors import AttachError, NotReadBack, StageFailed, SwapFailed
from shipd.images.memory import ImageMapping, create_memfd
from shipd.serving.deliver import DeliverSwap, Image
from shipd.serving.gate import Gate
from shipd.serving.model_follower import ModelFollower, resident_of
from shipd.serving.staging import Torn, fill_image
from shipd.serving.swap import make_swapper
from shipd.serving.tensors import ModelTensors
from shipd.serving.version import Version
from shipproto.errors import MalformedMessage
from shipproto.layout import Layout
from shipproto.structure import Structure, TensorSpec
from tests.support.swapping import Everything, encoder, perturbed, raw

_MEMFD = "shipd-test-deliver"

Pairs = Iterable[tuple[str, Tensor]]


class Taking:
    """Has load_weights as vLLM's models have it: copies what it is given."""

    def __init__(self) -> None:
        self.loaded: dict[str, bytes] = {}
        self.calls = 0
        self.before: Callable[[int, str], object] = lambda call, name: None

    def load_weights(self, weights: Pairs) -> set[str]:
        self.calls += 1
        names = set()
        for name, tensor in weights:
            self.before(self.calls, name)
            assert tensor.device.type == "cpu"
            self.loaded[name] = raw(tensor)
            names.add(name)
        return names


class Keeping:
    """Keeps the tensors themselves, of every version, and writes to them."""

    def __init__(self) -> None:
        self.versions: list[dict[str, Tensor]] = []

    def load_weights(self, weights: Pairs) -> None:
        self.versions.append(dict(weights))


class Images:
    """Slots of a model's pool, as the daemon has them, and their mappings in the serving process."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = ModelTensors(model)
        self.layout = Layout(self.tensors.structure)
        self.slots = [create_memfd(_MEMFD, self.layout.size) for _ in range(2)]
        self.daemon = [ImageMapping.shared(fd, self.layout.size) for fd in self.slots]
        self.mapped = [Image(fd, self.layout.size) for fd in self.slots]

    def write(self, slot: int, state: dict[str, Tensor]) -> Image:
        """Have a slot hold a version. In the daemon nobody writes to one that is being read."""
        fill_image(self.layout, [state[name] for name in self.layout.structure.names], self.daemon[slot].raw)
        return self.mapped[slot]


MakeImages = Callable[[nn.Module], Images]


@pytest.fixture
def images_of(caplog: pytest.LogCaptureFixture) -> Iterator[MakeImages]:
    """Makes images; at the end nothing may refer to them."""
    made: list[Images] = []

    def make(model: nn.Module) -> Images:
        made.append(Images(model))
        return made[-1]

    yield make
    # What was logged of a failure refers to the frames in which it happened.
    caplog.get_records("call").clear()
    while made:
        one = made.pop()
        for fd in one.slots:
            os.close(fd)
        one.daemon.clear()
        one.mapped.clear()
    gc.collect()
    assert _MEMFD not in Path("/proc/self/maps").read_text()


@pytest.fixture
def images(images_of: MakeImages) -> Images:
    """Those of an encoder."""
    return images_of(encoder())


def swap(swapper: DeliverSwap, image: Image, layout: Layout) -> None:
    """One version into it, as the link does."""
    swapper.lay_out(layout)
    swapper.stage(image)
    swapper.apply()


def expected(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: raw(value) for name, value in state.items()}


def test_every_tensor_comes_once_in_the_order_of_the_names_with_its_bits(images_of: MakeImages) -> None:
    model = Everything()
    images, target = images_of(model), Taking()
    swapper = DeliverSwap(target)
    swap(swapper, images.write(0, dict(model.state_dict())), images.layout)
    assert target.loaded == expected(model.state_dict())
    assert list(target.loaded) == sorted(model.state_dict())
    assert (target.calls, swapper.mode, swapper.settle()) == (1, "load_weights", True)
    with pytest.raises(NotReadBack):
        swapper.digest()


def test_tied_tensors_come_under_each_name_and_are_apart(images: Images) -> None:
    """A loader that quantises in place must not do so twice."""
    target = Keeping()
    swap(DeliverSwap(target), images.write(0, perturbed(encoder(), 1)), images.layout)
    (given,) = target.versions
    assert torch.equal(given["embed.weight"], given["head.weight"])
    given["embed.weight"].zero_()
    assert given["head.weight"].count_nonzero() > 0


def test_what_was_kept_stays_whatever_is_pushed_later(images: Images) -> None:
    target = Keeping()
    swapper = DeliverSwap(target)
    for version in range(5):
        # As the daemon would: into the slot that is not the current one, which has been settled by then.
        swap(swapper, images.write(version % 2, perturbed(encoder(), version)), images.layout)
        assert swapper.settle()
        assert not swapper.reads(images.mapped[1 - version % 2])
    for version, given in enumerate(target.versions):
        assert expected(given) == expected(perturbed(encoder(), version))


def test_what_the_callee_writes_is_seen_by_nobody_else(images: Images) -> None:
    target, bystander = Keeping(), Taking()
    swapper, other = DeliverSwap(target), DeliverSwap(bystander)
    state = perturbed(encoder(), 1)
    image = images.write(0, state)
    swap(swapper, image, images.layout)
    for tensor in target.versions[0].values():
        tensor.view(-1).view(torch.uint8).fill_(255)
    swap(other, image, images.layout)
    assert bystander.loaded == expected(state)
    # Nor is the undo what the callee has made of it.
    again = bytearray(images.layout.size)
    swapper.fill(memoryview(again))
    assert again == images.daemon[0].raw


def test_versions_that_are_replaced_are_never_copied(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who serves from the tensors that it is given needs no memory of its own for that."""

    class Bound:
        def load_weights(self, weights: Pairs) -> None:
            self.weights = dict(weights)

    swapper = DeliverSwap(Bound())
    monkeypatch.setattr(ImageMapping, "own", lambda *_: pytest.fail("something was copied"))
    for version in range(4):
        swap(swapper, images.write(version % 2, perturbed(encoder(), version)), images.layout)
        assert swapper.settle()


def test_an_image_that_cannot_be_parted_from_is_kept(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux before 5.14, or where memory has run out: then the daemon must not write to it."""
    target = Keeping()
    swapper = DeliverSwap(target)
    swap(swapper, images.write(0, perturbed(encoder(), 0)), images.layout)

    def refuse(*_: Any) -> None:
        raise OSError(22, "Invalid argument")

    with monkeypatch.context() as patched:
        patched.setattr(ImageMapping, "own", refuse)
        swap(swapper, images.write(1, perturbed(encoder(), 1)), images.layout)
        assert not swapper.settle()
        assert swapper.reads(images.mapped[0])
        assert not swapper.reads(images.mapped[1])
    assert swapper.settle()
    assert not swapper.reads(images.mapped[0])


# --- failures --------------------------------------------------------------------------------------------------------


def fail_at(target: Taking, name: str, calls: int) -> None:
    """Fail at this tensor in so many calls from now on."""
    first = target.calls + 1

    def before(call: int, now: str) -> None:
        if first <= call < first + calls and now == name:
            raise RuntimeError(f"no room for {now}")

    target.before = before


@pytest.mark.parametrize("at", [0, 7, -1])
def test_after_a_failure_at_any_tensor_the_version_before_is_back(images: Images, at: int) -> None:
    target = Taking()
    swapper = DeliverSwap(target)
    old = perturbed(encoder(), 1)
    swap(swapper, images.write(0, old), images.layout)
    names = images.layout.structure.names
    fail_at(target, names[at], calls=1)
    taken = len(names) if at < 0 else at + 1
    with pytest.raises(SwapFailed, match=f"taken {taken} of {len(names)} tensors: .*no room for .* serves") as caught:
        swap(swapper, images.write(1, perturbed(encoder(), 2)), images.layout)
    assert "no room" in str(caught.value.__cause__)
    assert target.loaded == expected(old)
    assert target.calls == 3
    assert swapper.structure is images.layout.structure
    # And it can be tried again.
    target.before = lambda *_: None
    new = perturbed(encoder(), 3)
    swap(swapper, images.write(1, new), images.layout)
    assert target.loaded == expected(new)


def test_what_was_kept_of_a_version_that_failed_stays_as_well(images: Images) -> None:
    class Greedy(Keeping):
        def load_weights(self, weights: Pairs) -> None:
            super().load_weights(weights)
            if len(self.versions) == 2:
                raise RuntimeError("too late")

    target = Greedy()
    swapper = DeliverSwap(target)
    swap(swapper, images.write(0, perturbed(encoder(), 0)), images.layout)
    with pytest.raises(SwapFailed, match="too late"):
        swap(swapper, images.write(1, perturbed(encoder(), 1)), images.layout)
    swapper.discard()
    assert not swapper.reads(images.mapped[1])
    images.write(1, perturbed(encoder(), 9))
    values = [expected(given) for given in target.versions]
    assert values == [expected(perturbed(encoder(), by)) for by in (0, 1, 0)]


@pytest.mark.parametrize(
    "shown", [lambda: 1 / 0, lambda: "\ud800\n" * 1000, lambda: None], ids=["error", "surrogates", "no text"]
)
def test_whatever_an_error_shows_of_itself_the_version_before_is_back(
    images: Images, shown: Callable[[], object]
) -> None:
    class Odd(Exception):
        def __repr__(self) -> str:
            return shown()  # type: ignore[return-value]  # no text, or none at all

        __str__ = __repr__

    target = Taking()
    swapper = DeliverSwap(target)
    old = perturbed(encoder(), 1)
    swap(swapper, images.write(0, old), images.layout)

    def fail(call: int, _name: str) -> None:
        if call == 2:
            raise Odd

    target.before = fail
    with pytest.raises(SwapFailed, match="load_weights failed when it had taken 1 of") as caught:
        swap(swapper, images.write(1, perturbed(encoder(), 2)), images.layout)
    assert len(str(caught.value).encode()) < 1000
    assert target.loaded == expected(old)


def test_where_the_version_before_fails_too_the_weights_are_a_mix(images: Images) -> None:
    target = Taking()
    swapper = DeliverSwap(target)
    swap(swapper, images.write(0, perturbed(encoder(), 1)), images.layout)
    fail_at(target, "norm.bias", calls=2)
    with pytest.raises(Torn, match=r"no room for norm\.bias.*given the version before again, load_weights failed"):
        swap(swapper, images.write(1, perturbed(encoder(), 2)), images.layout)
    assert swapper.structure is None
    new = perturbed(encoder(), 3)
    swap(swapper, images.write(1, new), images.layout)
    assert target.loaded == expected(new)


def test_without_a_version_before_a_failure_leaves_a_mix(images: Images) -> None:
    target = Taking()
    fail_at(target, "norm.bias", calls=1)
    with pytest.raises(Torn, match="no version before that it could be given again"):
        swap(DeliverSwap(target), images.write(0, perturbed(encoder(), 1)), images.layout)


def _early(weights: Pairs) -> object:
    return next(iter(weights))


def _generator(weights: Pairs) -> object:
    yield from weights


async def _coroutine(weights: Pairs) -> object:
    return list(weights)


@pytest.mark.filterwarnings("ignore:coroutine '_coroutine' was never awaited")
@pytest.mark.parametrize(("load", "taken"), [(_early, 1), (_generator, 0), (_coroutine, 0)])
def test_to_return_before_everything_was_taken_is_a_failure(
    images: Images, load: Callable[[Pairs], object], taken: int
) -> None:
    class Target:
        load_weights = staticmethod(load)

    count = len(images.layout.structure)
    with pytest.raises(Torn, match=f"load_weights returned after it had taken {taken} of {count} tensors"):
        swap(DeliverSwap(Target()), images.write(0, perturbed(encoder(), 1)), images.layout)


def test_tensors_cannot_be_had_after_load_weights_has_returned(images: Images) -> None:
    class Late:
        def load_weights(self, weights: Pairs) -> None:
            self.weights = iter(weights)
            for _ in range(3):
                next(self.weights)

    target = Late()
    with pytest.raises(Torn):
        swap(DeliverSwap(target), images.write(0, perturbed(encoder(), 1)), images.layout)
    assert list(target.weights) == []


# --- the rest --------------------------------------------------------------------------------------------------------


def test_parameters_that_require_gradients_can_be_copied_into(images: Images) -> None:
    model = encoder()
    parameters = dict(model.named_parameters(remove_duplicate=False))

    class Target:
        def load_weights(self, weights: Pairs) -> None:
            for name, tensor in weights:
                parameters[name].copy_(tensor)

    new = perturbed(encoder(), 1)
    swap(DeliverSwap(Target()), images.write(0, new), images.layout)
    assert expected(model.state_dict()) == expected(new)


def test_nothing_is_staged_that_nobody_has_described(images: Images) -> None:
    swapper = DeliverSwap(Taking())
    with pytest.raises(StageFailed, match="nothing is known of what is in it"):
        swapper.stage(images.mapped[0])
    swapper.lay_out(Layout(Structure.build([TensorSpec("a", "float32", (3,))])))
    with pytest.raises(StageFailed, match="nothing is known of what is in it"):
        swapper.stage(images.mapped[0])
    with pytest.raises(AttachError, match="no version has been delivered"):
        swapper.fill(memoryview(bytearray(8)))
    with pytest.raises(RuntimeError, match="nothing is staged"):
        swapper.apply()


def test_a_dtype_that_torch_lacks_is_named_before_anything_is_loaded(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Taking()
    image = images.write(0, perturbed(encoder(), 1))
    swapper = DeliverSwap(target)
    swapper.lay_out(images.layout)
    monkeypatch.delattr(torch, "float32")
    with pytest.raises(StageFailed, match=r"tensor 'block\.linear1\.bias' is float32, which torch .* does not have"):
        swapper.stage(image)
    assert target.calls == 0


def test_an_image_is_let_go_of_with_its_last_tensor(images: Images) -> None:
    target = Keeping()
    swapper = DeliverSwap(target)
    swap(swapper, images.write(0, perturbed(encoder(), 1)), images.layout)
    assert swapper.lends()
    target.versions.clear()
    gc.collect()
    assert not swapper.lends()
    image = weakref.ref(images.mapped[0])
    images.mapped.clear()
    assert image() is not None
    swapper.let_go()
    gc.collect()
    assert image() is None


def test_only_who_takes_any_tensors_is_told_which() -> None:
    """A daemon that says such things to a process with a model of its own breaks the protocol."""
    tensors = ModelTensors(encoder())
    swapper = make_swapper(tensors, Layout(tensors.structure))
    follower = ModelFollower(Gate(Version("", "")), swapper, resident_of(tensors), 1.0, [])
    with pytest.raises(MalformedMessage, match="has said itself how its images are laid out"):
        follower.lay_out(tensors.structure)
    with pytest.raises(MalformedMessage, match="a process that could have brought one"):
        follower.wait_for_version()
