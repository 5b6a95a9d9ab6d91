"""Pushes over several connections at once, over real sockets: what they share, and what happens when one fails."""

import asyncio
import contextlib
import threading

import pytest
import torch

import shipd
import shipd.client.lanes
from shipd.transfer.inlet import Inlet
from tests.support import checkpoints, naive
from tests.support.checkpoints import assert_installed
from tests.support.frames import COMMITTED, DATA, FINISH, Way
from tests.support.hostile import attacker, offer
from tests.support.models import content_of
from tests.support.naive import encode_structure
from tests.support.processes import Background, push
from tests.support.proxy import Proxy, until
from tests.support.upgrades import CHUNKS, NEW, OLD

pytest_plugins = ["tests.support.upgrades", "tests.support.patience"]

pytestmark = pytest.mark.usefixtures("short_backoff")


@pytest.fixture
def daemon(old_daemon):
    """A daemon that has a version already."""
    return old_daemon


@contextlib.contextmanager
def shared(proxy, checkpoint, lanes=4, **options):
    """A push whose own connection gets stuck at its first chunk, so that the lanes bring the others."""
    rule = proxy.hold(connection=0)
    with Background(push, proxy.address, checkpoint, label="new", lanes=lanes, **options) as running:
        try:
            yield running
        finally:
            rule.release()


def on_lanes(proxy):
    return sum(frame.connection > 0 for frame in proxy.seen(DATA))


def until_lanes_carried(proxy, count):
    until(lambda: on_lanes(proxy) >= count, f"{count} chunks on lanes")


def test_every_connection_carries_chunks_and_none_twice(daemon, proxy, new):
    with shared(proxy, new) as running:
        until_lanes_carried(proxy, 6)
    receipt = running.result()
    assert proxy.connections == 4
    assert proxy.count(DATA) == CHUNKS
    assert receipt.profile.lanes > 1
    assert receipt.digest == NEW.digest
    # All that the lanes cost: a handshake and a question each.
    assert NEW.nbytes < receipt.bytes_sent < NEW.nbytes * 1.002
    assert receipt.frames_resent == 0
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("lanes", [2, 5, 16])
def test_any_number_of_connections(daemon, lanes):
    state = checkpoints.as_state_dict(NEW)
    receipt = push(f"127.0.0.1:{daemon.port}", state, label="new", lanes=lanes)
    assert receipt.digest == NEW.digest
    assert_installed(daemon, NEW, label="new")


def test_a_model_that_is_served_swaps_to_what_lanes_brought(daemon):
    model = torch.nn.Sequential(*(torch.nn.Linear(700, 700) for _ in range(6)))
    resident = shipd.attach(model, "served", socket=daemon.config.socket)
    try:
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        receipt = push(f"127.0.0.1:{daemon.port}", state, model="served", lanes=4)
        assert resident.verify() == receipt.digest
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    finally:
        resident.detach()


@pytest.mark.parametrize("part", ["payload", "header"])
def test_a_damaged_frame_on_a_lane_costs_that_frame(daemon, proxy, new, part):
    flipped = proxy.flip(part, connection=1, nth=0)
    with shared(proxy, new, lanes=2) as running:
        until_lanes_carried(proxy, 3)
    receipt = running.result()
    assert flipped.applied == 1
    assert receipt.frames_resent == 1
    assert proxy.count(DATA) == CHUNKS + 1
    assert proxy.connections == 2
    assert_installed(daemon, NEW, label="new")


def test_a_flipped_prelude_on_a_lane_starts_the_connections_over(daemon, proxy, new):
    proxy.flip("prelude", connection=1, nth=2)
    with shared(proxy, new, lanes=2) as running:
        until(lambda: proxy.connections > 2, "another connection")
    assert running.result().digest == NEW.digest
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_a_lane_that_breaks_costs_what_was_not_held(daemon, proxy, new, how):
    proxy.cut(connection=1, nth=4, keep=0.5, how=how)
    with shared(proxy, new, lanes=2) as running:
        until(lambda: proxy.connections > 2, "another connection")
    receipt = running.result()
    assert receipt.digest == NEW.digest
    # What the lane had brought was held and did not travel again; a reset may throw away some that was not read yet.
    later = sum(frame.connection > 1 for frame in proxy.seen(DATA))
    assert 0 < later <= (CHUNKS if how == "rst" else CHUNKS - 4)
    assert_installed(daemon, NEW, label="new")


def test_a_lane_over_which_nothing_comes_through_is_found_out(daemon, proxy, new):
    proxy.stall(connection=1, nth=0)
    with shared(proxy, new, lanes=2, stall=4.0) as running:
        until_lanes_carried(proxy, 1)
    assert running.result(60).digest == NEW.digest
    assert proxy.connections > 2
    assert_installed(daemon, NEW, label="new")


def test_the_last_lane_overtaken_by_finish(start_daemon, tmp_path):
    # Few enough chunks for the kernel's buffers, so that the sender gets rid of those that are kept back.
    version = checkpoints.content(naive.Tensor(f"block.{at}", "float32", (512, 1024)) for at in range(4))
    path = checkpoints.write_safetensors(tmp_path / "new", version)
    daemon = start_daemon()
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(connection=1, nth=1)
        with Background(push, proxy.address, path, label="new", lanes=2) as running:
            try:
                until(lambda: proxy.count(FINISH) == 1 or running.done, "FINISH")
            finally:
                held.release()
        assert running.result().digest == version.digest
        assert proxy.count(DATA) == version.chunks
    assert_installed(daemon, version, label="new")


def test_a_daemon_that_takes_one_connection_gets_one(start_daemon, new):
    daemon = start_daemon(max_lanes=1)
    with Proxy(daemon.port) as proxy:
        assert push(proxy.address, new, lanes=4).profile.lanes == 1
        assert proxy.connections == 1


def test_a_lane_that_cannot_be_opened_is_done_without(daemon, proxy, new):
    rule = proxy.hold(connection=0)
    with Background(push, proxy.address, new, label="new", lanes=1) as running:
        rule.wait()
        proxy.refuse()
        rule.release()
        assert running.result().digest == NEW.digest
    proxy.accept()
    proxy.flip("prelude", kind=None, nth=0, connection=2)
    assert push(proxy.address, checkpoints.as_state_dict(OLD), lanes=2).digest == OLD.digest
    assert_installed(daemon, OLD)


def test_the_unix_socket_takes_one_connection(daemon, new):
    assert push(daemon.config.socket, new, label="new", lanes=4).profile.lanes == 1
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("lanes", [0, 17, -1])
def test_a_number_of_connections_that_cannot_be(daemon, new, lanes):
    with pytest.raises(ValueError, match="1 to 16"):
        push(f"127.0.0.1:{daemon.port}", new, lanes=lanes)


def test_cancelled_with_lanes_under_way(daemon, proxy, new):
    rule = proxy.hold(connection=0)

    async def converse():
        async with shipd.connect(proxy.address) as client:
            running = asyncio.create_task(client.push(new, model="model", label="new", lanes=3))
            await asyncio.to_thread(until_lanes_carried, proxy, 3)
            running.cancel()
            await running

    try:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(converse())
    finally:
        rule.release()
    assert_installed(daemon, OLD, label="old")
    assert push(f"127.0.0.1:{daemon.port}", new, label="after", lanes=3).digest == NEW.digest


def test_a_daemon_that_stops_ends_its_lanes(start_daemon, new, out_of_patience):
    daemon = start_daemon()
    with Proxy(daemon.port) as proxy:
        with shared(proxy, new, lanes=3) as running:
            until_lanes_carried(proxy, 3)
            daemon.stop()
            out_of_patience()
        assert isinstance(running.error(30), shipd.ShipError)
        assert proxy.count(COMMITTED, Way.TO_SENDER) == 0


def test_many_damaged_frames_on_lanes_cost_those_frames_and_no_time(daemon, proxy, monkeypatch):
    """Found in review: what was asked for on a lane could come before the loop had heard that it was damaged."""
    for nth in range(1, 24, 3):
        proxy.flip("payload", connection=1, nth=nth)
        proxy.flip("payload", connection=2, nth=nth)
    version = checkpoints.large(40)
    receipt = push(proxy.address, checkpoints.as_state_dict(version), lanes=3, stall=60)
    assert receipt.digest == version.digest
    assert proxy.connections == 3, "nothing stood still until the connections were opened anew"


def test_a_sender_without_descriptors_for_lanes_does_without(daemon, new, monkeypatch):
    def none_left(_self):
        raise shipd.ConnectError("too many open files")

    monkeypatch.setattr(shipd.client.lanes, "Waker", type("Waker", (), {"__init__": none_left}))
    receipt = push(f"127.0.0.1:{daemon.port}", new, label="new", lanes=4)
    assert receipt.profile.lanes == 1
    assert_installed(daemon, NEW, label="new")


# --- lanes that nobody asked for -------------------------------------------------------------------------------------

ROWS = tuple(naive.Tensor(f"t{at}", "uint8", (naive.LEAF,)) for at in range(4))
TRANSFER = bytes(range(16))


def _receiving(daemon):
    """A transfer that has been accepted, by a sender that then says nothing."""
    structure = encode_structure(ROWS)
    peer = attacker(daemon.port).greet().send("Offer", offer(structure, 4, 4 * naive.LEAF, model="model"))
    peer.expect("StructureWanted")
    peer.message("StructureIs", {"transfer": TRANSFER}, structure)
    peer.expect("Want")
    return peer


def _lane(daemon, number=1, transfer=TRANSFER):
    return attacker(daemon.port).greet().send("Join", {"lane": number, "transfer": transfer})


def test_a_lane_of_no_transfer_is_refused(start_daemon):
    daemon = start_daemon()
    with _lane(daemon) as lane:
        assert naive.unpack(lane.expect("Abort").header)["code"] == "protocol"
    with _receiving(daemon), _lane(daemon, transfer=bytes(16)) as lane:
        lane.expect("Abort")


@pytest.mark.parametrize("number", [8, 15])
def test_a_lane_beyond_what_was_offered_is_refused(start_daemon, number):
    daemon = start_daemon()
    with _receiving(daemon), _lane(daemon, number) as lane:
        lane.expect("Abort")


def test_a_lane_that_has_joined_is_not_joined_again(start_daemon):
    daemon = start_daemon()
    with _receiving(daemon), _lane(daemon) as lane, _lane(daemon) as twin:
        lane.expect("Joined")
        twin.expect("Abort")


def test_the_connection_of_a_transfer_is_no_lane_of_it(start_daemon):
    daemon = start_daemon()
    with _receiving(daemon) as peer:
        peer.send("Join", {"lane": 1, "transfer": TRANSFER})
        peer.expect("Abort")


@pytest.mark.parametrize(
    ("name", "fields", "payload"),
    [
        ("Data", {"chunk": 9}, b"x"),
        ("Data", {"chunk": 0}, b"of another size"),
        ("Commit", {"transfer": TRANSFER}, b""),
        ("Offer", offer(encode_structure(ROWS), 4, 4 * naive.LEAF), b""),
        ("StatusRequest", {}, b""),
        ("Join", {"lane": 2, "transfer": TRANSFER}, b""),
    ],
)
def test_what_a_lane_must_not_say_costs_that_lane(start_daemon, name, fields, payload):
    daemon = start_daemon()
    with _receiving(daemon) as peer:
        with _lane(daemon) as lane:
            lane.expect("Joined")
            lane.send(name, fields, payload)
            lane.drain()
        # Its number is free again, and the transfer goes on.
        until(lambda: not _taken(daemon), "the lane to be given up")
        with _lane(daemon) as lane:
            lane.expect("Joined")
            for chunk in range(4):
                lane.send("Data", {"chunk": chunk}, content_of(ROWS[chunk].name, naive.LEAF))
            until(lambda: _held(daemon) == 4, "four chunks to be held")
        peer.send("Ping", {"reply": True})
        while (frame := peer.receive()) is not None and frame.name != "Ping":
            pass
        assert frame is not None, "the transfer's own connection stands"


def _incoming(daemon):
    return daemon.server.models["model"].incoming


def _taken(daemon):
    return _incoming(daemon).receiver.lanes


def _held(daemon):
    incoming = _incoming(daemon)
    return len(incoming.receiver.held) if incoming is not None else 0


def test_what_is_sent_again_at_once_is_taken_although_the_loop_is_busy(start_daemon):
    daemon = start_daemon()
    with _receiving(daemon), _lane(daemon) as lane:
        lane.expect("Joined")
        busy, goes_on = threading.Event(), threading.Event()
        daemon._loop.call_soon_threadsafe(busy.set)
        daemon._loop.call_soon_threadsafe(goes_on.wait, 20)
        assert busy.wait(20)
        content = content_of(ROWS[0].name, naive.LEAF)
        lane.send("Data", {"chunk": 0}, content, payload_crc=1)
        lane.expect("Nack")
        lane.send("Data", {"chunk": 0}, content)
        lane.send("Ping", {"reply": True})
        lane.expect("Ping")
        goes_on.set()
        until(lambda: _held(daemon) == 1, "the chunk to be held")


def test_a_daemon_without_threads_for_lanes_does_without(start_daemon, monkeypatch, new):
    daemon = start_daemon(resume_window=0.5)

    def none_left(inlet):
        inlet._sock.close()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Inlet, "start", none_left)
    with _receiving(daemon), _lane(daemon) as lane:
        lane.drain()
        monkeypatch.undo()
        with _lane(daemon) as again:
            again.expect("Joined")
    until(lambda: _incoming(daemon) is None, "the transfer to be given up")
    assert push(f"127.0.0.1:{daemon.port}", new, label="new").digest == NEW.digest


def test_a_wrong_offer_of_a_known_transfer_ends_no_lane(start_daemon):
    daemon = start_daemon()
    with _receiving(daemon), _lane(daemon) as lane:
        lane.expect("Joined")
        wrong = offer(b"another structure", 4, 4 * naive.LEAF, model="model")
        with attacker(daemon.port).greet().send("Offer", wrong) as intruder:
            intruder.expect("Abort")
        lane.send("Data", {"chunk": 0}, content_of(ROWS[0].name, naive.LEAF))
        until(lambda: _held(daemon) == 1, "the chunk to be held")


def test_a_large_body_on_a_lane_costs_that_lane(start_daemon):
    daemon = start_daemon()
    with _receiving(daemon), _lane(daemon) as lane:
        lane.expect("Joined")
        with contextlib.suppress(ConnectionError):
            lane.message("StructureIs", {"transfer": TRANSFER}, bytes(2 * naive.LEAF))
        lane.drain()
        until(lambda: not _taken(daemon), "the lane to be given up")


def test_over_the_unix_socket_one_connection_is_offered(start_daemon):
    daemon = start_daemon()
    structure = encode_structure(ROWS)
    with (
        attacker(daemon.config.socket).greet().send("Offer", offer(structure, 4, 4 * naive.LEAF, model="model")) as peer
    ):
        peer.expect("StructureWanted")
        peer.message("StructureIs", {"transfer": TRANSFER}, structure)
        assert "lanes" not in naive.unpack(peer.expect("Want").header)
