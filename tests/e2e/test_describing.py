"""DESCRIBE: what must be known of a model before it is pushed to, and what both sides say that they run on."""

import threading
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import shipd
from shipd.client.questions import ask
from shipd.environment import environment
from shipd.transfer.lane import Lane
from shipproto.description import Description, decode_description
from shipproto.messages import Describe, DescriptionIs
from tests.conftest import StartDaemon
from tests.support.exact import Exact, state
from tests.support.hostile import attacker
from tests.support.processes import TOKEN, address_of, push, status
from tests.support.proxy import until
from tests.support.serving_process import Attach

pytest_plugins = ["tests.support.serving_process"]


class Tied(nn.Module):
    """Two names for one tensor, and a buffer that no checkpoint needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", self.embed.weight.new_zeros(5), persistent=False)


def opened(daemon: shipd.Daemon, token: bytes | None = None) -> Lane:
    """A connection to the daemon, over TCP."""
    return Lane.open(shipd.address.parse_address(address_of(daemon)), token=token, timeout=10)


def describe(daemon: shipd.Daemon, model: str = "model", known: bytes = b"", token: bytes | None = None) -> Description:
    """What the daemon says of a model."""
    lane = opened(daemon, token)
    try:
        return decode_description(ask(lane, Describe(model=model, structure=known), DescriptionIs, 10))
    finally:
        lane.close()


def test_of_a_model_that_is_served(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    resident = attach(Tied(), daemon, mode="flip")
    told = describe(daemon)
    structure = told.resident()
    assert structure is not None
    assert structure.names == ("embed.weight", "head.weight")
    assert structure.spec(1).tied_to == "embed.weight"
    assert told.transients().names == ("positions",)
    assert (told.model, told.version, told.label, told.digest.hex()) == ("model", True, "initial", resident.digest)
    assert (told.policy, told.cast, told.limit, told.delivered) == ("", None, 0, False)
    assert (told.memory_used, told.memory_limit) == (3 * 4096, 8 << 30)
    assert told.environment == environment()
    (process,) = told.processes
    assert (process.mode, process.model_class) == ("flip", f"{__name__}.Tied")
    assert process.environment == environment()
    again = describe(daemon, known=structure.digest)
    assert again.structure == b""
    assert again.resident(structure) is structure
    assert describe(daemon, known=bytes(16)).structure == structure.encoded
    (shown,) = status(address_of(daemon)).models[0].processes
    assert (shown.model_class, shown.environment) == (process.model_class, process.environment)


def test_a_class_with_a_name_that_does_not_fit_a_header(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    attach(type("é" + "x" * 260, (Tied,), {})(), daemon)
    attach(type("é", (Tied,), {})(), daemon)
    long, odd = (process.model_class for process in describe(daemon).processes)
    assert long == "..." + "x" * 253
    assert odd == f"{__name__}.\\xe9"


def test_of_models_that_nothing_serves(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    told = describe(daemon)
    assert (told.resident(), told.version, told.processes, told.limit) == (None, False, [], 8 << 30)
    assert len(told.transients()) == 0
    receipt = push(address_of(daemon), state(1), label="v1")
    told = describe(daemon)
    structure = told.resident()
    assert structure is not None
    assert set(structure.names) == set(state(1))
    assert (told.version, told.label, told.digest.hex()) == (True, "v1", receipt.digest)


def test_of_a_model_that_is_not_known(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(models={"one": "1GiB", "two": "1GiB"})
    with pytest.raises(shipd.UnknownModel, match=r"no model 'three' here.*\(models here: one, two\)"):
        describe(daemon, "three")


def test_what_the_configuration_says_of_it(attach: Attach, place: Path) -> None:
    said = {"model": shipd.ModelConfig(policy="subset", cast=True), "other": shipd.ModelConfig(policy="partial")}
    with shipd.Daemon(shipd.Config(listen="127.0.0.1:0", socket=str(place / "s"), models=said)) as daemon:
        with pytest.raises(shipd.UnknownModel, match=r"its configuration \(\[models.model\]\) has no max_bytes"):
            describe(daemon)
        resident = attach(Exact(0), daemon)
        told = describe(daemon)
        assert (told.policy, told.cast, told.limit) == ("subset", True, 0)
        resident.detach()
        with pytest.raises(shipd.UnknownModel):
            describe(daemon)


def test_what_a_daemon_says_of_itself(daemon: shipd.Daemon) -> None:
    lane = opened(daemon)
    assert lane.connection.peer.capabilities == ("describe", "partial")
    assert lane.connection.peer.environment == environment()
    lane.close()


def test_a_daemon_with_a_token_says_nothing_before_it_is_proved(start_daemon: StartDaemon, place: Path) -> None:
    (place / "token").write_text(TOKEN)
    daemon = start_daemon(token_file=str(place / "token"))
    lane = opened(daemon, TOKEN.encode())
    assert lane.connection.peer.capabilities == ("describe", "partial")
    assert lane.connection.peer.environment == {}
    lane.close()
    assert describe(daemon, token=TOKEN.encode()).environment == environment()


def test_unanswered_questions_are_bounded(daemon: shipd.Daemon) -> None:
    held = threading.Event()
    # Every worker is busy, as with large structures: no answer leaves before the fifth question has come.
    for _ in range(4):
        daemon.server._pool.submit(held.wait, 30)
    question: dict[str, Any] = {"model": "model"}
    try:
        with attacker(daemon.port) as peer:
            peer.greet()
            for _ in range(5):
                peer.send("Describe", question)
            assert peer.drain() == []
    finally:
        held.set()
    assert describe(daemon).model == "model"
    with attacker(daemon.port) as peer:
        peer.greet()
        for _ in range(20):
            peer.send("Describe", question)
            peer.expect("DescriptionIs")
    with attacker(daemon.port) as peer:
        peer.greet().send("Describe", question)
    until(lambda: not daemon.server._describer._unanswered, "nobody is owed an answer any more")
