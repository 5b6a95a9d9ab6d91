"""Coded runs by senders that lie: each costs the push that it belongs to, and nothing that is decoded is believed."""

import contextlib

import pytest
import zstandard

from shipd.codecs import registry
from tests.support import checkpoints
from tests.support.checkpoints import LEAF, MIB, Content, as_state_dict, assert_installed
from tests.support.coded_by_hand import CodedSender, ranges_of
from tests.support.frames import DATA
from tests.support.naive import Tensor
from tests.support.processes import Background, address_of, push
from tests.support.proxy import Proxy, until
from tests.support.successive import changed_in, first, following

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

V0 = first(6)
V1 = following(V0)
CHUNKS = V0.chunks
FIRST = min(row.name for row in V0.rows)
"""The tensor that chunk 0 is of."""


@pytest.fixture
def target(start_daemon):
    """A daemon with V0 in the model that is attacked, and a model for others."""
    daemon = start_daemon(models=dict.fromkeys(("model", "victim", "other"), "1GiB"))
    push(address_of(daemon), as_state_dict(V0), model="victim", label="v0")
    return daemon


@contextlib.contextmanager
def healthy_push(daemon, path):
    """Somebody else's, that is halfway while the block runs."""
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=10)
        with Background(push, proxy.address, path, label="healthy") as pushing:
            held.wait()
            yield
            held.release()
            assert pushing.result().frames_resent == 0
        assert proxy.connections == 1
        assert proxy.count(DATA) == checkpoints.medium().chunks
    assert_installed(daemon, checkpoints.medium(), label="healthy")


def assert_fit(daemon):
    """V0 still serves, and the next push goes through, as a delta or not."""
    assert_installed(daemon, V0, model="victim", label="v0")
    push(address_of(daemon), as_state_dict(V1), model="victim", label="after")
    assert_installed(daemon, V1, model="victim", label="after")


# --- what is as it is to be ------------------------------------------------------------------------------------------


def test_a_sender_by_hand_that_does_nothing_wrong(target):
    with CodedSender(target.port, V1, V0) as sender:
        assert sender.want.fields["base"] == bytes.fromhex(V0.digest)
        assert sender.want.fields["codecs"] == [1, 2, 3, 4, 5, 6, 7]
        sender.right("egr", 0, 3).right("gz", 3, 2).right("duh", 5, 1).right("xph", 6, 1).right("planes", 7, 2)
        for chunk in range(9, CHUNKS):
            sender.data(chunk)
        sender.finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


# --- frames that must not be sent ------------------------------------------------------------------------------------

EGR = registry.BY_NAME["egr"].number

LIES = {
    "a chunk that does not exist": lambda sender: sender.coded(EGR, CHUNKS, 1, b"x"),
    "a run that ends beyond the last chunk": lambda sender: sender.coded(EGR, CHUNKS - 2, 3, b"x"),
    "a run of the same beyond the last chunk": lambda sender: sender.coded(1, 0, CHUNKS + 1),
    "a run of four thousand million chunks": lambda sender: sender.coded(EGR, 0, (1 << 32) - 1, b"x"),
    "chunks whose sum overflows": lambda sender: sender.coded(1, (1 << 32) - 1, (1 << 32) - 1),
    "no chunks": lambda sender: sender.coded(EGR, 0, 0, b"x"),
    "no codec": lambda sender: sender.coded(0, 0, 1, b"x"),
    "a codec of no number": lambda sender: sender.coded(256, 0, 1, b"x"),
    "a codec that nobody has": lambda sender: sender.coded(99, 0, 1, b"x"),
    "the same, with a payload": lambda sender: sender.coded(1, 0, 1, b"x"),
    "a delta without a payload": lambda sender: sender.coded(EGR, 0, 1),
    "a payload that is too long": lambda sender: sender.coded(EGR, 0, 1, b"x", payload_length=512 * 1024 + 1),
    "flags": lambda sender: sender.coded(EGR, 0, 1, b"x", flags=1),
    "a negative chunk": lambda sender: sender.coded(EGR, -1, 1, b"x"),
    "a field too many": lambda sender: sender.send("Coded", {"!x": 1, "chunk": 0, "chunks": 1, "codec": EGR}, b"x"),
    "a field too few": lambda sender: sender.send("Coded", {"chunk": 0, "codec": EGR}, b"x"),
    "what is held": lambda sender: sender.send("Held", {"transfer": sender.transfer}, bytes(16)),
}


@pytest.mark.parametrize("lie", LIES)
def test_frames_that_cost_the_connection(target, medium, lie):
    with healthy_push(target, medium):
        with CodedSender(target.port, V1, V0) as sender:
            with contextlib.suppress(ConnectionError):
                LIES[lie](sender)
            sender.drain()
        until(lambda: len(target.server._peers) == 1, "the daemon has let go of the sender")
        incoming = target.server.models["victim"].incoming
        assert incoming is None or not incoming.receiver.held
    assert_fit(target)


def test_a_run_of_more_than_16_mib(start_daemon):
    version = first(18)
    daemon = start_daemon(models={"victim": "1GiB"})
    push(address_of(daemon), as_state_dict(version), model="victim", label="v0")
    with CodedSender(daemon.port, version, version) as sender:
        sender.coded(1, 0, version.chunks).finish().commit()
    assert_installed(daemon, version, model="victim", label="hostile")
    with CodedSender(daemon.port, following(version), version, transfer=bytes(range(16, 32))) as sender:
        sender.coded(EGR, 0, 33, b"x")
        assert sender.drain() == ["Abort"] or not sender.drain()
    assert_installed(daemon, version, model="victim", label="hostile")


@pytest.mark.parametrize("codec", ["egr", "gz", "duh", "f32d"])
def test_deltas_where_no_base_was_agreed_on(target, codec):
    with CodedSender(target.port, V1, None) as sender:
        assert sender.want.fields["base"] == bytes.fromhex(V0.digest), "it was told what it is"
        number = registry.BY_NAME[codec].number
        assert number not in sender.want.fields["codecs"]
        sender.coded(number, 0, 1, b"x")
        sender.drain()
    assert_fit(target)


def test_the_same_where_nothing_was_said_of_a_base(target):
    with CodedSender(target.port, V1, None, incremental=False) as sender:
        assert "base" not in sender.want.fields or not sender.want.fields["base"]
        assert 1 not in sender.want.fields["codecs"]
        sender.coded(1, 0, 1)
        sender.drain()
    assert_fit(target)


def test_coded_runs_to_a_daemon_that_wants_none(start_daemon):
    daemon = start_daemon(models={"victim": "1GiB"}, incremental=False)
    push(address_of(daemon), as_state_dict(V0), model="victim", label="v0")
    with CodedSender(daemon.port, V1, V0) as sender:
        assert not sender.want.fields.get("codecs")
        sender.coded(2, 0, 1, b"x")
        sender.drain()
    assert_fit(daemon)


# --- payloads that are none ------------------------------------------------------------------------------------------


def zstd_bomb(size=256 * MIB):
    """A frame that says how much is in it, of which there is more than anybody wants."""
    return zstandard.ZstdCompressor(level=1).compress(bytes(size))


def _spoilt(codec, spoil):
    return lambda sender: (codec, bytes(spoil(sender.payload(codec, 0, 2))))


BOMB = zstd_bomb()
PAYLOADS = {
    **{f"{codec} of nothing": (lambda _sender, codec=codec: (codec, b"\0")) for codec in registry.BY_NAME},
    **{f"{codec} of noise": (lambda _sender, codec=codec: (codec, checkpoints.random_bytes(codec, 5000)))
       for codec in registry.BY_NAME},
    **{f"{codec} of ones": (lambda _sender, codec=codec: (codec, b"\xff" * 70_000)) for codec in registry.BY_NAME},
    **{f"{codec} cut short": _spoilt(codec, lambda payload: payload[:-1]) for codec in ("egr", "gz", "duh", "xph")},
    **{f"{codec} and more": _spoilt(codec, lambda payload: payload + b"\0") for codec in ("egr", "gz", "planes")},
    "a bomb in xph": lambda _sender: ("xph", b"\0" + BOMB),
    "a bomb in planes": lambda _sender: ("planes", b"\x02\0" + BOMB),
    "a bomb by itself": lambda _sender: ("gz", BOMB),
    "f32d of words of 16 bits": _spoilt("egr", lambda payload: payload),
}  # fmt: skip


@pytest.mark.parametrize("what", PAYLOADS)
def test_a_payload_that_does_not_decode_is_asked_for_as_it_is(target, what):
    with CodedSender(target.port, V1, V0) as sender:
        codec, payload = PAYLOADS[what](sender)
        if what.startswith("f32d of words"):
            codec = "f32d"
        number = sender.sequence
        sender.coded(registry.BY_NAME[codec].number, 0, 2, payload[: 512 * 1024])
        for chunk in range(2, CHUNKS):
            sender.data(chunk)
        sender.finish()
        found = sender.answer("Nack", "Want", "Staged", "Abort")
        if found.name == "Nack":
            assert found.fields["sequences"] == [number]
            sender.data(0).data(1)
        elif found.name == "Want":
            # It decodes to something, which is nothing that FINISH knows of.
            for chunk in ranges_of(found):
                sender.data(chunk)
            sender.finish()
        else:
            raise AssertionError(found.name)
        sender.commit()
    assert_installed(target, V1, model="victim", label="hostile")


def test_a_run_that_decodes_to_something_else(target):
    """Its digests are not those of FINISH: its tensors come again as they are, and are committed."""
    other = following(V0, seed=77)
    with CodedSender(target.port, other, V0) as wrong:
        payload = wrong.payload("egr", 0, 4)
        wrong.send("Abort", {"code": "interrupted", "transfer": wrong.transfer})
    until(lambda: target.server.models["victim"].incoming is None, "the transfer is over")
    with CodedSender(target.port, V1, V0, transfer=bytes(range(16, 32))) as sender:
        sender.coded(EGR, 0, 4, payload).right("egr", 4, CHUNKS - 4).finish()
        again = sender.expect("Want")
        assert not again.fields.get("codecs"), "nothing coded is wanted any more"
        assert set(ranges_of(again)) >= set(range(4))
        for chunk in ranges_of(again):
            sender.data(chunk)
        sender.finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


def test_a_run_where_nothing_coded_is_wanted_any_more(target):
    with CodedSender(target.port, V1, V0) as sender:
        sender.right("egr", 0, CHUNKS - 1).coded(1, CHUNKS - 1, 1).finish()
        again = sender.expect("Want")
        sender.right("egr", ranges_of(again)[0], 1)
        sender.drain()
    assert_fit(target)


def test_lies_about_what_is_the_same_are_found_out(target):
    with CodedSender(target.port, V1, V0) as sender:
        sender.coded(1, 0, CHUNKS).finish()
        again = sender.expect("Want")
        assert ranges_of(again) == list(range(CHUNKS))
        for chunk in ranges_of(again):
            sender.data(chunk)
        sender.finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


def test_who_lies_three_times_is_not_asked_a_fourth_time(target):
    lie = Content(V1.rows, {**V1.data, V1.rows[0].name: V0.data[V0.rows[0].name]})
    with CodedSender(target.port, V1, V0) as sender:
        sender.image = sender._image(lie)
        sender.coded(1, 0, CHUNKS).finish()
        for _ in range(2):
            for chunk in ranges_of(sender.expect("Want")):
                sender.data(chunk)
            sender.finish()
        abort = sender.expect("Abort")
        assert abort.fields["code"] == "integrity"
        assert abort.fields["tensor"] == V1.rows[0].name
    assert_fit(target)


def test_what_did_not_decode_must_come_as_it_is(target):
    """Found here: a sender could have runs refused for ever, and the daemon kept a number of each."""
    with CodedSender(target.port, V1, V0) as sender:
        sender.coded(EGR, 0, 2, b"x")
        sender.expect("Nack")
        sender.right("egr", 1, 1)
        assert sender.drain() == [], "the connection is closed"
    assert_fit(target)


@pytest.mark.parametrize("codec", [1, EGR])
def test_a_run_of_chunks_of_which_some_are_there(target, codec):
    """Those that are there stay; the others come one by one."""
    with CodedSender(target.port, V1, V0) as sender:
        sender.data(1)
        number = sender.sequence
        sender.coded(codec, 0, 3, b"x" if codec == EGR else b"")
        assert sender.expect("Nack").fields["sequences"] == [number]
        for chunk in (0, 1, *range(2, CHUNKS)):
            sender.data(chunk)
        sender.finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


def test_a_run_of_chunks_that_are_all_there(target):
    with CodedSender(target.port, V1, V0) as sender:
        sender.data(0).data(1).coded(1, 0, 2).coded(EGR, 0, 2, b"x").right("egr", 2, CHUNKS - 2).finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


# --- on lanes --------------------------------------------------------------------------------------------------------


def test_runs_on_a_lane(target):
    with CodedSender(target.port, V1, V0) as sender, sender.join() as lane:
        sender.right("egr", 0, 4)
        for first_chunk in range(4, CHUNKS - 1, 2):
            payload = sender.payload("egr", first_chunk, 2)
            lane.send("Coded", {"chunk": first_chunk, "chunks": 2, "codec": EGR}, payload)
        sender.finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


def test_a_run_on_a_lane_that_does_not_decode(target):
    """What asks for its chunks is no NACK, for which the lane's thread would have to wake up, but WANT."""
    with CodedSender(target.port, V1, V0) as sender, sender.join() as lane:
        lane.send("Coded", {"chunk": 0, "chunks": 2, "codec": EGR}, b"x")
        sender.right("egr", 2, CHUNKS - 2).finish()
        again = sender.expect("Want")
        assert ranges_of(again) == [0, 1]
        sender.data(0).data(1).finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


@pytest.mark.parametrize("run", [(CHUNKS - 1, 2, EGR, b"x"), (0, 1, 99, b"x"), (0, CHUNKS + 1, 1, b"")])
def test_lies_on_a_lane_cost_the_lane(target, run):
    start, count, codec, payload = run
    with CodedSender(target.port, V1, V0) as sender, sender.join() as lane:
        lane.send("Coded", {"chunk": start, "chunks": count, "codec": codec}, payload)
        lane.drain()
        sender.right("egr", 0, CHUNKS).finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


def test_one_run_on_two_connections(target):
    """One of them decodes; nothing is decoded twice, or mixed."""
    with CodedSender(target.port, V1, V0) as sender, sender.join() as lane:
        for start in range(0, CHUNKS, 2):
            payload = sender.payload("egr", start, 2)
            fields = {"chunk": start, "chunks": 2, "codec": EGR}
            lane.send("Coded", fields, payload)
            sender.send("Coded", fields, payload)
        sender.finish().commit()
    assert_installed(target, V1, model="victim", label="hostile")


# --- what an image held before ---------------------------------------------------------------------------------------


def test_garbage_where_the_same_is_said_to_be(target):
    """Found here: memory that a damaged chunk had been received into was taken for what it held before."""
    after = changed_in(V0, {FIRST: [5]})
    push(address_of(target), as_state_dict(after), model="victim", label="v1")
    # Now the image that is filled next holds V0, whose last chunk is that of the version that serves.
    last = CHUNKS - 1
    with CodedSender(target.port, V0, after) as sender:
        size = len(sender.image[sender.span(last, 1)])
        sender.send("Data", {"chunk": last}, b"garbage " * (size // 8), payload_crc=1)
        sender.expect("Nack")
        sender.coded(1, 1, CHUNKS - 1).data(0).finish()
        found = sender.answer("Staged", "Want", "Abort")
        if found.name == "Staged":
            sender.send("Commit", {"transfer": sender.transfer})
            sender.expect("Committed")
    if found.name == "Staged":
        assert_installed(target, V0, model="victim", label="hostile")


def test_something_between_two_tensors_is_not_taken(target):
    """Found here: it would have stayed in the image, digested by nobody, and spoilt the deltas of later versions."""
    rows = [Tensor(f"t{at}", "bfloat16", (LEAF // 2 + 1,)) for at in range(4)]
    version = checkpoints.content(rows)
    push(address_of(target), as_state_dict(version), model="other", label="v0")
    after = changed_in(version, {"t1": [0]})
    with CodedSender(target.port, after, version, model="other") as sender:
        image = bytearray(sender.image)
        end = sender.span(1, 1).stop
        image[end : end + 8] = b"anything"
        sender.image = bytes(image)
        number = sender.sequence
        sender.right("egr", 0, sender.chunks)
        assert sender.expect("Nack").fields["sequences"] == [number]
        for chunk in range(sender.chunks):
            sender.data(chunk)
        sender.finish().commit()
    assert_installed(target, after, model="other", label="hostile")
    held = target.server.models["other"].version.slot.memory.view
    assert bytes(held[end : end + 8]) == bytes(8)
