"""What a push decides about bases and coding: by the link as it is known, and by what the receiver said. No sockets."""

import math
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shipd.bases.base import MAX_BASES
from shipd.client import incremental
from shipd.client.incremental import Incremental
from shipd.codecs import compiled, registry
from shipd.transfer.lane import Lane
from shipd.transfer.link_rate import LinkRate
from shipproto.agreement import Agreement
from shipproto.digests import LeafDigests
from shipproto.sender import Sender
from tests.support.bases import Version, model

MB = 1e6
VERSION = Version.of(model(100))
THERE = "there:7447"
FAST = 5000 * MB
"""More than any codec keeps up with."""

ALL = dict.fromkeys((codec.number for codec in registry.CODECS), 500)


@dataclass
class FakeLane:
    """A connection whose kernel says what the test wants."""

    measured: LinkRate | None = None
    peer: str = THERE
    local: bool = False

    def rate(self) -> LinkRate | None:
        return self.measured


@dataclass
class FakeBase:
    digest: bytes
    closed: int = 0

    def close(self) -> None:
        self.closed += 1


@dataclass
class FakeKeeper:
    """Knows versions by their digests alone, and keeps none: it answers, or raises, what it is told to."""

    known: tuple[bytes, ...] = ()
    answer: "str | Exception | None" = None
    asked: list[str] = field(default_factory=list)
    opened: list[Any] = field(default_factory=list)

    def digests(self, model: str, offered: object) -> tuple[bytes, ...]:
        self.asked.append(f"digests of {model}")
        return self.known

    def open(self, model: str, layout: object, digest: bytes) -> Any:
        if digest not in self.known:
            return None
        self.opened.append(FakeBase(digest))
        return self.opened[-1]

    def keep(self, model: str, digests: LeafDigests, read_chunk: object) -> str | None:
        self.asked.append(f"keep {model}")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def sender(**values: Any) -> Sender:
    """As much of one as is looked at: what it offers, and what the receiver has answered."""
    defaults = {
        "model": "m",
        "offered": VERSION.layout.structure,
        "layout": VERSION.layout,
        "digests": VERSION.digests,
        "incremental": True,
        "codecs": ALL,
        "bases": (),
        "base": b"",
    }
    values = {**defaults, **values}
    told = bool(values["base"]) and values["base"] not in values["bases"]
    return cast("Sender", SimpleNamespace(agreed=Agreement(values["base"], values["codecs"], told), **values))


def lane(**values: Any) -> Lane:
    return cast("Lane", FakeLane(**values))


def measured(rate: float, *, acknowledged: int = 1 << 20, at_least: bool = False) -> Lane:
    return lane(measured=LinkRate(rate, at_least, 0.01, acknowledged))


def push(*keepers: FakeKeeper, **options: Any) -> Incremental:
    return Incremental(keepers, keepers, **{"compile_above": 1 << 60, **options})


def pays(by: Incremental) -> bool:
    """A call, which mypy does not take for a value that stays."""
    return by.coding_pays


def kept(by: Incremental, of: Sender | None = None, rate: float = 0.0) -> None:
    by.keep(of or sender(), VERSION.chunk, rate)


def digests(count: int, first: int = 0) -> tuple[bytes, ...]:
    return tuple(bytes((first + at,)) * 16 for at in range(count))


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is known of links; nothing, at first."""
    known: dict[str, float] = {}
    monkeypatch.setattr(incremental, "_rates", known)
    return known


# --- the link --------------------------------------------------------------------------------------------------------


def test_a_link_of_which_nothing_is_known_is_taken_to_be_thin(rates):
    by = push()
    by.offers(lane(), sender())
    assert by.link(lane()) == 20 * MB
    assert not rates


def test_what_a_link_has_shown_counts_once_enough_has_arrived(rates):
    by = push()
    by.offers(lane(), sender())
    # It may all have passed in one burst; that the link is slow needs no proof.
    assert by.link(measured(FAST, acknowledged=1000)) == 20 * MB
    assert by.link(measured(MB, acknowledged=1000)) == MB
    # There was not more to send.
    assert by.link(measured(FAST, at_least=True)) == 20 * MB
    assert by.link(measured(MB, at_least=True)) == MB
    assert not rates
    assert by.link(measured(FAST)) == FAST
    assert rates == {THERE: FAST}
    assert by.link(measured(2 * MB)) == 2 * MB
    assert rates == {THERE: 2 * MB}


def test_the_next_push_begins_with_what_the_last_one_reached(rates):
    push_before = push()
    push_before.offers(lane(), sender())
    push_before.link(measured(300 * MB))
    by = push()
    by.offers(lane(), sender())
    assert by.link(lane()) == 300 * MB
    assert by.link(measured(FAST, acknowledged=1000)) == 300 * MB
    assert by.link(measured(MB, at_least=True)) == 300 * MB, "there was little to send, so that is no news"
    other = push()
    other.offers(lane(peer="elsewhere:7447"), sender())
    assert other.link(lane()) == 20 * MB
    assert set(rates) == {THERE}


@pytest.mark.parametrize("known", [None, 100 * MB])
def test_no_link_is_faster_than_the_limit(rates, known):
    if known:
        rates[THERE] = known
    by = push(limit=3 * MB)
    by.offers(lane(), sender())
    assert by.link(lane()) == 3 * MB
    assert by.link(measured(FAST)) == 3 * MB
    assert by.link(measured(MB)) == MB
    assert by.link(measured(FAST, acknowledged=0)) in (MB, 3 * MB)


def test_what_a_limit_lets_through_is_not_taken_for_the_link(rates):
    by = push(limit=3 * MB)
    by.offers(lane(), sender())
    by.link(measured(2.9 * MB))
    kept(by, rate=2.9 * MB)
    assert not rates, "a push without the limit would begin as if the link were that slow"
    by.link(measured(MB))
    assert rates == {THERE: MB}


# --- what is offered -------------------------------------------------------------------------------------------------


def test_bases_of_all_are_offered_once_each_the_likeliest_first():
    one, other = FakeKeeper(digests(3)), FakeKeeper(digests(3, first=2))
    assert push(one, other).offers(lane(), sender()) == digests(5)
    assert one.asked == ["digests of m"]


def test_no_more_are_offered_than_an_offer_can_hold():
    one, other = FakeKeeper(digests(6)), FakeKeeper(digests(6, first=4))
    assert push(one, other).offers(lane(), sender()) == digests(MAX_BASES)


def test_none_are_offered_where_no_delta_would_be_made(rates):
    keeper = FakeKeeper(digests(2))
    assert push(keeper).offers(lane(local=True), sender()) == ()
    rates[THERE] = FAST
    assert push(keeper).offers(lane(), sender()) == ()
    assert keeper.asked == [], "it may have to read gigabytes to tell"
    assert push(keeper, prefer="bytes").offers(lane(local=True), sender()) == digests(2)
    assert push(keeper, limit=MB).offers(lane(local=True), sender()) == digests(2)
    assert push(keeper, limit=MB).offers(lane(), sender()) == digests(2)


@pytest.mark.parametrize(("above", "compiles"), [(0, True), (99, True), (100, False)])
def test_loops_are_compiled_beside_the_push_of_a_model_that_is_worth_it(monkeypatch, above, compiles):
    """The model has 100 bytes."""
    called = threading.Event()
    monkeypatch.setattr(compiled, "warm_up", called.set)
    push(FakeKeeper(), compile_above=above).offers(lane(), sender())
    assert not any(thread.name == "shipd compiler" for thread in threading.enumerate()), "there is no base"
    assert not called.is_set()
    push(FakeKeeper(digests(1)), compile_above=above).offers(lane(), sender())
    if compiles:
        assert called.wait(20)
    else:
        assert not any(thread.name == "shipd compiler" for thread in threading.enumerate())
        assert not called.is_set()


# --- once the receiver has answered ----------------------------------------------------------------------------------


def test_coding_begins_with_the_base_that_both_have():
    one, other = FakeKeeper(digests(1)), FakeKeeper(digests(2))
    by = push(one, other)
    answered = sender(bases=digests(2), base=digests(2)[1])
    by.offers(lane(), answered)
    assert by.begin(answered, 3)
    assert pays(by)
    assert by.base is other.opened[0]
    assert one.opened == []
    assert by.chooser is not None
    assert by.chooser.encoders == 3
    # Another connection: what was open is closed, and what was chosen is not forgotten.
    by.chooser.choose(1000, (), link=math.inf, density=None, runs=1)
    assert by.begin(answered, 1)
    assert [base.closed for base in other.opened] == [1, 0]
    assert len(by.chooser.taken) == 1
    by.end()
    by.end()
    assert [base.closed for base in other.opened] == [1, 1]
    assert by.base is None


@pytest.mark.parametrize("base", [b"", b"x" * 16])
def test_without_a_common_base_what_needs_none_is_coded(base):
    """The receiver has no version, or one that was not offered."""
    keeper = FakeKeeper((*digests(1), b"x" * 16))
    by = push(keeper)
    by.offers(lane(), sender())
    assert by.begin(sender(bases=digests(1), base=base), 1)
    assert by.base is None
    assert keeper.opened == []


def test_a_base_that_is_gone_by_then_is_done_without():
    by = push(FakeKeeper())
    by.offers(lane(), sender())
    assert by.begin(sender(bases=digests(1), base=digests(1)[0]), 1)
    assert by.base is None


def test_speeds_come_from_the_receiver_where_it_has_any():
    by = push()
    by.offers(lane(), sender())
    by.begin(sender(codecs={2: 123, 4: 0}), 1)
    assert by.chooser is not None
    assert by.chooser.decoding == {2: 123 * MB, 4: 500 * MB}


@pytest.mark.parametrize(
    ("options", "local", "answered", "begins"),
    [
        ({}, False, {}, True),
        ({}, False, {"codecs": {}}, False),
        ({}, False, {"incremental": False}, False),
        ({}, True, {}, False),
        ({"limit": MB}, True, {}, True),
        ({"prefer": "bytes"}, True, {}, True),
        ({"prefer": "bytes"}, True, {"codecs": {}}, False),
    ],
)
def test_whether_anything_is_coded(options, local, answered, begins):
    by = push(**options)
    by.offers(lane(local=local), sender())
    assert by.begin(sender(**answered), 1) is begins
    assert pays(by) is begins


def test_a_receiver_that_no_longer_takes_coded_runs_gets_none():
    keeper = FakeKeeper(digests(1))
    by = push(keeper)
    by.offers(lane(), sender())
    assert by.begin(sender(bases=digests(1), base=digests(1)[0]), 1)
    assert not by.begin(sender(codecs={}), 1)
    assert not pays(by)
    assert by.base is None
    assert [base.closed for base in keeper.opened] == [1]


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_where_time_counts_coding_ends_and_comes_back_with_the_rate(rates):
    by = push()
    by.offers(lane(), sender())
    by.begin(sender(), 1)
    assert by.plain(math.inf), "nothing more is encoded"
    assert not pays(by)
    by.reconsider(FAST)
    assert not pays(by)
    assert rates[THERE] == FAST
    by.reconsider(5 * MB)
    assert pays(by)
    assert rates[THERE] == 5 * MB
    by.reconsider(FAST)
    assert not pays(by)


def test_where_bytes_count_coding_goes_on_after_a_run_that_is_best_as_it_is():
    by = push(prefer="bytes")
    by.offers(lane(), sender())
    by.begin(sender(), 1)
    assert not by.plain(math.inf)
    assert pays(by)


def test_it_is_the_receivers_speed_that_is_reconsidered():
    by = push()
    by.offers(lane(), sender())
    by.begin(sender(codecs=dict.fromkeys(ALL, 1)), 1)
    by.plain(math.inf)
    # At 1 MB/s of decoding nothing is worth being coded for a link of 5 MB/s.
    by.reconsider(5 * MB)
    assert not pays(by)
    by.reconsider(0.1 * MB)
    assert pays(by)


def test_nothing_is_reconsidered_where_nothing_can_be_coded(rates):
    by = push()
    by.offers(lane(), sender())
    by.reconsider(MB)
    assert not pays(by)
    by.begin(sender(codecs={}), 1)
    by.reconsider(MB)
    assert not pays(by)
    assert not rates


def test_another_connection_begins_with_coding_again():
    by = push()
    by.offers(lane(), sender())
    by.begin(sender(), 1)
    by.plain(math.inf)
    assert by.begin(sender(), 1)
    assert pays(by)


# --- afterwards ------------------------------------------------------------------------------------------------------


def test_what_was_committed_is_kept_by_all():
    keepers = FakeKeeper(), FakeKeeper()
    by = push(*keepers)
    by.offers(lane(), sender())
    kept(by)
    assert [keeper.asked[-1] for keeper in keepers] == ["keep m", "keep m"]
    assert by.kept == []
    assert by.keep_seconds > 0


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("the disk is full", "the disk is full"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (ValueError("a bug"), "ValueError: a bug"),
    ],
)
def test_a_keeper_that_fails_is_named_and_stops_no_other(answer, why):
    """Found here: one that raised made a failure of a push that was committed."""
    keepers = FakeKeeper(answer=answer), FakeKeeper()
    by = push(*keepers)
    by.offers(lane(), sender())
    kept(by)
    assert by.kept == [why]
    assert keepers[1].asked[-1] == "keep m"


@pytest.mark.parametrize(
    ("known", "local", "options", "keeps"),
    [
        (None, False, {}, True),
        (5 * MB, False, {}, True),
        (FAST, False, {}, False),
        (FAST, False, {"limit": 5 * MB}, True),
        (FAST, False, {"limit": FAST}, False),
        (FAST, False, {"prefer": "bytes"}, True),
        (None, True, {}, False),
        (None, True, {"limit": 5 * MB}, True),
        (None, True, {"prefer": "bytes"}, True),
    ],
)
def test_a_version_is_kept_only_where_a_delta_will_be_made_of_it(rates, known, local, options, keeps):
    if known:
        rates[THERE] = known
    keeper = FakeKeeper()
    by = push(keeper, **options)
    by.offers(lane(local=local), sender())
    keeper.asked.clear()
    kept(by)
    assert keeper.asked == (["keep m"] if keeps else [])


def test_a_version_of_which_not_everything_was_read_is_not_kept():
    keeper = FakeKeeper()
    by = push(keeper)
    by.offers(lane(), sender())
    kept(by, sender(digests=LeafDigests(VERSION.layout)))
    assert "keep m" not in keeper.asked
    assert by.kept == []


def test_the_rate_of_the_whole_push_counts_where_the_kernel_has_told_none(rates):
    by = push(FakeKeeper())
    by.offers(lane(), sender())
    kept(by, rate=0.0)
    assert not rates
    kept(by, rate=FAST)
    assert rates == {THERE: FAST}
    kept(by, rate=MB)
    assert rates == {THERE: FAST}, "what is known already is better than that"


def test_a_named_base_that_is_another_version_in_the_structure_that_rules_is_told_of():
    named = FakeKeeper(digests(1))
    by = Incremental((named,), named=named, prefer="bytes")
    offer = by.offers(lane(), sender())
    ruling = Version.of(model(90)).layout
    by.begin(sender(bases=offer, base=digests(1, first=7)[0], layout=ruling), 1)
    assert by.unused == "it is not the version that the daemon has"


@pytest.mark.parametrize(
    ("options", "link", "pays"),
    [({}, FAST, False), ({}, MB, True), ({"prefer": "bytes"}, FAST, True), ({"limit": MB}, FAST, True)],
    ids=["fast", "slow", "bytes", "limited"],
)
def test_over_a_link_that_is_known_to_be_fast_nothing_is_read_for_an_encoder(rates, options, link, pays):
    rates[THERE] = link
    by = push(**options)
    by.offers(lane(), sender())
    assert by.begin(sender(), 1), "should it turn out to be slow after all"
    assert by.coding_pays is pays
    by.reconsider(MB)
    assert by.coding_pays
