"""What can be pushed into: one version, bit for bit, whatever the process has made of the model."""

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

import shipd
from shipd.cli.render import print_status, print_verification
from shipd.images.memory import ImageMapping
from shipd.serving.deliver import DeliverSwap
from shipproto.status import ProcessStatus
from tests.conftest import StartDaemon
from tests.support.offers import offer
from tests.support.processes import DEADLINE, address_of, push, status
from tests.support.proxy import until
from tests.support.serving_process import Attach
from tests.support.swapping import raw

pytest_plugins = ["tests.support.serving_process"]

Weights = Iterable[tuple[str, Tensor]]
Contents = dict[str, bytes]


class Reader(nn.Module):
    """A small language model with a tied head. torch.jit can script it, and then knows of no non-persistent buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.position = nn.Embedding(8, 16)
        self.gate = nn.Linear(16, 16)
        self.up = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(hidden + torch.sigmoid(self.gate(hidden)) * self.up(hidden)))


def reader(seed: int) -> Reader:
    """One of them, in evaluation mode."""
    torch.manual_seed(seed)
    return Reader().eval()


def version(seed: int) -> dict[str, Tensor]:
    """The state of one of them."""
    return reader(seed).state_dict()


def contents(state: dict[str, Tensor]) -> Contents:
    """Every tensor's bytes."""
    return {name: raw(tensor) for name, tensor in state.items()}


def answer(model: nn.Module) -> Tensor:
    """What a model makes of a question, through the hooks."""
    with torch.no_grad():
        found: Tensor = model(torch.arange(6).view(1, 6))
    return found


class Engine:
    """What vLLM makes of a model: other names, fused tensors, and ``load_weights``. No module."""

    def __init__(self) -> None:
        self.embed = torch.zeros(48, 16)
        """Padded, as vocabularies are."""
        self.fused: Tensor = torch.zeros(0)
        self.seen: Contents = {}
        self.calls = 0
        self.fail: Callable[[int, str], bool] = lambda call, name: False

    def load_weights(self, weights: Weights) -> set[str]:
        self.calls += 1
        parts: dict[str, Tensor] = {}
        for name, tensor in weights:
            if self.fail(self.calls, name):
                raise RuntimeError(f"cannot take {name}")
            self.seen[name] = raw(tensor)
            if name == "embed.weight":
                self.embed[:40].copy_(tensor)
            elif name in ("gate.weight", "up.weight"):
                parts[name] = tensor
        self.fused = torch.cat([parts["gate.weight"], parts["up.weight"]])
        return set(self.seen)


def traced(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.jit.trace(model, torch.zeros(1, 6, dtype=torch.long))
    return made


def scripted(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.jit.script(model)
    return made


def compiled(model: nn.Module) -> nn.Module:
    made: object = torch.compile(model, backend="eager")
    assert isinstance(made, nn.Module)
    return made


def partly_wrapped(model: nn.Module) -> nn.Module:
    model.add_module("up", compiled(model.get_submodule("up")))
    model.add_module("norm", checkpoint_wrapper(model.get_submodule("norm")))
    return DataParallel(model)


DESTINATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "compiled": compiled,
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "partly wrapped": partly_wrapped,
    "traced": traced,
    "scripted": scripted,
}


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["copy", "flip"])
def test_one_version_into_every_destination(start_daemon: StartDaemon, attach: Attach, group: None, mode: str) -> None:
    daemon = start_daemon(models={})
    models = {name: wrap(reader(at)) for at, (name, wrap) in enumerate(DESTINATIONS.items())}
    residents = {name: attach(model, daemon, mode=mode) for name, model in models.items()}
    engine = Engine()
    residents["load_weights"] = attach(engine, daemon)
    # The weights of the first one, which nobody pushed, are everybody's.
    first = answer(models["plain"])
    assert all(torch.equal(answer(model), first) for model in models.values())
    assert engine.seen == contents(version(0))
    for seed in (100, 101):
        receipt = push(address_of(daemon), version(seed), label=f"v{seed}")
        assert (receipt.swapped, receipt.stale) == (len(residents), ())
        right = answer(reader(seed))
        for name, model in models.items():
            assert torch.equal(answer(model), right), name
            assert residents[name].verify() == receipt.digest
        assert engine.seen == contents(version(seed))
        assert raw(engine.embed[:40]) == raw(version(seed)["embed.weight"])
        assert raw(engine.fused[16:]) == raw(version(seed)["up.weight"])
        assert residents["load_weights"].digest == receipt.digest
    modes = {process.mode for process in status(address_of(daemon)).models[0].processes}
    assert modes == {mode, "load_weights"}


# --- load_weights ----------------------------------------------------------------------------------------------------


def test_before_the_first_push_nothing_is_loaded(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    engine, late = Engine(), Engine()
    resident = attach(engine, daemon)
    assert (resident.label, resident.digest, resident.mode, resident.stale) == ("", "", "load_weights", None)
    assert resident.connected
    with resident.hold() as held:
        assert held == shipd.Version("", "")
    assert engine.calls == 0
    (told,) = status(address_of(daemon)).models
    assert (told.label, told.tensors, told.image_bytes) == ("", 0, 0)
    assert [(each.state, each.mode, each.digest) for each in told.processes] == [("serving", "load_weights", "")]
    receipt = push(address_of(daemon), version(1), label="v1")
    assert (receipt.swapped, receipt.pause_seconds is not None) == (1, True)
    assert (resident.label, resident.digest, engine.calls) == ("v1", receipt.digest, 1)
    assert engine.seen == contents(version(1))
    # Who comes later gets it before attach returns.
    assert attach(late, daemon).label == "v1"
    assert late.seen == engine.seen
    assert push(address_of(daemon), version(2), label="v2").swapped == 2
    assert late.seen == engine.seen == contents(version(2))


def test_verify_says_that_nothing_was_read_back(
    start_daemon: StartDaemon,
    attach: Attach,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    daemon = start_daemon(models={})
    resident = attach(Engine(), daemon)
    assert verification(daemon).matches
    receipt = push(address_of(daemon), version(1), label="v1")
    attach(reader(0), daemon)
    with pytest.raises(shipd.NotReadBack, match="'model' takes its versions through load_weights: 'v1' was delivered"):
        resident.verify()
    found = verification(daemon)
    assert found.matches
    assert [(each.delivered, each.matches, each.digest) for each in found.processes] == [
        (True, True, receipt.digest),
        (False, True, receipt.digest),
    ]
    print_verification(found)
    printed = capsys.readouterr().out
    assert f"{receipt.digest}  delivered, not read back" in printed
    assert f"{receipt.digest}  the same" in printed
    print_status(status(address_of(daemon)), "here")
    assert "serving (load_weights)" in capsys.readouterr().out


def verification(daemon: shipd.Daemon) -> shipd.Verification:
    """What VERIFY says."""

    async def ask() -> shipd.Verification:
        async with shipd.connect(address_of(daemon)) as client:
            return await client.verify("model")

    return asyncio.run(ask())


def test_a_load_weights_that_fails_is_given_the_version_before_again(
    start_daemon: StartDaemon, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start_daemon(models={})
    engine = Engine()
    resident = attach(engine, daemon)
    push(address_of(daemon), version(1), label="v1")
    engine.fail = lambda call, name: call == 2 and name == "norm.weight"
    with pytest.raises(shipd.SwapFailed, match=r"taken 6 of 9 tensors: .*cannot take norm.weight.* and serves"):
        push(address_of(daemon), version(2), label="v2")
    caplog.clear()
    assert engine.seen == contents(version(1))
    assert (resident.label, resident.stale, engine.calls) == ("v1", None, 3)
    assert push(address_of(daemon), version(3), label="v3").swapped == 1
    assert engine.seen == contents(version(3))


def test_one_that_fails_twice_is_fenced_until_it_has_the_committed_version(
    start_daemon: StartDaemon, attach: Attach, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(models={})
    engine = Engine()
    resident = attach(engine, daemon)
    push(address_of(daemon), version(1), label="v1")
    reasons: list[str] = []
    engine.fail = lambda call, name: call in (2, 3, 4) and name == "norm.bias"
    fence = resident._gate.fence

    def noting(reason: str) -> None:
        reasons.append(reason)
        fence(reason)

    monkeypatch.setattr(resident._gate, "fence", noting)
    receipt = push(address_of(daemon), version(2), label="v2")
    assert (receipt.swapped, receipt.stale) == (0, (str(os.getpid()),))
    until(lambda: resident.stale is None and resident.connected, "it has been given the committed version")
    caplog.clear()
    assert "the weights are a mix of two versions: load_weights failed" in reasons[0]
    assert "given the version before again, load_weights failed" in reasons[0]
    assert (resident.label, resident.digest, engine.calls) == ("v2", receipt.digest, 5)
    assert engine.seen == contents(version(2))


def test_attaching_fails_where_the_committed_version_cannot_be_loaded(
    start_daemon: StartDaemon, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start_daemon()
    push(address_of(daemon), version(1), label="v1")
    engine = Engine()
    engine.fail = lambda call, name: name == "norm.bias"
    with pytest.raises(shipd.SwapFailed, match="no version before that it could be given again"):
        attach(engine, daemon)
    caplog.clear()


def test_attaching_does_not_wait_for_ever_for_a_load_weights(
    daemon: shipd.Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shipd.serving.link._LEAVE_SECONDS", 0.1)
    push(address_of(daemon), version(1), label="v1")
    engine, let_go = Engine(), threading.Event()
    engine.fail = lambda call, name: not let_go.wait(DEADLINE)
    with pytest.raises(shipd.Stalled, match=r"within 0\.5 s; its load_weights has not returned"):
        shipd.attach(engine, "model", socket=daemon.config.socket, timeout=0.5)
    assert not engine.seen, "it was left in the middle of that"
    let_go.set()
    until(lambda: not daemon.server.models["model"].attaching, "the attempt is over for the daemon as well")
    resident = shipd.attach(Engine(), "model", socket=daemon.config.socket)
    assert resident.label == "v1"
    resident.detach()
    caplog.clear()


def test_after_a_restart_of_the_daemon_it_brings_back_what_it_was_given(
    start_daemon: StartDaemon, attach: Attach, place: Path
) -> None:
    daemon = start_daemon(models={}, socket=str(place / "one.sock"))
    engine, idle = Engine(), Engine()
    resident = attach(engine, daemon)
    receipt = push(address_of(daemon), version(1), label="v1")
    daemon.stop()
    daemon = start_daemon(models={}, socket=str(place / "one.sock"))
    until(lambda: resident.connected, "it is attached again")
    assert engine.calls == 1
    (told,) = status(address_of(daemon)).models
    assert (told.label, told.digest, told.tensors) == ("v1", receipt.digest, receipt.tensors)
    # Others are led to it: modules, and whatever has load_weights.
    model = reader(0)
    assert attach(model, daemon).verify() == receipt.digest
    assert torch.equal(answer(model), answer(reader(1)))
    assert attach(idle, daemon).label == "v1"
    assert idle.seen == engine.seen
    assert push(address_of(daemon), version(2), label="v2").swapped == 3
    assert engine.seen == contents(version(2))


def test_who_waits_is_given_the_version_that_another_brings_back(
    start_daemon: StartDaemon, attach: Attach, place: Path
) -> None:
    first = start_daemon(models={}, socket=str(place / "one.sock"))
    returning = attach(reader(0), first)
    push(address_of(first), version(1), label="v1")
    first.stop()
    second = start_daemon(models={}, socket=str(place / "two.sock"))
    engine = Engine()
    waiting = attach(engine, second)
    assert (waiting.label, engine.calls) == ("", 0)
    (place / "one.sock").symlink_to("two.sock")
    until(lambda: returning.connected, "the other one is attached again")
    until(lambda: waiting.label == "v1", "it is given that version")
    assert engine.seen == contents(version(1))
    until(lambda: {each.state for each in processes(second)} == {"serving"}, "both are at it")
    assert {each.label for each in processes(second)} == {"v1"}


def processes(daemon: shipd.Daemon) -> list[ProcessStatus]:
    """What is attached."""
    found: list[ProcessStatus] = status(address_of(daemon)).models[0].processes
    return found


def test_tensors_that_were_kept_stay_what_they_were(start_daemon: StartDaemon, attach: Attach) -> None:
    kept: list[dict[str, Tensor]] = []

    class Keeping:
        def load_weights(self, weights: Weights) -> None:
            kept.append(dict(weights))

    daemon = start_daemon(models={}, stage_timeout=5.0)
    resident = attach(Keeping(), daemon)
    for seed in range(6):
        receipt = push(address_of(daemon), version(seed), label=f"v{seed}")
        assert (receipt.swapped, receipt.stale) == (1, ())
    resident.detach()
    # Now its last image is the daemon's as well.
    push(address_of(daemon), version(7), label="v7")
    push(address_of(daemon), version(8), label="v8")
    assert [contents(each) for each in kept] == [contents(version(seed)) for seed in range(6)]
    kept.clear()
    gc.collect()


def test_a_forked_child_serves_only_what_is_its_own(start_daemon: StartDaemon, attach: Attach) -> None:
    """The daemon knows of the parent only, and writes into images that a child may still refer to."""

    class Bound:
        def load_weights(self, weights: Weights) -> None:
            self.weights = dict(weights)

    daemon = start_daemon(models={})
    copying, bound = attach(Engine(), daemon), attach(Bound(), daemon)
    push(address_of(daemon), version(1), label="v1")
    # What a fork calls in the child, but for the session: that is the parent's, and goes on here.
    copying._follower.abandon_after_fork()
    bound._follower.abandon_after_fork()
    assert copying.stale is None
    with pytest.raises(shipd.Fenced, match="forked from one whose load_weights keeps the tensors"), bound.hold():
        pass


def test_other_tensors_are_refused_while_it_is_attached(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    engine = Engine()
    resident = attach(engine, daemon)
    push(address_of(daemon), version(1), label="v1")
    other = version(2)
    del other["norm.bias"]
    told = (
        r"1 missing\. Its processes \(\d+\) were given 'v1' through load_weights, .* stop those processes or have them"
    )
    with pytest.raises(shipd.TensorMismatch, match=told) as caught:
        offer(address_of(daemon), other, label="v2")
    assert caught.value.problems == ("missing: norm.bias (float32 [16])",)
    with pytest.raises(shipd.TensorMismatch, match="1 missing"):
        push(address_of(daemon), other, label="v2")
    resident.detach()
    until(lambda: not processes(daemon), "the session ends")
    assert push(address_of(daemon), other, label="v2").swapped == 0


def test_a_first_push_that_ends_without_effect_leaves_no_images(
    start_daemon: StartDaemon, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(models={})
    engine = Engine()
    resident = attach(engine, daemon)

    def refuse(self: DeliverSwap, mapping: ImageMapping) -> None:
        assert daemon.server.images.budget.used > 0
        raise shipd.StageFailed("not this one")

    with monkeypatch.context() as patched:
        patched.setattr(DeliverSwap, "stage", refuse)
        with pytest.raises(shipd.StageFailed, match=f"process {os.getpid()} cannot take the version: not this one"):
            push(address_of(daemon), {"other.weight": torch.zeros(1000)}, label="v1")
    until(lambda: daemon.server.images.budget.used == 0, "the images are given back")
    until(lambda: "/memfd:shipd:" not in Path("/proc/self/maps").read_text(), "the process lets go of its images")
    assert (engine.calls, resident.label, processes(daemon)[0].state) == (0, "", "serving")
    # What it was going to be laid out like rules nothing.
    assert push(address_of(daemon), version(1), label="v1").swapped == 1
    assert engine.seen == contents(version(1))


def test_a_module_does_not_rule_a_process_that_waits(start_daemon: StartDaemon, attach: Attach) -> None:
    """Nobody knows whether the weights that it came with are the module's."""
    daemon = start_daemon(models={})
    engine, model = Engine(), reader(0)
    attach(engine, daemon)
    with pytest.raises(shipd.Busy, match=rf"process {os.getpid()} takes the versions of model 'model' through load_w"):
        attach(model, daemon)
    push(address_of(daemon), version(1), label="v1")
    assert attach(model, daemon).label == "v1"


def test_a_module_may_take_its_versions_through_load_weights(start_daemon: StartDaemon, attach: Attach) -> None:
    class Loading(Reader):
        def load_weights(self, weights: Weights) -> None:
            self.load_state_dict({name.removeprefix("checkpoint."): tensor for name, tensor in weights})

    daemon = start_daemon(models={})
    torch.manual_seed(0)
    model = Loading().eval()
    resident = attach(compiled(model), daemon, mode="load_weights")
    pushed = {f"checkpoint.{name}": tensor for name, tensor in version(1).items()}
    push(address_of(daemon), pushed, label="v1")
    assert torch.equal(answer(model), answer(reader(1)))
    # Its forwards are holds, as those of any module.
    held: list[bool] = []
    model.norm.register_forward_hook(lambda *_: held.append(resident._gate.hold().forward.owned()))
    answer(model)
    assert held == [True]
    with pytest.raises(shipd.AttachError, match="this model is attached already, as 'model'"):
        attach(model, daemon, name="other")


def test_what_cannot_be_attached_is_told_why(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    with pytest.raises(shipd.AttachError, match=r"a dict is no torch\.nn\.Module, and has no load_weights"):
        attach({}, daemon)
    with pytest.raises(shipd.AttachError, match="mode 'load_weights' needs a method of that name, and Reader has none"):
        attach(reader(0), daemon, mode="load_weights")
    with pytest.raises(shipd.AttachError, match="mode 'flip' is for modules, and this Engine is none; leave it out"):
        attach(Engine(), daemon, mode="flip")
