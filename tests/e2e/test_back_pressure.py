"""Peers that ask more than they read, all at once or for ever: what the daemon does for them, and keeps, is bounded."""

import contextlib
import gc
import os
import socket

import msgpack
import pytest

import shipd
from shipd.service.incoming import Incoming
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from tests.support import checkpoints, hostile
from tests.support.by_hand import attached
from tests.support.checkpoints import MIB
from tests.support.hostile import Peer, attacker, frame
from tests.support.naive import Tensor, encode_structure
from tests.support.offers import offer
from tests.support.processes import push, status
from tests.support.proxy import until

SMALL = (Tensor("weight", "float32", (4,)),)
SPARSE = (Tensor("layer.000.weight", "float32", (24 * MIB,)),)


@pytest.fixture
def unpushed(start_daemon):
    """A daemon with no models but those that are attached."""
    return start_daemon(models={})


def _asks(daemon: shipd.Daemon, stack: contextlib.ExitStack) -> Peer:
    return stack.enter_context(attacker(daemon.port)).greet()


def _owed(daemon: shipd.Daemon) -> int:
    return daemon.server._verifier._unanswered.total()


def test_however_many_ask_the_processes_read_back_once(unpushed):
    """Found here: each question had every process digest all of its parameters."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(attached(unpushed.config.socket, SMALL))
        first, *others = [_asks(unpushed, stack) for _ in range(4)]
        first.send("VerifyRequest", {"model": "model"})
        reading = process.expect("DigestRequest").fields
        for peer in others:
            for _ in range(16):
                peer.send("VerifyRequest", {"model": "model"})
        until(lambda: _owed(unpushed) == 49, "all have asked")
        process.send("DigestIs", {"digest": b"1" * 16, **reading})
        assert b"31" * 16 in first.expect("VerifyIs").payload
        # One more, for all of them: it begins after they have asked.
        process.send("DigestIs", {"digest": b"2" * 16, **process.expect("DigestRequest").fields})
        for peer in others:
            assert all(b"32" * 16 in peer.expect("VerifyIs").payload for _ in range(16))
        process.send("Ping", {"reply": True})
        answer = process.receive()
        assert answer is not None
        assert answer.name == "Ping", "nobody has to read a third time"
        assert not _owed(unpushed)
        assert not unpushed.server._verifier._running


def test_one_connection_cannot_ask_for_ever(unpushed):
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(attached(unpushed.config.socket, SMALL))
        greedy, modest = (_asks(unpushed, stack) for _ in range(2))
        modest.send("VerifyRequest", {"model": "model"})
        reading = process.expect("DigestRequest").fields
        for _ in range(17):
            greedy.send("VerifyRequest", {"model": "model"})
        assert greedy.drain() == []
        process.send("DigestIs", {"digest": b"1" * 16, **reading})
        modest.expect("VerifyIs")
        process.send("DigestIs", {"digest": b"1" * 16, **process.expect("DigestRequest").fields})
        until(lambda: not _owed(unpushed), "nothing is kept of who has gone")


def test_a_process_that_reads_nothing_is_evicted_before_its_messages_pile_up(unpushed, tmp_path, monkeypatch):
    """Found here: one that is stopped while it copies ahead was told of every 16 MiB of every push, for ever."""
    monkeypatch.setattr("shipd.service.session._MAX_BACKLOG", 4096)
    monkeypatch.setattr("shipd.service.rollout._ARRIVING_CHUNKS", 1)
    most = []
    tell = shipd.service.session.Session.arriving

    def telling(session, *arguments):
        tell(session, *arguments)
        most.append(session.peer.backlog)

    monkeypatch.setattr("shipd.service.session.Session.arriving", telling)
    path = checkpoints.write_sparse(tmp_path / "v1", tensors=1, size=96 * MIB)
    with attached(unpushed.config.socket, SPARSE, pinned=True) as process:
        process.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for peer in unpushed.server._peers:
            peer._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        receipt = push(f"127.0.0.1:{unpushed.port}", path, label="v1")
        assert receipt.stale == (str(os.getpid()),), "it is named"
        assert receipt.swapped == 0
        assert 4096 < max(most) < 4096 + 512
        assert len(most) < 192, "it was not told of all chunks"
        (model,) = status(f"127.0.0.1:{unpushed.port}").models
        assert [each.state for each in model.processes] == ["stale"]
        # It hears why when it reads again.
        assert "Evicted" in process.drain()


def test_a_process_that_reads_nothing_and_is_asked_to_read_back(unpushed, monkeypatch):
    monkeypatch.setattr("shipd.service.session._MAX_BACKLOG", -1)
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(attached(unpushed.config.socket, SMALL))
        peer = _asks(unpushed, stack)
        peer.send("VerifyRequest", {"model": "model"})
        assert b"is gone" in peer.expect("VerifyIs").payload
        assert process.drain() == ["Evicted"]


def test_a_local_client_that_does_not_read_its_answers_is_not_listened_to(start_daemon):
    """Found here: over the Unix socket they piled up in the daemon."""
    daemon = start_daemon(models={f"model.{at}": "1GiB" for at in range(100)})
    with attacker(daemon.config.socket) as peer:
        peer.greet()
        (served,) = daemon.server._peers
        sent = hostile.flood(peer, lambda at: frame("StatusRequest", b"\x80", b"", at + 1), 1.5, 64 * MIB)
        assert sent > 20_000, "else this has shown nothing"
        assert 100_000 < served.backlog < MIB
        assert len(status(f"127.0.0.1:{daemon.port}").models) == 100, "others are served meanwhile"
        # Whoever reads again is answered again.
        peer.sock.settimeout(hostile.DEADLINE)
        assert [peer.expect("StatusIs").name for _ in range(200)] == ["StatusIs"] * 200


def _living(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_nothing_is_kept_of_a_push_but_how_it_ended(start_daemon, tmp_path):
    """Found here: the last 256 pushes kept their digests and layouts, a megabyte each for a model of many tensors."""
    before = _living(LeafDigests), _living(Layout), _living(Incoming)
    daemon = start_daemon()
    address = f"127.0.0.1:{daemon.port}"
    paths = [checkpoints.write_safetensors(tmp_path / f"v{at}", checkpoints.tiny(at)) for at in range(10)]
    for path in paths:
        push(address, path)
    with attached(daemon.config.socket, SMALL, model="served"):
        for _ in range(4):
            with pytest.raises(shipd.TensorMismatch):
                offer(address, paths[0], model="served")
        until(lambda: len(daemon.server._pushes._ended) == 14, "the last one is over")
        after = _living(LeafDigests), _living(Layout), _living(Incoming)
    # One for each image that holds a version, one for each model; and what the last push, which may have its thread
    # still, has of its own in this process.
    assert after[0] - before[0] <= 3 + 1
    assert after[1] - before[1] <= 2 + 1
    assert after[2] - before[2] <= 1


def test_a_sender_that_comes_back_is_told_of_the_first_mismatches(start_daemon):
    daemon = start_daemon(models={})
    rows = tuple(Tensor(f"tensor.{at:04}", "float32", (1,)) for at in range(500))
    structure = encode_structure(rows)
    offered = hostile.offer(structure, 500, 2000, model="model")
    with attached(daemon.config.socket, SMALL):
        counts: list[int] = []
        for _ in range(2):
            with attacker(daemon.port) as peer:
                peer.greet().send("Offer", offered)
                if not counts:
                    peer.expect("StructureWanted")
                    peer.message("StructureIs", {"transfer": hostile.TRANSFER}, structure)
                abort = peer.expect("Abort")
                assert abort.fields["code"] == "mismatch"
                counts.append(len(msgpack.unpackb(abort.payload)))
    assert counts == [501, 100]
