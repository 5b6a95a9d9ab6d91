"""Pushes of what does not fit as it is: how plans are come by, what receipts say of them, when they are remembered."""

import asyncio
import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shipd
from shipd.client.planning import Renames
from shipd.matching.plan import Plan
from shipd.matching.renames import load_renames
from tests.conftest import StartDaemon
from tests.support.bitwise import same
from tests.support.fake_daemon import FakeDaemon
from tests.support.frames import DESCRIBE, DESCRIPTION_IS, HELLO, OFFER, Way
from tests.support.hostile import Peer
from tests.support.naive import Tensor as Column
from tests.support.naive import encode_structure, hello, pack
from tests.support.processes import Background, address_of, push
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Attach

pytest_plugins = ["tests.support.serving_process", "tests.support.bitwise", "tests.support.older"]


class Net(nn.Module):
    """Two layers, and what is said besides."""

    def __init__(self, *more: str) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        for name in more:
            self.add_module(name, nn.Linear(2, 2))


def weights(version: int, prefix: str = "", *more: str) -> dict[str, Tensor]:
    """A version of it."""
    shapes = {name: tensor.shape for name, tensor in Net(*more).state_dict().items()}
    generator = torch.Generator().manual_seed(version)
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def unwrapped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@pytest.fixture
def served(start_daemon: StartDaemon, attach: Attach) -> tuple[shipd.Daemon, Net, shipd.Resident]:
    """A daemon, a model that it serves, and that as it is attached."""
    daemon = start_daemon(models={})
    model = Net()
    return daemon, model, attach(model, daemon)


Served = tuple[shipd.Daemon, Net, shipd.Resident]


@pytest.fixture
def proxy(served: Served) -> Iterator[Proxy]:
    """On the way to that daemon."""
    with Proxy(served[0].port) as proxy:
        yield proxy


def dry(address: str, checkpoint: Any, **options: Any) -> Plan | None:
    """The plan of a push."""

    async def converse() -> Plan | None:
        async with shipd.connect(address) as client:
            return await client.plan(checkpoint, model="model", **options)

    return asyncio.run(converse())


# --- what is done, and told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True], ids=["tcp", "unix"])
def test_a_prefix_is_found_and_told(served: Served, local: bool) -> None:
    daemon, model, resident = served
    tensors = weights(1, "module.")
    receipt = push(daemon.config.socket if local else address_of(daemon), tensors)
    assert receipt.renamed == ("module.* -> * (4 tensors)",)
    assert (receipt.policy, receipt.cast, receipt.kept, receipt.ignored, receipt.tensors) == ("strict", (), (), (), 4)
    assert receipt.profile.plan > 0
    assert resident.verify() == receipt.digest == receipt.live_digest
    assert same(model.state_dict(), unwrapped(tensors, "module."))
    plain = push(address_of(daemon), model, label=receipt.label)
    assert (plain.already, plain.renamed) == (True, ())


@pytest.mark.parametrize(
    ("renames", "told"),
    [
        (r"^(tail|trunk)\.=\1_.", None),
        ([r"^trunk\.=body.", r"^tail\.=head."], r"--map '^trunk\.=body.' (2 tensors)"),
        ({"trunk.weight": "body.weight", "trunk.bias": "body.bias", "tail.weight": "neck.weight"}, None),
        (
            {f"{own}.{what}": f"{its}.{what}" for own, its in (("trunk", "body"), ("tail", "head"))
             for what in ("weight", "bias")},
            "renames (4 tensors)",
        ),
    ],
    ids=["a rule that leads nowhere", "rules", "a mapping to nowhere", "a mapping"],
)  # fmt: skip
def test_names_that_the_user_maps(served: Served, proxy: Proxy, renames: Renames, told: str | None) -> None:
    _daemon, model, _resident = served
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = {"body": "trunk", "head": "tail"}
    tensors = {own[name.partition(".")[0]] + name[4:]: tensor for name, tensor in weights(2).items()}
    if told is None:
        with pytest.raises(shipd.TensorMismatch) as caught:
            push(proxy.address, tensors, renames=renames)
        assert caught.value.problems
        assert same(model.state_dict(), before)
        assert proxy.count(OFFER) == 0
        return
    receipt = push(proxy.address, tensors, renames=renames)
    assert told in receipt.renamed
    assert same(model.state_dict(), weights(2))
    push(proxy.address, tensors, renames=renames)
    assert proxy.count(DESCRIBE) == 1, "a plan is remembered by whatever maps names"


def test_a_mapping_file(served: Served, tmp_path: Path) -> None:
    daemon, model, _resident = served
    file = tmp_path / "names.toml"
    file.write_text('trunk.weight = "body.weight"\n"trunk.bias" = "body.bias"\n')
    tensors = {name.replace("body", "trunk"): tensor for name, tensor in weights(3).items()}
    receipt = push(address_of(daemon), tensors, renames=[load_renames(file)])
    assert receipt.renamed == (f"{file} (2 tensors)",)
    assert same(model.state_dict(), weights(3))


@pytest.mark.parametrize(
    ("renames", "said"),
    [
        (
            {1: "body.weight"},
            "renames maps '1' to 'body.weight': it maps names in the checkpoint to names in the model",
        ),
        ({"a": ["body.weight"]}, "both are texts"),
        ({"a": ""}, "where a tensor's name belongs"),
        ([("a", "b")], r"renames has \('a', 'b'\), which is no rule"),
        ("ab", "is not of the form regex=replacement"),
    ],
)
def test_renames_that_are_none(served: Served, renames: Any, said: str) -> None:
    with pytest.raises(shipd.MappingError, match=said):
        push(address_of(served[0]), weights(1), renames=renames)


def test_casts_are_made_before_anything_is_sent(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Net().to(torch.bfloat16)
    resident = attach(model, daemon)
    tensors = weights(1, "module.")
    with pytest.raises(shipd.TensorMismatch, match=r"help: add --cast, which casts float32 -> bfloat16"):
        push(address_of(daemon), tensors)
    receipt = push(address_of(daemon), tensors, cast=True)
    assert receipt.cast == ("float32 -> bfloat16 (4 tensors)",)
    assert resident.verify() == receipt.digest
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in weights(1).items()}
    assert same(model.state_dict(), expected)
    tensors["module.head.bias"][1] = -3.4e38
    with pytest.raises(
        shipd.CastError, match=r"'head.bias' \('module.head.bias' in the checkpoint\).* at \[1\]"
    ) as raised:
        push(address_of(daemon), tensors, cast=True)
    assert raised.value.tensor == "head.bias"
    assert same(model.state_dict(), expected)
    assert resident.verify() == receipt.digest


def test_a_base_goes_the_way_of_the_checkpoint(served: Served) -> None:
    """Renamed and selected as what is pushed is, so that it is the version that the daemon has."""
    daemon, model, _resident = served
    old = weights(1, "net.model.")
    first = push(address_of(daemon), old, renames=[r"^net\.="])
    new = {**old, "net.model.head.bias": old["net.model.head.bias"] + 1}
    options: dict[str, Any] = {"renames": [r"^net\.="], "prefer": "bytes", "base": old}
    receipt = push(address_of(daemon), new, **options)
    assert (receipt.base, receipt.base_unused) == (first.digest, "")
    assert same(model.state_dict(), unwrapped(new, "net.model."))


def test_everything_at_once(served: Served, tmp_path: Path) -> None:
    daemon, model, resident = served
    file = tmp_path / "training.pt"
    torch.save({"model": weights(1, "module."), "ema": weights(2, "module.", "aux")}, file)
    options: dict[str, Any] = {"policy": "partial", "snapshot": True, "lanes": 2, "prefer": "bytes"}
    receipt = push(address_of(daemon), file, key="ema", **options)
    assert (receipt.policy, receipt.ignored) == ("partial", ("module.aux.bias", "module.aux.weight"))
    assert receipt.live_digest == receipt.digest == resident.verify(), "nothing of the model was left out"
    assert same(model.state_dict(), {name: weights(2, "", "aux")[name] for name in weights(1)})


# --- remembered ------------------------------------------------------------------------------------------------------


def test_a_plan_is_asked_for_once(served: Served, proxy: Proxy) -> None:
    _daemon, model, _resident = served
    for version in range(1, 4):
        receipt = push(proxy.address, weights(version, "module."))
        assert receipt.renamed == ("module.* -> * (4 tensors)",)
        assert proxy.count(DESCRIBE) == 1
    assert same(model.state_dict(), weights(3))
    push(proxy.address, weights(4))
    assert proxy.count(DESCRIBE) == 2, "another checkpoint has a plan of its own"
    push(proxy.address, weights(5, "module."), policy="subset")
    assert proxy.count(DESCRIBE) == 3, "and so have other wishes"


def test_what_could_not_be_pushed_is_not_remembered(served: Served, proxy: Proxy) -> None:
    for asked in range(1, 3):
        with pytest.raises(shipd.TensorMismatch):
            push(proxy.address, weights(1, "", "aux"))
        assert proxy.count(DESCRIBE) == asked
    assert proxy.count(OFFER) == 0


def test_a_plan_for_another_model_than_there_is_now_is_made_anew(
    served: Served, proxy: Proxy, start_daemon: StartDaemon, attach: Attach
) -> None:
    push(proxy.address, weights(1, "module."))
    other = start_daemon(models={})
    model = nn.ModuleDict({"net": Net()})
    attach(model, other)
    proxy.upstream = other.port
    receipt = push(proxy.address, weights(2, "module."))
    assert receipt.renamed == ("module.* -> net.* (4 tensors)",)
    assert same(model.state_dict(), weights(2, "net."))
    assert (proxy.count(DESCRIBE), proxy.count(OFFER)) == (2, 3)
    push(proxy.address, weights(3, "module."))
    assert proxy.count(DESCRIBE) == 2


def test_what_was_left_out_is_sent_once_the_model_has_it(
    served: Served, proxy: Proxy, start_daemon: StartDaemon, attach: Attach
) -> None:
    """The part would fit the new model as well, and nobody would be told that a tensor of it stays behind."""
    tensors = weights(1, "", "aux")
    del tensors["head.bias"]
    for asked in range(1, 3):
        receipt = push(proxy.address, tensors, policy="partial")
        assert (receipt.ignored, receipt.kept) == (("aux.bias", "aux.weight"), ("head.bias",))
        assert proxy.count(DESCRIBE) == asked
    whole, short = proxy.seen(DESCRIPTION_IS, Way.TO_SENDER)
    assert short.payload < whole.payload, "what is known is not told again"
    other = start_daemon(models={})
    model = Net("aux")
    attach(model, other)
    proxy.upstream = other.port
    receipt = push(proxy.address, tensors, policy="partial")
    assert (receipt.ignored, receipt.kept) == ((), ("head.bias",))
    assert same({name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"}, tensors)


# --- what a daemon allows --------------------------------------------------------------------------------------------


@pytest.fixture
def configured(attach: Attach, place: Path) -> Iterator[Callable[[shipd.ModelConfig], shipd.Daemon]]:
    """Starts a daemon that says this of the model that it serves."""
    running: list[shipd.Daemon] = []

    def start(said: shipd.ModelConfig) -> shipd.Daemon:
        daemon = shipd.Daemon(shipd.Config(listen="127.0.0.1:0", socket=str(place / "s"), models={"model": said}))
        daemon.start()
        running.append(daemon)
        attach(Net(), daemon)
        return daemon

    yield start
    for daemon in running:
        daemon.stop()


def test_the_configuration_says_what_a_push_means(configured: Callable[[shipd.ModelConfig], shipd.Daemon]) -> None:
    address = address_of(configured(shipd.ModelConfig(policy="subset", cast=False)))
    part = {"head.bias": torch.ones(2)}
    receipt = push(address, part)
    assert (receipt.policy, receipt.kept) == ("subset", ("body.bias", "body.weight", "head.weight"))
    assert receipt.live_digest != receipt.digest
    with pytest.raises(
        shipd.Refused, match=r"takes pushes of policy 'subset' at most, and this one is 'partial'.*\[models.\"model\"\]"
    ):
        push(address, part, policy="partial")
    with pytest.raises(shipd.TensorMismatch, match=r"missing: body.bias"):
        push(address, part, policy="strict")
    with pytest.raises(shipd.Refused, match=r"takes no casts.* cast = true put into \[models.\"model\"\]"):
        push(address, part, cast=True)
    assert push(address, {"head.bias": torch.zeros(2)}).policy == "subset"


def test_where_nothing_is_attached(daemon: shipd.Daemon) -> None:
    address = address_of(daemon)
    assert dry(address, weights(1)) is None
    first = push(address, weights(1, "module."))
    assert (first.renamed, first.pause_seconds) == ((), None), "it is what the model consists of from now on"
    assert push(address, weights(2)).renamed == ("* -> module.* (4 tensors)",)
    other = {"w": torch.ones(3)}
    assert dry(address, other) is None, "it would take the place of what nothing serves"
    assert push(address, other).tensors == 1
    with pytest.raises(shipd.TensorMismatch, match="not a single name fits"):
        push(address, weights(1), policy="strict", cast=True)


@pytest.mark.parametrize("wish", [{"policy": "subset"}, {"cast": True}, {"renames": ["a=b"]}], ids=str)
def test_nothing_is_wished_for_of_a_model_that_is_not_known(daemon: shipd.Daemon, wish: dict[str, Any]) -> None:
    """A part would become the whole model, under names and dtypes that nobody asked for."""
    with pytest.raises(
        shipd.Refused, match=r"nothing is known yet of what model 'model' consists of.* attach the process"
    ):
        push(address_of(daemon), {"head.bias": torch.ones(2)}, **wish)
    assert daemon.server.models["model"].version is None


# --- older daemons, and worse ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("older_daemons")
def test_a_daemon_that_cannot_tell(served: Served, proxy: Proxy) -> None:
    daemon, model, _resident = served
    receipt = push(proxy.address, weights(1))
    assert (receipt.policy, receipt.renamed, receipt.profile.plan < 1) == ("strict", (), True)
    assert same(model.state_dict(), weights(1))
    assert dry(proxy.address, weights(1, "module.")) is None
    with pytest.raises(shipd.TensorMismatch, match=r"unexpected: module.body.bias"):
        push(proxy.address, weights(1, "module."))
    wishes: list[dict[str, Any]] = [{"policy": "subset"}, {"cast": True}, {"renames": ["a=b"]}]
    for wish in wishes:
        with pytest.raises(shipd.PeerError, match=r"is of an older release.* push without a policy, casts and renames"):
            push(proxy.address, weights(1), **wish)
    push(proxy.address, weights(2), policy="strict", cast=False)
    assert proxy.count(DESCRIBE) == 0
    assert same(model.state_dict(), weights(2))
    assert daemon.server.models["model"].incoming is None


def test_a_path_that_breaks_and_damages_while_it_is_asked(served: Served, proxy: Proxy) -> None:
    _daemon, model, _resident = served
    proxy.cut(kind=DESCRIBE, nth=0)
    proxy.flip("header", kind=DESCRIBE, nth=1)
    proxy.flip("payload", kind=DESCRIPTION_IS, nth=0, way=Way.TO_SENDER)
    receipt = push(proxy.address, weights(1, "module."))
    assert receipt.renamed == ("module.* -> * (4 tensors)",)
    assert same(model.state_dict(), weights(1))


def test_a_daemon_that_never_answers(served: Served, proxy: Proxy) -> None:
    _daemon, model, _resident = served
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for answer in range(2):
        proxy.hold(kind=DESCRIPTION_IS, nth=answer, way=Way.TO_SENDER)
    with pytest.raises(shipd.Stalled, match=r"did not say in time what model 'model' consists of") as silent:
        push(proxy.address, weights(1), stall=0.2)
    assert (silent.value.model, silent.value.peer) == ("model", proxy.address)
    with pytest.raises(shipd.Stalled, match=r"longer than its timeout of 0.2 s"):
        push(proxy.address, weights(1), timeout=0.2)
    assert proxy.count(OFFER) == 0
    assert same(model.state_dict(), before)


def test_the_timeout_is_that_of_the_whole_push(served: Served, proxy: Proxy) -> None:
    """A connection that stands and says nothing, and a question before it, are within it."""

    async def converse() -> None:
        async with shipd.connect(proxy.address) as client:
            await client.push(weights(1), model="model")
            proxy.hold(kind=HELLO, nth=1, way=Way.TO_SENDER)
            with pytest.raises(shipd.Stalled, match=r"longer than its timeout of 0.2 s"):
                await client.push(weights(1, "module."), model="model", timeout=0.2)

    began = time.monotonic()
    asyncio.run(converse())
    assert time.monotonic() - began < 8, "the ten seconds of a handshake are not waited for"


def test_cancelling_while_it_is_asked(served: Served, proxy: Proxy) -> None:
    daemon, _model, resident = served
    digest = resident.digest
    held = proxy.hold(kind=DESCRIPTION_IS, nth=0, way=Way.TO_SENDER)

    async def converse() -> None:
        async with shipd.connect(proxy.address) as client:
            pushing = asyncio.create_task(client.push(weights(1), model="model"))
            await asyncio.to_thread(held.wait)
            pushing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pushing

    with Background(asyncio.run, converse()) as talking:
        talking.result(10)
    assert proxy.count(OFFER) == 0
    assert resident.verify() == digest
    assert daemon.server.models["model"].incoming is None


LIES: dict[str, Any] = {
    "nonsense": b"\xc1",
    "no map": b"\x92\x01\x02",
    "no model": pack({"policy": ""}),
    "a model of control characters": {"model": "\x1b[2J"},
    "a class of control characters": {"processes": [{"pid": 1, "model_class": "\x1b[2J"}]},
    "a class of 16 MiB": {"processes": [{"pid": 1, "model_class": "x" * (16 << 20)}]},
    "an environment of control characters": {"environment": {"torch": "\x1b[2J"}},
    "a policy of control characters": {"policy": "\x1b[2J"},
    "a policy that nobody knows": {"policy": "anything"},
    "a label that is none": {"label": "a b"},
    "a process of a negative number": {"processes": [{"pid": -1}]},
    "a hundred processes": {"processes": [{"pid": 1}] * 100},
    "a structure that is none": {"structure": b"\x80", "structure_digest": bytes(16)},
    "another structure than it names": {"structure": encode_structure([Column("a", "float32", ())]),
                                        "structure_digest": bytes(16)},
    "a digest without a structure": {"structure_digest": bytes(16)},
    "buffers that are none": {"transient": b"\xc1"},
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_daemon_that_lies_is_a_broken_peer(lie: str) -> None:
    told = LIES[lie]
    body = told if isinstance(told, bytes) else pack({"model": "model", **told})

    def answer(peer: Peer) -> None:
        peer.expect("Hello")
        peer.send("Hello", hello(os.urandom(32), "fake", capabilities=["describe"]))
        peer.expect("Describe")
        peer.message("DescriptionIs", {}, body)

    with FakeDaemon(answer) as fake, pytest.raises(shipd.PeerError) as caught:
        push(fake.address, weights(1))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize("prefix", ["", "module."], ids=["as it is", "planned"])
def test_nothing_of_what_was_pushed_outlives_the_push(served: Served, prefix: str) -> None:
    """Found here: a push referred to itself, so that a version stayed in memory until the next garbage collection."""
    daemon, _model, _resident = served
    tensors = weights(1, prefix)
    living = [weakref.ref(tensor) for tensor in tensors.values()]
    gc.disable()
    try:
        push(address_of(daemon), tensors)
        del tensors
        # The push's thread may be about to end.
        until(lambda: not any(reference() is not None for reference in living), "its tensors are gone")
    finally:
        gc.enable()
