"""Pushes of a part of a model: what is not sent keeps its value, in every process, and everything says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shipd
from shipproto.digests import digest_image
from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, fingerprint, question, state
from tests.support.fake_daemon import FakeDaemon, after_hello
from tests.support.hostile import attacker, columns, offer
from tests.support.partial import patched, push_part
from tests.support.processes import address_of, push, status
from tests.support.serving_process import Attach, Serve

pytest_plugins = ["tests.support.serving_process"]

BEFORE, AFTER = state(1, "wide"), state(2, "wide")


def some(whole: Mapping[str, Tensor], *which: str) -> dict[str, Tensor]:
    """The tensors whose names begin with one of these."""
    return {name: tensor for name, tensor in whole.items() if name.startswith(which)}


def answer_of(tensors: Mapping[str, Tensor]) -> str:
    """What a model with these tensors answers."""
    model = Exact(0, "wide")
    model.load_state_dict(dict(tensors))
    return ask(model, "wide")


def used(daemon: shipd.Daemon) -> int:
    """Bytes of all images."""
    return daemon.server.images.budget.used


def assert_whole(daemon: shipd.Daemon, tensors: Mapping[str, Tensor], digest: str) -> None:
    """The daemon's version has these bytes, no others, and the digest that goes with them."""
    model = daemon.server.models["model"]
    assert model.version is not None
    assert model.pool is not None
    view, layout = model.version.slot.memory.view, model.pool.layout
    for row, name in enumerate(layout.structure.names):
        start, size = int(layout.offsets[row]), int(layout.structure.nbytes[row])
        assert view[start : start + size] == tensors[name].contiguous().numpy().tobytes(), name
    assert digest_image(layout, view).version_digest().hex() == model.version.digest.hex() == digest
    assert model.version.slot.digests is not None
    assert model.version.slot.digests.version_digest().hex() == digest


# --- what becomes of it ----------------------------------------------------------------------------------------------


def test_two_processes_get_what_was_sent_and_keep_the_rest(
    start_daemon: StartDaemon, attach: Attach, serve: Serve
) -> None:
    daemon = start_daemon(models={})
    model = Exact(1, "wide")
    resident = attach(model, daemon)
    other = serve(daemon.config.socket, version=9, kind="wide", mode="flip")
    before = used(daemon)
    part = some(AFTER, "layers.1.", "layers.4.bias", "crowd.7", "shift")
    receipt, live = push_part(address_of(daemon), part, "part")
    expected = patched(BEFORE, part)
    assert (receipt.label, receipt.swapped, receipt.stale, receipt.already) == ("part", 2, (), False)
    assert (receipt.tensors, receipt.bytes_total) == (len(part), sum(tensor.nbytes for tensor in part.values()))
    assert receipt.digest != live
    assert live == resident.digest == resident.verify() == other.ask("verify")
    assert ask(model, "wide") == other.ask("answer") == answer_of(expected)
    assert_whole(daemon, expected, live)
    (told,) = status(address_of(daemon)).models
    assert (told.label, told.digest, told.tensors) == ("part", live, len(BEFORE))
    assert used(daemon) == before
    # The digest of what was sent is that of a model of these tensors alone.
    alone = start_daemon()
    assert push(address_of(alone), part).digest == receipt.digest


def test_one_part_after_the_other(start_daemon: StartDaemon, attach: Attach) -> None:
    """Every slot has had another version before, of which nothing must be left that is not meant."""
    daemon = start_daemon(models={})
    model = Exact(1, "wide")
    resident = attach(model, daemon)
    now: dict[str, Tensor] = dict(BEFORE)
    steps = ("layers.0.weight", "layers.0.", "crowd.", "layers.5.bias", "layers.", "shift", "layers.2.weight")
    for number, which in enumerate(steps):
        part = some(state(10 + number, "wide"), which)
        _, live = push_part(address_of(daemon), part)
        now = patched(now, part)
        assert_whole(daemon, now, live)
        assert resident.verify() == live
    assert ask(model, "wide") == answer_of(now)
    whole = push(address_of(daemon), state(3, "wide"), label="whole")
    assert resident.verify() == whole.digest
    assert_whole(daemon, state(3, "wide"), whole.digest)


def test_a_whole_push_afterwards_sends_only_what_is_other(daemon: shipd.Daemon) -> None:
    push(address_of(daemon), BEFORE, label="v1")
    part = some(AFTER, "layers.2.weight")
    _, live = push_part(address_of(daemon), part)
    receipt = push(address_of(daemon), patched(BEFORE, part), label="again", prefer="bytes")
    assert receipt.digest == live
    assert receipt.bytes_unchanged == receipt.bytes_total + sum_of_gaps(daemon)
    assert receipt.bytes_sent < 16384


def sum_of_gaps(daemon: shipd.Daemon) -> int:
    """Bytes between small tensors, which travel with them."""
    pool = daemon.server.models["model"].pool
    assert pool is not None
    return pool.layout.wire_bytes - pool.layout.structure.total_bytes


def test_everything_may_be_a_part(daemon: shipd.Daemon) -> None:
    push(address_of(daemon), BEFORE, label="v1")
    before = used(daemon)
    receipt, live = push_part(address_of(daemon), AFTER, "v2")
    assert receipt.digest == live
    assert_whole(daemon, AFTER, live)
    assert used(daemon) == before


def test_coded_runs_without_a_base(daemon: shipd.Daemon) -> None:
    push(address_of(daemon), BEFORE, label="v1")
    halves = {"layers.3.weight": AFTER["layers.3.weight"]}
    receipt, live = push_part(address_of(daemon), halves, prefer="bytes")
    assert {use.codec for use in receipt.codecs} <= {"xph", "planes", "zstd", "raw"}
    assert sum(use.runs for use in receipt.codecs if use.codec != "raw") > 0
    assert receipt.bytes_sent < receipt.bytes_total / 2
    assert_whole(daemon, patched(BEFORE, halves), live)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_same_part_again_under_its_label(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    resident = attach(Exact(1, "wide"), daemon)
    part = some(AFTER, "layers.1.")
    first, live = push_part(address_of(daemon), part, "p1")
    before = used(daemon)
    again, still = push_part(address_of(daemon), part, "p1")
    assert (again.already, again.digest, still) == (True, first.digest, live)
    assert again.bytes_sent < 2048
    assert resident.digest == live
    # A part of the part is in the version as well, and nothing would change.
    assert push_part(address_of(daemon), some(part, "layers.1.bias"), "p1")[0].already
    with pytest.raises(shipd.LabelConflict, match="'p1' with other content"):
        push_part(address_of(daemon), {"layers.1.bias": BEFORE["layers.1.bias"]}, "p1")
    assert used(daemon) == before
    assert resident.verify() == live


def test_the_label_of_an_earlier_version(daemon: shipd.Daemon) -> None:
    address = address_of(daemon)
    push(address, BEFORE, label="v1")
    part, other = some(AFTER, "layers.1."), some(AFTER, "layers.2.")
    _, first = push_part(address, part, "p1")
    push_part(address, other, "p2")
    with pytest.raises(shipd.LabelConflict, match=f"'p1' with other content \\(digest {first}\\)"):
        push_part(address, part, "p1")
    # What comes out is what the label stands for: the rest is as it was then.
    receipt, live = push_part(address, some(BEFORE, "layers.2."), "p1")
    assert (live, receipt.already) == (first, False)


# --- ties ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Three names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.tail = nn.Linear(3, 7, bias=False)
        self.head.weight = self.tail.weight = self.embed.weight


@pytest.mark.parametrize("sent", [("embed.weight",), ("tail.weight",), ("head.weight", "embed.weight")])
def test_one_of_several_names_sets_them_all(start_daemon: StartDaemon, attach: Attach, sent: tuple[str, ...]) -> None:
    daemon = start_daemon(models={})
    model = Tied()
    bias = model.head.bias.detach().clone()
    resident = attach(model, daemon)
    value = torch.arange(21.0).reshape(7, 3)
    _, live = push_part(address_of(daemon), {name: value.clone() for name in sent}, "tied")
    assert torch.equal(model.embed.weight, value)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.bias, bias)
    assert resident.verify() == live


def test_other_values_for_names_of_one_tensor(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Tied()
    resident = attach(model, daemon)
    digest, before = resident.digest, used(daemon)
    part = {"embed.weight": torch.zeros(7, 3), "head.weight": torch.ones(7, 3), "tail.weight": torch.zeros(7, 3)}
    with pytest.raises(shipd.TensorMismatch, match=r"ties 'embed\.weight' and 'head\.weight', but this push") as caught:
        push_part(address_of(daemon), part)
    assert caught.value.problems == ("tied: embed.weight and head.weight have other values",)
    assert caught.value.tensor == "head.weight"
    assert resident.verify() == digest
    assert used(daemon) == before


# --- refusals --------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "unexpected": ({"shift": AFTER["shift"], "shifts": AFTER["shift"]}, ("unexpected: shifts (int64 [512])",)),
    "shape": ({"shift": torch.zeros(3, dtype=torch.int64)}, ("shape: shift is [3], the resident model has [512]",)),
    "dtype": ({"shift": torch.zeros(512)}, ("dtype: shift is float32, the resident model has int64",)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit(daemon: shipd.Daemon, what: str) -> None:
    push(address_of(daemon), BEFORE, label="v1")
    tensors, problems = WRONG[what]
    with pytest.raises(shipd.TensorMismatch, match="the tensors do not match model 'model': 1") as caught:
        push_part(address_of(daemon), tensors)
    assert caught.value.problems == problems
    assert status(address_of(daemon)).models[0].label == "v1"


def test_nothing_at_all(daemon: shipd.Daemon) -> None:
    push(address_of(daemon), BEFORE, label="v1")
    empty = columns(dtypes=b"", names=[], ndims=b"")
    with attacker(daemon.port) as peer:
        peer.greet().send("Offer", offer(empty, 0, 0, model="model", partial=True))
        asked = peer.expect("StructureWanted").fields
        abort = peer.send("StructureIs", asked, empty).expect("Abort").fields
    assert (abort["code"], abort["message"]) == ("mismatch", "the checkpoint has no tensors")


def test_nothing_to_keep(daemon: shipd.Daemon) -> None:
    with pytest.raises(shipd.Refused, match="'model' has no version yet, so that what this push leaves out has no val"):
        push_part(address_of(daemon), AFTER)
    assert used(daemon) == 0


def test_no_room_for_it(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(memory_limit="14MiB")
    push(address_of(daemon), BEFORE, label="v1")
    before = used(daemon)
    with pytest.raises(shipd.MemoryLimit, match=r"needs .* \(an image for the tensors that are sent\), and of"):
        push_part(address_of(daemon), some(AFTER, "layers.", "shift"))
    receipt, _ = push_part(address_of(daemon), some(AFTER, "layers.1."))
    assert (receipt.tensors, used(daemon)) == (2, before)


def test_what_the_configuration_allows(place: Path, attach: Attach) -> None:
    def config(policy: Any, name: str = "model") -> shipd.Config:
        models = {name: shipd.ModelConfig(policy=policy)}
        return shipd.Config(listen="127.0.0.1:0", socket=str(place / "s"), models=models)

    part = some(AFTER, "shift")
    with shipd.Daemon(config("strict", "a.b")) as daemon:
        resident = attach(Exact(1, "wide"), daemon, "a.b")
        with pytest.raises(
            shipd.Refused, match=r'policy = "strict" of it \(\[models\."a\.b"\]\). Push all of its'
        ) as no:
            push_part(address_of(daemon), part, model="a.b")
        assert no.value.exit_code == 12
        assert resident.verify() == resident.digest
        for policy in ("subset", "partial"):
            daemon.call(reloaded(daemon, config(policy, "a.b")))
            assert push_part(address_of(daemon), part, model="a.b")[0].swapped == 1
        daemon.call(reloaded(daemon, config("strict", "other")))
        assert push_part(address_of(daemon), part, model="a.b")[0].swapped == 1
        resident.detach()


async def reloaded(daemon: shipd.Daemon, config: shipd.Config) -> None:
    """As SIGHUP does it, on the daemon's loop."""
    daemon.server.reload(config)


def test_a_daemon_that_does_not_know_of_parts() -> None:
    """It would take the part for a whole version, and some would install it: it is not even offered."""
    with (
        FakeDaemon(after_hello(lambda peer, offered: peer.drain())) as fake,
        pytest.raises(shipd.Refused, match="fake is of a release that takes only whole versions: update it"),
    ):
        push_part(fake.address, AFTER)


def test_another_part_under_the_same_id(daemon: shipd.Daemon) -> None:
    body = columns()
    with attacker(daemon.port) as peer, attacker(daemon.port) as other:
        offered = offer(body, 1, 4, model="model")
        peer.greet().send("Offer", offered).expect("StructureWanted")
        abort = other.greet().send("Offer", {**offered, "partial": True}).expect("Abort").fields
    assert abort["code"] == "protocol"


def test_the_answer_of_the_model(start_daemon: StartDaemon, attach: Attach) -> None:
    """Buffers that are no part of a state dict cannot be sent in a part either: they are not what is live."""
    daemon = start_daemon(models={})
    model = Exact(1, "wide")
    model.register_buffer("extra", torch.zeros(3), persistent=False)
    attach(model, daemon)
    with pytest.raises(shipd.TensorMismatch, match="1 unexpected"):
        push_part(address_of(daemon), {"extra": torch.ones(3)})
    with torch.inference_mode():
        assert fingerprint(model(question("wide"))) == answer_of(BEFORE)
