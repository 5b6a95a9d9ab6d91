"""What is remembered of pushes, processes and connections when they are over."""

import os
import time
from types import SimpleNamespace

import pytest

from shipd.service.models import Model
from shipd.service.tally import OUTCOMES, Tally
from shipproto.errors import AbortCode, AuthFailed, BadPrelude, ForeignPeer, MalformedMessage, TransferError
from shipproto.messages import Committed

NOBODY = 2**22 + 1
"""No process has this number: it is above the largest that Linux gives."""


@pytest.fixture
def models():
    return {name: Model(name) for name in ("one", "two")}


@pytest.fixture
def tally(models):
    return Tally(models)


def push(model, *, outcome=None, error=None, stage=None, size=100, damaged=0):
    """A push that is over, as far as it is looked at."""
    receiver = SimpleNamespace(outcome=outcome, error=error, payload_bytes=size, chunks_damaged=damaged)
    began = time.monotonic() - 0.3
    return SimpleNamespace(model=model, receiver=receiver, began=began, stage_seconds=stage, decoded_bytes=3 * size)


def committed(**fields):
    return Committed(digest=bytes(16), label="v1", transfer=bytes(16), **fields)


def peer(*, error=None, established=True, received=1000, resent=0):
    return SimpleNamespace(
        error=error,
        connection=SimpleNamespace(established=established, bytes_received=received, frames_resent=resent),
    )


def test_a_commit(tally, models):
    tally.finished(push(models["one"], outcome=committed(pause_seconds=0.004), stage=0.02, damaged=2))
    one = tally.of("one")
    assert one.outcomes == {"committed": 1}
    assert (one.payload_bytes, one.frames_damaged) == (100, 2)
    assert one.transfer_seconds.count == one.stage_seconds.count == one.pause_seconds.count == 1
    assert 0.25 < one.transfer_seconds.sum < 30
    assert (one.stage_seconds.sum, one.pause_seconds.sum) == (0.02, 0.004)


def test_what_was_current_already_takes_no_time(tally, models):
    tally.finished(push(models["one"], outcome=committed(already=True), size=0))
    assert tally.of("one").outcomes == {"already": 1}
    assert tally.of("one").transfer_seconds.count == 0


def test_a_failure_is_counted_by_its_code_and_its_staging_all_the_same(tally, models):
    tally.finished(push(models["one"], error=TransferError(AbortCode.SWAP_FAILED, "x"), stage=0.5))
    one = tally.of("one")
    assert one.outcomes == {"swap-failed": 1}
    assert (one.transfer_seconds.count, one.stage_seconds.count, one.pause_seconds.count) == (0, 1, 0)
    assert one.payload_bytes == 100, "the bytes have travelled"


def test_every_code_is_an_outcome():
    assert len(set(OUTCOMES)) == len(OUTCOMES) == len(AbortCode) + 2


def test_made_up_names_share_the_remainder(tally):
    for number in range(1000):
        tally.refused(f"made-up-{number}", TransferError(AbortCode.UNKNOWN_MODEL, "x"))
    assert [name for name, _ in tally.each()] == ["one", "two", ""]
    assert tally.rest.outcomes == {"unknown-model": 1000}


def test_the_remainder_is_not_shown_before_there_is_one(tally):
    assert [name for name, _ in tally.each()] == ["one", "two"]


def test_sums_do_not_fall_when_a_model_goes(tally, models):
    for name in ("one", "two"):
        tally.finished(push(models[name], outcome=committed(pause_seconds=0.1), stage=1.0, damaged=1))
    del models["one"]
    assert [name for name, _ in tally.each()] == ["two", ""]
    assert tally.rest.outcomes == {"committed": 1}
    assert (tally.rest.payload_bytes, tally.rest.frames_damaged) == (100, 1)
    assert tally.rest.pause_seconds.count == tally.rest.stage_seconds.count == tally.rest.transfer_seconds.count == 1
    models["one"] = Model("one")
    assert tally.of("one").outcomes == {}, "another model of that name begins anew"


def test_models_that_come_and_go_leave_no_books(tally, models):
    """Also where nobody ever asks for metrics."""
    for number in range(100):
        name = f"passing-{number}"
        models[name] = Model(name)
        tally.finished(push(models[name], outcome=committed()))
        del models[name]
    assert len(tally._tallies) == 1
    assert [name for name, _ in tally.each()] == ["one", "two", ""]
    assert tally.rest.outcomes == {"committed": 100}


def test_stale_until_seen_again_or_dead(tally, models):
    one = models["one"]
    mine, parent = os.getpid(), os.getppid()
    tally.finished(push(one, outcome=committed(stale=(str(mine), str(parent), str(NOBODY)))))
    assert tally.of("one").stale(one) == 2, "one of them does not live"
    one.sessions.append(SimpleNamespace(pid=mine, lost=True))
    assert tally.of("one").stale(one) == 2, "its session is about to end: it is not back, nor counted twice"
    one.sessions[:] = [SimpleNamespace(pid=mine, lost=False)]
    assert tally.of("one").stale(one) == 1
    one.sessions.clear()
    assert tally.of("one").stale(one) == 1, "whoever came back is not stale for leaving"


def test_an_eviction(tally):
    session = SimpleNamespace(model="one", pid=os.getpid(), evicted=True)
    tally.lost(peer(), session)
    tally.lost(peer(), SimpleNamespace(model="one", pid=os.getpid(), evicted=False))
    assert tally.of("one").evictions == 1
    assert tally.of("one").given_up == {os.getpid()}


@pytest.mark.parametrize(
    ("error", "established", "reason"),
    [
        (ForeignPeer("x", b"GET"), False, "foreign"),
        (AuthFailed("x"), False, "auth"),
        (BadPrelude("x"), True, "damaged"),
        (MalformedMessage("x"), True, "protocol"),
        (None, False, "no-handshake"),
        (None, True, None),
    ],
)
def test_why_a_connection_ended(tally, error, established, reason):
    tally.lost(peer(error=error, established=established, received=7, resent=3), None)
    closed = tally.connections["tcp"]
    assert closed.failures == ({} if reason is None else {reason: 1})
    assert (closed.closed, closed.bytes_received, closed.frames_resent) == (1, 7, 3)
