"""Bits that are flipped on the way, bytes lost and doubled: a frame is sent again, or a connection opened anew."""

import random

import pytest

import shipd
from tests.support import checkpoints
from tests.support.checkpoints import LEAF, assert_installed
from tests.support.frames import (
    COMMIT,
    COMMITTED,
    DATA,
    FINISH,
    HELLO,
    MESSAGES,
    NACK,
    OFFER,
    PRELUDE,
    PROGRESS,
    STAGED,
    STRUCTURE_IS,
    WANT,
    Way,
    name_of_way,
)
from tests.support.processes import push
from tests.support.proxy import Proxy
from tests.support.upgrades import CHUNKS, NEW, assert_fit

pytest_plugins = ["tests.support.upgrades"]

pytestmark = pytest.mark.usefixtures("short_backoff", "short_goodbye")


# --- flipped bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nth", "tensor"), [(0, "block.0.weight"), (7, "block.1.weight"), (23, "block.5.weight")])
@pytest.mark.parametrize("part", ["payload", "header"])
def test_one_flipped_bit_costs_exactly_one_frame(daemon, proxy, new, part, nth, tensor):
    proxy.flip(part, nth=nth)
    receipt = push(proxy.address, new, label="new")
    assert receipt.frames_resent == 1
    assert receipt.resent_tensors == (tensor,)
    assert proxy.count(DATA) == CHUNKS + 1
    assert proxy.count(NACK, Way.TO_SENDER) == 1
    assert proxy.connections == 1
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("bit", [0, 7, 4096 * 8, LEAF * 8 - 1])
def test_wherever_in_the_payload_the_bit_is(daemon, proxy, new, bit):
    proxy.flip("payload", nth=3, bit=bit)
    assert push(proxy.address, new).frames_resent == 1
    assert proxy.count(DATA) == CHUNKS + 1
    assert_installed(daemon, NEW)


def test_a_damaged_chunk_of_many_small_tensors_names_them(proxy, new):
    proxy.flip("payload", nth=CHUNKS - 1)
    receipt = push(proxy.address, new)
    assert receipt.frames_resent == 1
    assert receipt.resent_tensors == tuple(f"block.{at}.bias" for at in range(6))


def test_several_flipped_bits_cost_a_frame_each(daemon, proxy, new):
    for nth in (1, 2, 9, 10):
        proxy.flip("payload", nth=nth)
    receipt = push(proxy.address, new)
    assert receipt.frames_resent == 4
    assert proxy.count(DATA) == CHUNKS + 4
    assert "block.0.weight" in receipt.resent_tensors
    assert_installed(daemon, NEW)


def test_a_frame_sent_again_may_be_damaged_again(daemon, proxy, new):
    rule = proxy.flip("payload", nth=5, every=True, times=4)
    receipt = push(proxy.address, new)
    assert receipt.frames_resent == rule.applied == 4
    assert proxy.count(DATA) == CHUNKS + 4
    assert receipt.resent_tensors == ("block.1.weight",)
    assert_installed(daemon, NEW)


def test_a_flipped_prelude_costs_the_connection_and_no_frame_that_is_held(daemon, proxy, new):
    proxy.flip("prelude", nth=11)
    receipt = push(proxy.address, new, label="new")
    assert proxy.connections == 2
    assert proxy.count(DATA, connection=1) == CHUNKS - 11, "only what was missing travels again"
    assert receipt.frames_resent == 0, "frames lost with a connection are not damaged frames"
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("part", ["prelude", "header", "payload"])
@pytest.mark.parametrize(("kind", "way"), MESSAGES, ids=name_of_way)
def test_a_flipped_bit_in_any_other_message(start_daemon, tmp_path, kind, way, part):
    daemon = start_daemon()
    path = checkpoints.write_safetensors(tmp_path / "new", NEW)
    with Proxy(daemon.port) as proxy:
        rule = proxy.flip(part, kind=kind, way=way)
        if part == "payload" and kind not in (STRUCTURE_IS, FINISH, WANT):
            pytest.skip("has no payload")
        receipt = push(proxy.address, path, label="new")
        assert rule.applied == 1
        assert proxy.connections == (2 if part == "prelude" else 1)
        if kind not in (WANT, PROGRESS):
            assert proxy.count(DATA) == CHUNKS
    assert receipt.digest == NEW.digest
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("part", ["prelude", "header"])
def test_a_flipped_bit_in_the_request_to_send_again(daemon, proxy, new, part):
    proxy.flip("payload", nth=3)
    proxy.flip(part, kind=NACK, way=Way.TO_SENDER)
    push(proxy.address, new)
    assert proxy.connections == (2 if part == "prelude" else 1)
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("way", Way, ids=name_of_way)
@pytest.mark.parametrize("part", ["prelude", "header"])
def test_a_damaged_handshake_on_the_first_connection_is_a_typed_error(daemon, proxy, new, way, part):
    proxy.flip(part, kind=HELLO, way=way, connection=0)
    with pytest.raises(shipd.ConnectError):
        push(proxy.address, new)
    assert_fit(daemon, new)


@pytest.mark.parametrize("way", Way, ids=name_of_way)
@pytest.mark.parametrize("part", ["prelude", "header"])
def test_a_damaged_handshake_on_a_later_connection_is_repeated(daemon, proxy, new, way, part):
    proxy.cut(nth=5)
    proxy.flip(part, kind=HELLO, way=way, connection=1)
    push(proxy.address, new)
    assert proxy.connections == 3
    assert_installed(daemon, NEW)


def test_a_frame_damaged_every_time_ends_the_push_and_is_named(daemon, proxy, new):
    rule = proxy.flip("payload", nth=9, every=True)
    with pytest.raises(shipd.IntegrityError, match=r"block\.2\.weight.* damaged 5 times") as caught:
        push(proxy.address, new, label="new")
    assert caught.value.tensor == "block.2.weight"
    assert caught.value.transfer_id is not None
    assert caught.value.exit_code == 13
    assert rule.applied == 5
    assert_fit(daemon, new)


def test_a_header_damaged_every_time_ends_the_push_and_is_named(daemon, proxy, new):
    proxy.flip("header", nth=9, every=True)
    with pytest.raises(shipd.IntegrityError, match=r"block\.2\.weight"):
        push(proxy.address, new, label="new")
    assert_fit(daemon, new)


def test_a_prelude_damaged_every_time_ends_the_push(daemon, proxy, new):
    for connection in range(10):
        proxy.flip("prelude", nth=0, connection=connection)
    with pytest.raises(shipd.TransferFailed, match="broke 5 times"):
        push(proxy.address, new, label="new")
    assert proxy.connections == 5
    assert_fit(daemon, new)


@pytest.mark.parametrize(("kind", "way"), [(OFFER, Way.TO_DAEMON), (WANT, Way.TO_SENDER)], ids=name_of_way)
def test_a_message_damaged_every_time_ends_the_push(daemon, proxy, new, kind, way):
    proxy.flip("header", kind=kind, way=way, nth=None)
    with pytest.raises(shipd.ShipError, match=r"127\.0\.0\.1"):
        push(proxy.address, new, label="new", stall=5)
    assert_fit(daemon, new)


# --- bytes lost and doubled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 32, 5000])
@pytest.mark.parametrize("fault", ["drop", "duplicate"])
def test_lost_or_doubled_bytes_cost_the_connection(daemon, proxy, new, fault, count):
    getattr(proxy, fault)(count, nth=8)
    push(proxy.address, new)
    assert proxy.connections == 2
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("fault", ["drop", "duplicate"])
def test_lost_or_doubled_bytes_from_the_daemon(daemon, proxy, new, fault):
    getattr(proxy, fault)(3, kind=PROGRESS, nth=0, way=Way.TO_SENDER)
    push(proxy.address, new)
    assert_installed(daemon, NEW)


def test_a_whole_frame_doubled_is_out_of_sequence(daemon, proxy, new):
    proxy.duplicate(LEAF + PRELUDE + 10, nth=8)
    push(proxy.address, new)
    assert_installed(daemon, NEW)


# --- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_damage(daemon, proxy, new, seed):
    """A few faults of every kind that can be survived, anywhere in either direction."""
    dice = random.Random(seed)
    for _ in range(dice.randint(2, 5)):
        way = dice.choice((Way.TO_DAEMON, Way.TO_DAEMON, Way.TO_SENDER))
        kinds = (
            (DATA, DATA, DATA, OFFER, FINISH, COMMIT) if way is Way.TO_DAEMON else (WANT, PROGRESS, STAGED, COMMITTED)
        )
        kind = dice.choice(kinds)
        nth = dice.randrange(CHUNKS) if kind == DATA else 0
        # Bytes that are lost behind the last frame of an exchange are a stall, and TCP loses none.
        fault = dice.choice(("header", "prelude", "cut", "duplicate"))
        if fault == "cut":
            proxy.cut(kind=kind, nth=nth, way=way, keep=dice.random(), how=dice.choice(("fin", "rst")))
        elif fault == "duplicate":
            proxy.duplicate(dice.randint(1, 40), kind=kind, nth=nth, way=way)
        else:
            proxy.flip(fault, kind=kind, nth=nth, way=way)
    receipt = push(proxy.address, new, label="new", stall=10)
    assert receipt.digest == NEW.digest
    assert_installed(daemon, NEW, label="new")
