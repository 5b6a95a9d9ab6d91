"""Attackers at a daemon that takes somebody else's push: each costs its own connection and nothing else."""

import contextlib
import json
import socket
import threading

import pytest

import shipd
from tests.support import attacks, checkpoints, hostile, naive
from tests.support.attacks import ATTACKS, STRUCTURES
from tests.support.checkpoints import MIB, assert_installed
from tests.support.frames import DATA
from tests.support.hostile import attacker, flood, frame
from tests.support.naive import hello, pack
from tests.support.patience import reconfigure
from tests.support.processes import Background, address_of, memory, push, status
from tests.support.proxy import Proxy, until


@contextlib.contextmanager
def healthy_push(daemon, path):
    """A push of somebody else's that is halfway while the block runs, and must end as if nothing had been."""
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=10)
        with Background(push, proxy.address, path, label="healthy") as pushing:
            held.wait()
            yield
            held.release()
            receipt = pushing.result()
        assert proxy.connections == 1
        assert proxy.count(DATA) == checkpoints.medium().chunks
    assert receipt.frames_resent == 0
    assert_installed(daemon, checkpoints.medium(), label="healthy")


@pytest.fixture
def target(start_daemon):
    """A daemon with a model for the healthy push, and one for the attackers."""
    return start_daemon(models={"model": "1GiB", "victim": "1GiB"})


# --- frames, structures and offers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_cost_their_own_connection_and_nothing_else(target, medium, attack):
    with healthy_push(target, medium):
        with attacker(target.port) as peer:
            with contextlib.suppress(ConnectionError):
                ATTACKS[attack](peer)
            peer.drain()
        until(lambda: len(target.server._peers) == 1, "the daemon has let go of the attacker")
    assert target.server.models["victim"].version is None


@pytest.mark.parametrize("attack", ["garbage", "long_payload", "data_first", "nacks", "deep_header", "commit_at_once"])
def test_attacks_over_the_unix_socket(target, medium, attack):
    with healthy_push(target, medium):
        with attacker(target.config.socket) as peer:
            with contextlib.suppress(ConnectionError):
                ATTACKS[attack](peer)
            peer.drain()
        until(lambda: len(target.server._peers) == 1, "the daemon has let go of the attacker")


@pytest.mark.parametrize("what", STRUCTURES)
def test_absurd_structures(target, medium, what):
    with healthy_push(target, medium):
        with attacker(target.port) as peer:
            attacks.offer_structure(peer, STRUCTURES[what])
            peer.drain()
        until(lambda: len(target.server._peers) == 1, "the daemon has let go of the attacker")
    assert target.server.models["victim"].pool is None


def test_more_tensors_than_there_may_be(target, medium):
    with healthy_push(target, medium), attacker(target.port) as peer:
        attacks.offer_structure(peer, attacks.too_many_tensors(), tensors=1 << 20)
        peer.drain()


def test_an_offer_whose_peer_is_gone_at_once_holds_nothing_up(target, small):
    """Over a Unix socket OFFER and the end of the stream may be read in one go."""
    offer = hostile.offer(hostile.columns(), 1, 4)
    both = frame("Hello", hello(bytes(32)), b"", 0) + frame("Offer", offer, b"", 1)
    for ending in (b"", b"garbage" * 10):
        with attacker(target.config.socket) as peer:
            peer.write(both + ending)
        until(lambda: not target.server._peers, "the connection is gone")
    push(address_of(target), small, model="victim")
    assert_installed(target, checkpoints.tiny(), model="victim")


def test_an_offer_and_an_abort_in_one_write(target, small):
    offer = hostile.offer(hostile.columns(), 1, 4)
    abort = {"code": "interrupted", "transfer": hostile.TRANSFER}
    with attacker(target.port) as peer:
        peer.write(
            frame("Hello", hello(bytes(32)), b"", 0) + frame("Offer", offer, b"", 1) + frame("Abort", abort, b"", 2)
        )
        peer.expect("Hello")
    push(address_of(target), small, model="victim")


def test_offers_that_are_aborted_leave_no_memory_behind(target, small):
    """An ABORT may come while the structure is looked at, or images are made."""
    structure = hostile.columns()
    for number in range(50):
        transfer = (number + 1).to_bytes(16, "big")
        with attacker(target.port) as peer:
            peer.greet().send("Offer", hostile.offer(structure, 1, 4, transfer=transfer))
            peer.expect("StructureWanted")
            peer.write(
                frame("StructureIs", {"transfer": transfer}, structure, 2)
                + frame("Abort", {"code": "interrupted", "transfer": transfer}, b"", 3)
            )
            until(lambda: target.server.models["victim"].incoming is None, "the transfer is over")
    assert target.server.images.budget.used == 0
    push(address_of(target), small, model="victim")


# --- silence, and connections without end ----------------------------------------------------------------------------


def test_silence_before_the_handshake_is_not_waited_out(start_daemon, medium, monkeypatch):
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon()
    with healthy_push(daemon, medium), contextlib.ExitStack() as stack:
        # Only now: the healthy one has had the time that it needed.
        monkeypatch.setattr("shipd.service.server._HANDSHAKE_SECONDS", 0.2)
        silent = [stack.enter_context(attacker(daemon.port)) for _ in range(20)]
        for peer in silent:
            assert peer.drain() == []


def test_a_handshake_byte_by_byte_is_cut_off_in_time(start_daemon, medium, monkeypatch):
    """Each byte shows life; the deadline is for the whole."""
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon()
    with healthy_push(daemon, medium), attacker(daemon.port) as peer:
        monkeypatch.setattr("shipd.service.server._HANDSHAKE_SECONDS", 0.3)

        def trickle():
            slowly = threading.Event()
            for byte in frame("Hello", hello(bytes(32)), b"", 0) * 100:
                peer.write(bytes((byte,)))
                slowly.wait(0.01)

        with pytest.raises(ConnectionError):
            trickle()


def test_half_a_frame_and_then_nothing(start_daemon, small, monkeypatch):
    """A sender that stops in the middle of a frame keeps its model busy until the stall deadline, and no longer."""
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon()
    structure = hostile.columns()
    with attacker(daemon.port) as peer:
        peer.greet().send("Offer", hostile.offer(structure, 1, 4, model="model"))
        peer.expect("StructureWanted")
        peer.send("StructureIs", {"transfer": hostile.TRANSFER}, structure)
        peer.expect("Want")
        peer.write(frame("Data", {"chunk": 0}, bytes(4), peer.sequence)[:-2])
        with pytest.raises(shipd.Busy):
            push(address_of(daemon), small)
        reconfigure(daemon, stall=0.3)
        peer.drain()
    reconfigure(daemon, stall=30.0)
    push(address_of(daemon), small)
    assert_installed(daemon, checkpoints.tiny())


def test_port_of_a_client_that_vanished(daemon, small):
    """Reset in the middle of the handshake, of a question and of an offer."""
    import struct

    for upto in (b"", b"SHPD", frame("Hello", hello(bytes(32)), b"", 0)):
        sock = socket.create_connection(("127.0.0.1", daemon.port))
        sock.sendall(upto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    until(lambda: not daemon.server._peers, "the connections are gone")
    push(address_of(daemon), small)


def test_more_connections_than_are_allowed(start_daemon, medium, small, monkeypatch):
    monkeypatch.setattr("shipd.service.server._MAX_CONNECTIONS", 8)
    daemon = start_daemon()
    with healthy_push(daemon, medium):
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(attacker(daemon.port)).greet() for _ in range(7)]
            with attacker(daemon.port) as peer:
                assert peer.drain() == []
            assert all(peer.send("Ping", {"reply": True}).expect("Ping") for peer in idle)
        until(lambda: len(daemon.server._peers) == 1, "they have gone")
        assert status(address_of(daemon)).models
    push(address_of(daemon), small, label="next")


# --- floods ----------------------------------------------------------------------------------------------------------


LARGE = 128 * 1024


_HUGE: dict[str, object] = {"body_id": 1, "body_size": 64 * MIB, "transfer": hostile.TRANSFER}


FLOODS = {
    "questions": lambda number: frame("StatusRequest", b"\x80", b"", number + 1),
    "verifications": lambda number: frame("VerifyRequest", {"model": "model"}, b"", number + 1),
    "pings": lambda number: frame("Ping", {"reply": True}, b"", number + 1),
    "offers": lambda number: frame(
        "Offer", hostile.offer(b"", 1, 4, transfer=(number + 1).to_bytes(16, "big"), model="nobody"), b"", number + 1
    ),
    "damaged frames": lambda number: frame("Ping", b"\x80", b"", number + 1, header_crc=1),
    "a structure that nobody waits for": lambda number: (
        frame("Body", {"body_id": 1, "offset": number * naive.LEAF}, bytes(naive.LEAF), number + 1)
        if number
        else frame("StructureIs", _HUGE, bytes(naive.LEAF), 1, flags=naive.MORE)
    ),
    "pieces of no body": lambda number: frame("Body", {"body_id": 9, "offset": 0}, bytes(LARGE), number + 1),
}


@pytest.mark.parametrize("what", FLOODS)
def test_floods_whose_answers_nobody_reads_take_no_memory(start_shipd, medium, what):
    # The more models, the longer the answer to a question of forty bytes.
    service = start_shipd(models={"model": "1GiB", **{f"other.{at}": "1GiB" for at in range(100)}})
    push(service.address, medium, label="v0")
    before = memory(service.pid)["RssAnon"]
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(attacker(service.port)).greet() for _ in range(4)]
        floods = [stack.enter_context(Background(flood, peer, FLOODS[what], 1.5, 64 * MIB)) for peer in peers]
        assert status(service.address).models[0].label == "v0", "others are served meanwhile"
        sent = [running.result() for running in floods]
        assert sum(sent) > 100_000, "else this has shown nothing"
        grown = memory(service.pid)["RssAnon"] - before
    assert grown < 24 * MIB, f"the daemon grew by {grown / MIB:.0f} MiB"
    push(service.address, medium, label="v1")


def test_who_does_not_read_is_cut_off_in_the_end(start_daemon, medium, monkeypatch):
    """There is always something left to be written to it, so that a polite close would wait for ever."""
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    monkeypatch.setattr("shipd.transfer.stream._FAREWELL_SECONDS", 0.1)
    daemon = start_daemon(models={"model": "1GiB", **{f"other.{at}": "1GiB" for at in range(100)}})
    with healthy_push(daemon, medium), attacker(daemon.port) as peer:
        monkeypatch.setattr("shipd.service.server._IDLE_SECONDS", 0.3)
        # A small window, so that little is needed to fill it.
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.greet()
        while flood(peer, FLOODS["questions"], 0.2, 64 * MIB):
            pass
        until(lambda: len(daemon.server._peers) == 1, "the daemon has let go of the attacker")


# --- the log ---------------------------------------------------------------------------------------------------------


def test_peers_cannot_write_into_the_log(start_shipd):
    """What a peer says of itself, or sends as a name, stands escaped in one line."""
    service = start_shipd(log_format="text")
    listening = next(line for line in service.err.splitlines() if " listening " in line)
    port = int(listening.partition("address=127.0.0.1:")[2].split()[0])
    evil = "x\n<0>fatal all is lost model=\x1b[31mred\x1b[0m"
    with attacker(port) as peer:
        peer.send("Hello", hello(bytes(32), evil[:60], version_min=2, version_max=2))
        peer.drain()
    with attacker(port) as peer:
        peer.write(b"\x1b[2J\nfatal line\n" * 10)
        peer.drain()
    with attacker(port) as peer:
        peer.greet().send("Ping", pack({"!\n\x1b[0m evil": 1}))
        peer.drain()
    service.terminate()
    assert "\x1b" not in service.err
    assert all(line[:4].isdigit() for line in service.err.splitlines()), service.err
    assert service.err.count("fatal line") == 1, "it is said, escaped"
    assert "evil" in service.err


def test_json_logs_are_one_object_a_line(start_shipd):
    service = start_shipd()
    with attacker(service.port) as peer:
        peer.write(b"GET /\r\n\r\n{}\n")
        peer.drain()
    service.wait_for_log("closing a foreign connection")
    for line in service.err.splitlines():
        assert json.loads(line)["message"]
