"""Faults while coded runs travel: damage, lost connections, and bases that one of the two sides has no more."""

import random
import threading

import pytest

import shipd
import shipd.client.encoding
import shipd.service.decoding
from shipd.bases.store import kept_versions
from tests.support import naive
from tests.support.checkpoints import LEAF, as_state_dict, assert_installed, write_safetensors
from tests.support.fake_daemon import FakeDaemon, after_hello
from tests.support.frames import CODED, DATA, HELD, NACK, OFFER, WANT, Way
from tests.support.processes import Background, address_of, push, status
from tests.support.proxy import Proxy, until
from tests.support.successive import changed_in, first, following, push_small, used

pytest_plugins = ["tests.support.successive", "tests.support.upgrades"]

pytestmark = pytest.mark.usefixtures("fresh_bases", "short_backoff", "short_goodbye")

V0 = first(24)
V1 = following(V0, learning_rate=3e-4)
"""Far enough from V0 that it takes a dozen runs."""
V2 = following(V1, seed=2)
FIRST = min(row.name for row in V0.rows)


@pytest.fixture
def daemon(start_daemon):
    """A daemon that has V0, which was pushed from here."""
    daemon = start_daemon()
    push_small(address_of(daemon), as_state_dict(V0), label="v0")
    return daemon


def chunks_of(frame):
    """The chunks of a run."""
    fields = naive.unpack(frame.header)
    return range(fields["chunk"], fields["chunk"] + fields["chunks"])


def test_it_takes_runs_enough(daemon, proxy):
    """Else nothing here would happen halfway."""
    receipt = push_small(proxy.address, as_state_dict(V1), label="v1")
    assert 8 <= proxy.count(CODED) < V1.chunks
    assert not proxy.count(DATA)
    assert receipt.base == V0.digest
    assert_installed(daemon, V1, label="v1")


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [0, 3, 7])
@pytest.mark.parametrize("part", ["payload", "header"])
def test_one_flipped_bit_costs_exactly_one_run(daemon, proxy, part, nth):
    proxy.flip(part, kind=CODED, nth=nth)
    receipt = push_small(proxy.address, as_state_dict(V1), label="v1")
    assert receipt.frames_resent == 1
    assert proxy.count(NACK, Way.TO_SENDER) == 1
    damaged = chunks_of(proxy.seen(CODED)[nth])
    assert [naive.unpack(frame.header)["chunk"] for frame in proxy.seen(DATA)] == list(damaged), "as they are"
    assert proxy.connections == 1
    assert receipt.bytes_sent < V1.nbytes
    assert_installed(daemon, V1, label="v1")


def test_a_damaged_run_of_what_is_the_same_comes_as_it_is(daemon, proxy):
    """Found here: it came as a run again."""
    proxy.flip("header", kind=CODED, nth=0)
    receipt = push_small(proxy.address, as_state_dict(V0), label="the-same")
    assert receipt.frames_resent == 1
    (same, *others) = proxy.seen(CODED)
    assert {naive.unpack(frame.header)["codec"] for frame in (same, *others)} == {1}
    assert proxy.count(DATA) == len(chunks_of(same))
    assert_installed(daemon, V0, label="the-same")


def test_a_flipped_prelude_costs_the_connection_and_no_run_that_is_held(daemon, proxy):
    proxy.flip("prelude", kind=CODED, nth=4)
    receipt = push_small(proxy.address, as_state_dict(V1), label="v1")
    assert proxy.connections == 2
    assert receipt.frames_resent == 0
    before = {chunk for frame in proxy.seen(CODED, connection=0)[:4] for chunk in chunks_of(frame)}
    after = {chunk for frame in proxy.seen(CODED, connection=1) for chunk in chunks_of(frame)}
    assert not before & after, "only what was missing travels again"
    assert not proxy.count(DATA)
    assert_installed(daemon, V1, label="v1")


def test_a_run_that_is_damaged_and_whose_chunk_is_damaged_again(daemon, proxy):
    proxy.flip("payload", kind=CODED, nth=2)
    rule = proxy.flip("payload", kind=DATA, nth=0, every=True, times=3)
    receipt = push_small(proxy.address, as_state_dict(V1), label="v1")
    assert rule.applied == 3
    assert receipt.frames_resent == 4
    assert_installed(daemon, V1, label="v1")


def test_a_chunk_that_is_damaged_every_time_ends_the_push(daemon, proxy):
    proxy.flip("payload", kind=CODED, nth=2)
    proxy.flip("payload", kind=DATA, nth=0, every=True)
    with pytest.raises(shipd.IntegrityError, match="damaged 5 times"):
        push_small(proxy.address, as_state_dict(V1), label="v1")
    assert_installed(daemon, V0, label="v0")
    push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert_installed(daemon, V1, label="v1")


@pytest.mark.parametrize("kind", [HELD, WANT])
@pytest.mark.parametrize("part", ["payload", "header", "prelude"])
def test_damage_to_what_the_daemon_says_it_holds(daemon, proxy, kind, part):
    kept_versions.clear()
    after = changed_in(V0, {FIRST: [3]})
    proxy.flip(part, kind=kind, way=Way.TO_SENDER)
    receipt = push(proxy.address, as_state_dict(after), label="new")
    assert proxy.connections == (2 if part == "prelude" else 1)
    assert receipt.digest == after.digest
    assert_installed(daemon, after, label="new")


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("fault", ["drop", "duplicate"])
def test_lost_or_doubled_bytes_cost_the_connection(daemon, proxy, fault, count):
    getattr(proxy, fault)(count, kind=CODED, nth=3)
    push_small(proxy.address, as_state_dict(V1), label="v1")
    assert proxy.connections == 2
    assert_installed(daemon, V1, label="v1")


# --- connections that end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_cut_halfway_is_gone_on_from(daemon, proxy, how, keep):
    proxy.cut(kind=CODED, nth=5, keep=keep, how=how)
    receipt = push_small(proxy.address, as_state_dict(V1), label="v1")
    assert proxy.connections == 2
    assert not proxy.count(DATA)
    assert receipt.base == V0.digest
    if how == "fin":
        before = {chunk for frame in proxy.seen(CODED, connection=0)[:5] for chunk in chunks_of(frame)}
        after = {chunk for frame in proxy.seen(CODED, connection=1) for chunk in chunks_of(frame)}
        assert not before & after
    assert_installed(daemon, V1, label="v1")


def test_cut_again_and_again(daemon, proxy):
    for connection in range(4):
        proxy.cut(kind=CODED, nth=2, connection=connection)
    receipt = push_small(proxy.address, as_state_dict(V1), label="v1")
    assert proxy.connections == 5
    assert receipt.digest == V1.digest
    assert_installed(daemon, V1, label="v1")


def test_cut_while_it_is_decoded(daemon, proxy, monkeypatch):
    """The runs that were being decoded are held when the sender is back, or are decoded while it sends the others."""
    decode = shipd.service.decoding.Target.decode
    go_on, decoding = threading.Event(), threading.Event()

    def slowly(self, run, base):
        decoding.set()
        assert go_on.wait(20)
        return decode(self, run, base)

    monkeypatch.setattr("shipd.service.decoding.Target.decode", slowly)
    cut = proxy.cut(kind=CODED, nth=3)
    with Background(push_small, proxy.address, as_state_dict(V1), label="v1") as pushing:
        cut.wait()
        assert decoding.wait(20)
        proxy.wait_until_frames(2, kind=WANT, way=Way.TO_SENDER)
        go_on.set()
        receipt = pushing.result()
    before = {chunk for frame in proxy.seen(CODED, connection=0)[:3] for chunk in chunks_of(frame)}
    again = {chunk for frame in proxy.seen(CODED, connection=1) for chunk in chunks_of(frame)}
    assert len(again) < V1.chunks
    assert before | again == set(range(V1.chunks))
    assert receipt.digest == V1.digest
    assert_installed(daemon, V1, label="v1")


@pytest.mark.parametrize("seed", range(8))
def test_random_damage(daemon, proxy, seed):
    dice = random.Random(seed)
    for _ in range(dice.randint(2, 4)):
        fault = dice.choice(("header", "payload", "prelude", "cut", "duplicate"))
        nth = dice.randrange(10)
        if fault == "cut":
            proxy.cut(kind=CODED, nth=nth, keep=dice.random(), how=dice.choice(("fin", "rst")))
        elif fault == "duplicate":
            proxy.duplicate(dice.randint(1, 40), kind=CODED, nth=nth)
        else:
            proxy.flip(fault, kind=CODED, nth=nth)
    receipt = push_small(proxy.address, as_state_dict(V1), label="v1", stall=10)
    assert receipt.digest == V1.digest
    assert_installed(daemon, V1, label="v1")


# --- bases that are gone, or are others ------------------------------------------------------------------------------


def test_a_daemon_that_is_restarted_halfway_has_no_base(start_shipd):
    here = start_shipd()
    push_small(here.address, as_state_dict(V0), label="v0")
    with Proxy(here.port) as proxy:
        held = proxy.hold(kind=CODED, nth=5)
        with Background(push_small, proxy.address, as_state_dict(V1), label="v1") as pushing:
            held.wait()
            proxy.refuse()
            here.kill()
            proxy.forget_rules()
            there = start_shipd(directory=here.directory)
            proxy.upstream = there.port
            proxy.accept()
            receipt = pushing.result()
    assert "xph" in used(receipt)
    assert receipt.bytes_sent > V1.nbytes * 0.6
    (model,) = status(there.address).models
    assert (model.label, model.digest) == ("v1", V1.digest)
    # It is a base from now on.
    receipt = push_small(there.address, as_state_dict(V2), label="v2")
    assert receipt.base == V1.digest
    assert receipt.bytes_sent < V2.nbytes / 300


def test_a_sender_that_is_restarted_has_no_base(daemon):
    kept_versions.clear()
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert set(used(receipt)) == {"xph"}, "all of it has changed"
    assert_installed(daemon, V1, label="v1")


def test_a_base_that_is_dropped_while_it_is_used(daemon, proxy, monkeypatch):
    """What was encoded by then is used; the rest goes on without."""
    # As many frames as are held back in the proxy and the kernel must not be all there are.
    monkeypatch.setattr(shipd.client.encoding, "_WAITING", 1)
    monkeypatch.setattr(kept_versions, "limit", kept_versions.limit)
    version = following(first(64, seed=3), learning_rate=1e-3)
    base = first(64, seed=3)
    push_small(address_of(daemon), as_state_dict(base), label="base")
    held = proxy.hold(kind=CODED, nth=0)
    with Background(push_small, proxy.address, as_state_dict(version), label="new") as pushing:
        held.wait()
        kept_versions.limit = 0
        held.release()
        receipt = pushing.result()
    assert receipt.not_kept, "nothing is kept any more"
    deltas = {"egr", "gz", "duh"} & set(used(receipt))
    assert deltas, "what was encoded before is used"
    assert "xph" in used(receipt), "the rest goes on without a base"
    assert proxy.connections == 1
    assert_installed(daemon, version, label="new")


def test_another_sender_has_moved_the_daemon_on(daemon):
    other = following(V1, seed=9)
    push(address_of(daemon), as_state_dict(other), label="other")
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert "egr" not in used(receipt)
    assert_installed(daemon, V1, label="v1")


def test_another_sender_has_moved_the_daemon_on_and_back(daemon):
    push(address_of(daemon), as_state_dict(V2), label="other")
    push(address_of(daemon), as_state_dict(V0), label="back")
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert receipt.base == V0.digest
    assert_installed(daemon, V1, label="v1")


def test_another_sender_moves_the_daemon_on_while_this_one_is_away(daemon, proxy):
    """The push that was under way is superseded, and says so."""
    held = proxy.hold(kind=CODED, nth=3)
    with Background(push_small, proxy.address, as_state_dict(V1), label="v1") as pushing:
        held.wait()
        proxy.refuse()
        proxy.sever_all()
        incoming = daemon.server.models["model"].incoming
        until(lambda: not incoming.receiver.attended, "the daemon sees that the sender is gone")
        push(address_of(daemon), as_state_dict(V2), label="other")
        proxy.forget_rules()
        proxy.accept()
        assert isinstance(pushing.error(20), shipd.Superseded)
    assert_installed(daemon, V2, label="other")
    push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert_installed(daemon, V1, label="v1")


def _overwrite(path, version):
    """In place, as no careful trainer does."""
    other = write_safetensors(path.with_name("other"), version)
    path.write_bytes(other.read_bytes())


def test_a_base_file_that_is_written_to_before_it_is_used(daemon, proxy, tmp_path):
    kept_versions.clear()
    path = write_safetensors(tmp_path / "base", V0)
    held = proxy.hold(kind=WANT, way=Way.TO_SENDER)
    with Background(push_small, proxy.address, as_state_dict(V1), label="v1", base=path) as pushing:
        held.wait()
        _overwrite(path, V1)
        held.release()
        receipt = pushing.result()
    assert "same" not in used(receipt), "that it has changed is seen"
    assert_installed(daemon, V1, label="v1")


def test_a_base_file_that_is_written_to_while_it_is_used(daemon, proxy, tmp_path, monkeypatch):
    """What is the same there now is not what the daemon has: the digests show it, and the tensors come again."""
    monkeypatch.setattr(shipd.client.encoding, "_WAITING", 1)
    kept_versions.clear()
    path = write_safetensors(tmp_path / "base", V0)
    held = proxy.hold(kind=CODED, nth=0)
    with Background(push_small, proxy.address, as_state_dict(V1), label="v1", base=path) as pushing:
        held.wait()
        _overwrite(path, V1)
        held.release()
        receipt = pushing.result()
    assert "same" in used(receipt)
    assert proxy.count(WANT, Way.TO_SENDER) == 2, "they were asked for again"
    assert receipt.base == V0.digest
    assert_installed(daemon, V1, label="v1")


def test_a_base_file_that_is_cut_short_meanwhile(daemon, proxy, tmp_path):
    kept_versions.clear()
    path = write_safetensors(tmp_path / "base", V0)
    held = proxy.hold(kind=WANT, way=Way.TO_SENDER)
    with Background(push_small, proxy.address, as_state_dict(V1), label="v1", base=path) as pushing:
        held.wait()
        with path.open("r+b") as file:
            file.truncate(1000)
        held.release()
        receipt = pushing.result()
    assert receipt.digest == V1.digest
    assert_installed(daemon, V1, label="v1")


def test_a_base_whose_tensors_change_meanwhile(daemon, proxy):
    kept_versions.clear()
    base = as_state_dict(V0)
    held = proxy.hold(kind=CODED, nth=0)
    with Background(push_small, proxy.address, as_state_dict(V1), label="v1", base=base) as pushing:
        held.wait()
        for tensor in base.values():
            tensor.zero_()
        held.release()
        receipt = pushing.result()
    assert receipt.digest == V1.digest
    assert_installed(daemon, V1, label="v1")


def test_tensors_that_change_while_they_are_encoded(daemon, proxy):
    state = as_state_dict(V1)
    held = proxy.hold(kind=CODED, nth=0)
    with Background(push_small, proxy.address, state, label="v1") as pushing:
        held.wait()
        state[FIRST].add_(1)
        held.release()
        assert isinstance(pushing.error(20), shipd.TensorChanged)
    assert_installed(daemon, V0, label="v0")
    # What the sender has of V0 is still V0.
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert receipt.base == V0.digest
    assert_installed(daemon, V1, label="v1")


def test_tensors_that_change_before_they_are_kept(daemon, monkeypatch):
    """Committed is what was sent; what is there now is not it, and is no base."""
    state = as_state_dict(V1)
    keep = kept_versions.keep

    def late(model, digests, read_chunk):
        state[FIRST].add_(1)
        return keep(model, digests, read_chunk)

    monkeypatch.setattr(kept_versions, "keep", late)
    receipt = push_small(address_of(daemon), state, label="v1")
    assert receipt.digest == V1.digest
    assert len(receipt.not_kept) == 1
    assert "changed" in receipt.not_kept[0]
    assert_installed(daemon, V1, label="v1")
    monkeypatch.undo()
    receipt = push_small(address_of(daemon), as_state_dict(V2), label="v2")
    assert "egr" not in used(receipt)
    assert_installed(daemon, V2, label="v2")


def test_a_push_that_fails_leaves_the_base_that_there_was(daemon, proxy):
    proxy.flip("payload", kind=CODED, nth=0)
    proxy.flip("payload", kind=DATA, nth=0, every=True)
    with pytest.raises(shipd.IntegrityError):
        push_small(proxy.address, as_state_dict(V1), label="v1")
    receipt = push_small(address_of(daemon), as_state_dict(V2), label="v2")
    assert receipt.base == V0.digest
    assert_installed(daemon, V2, label="v2")


# --- daemons that know less ------------------------------------------------------------------------------------------


def test_a_daemon_that_wants_nothing_incremental(start_daemon):
    daemon = start_daemon(incremental=False)
    for at, version in enumerate((V0, V1)):
        with Proxy(daemon.port) as proxy:
            receipt = push_small(proxy.address, as_state_dict(version), label=f"v{at}")
            assert proxy.count(DATA) == version.chunks
            assert proxy.count(CODED) == proxy.count(HELD, Way.TO_SENDER) == 0
        assert receipt.codecs == ()
    assert_installed(daemon, V1, label="v1")


def test_old_senders_say_nothing_of_bases(daemon):
    """Pushes without a base say what senders said before there were bases."""
    with Proxy(daemon.port) as proxy:
        push(proxy.address, as_state_dict(V1), label="v1", base=False)
        (offered,) = proxy.seen(OFFER)
        assert not {"bases", "incremental"} & set(naive.unpack(offered.header))
        assert proxy.count(DATA) == V1.chunks
    assert_installed(daemon, V1, label="v1")


def _old_daemon(peer, offered):
    """Takes an OFFER as a daemon did that had never heard of bases, and refuses the push once it has read a chunk."""
    structure = {"structure": offered["structure"], "transfer": offered["transfer"]}
    peer.send("Want", structure, bytes(4) + V1.chunks.to_bytes(4, "little"))
    first_frame = peer.expect("Data")
    assert len(first_frame.payload) == LEAF
    peer.send("Abort", {"code": "busy", "transfer": offered["transfer"]}, b"")


def test_a_daemon_that_has_never_heard_of_bases(daemon):
    assert kept_versions.memory_used, "there is something to offer"
    with FakeDaemon(after_hello(_old_daemon)) as old, pytest.raises(shipd.Busy):
        push_small(old.address, as_state_dict(V1), label="v1")


LYING_WANTS: dict[str, dict[str, object]] = {
    "a base that was not offered": {"base": bytes(range(16)), "codecs": [1, 4]},
    "a codec of no number": {"codecs": [0]},
    "too many codecs": {"codecs": list(range(1, 40)), "speeds": [0] * 39},
    "codecs out of order": {"codecs": [4, 2], "speeds": [0, 0]},
    "fewer speeds than codecs": {"codecs": [1, 4], "speeds": [7]},
    "half a base": {"base": bytes(8)},
}


@pytest.mark.parametrize("lie", LYING_WANTS)
def test_daemons_that_lie_about_what_they_decode(daemon, lie):
    """Whatever they say, the push ends in a typed error, or in chunks that they can make what they like of."""
    seen: list[str] = []

    def answer(peer, offered):
        fields = {"structure": offered["structure"], "transfer": offered["transfer"], **LYING_WANTS[lie]}
        peer.send("Want", fields, bytes(4) + V1.chunks.to_bytes(4, "little"))
        while (found := peer.receive()) is not None and len(seen) < 3:
            seen.append(found.name)
            if found.name in ("Data", "Coded"):
                peer.send("Abort", {"code": "busy", "transfer": offered["transfer"]}, b"")
                return

    with FakeDaemon(after_hello(answer)) as liar, pytest.raises(shipd.ShipError):
        push_small(liar.address, as_state_dict(V1), label="v1")
    assert "Coded" not in seen or lie == "a base that was not offered"


@pytest.mark.parametrize("body", [b"", b"x", bytes(16), bytes(16 * (V1.chunks + 1))])
def test_daemons_that_lie_about_what_they_hold(daemon, body):
    kept_versions.clear()

    def answer(peer, offered):
        named = {"transfer": offered["transfer"]}
        peer.send("Held", named, body)
        want = {"base": bytes(range(16)), "codecs": [1], "speeds": [0], "structure": offered["structure"], **named}
        peer.send("Want", want, bytes(4) + V1.chunks.to_bytes(4, "little"))
        peer.expect("Data")
        peer.send("Abort", {"code": "busy", **named}, b"")
        while peer.receive() is not None:
            pass

    with FakeDaemon(after_hello(answer)) as liar, pytest.raises(shipd.ShipError) as caught:
        push_small(liar.address, as_state_dict(V1), label="v1")
    assert isinstance(caught.value, shipd.Busy if not body else shipd.PeerError)
