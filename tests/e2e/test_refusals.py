"""Pushes that are refused, peers that are none, and attackers: typed errors, and a daemon that is fit afterwards."""

import asyncio
import contextlib
import json
import socket
import threading
from pathlib import Path

import pytest

import shipd
import shipproto.handshake
from tests.support import attacks, checkpoints, hostile, naive
from tests.support.attacks import ATTACKS, STRUCTURES
from tests.support.checkpoints import MIB, assert_installed
from tests.support.fake_daemon import ANSWERS, FakeDaemon, after_hello, speaking
from tests.support.frames import DATA, OFFER
from tests.support.hostile import attacker, flood, frame
from tests.support.naive import hello, pack
from tests.support.processes import TOKEN, Background, address_of, memory, push, shipctl, status
from tests.support.proxy import Proxy, until

# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(start_daemon, tmp_path):
    """A daemon that wants a token."""
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return start_daemon(token_file=str(file))


def test_right_token(guarded, small):
    push(address_of(guarded), small, token=TOKEN)
    assert_installed(guarded, checkpoints.tiny())


def test_token_never_travels(guarded, small):
    with Proxy(guarded.port) as proxy:
        push(proxy.address, small, token=TOKEN)
        assert proxy.frames
        assert not any(TOKEN.encode() in frame.header for frame in proxy.frames)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("wrong horse battery staple", "the token is wrong"),
        (None, "asks for a token and none was given"),
        (TOKEN + "\n", "the token is wrong"),
    ],
)
def test_wrong_or_missing_token(guarded, small, token, said):
    with pytest.raises(shipd.AuthError, match=said) as caught:
        push(address_of(guarded), small, token=token)
    assert caught.value.exit_code == 12
    assert caught.value.peer == address_of(guarded)
    push(address_of(guarded), small, token=TOKEN)


def test_token_that_nobody_asked_for(daemon, small):
    """Who gives a token wants to know whom it talks to, and this daemon cannot prove that."""
    with pytest.raises(shipd.AuthError, match="asks for none"):
        push(address_of(daemon), small, token=TOKEN)
    push(address_of(daemon), small)


def test_a_daemon_that_does_not_know_the_token_is_found_out(small):
    def pretend(peer):
        peer.expect("Hello")
        peer.send("Hello", hello(bytes(32), auth=True))
        peer.expect("Auth")
        peer.send("Auth", {"proof": bytes(32)})

    with FakeDaemon(pretend) as fake, pytest.raises(shipd.AuthError, match="the token is wrong"):
        push(fake.address, small, token=TOKEN)


def test_nothing_is_done_for_who_has_not_proved_the_token(guarded):
    for message in ("StatusRequest", "Ping"):
        with attacker(guarded.port) as peer:
            peer.greet().send(message)
            assert peer.drain() == []


def test_status_needs_the_token_too(guarded):
    with pytest.raises(shipd.AuthError):
        status(address_of(guarded))
    assert status(address_of(guarded), token=TOKEN).models[0].name == "model"


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_unknown_model_names_those_there_are(start_daemon, small):
    daemon = start_daemon(models={"this": "1GiB", "that": "1GiB"})
    with pytest.raises(shipd.UnknownModel, match=r"no model 'other'.*models here: that, this") as caught:
        push(address_of(daemon), small, model="other")
    assert caught.value.exit_code == 10
    assert caught.value.model == "other"
    assert caught.value.transfer_id is not None
    push(address_of(daemon), small, model="this")


@pytest.mark.parametrize("name", ["", "a/b", "../up", "two words", "line\nbreak", "x" * 129, "-flag", "Ünal"])
def test_names_that_cannot_be_one(daemon, small, name):
    with pytest.raises(ValueError, match="cannot be a model name"):
        push(address_of(daemon), small, model=name)
    with pytest.raises(ValueError, match="cannot be a label"):
        push(address_of(daemon), small, label=name)
    push(address_of(daemon), small)


@pytest.mark.parametrize("metadata", [{f"{at}": "x" for at in range(33)}, {"x": "y" * 257}, {"x" * 257: "y"}])
def test_metadata_that_does_not_fit(daemon, small, metadata):
    with pytest.raises(ValueError, match="cannot be offered"):
        push(address_of(daemon), small, metadata=metadata)
    push(address_of(daemon), small)


def test_busy_names_the_push_that_runs(daemon, small, medium):
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=10)
        with Background(push, proxy.address, medium, label="first") as pushing:
            held.wait()
            transfer = status(address_of(daemon)).models[0].transfer
            with pytest.raises(shipd.Busy, match=transfer.transfer_id) as caught:
                push(address_of(daemon), small, label="second")
            assert caught.value.exit_code == 11
            assert transfer.peer in str(caught.value)
            assert "receiving" in str(caught.value)
            held.release()
            assert pushing.result().label == "first"
    assert_installed(daemon, checkpoints.medium(), label="first")
    push(address_of(daemon), small, label="second")


def test_label_of_other_content_is_refused(daemon, small, tmp_path):
    other = checkpoints.write_safetensors(tmp_path / "other.safetensors", checkpoints.tiny(1))
    with Proxy(daemon.port) as proxy:
        push(proxy.address, small, label="v1")
        sent = proxy.count(DATA)
        with pytest.raises(shipd.LabelConflict, match=r"'v1'.*choose another label") as caught:
            push(proxy.address, other, label="v1")
        assert proxy.count(DATA) == sent, "known from the digests alone"
    assert caught.value.exit_code == 12
    assert checkpoints.tiny().digest in str(caught.value)
    assert_installed(daemon, checkpoints.tiny(), label="v1")
    push(address_of(daemon), other, label="v2")


def test_label_of_an_earlier_version_is_refused(daemon, small, tmp_path):
    other = checkpoints.write_safetensors(tmp_path / "other.safetensors", checkpoints.tiny(1))
    third = checkpoints.write_safetensors(tmp_path / "third.safetensors", checkpoints.tiny(2))
    push(address_of(daemon), small, label="v1")
    push(address_of(daemon), other, label="v2")
    with pytest.raises(shipd.LabelConflict):
        push(address_of(daemon), third, label="v1")
    assert_installed(daemon, checkpoints.tiny(1), label="v2")
    push(address_of(daemon), small, label="v1")
    assert_installed(daemon, checkpoints.tiny(), label="v1")


def test_label_of_another_structure_is_refused(daemon, small, medium):
    push(address_of(daemon), small, label="v1")
    with pytest.raises(shipd.LabelConflict):
        push(address_of(daemon), medium, label="v1")
    assert_installed(daemon, checkpoints.tiny(), label="v1")


def test_nothing_to_push(daemon, tmp_path):
    empty = checkpoints.write_safetensors(tmp_path / "empty.safetensors", checkpoints.content([]))
    with pytest.raises(shipd.TensorMismatch, match="no tensors"):
        push(address_of(daemon), empty)
    assert daemon.server.images.budget.used == 0


# --- memory ----------------------------------------------------------------------------------------------------------


def test_larger_than_its_model_may_be(start_daemon, small, medium):
    daemon = start_daemon(models={"model": "1MiB"})
    with Proxy(daemon.port) as proxy:
        with pytest.raises(shipd.MemoryLimit, match=r"1\.0 MB.*12\.6 MB") as caught:
            push(proxy.address, medium)
        assert proxy.count(DATA) == 0
    assert caught.value.exit_code == 12
    push(address_of(daemon), small)
    assert_installed(daemon, checkpoints.tiny())


def test_larger_than_the_daemon_has(start_daemon, small, medium):
    daemon = start_daemon(memory_limit="20MiB")
    with Proxy(daemon.port) as proxy:
        with pytest.raises(shipd.MemoryLimit, match=r"25\.2 MB.*21\.0 MB.*21\.0 MB are left") as caught:
            push(proxy.address, medium)
        assert proxy.count(DATA) == 0
    assert caught.value.exit_code == 12
    assert daemon.server.images.budget.used == 0
    push(address_of(daemon), small)


def test_what_is_left_beside_another_model(start_daemon, small, medium):
    daemon = start_daemon(models={"one": "1GiB", "other": "1GiB"}, memory_limit="30MiB")
    push(address_of(daemon), medium, model="one")
    with pytest.raises(shipd.MemoryLimit, match=r"only 6\.2 MB are left"):
        push(address_of(daemon), medium, model="other")
    assert_installed(daemon, checkpoints.medium(), model="one")
    push(address_of(daemon), small, model="other")


def test_an_absurdly_large_offer_costs_nothing(start_shipd, tmp_path):
    """A sparse file of 4 GiB is offered where 1 GiB fits: known before a byte travels or a page is touched."""
    service = start_shipd(memory_limit="1GiB")
    path = checkpoints.write_sparse(tmp_path / "sparse", tensors=4, size=1 << 30)
    before = memory(service.pid)
    with pytest.raises(shipd.MemoryLimit, match=r"4\.3 GB.*1\.1 GB"):
        push(service.address, path)
    assert memory(service.pid)["RssAnon"] - before["RssAnon"] < 8 * MIB
    assert status(service.address).memory_used == 0


# --- checkpoints that are none ---------------------------------------------------------------------------------------


def _truncated(path: Path) -> None:
    checkpoints.write_safetensors(path, checkpoints.medium())
    with path.open("r+b") as file:
        file.truncate(1 << 20)


def _longer(path: Path) -> None:
    checkpoints.write_safetensors(path, checkpoints.tiny())
    with path.open("ab") as file:
        file.write(b"more")


def _pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00]\x94.")


FILES = {
    "truncated": (_truncated, "truncated"),
    "longer than it says": (_longer, "more than"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "a login page": (lambda path: path.write_text("<!DOCTYPE html><html>Sign in</html>"), "HTML"),
    "a git-lfs pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        "LFS",
    ),
    "zeros": (lambda path: path.write_bytes(bytes(10000)), "zeros"),
    "a pickle": (_pickle, "pickle"),
    "a directory": (lambda path: path.mkdir(), "directory"),
    "nothing at all": (lambda _path: None, "no such file"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_no_checkpoint(daemon, small, tmp_path, what):
    make, said = FILES[what]
    path = tmp_path / "checkpoint"
    make(path)
    with Proxy(daemon.port) as proxy:
        with pytest.raises(shipd.CheckpointError, match=said) as caught:
            push(proxy.address, path)
        assert "checkpoint" in str(caught.value)
        assert proxy.count(OFFER) == 0
    push(address_of(daemon), small)


@pytest.mark.parametrize("what", ["truncated", "a login page", "a pickle", "nothing at all"])
def test_the_same_through_shipctl(daemon, tmp_path, what):
    make, said = FILES[what]
    path = tmp_path / "checkpoint"
    make(path)
    finished = shipctl("push", path, "--to", address_of(daemon), "--model", "model")
    assert finished.code == 1, finished
    assert said in finished.err
    assert "Traceback" not in finished.err
    assert finished.out == ""


@pytest.mark.parametrize(
    "what",
    [
        "import torch; state = {'sparse': torch.eye(3).to_sparse()}",
        "import torch; state = {'quantised': torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}",
        "state = {'a list': [1, 2, 3]}",
        "import torch; state = {'meta': torch.empty(3, device='meta')}",
    ],
)
def test_tensors_that_cannot_be_shipped(daemon, what):
    scope: dict = {}
    with contextlib.suppress(UserWarning):
        exec(what, scope)
    if "state" not in scope:
        pytest.skip("this torch warns about making one")
    state = scope["state"]
    with Proxy(daemon.port) as proxy:
        with pytest.raises(shipd.UnsupportedTensor) as caught:
            push(proxy.address, state)
        assert proxy.count(OFFER) == 0
    assert next(iter(state)) in str(caught.value)
    assert caught.value.exit_code == 12


# --- what answers is no shipd ----------------------------------------------------------------------------------------

FOREIGN = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "it speaks HTTP"),
    "TLS": (bytes.fromhex("15030100020246"), "it speaks TLS"),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", "it speaks SSH"),
    "SMTP": (b"220 mail.example.org ESMTP\r\n", "it began with b'220 mail"),
    "garbage": (bytes(range(255, 155, -1)), "it began with"),
    "a terminal's escape": (b"\x1b[2J\x1b]0;owned\x07" * 5, r"it began with b'\\x1b"),
}


@pytest.mark.parametrize("protocol", FOREIGN)
def test_what_answers_speaks_another_protocol(small, protocol):
    text, said = FOREIGN[protocol]
    with FakeDaemon(speaking(text)) as fake, pytest.raises(shipd.PeerError, match=said) as caught:
        push(fake.address, small)
    assert fake.address in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_what_answers_hangs_up(small):
    with FakeDaemon(lambda _peer: None) as fake, pytest.raises(shipd.ConnectError, match="closed the connection"):
        push(fake.address, small)


def test_shipctl_at_a_web_server(small):
    with FakeDaemon(speaking(FOREIGN["HTTP"][0])) as fake:
        finished = shipctl("push", small, "--to", fake.address, "--model", "model")
    assert finished.code == 1, finished
    assert "it speaks HTTP. Check the host and the port." in finished.err
    assert "Traceback" not in finished.err


@pytest.mark.parametrize(("low", "high", "who"), [(2, 3, "this side")])
def test_a_newer_daemon(small, low, high, who):
    def answer(peer):
        peer.expect("Hello")
        peer.send("Hello", hello(bytes(32), "shipd/9", version_min=low, version_max=high))

    with FakeDaemon(answer) as fake, pytest.raises(shipd.PeerError, match=rf"shipd/9 speaks protocol .*update {who}"):
        push(fake.address, small)


def test_a_newer_sender_is_told_why(daemon, small):
    with attacker(daemon.port) as peer:
        peer.send("Hello", hello(bytes(32), "shipd/9", version_min=2, version_max=7))
        abort = peer.expect("Abort").fields
        assert abort["code"] == "version"
        assert "shipd/9 speaks protocol 2 to 7" in abort["message"]
        assert peer.drain() == []
    push(address_of(daemon), small)


def test_an_older_sender_meets_a_newer_daemon(start_daemon, small, monkeypatch):
    """This release as the older one: shipctl is a process of its own, and the daemon here speaks version 2 only."""
    monkeypatch.setattr(shipproto.handshake, "PROTOCOL_VERSION", 2)
    daemon = start_daemon()
    finished = shipctl("push", small, "--to", address_of(daemon), "--model", "model")
    assert finished.code == 1, finished
    assert "speaks protocol 2 to 2, this side 1: update this side" in finished.err


def test_an_older_daemon_meets_a_newer_sender(start_shipd, small, monkeypatch):
    service = start_shipd()
    monkeypatch.setattr(shipproto.handshake, "PROTOCOL_VERSION", 2)
    with pytest.raises(shipd.PeerError, match="speaks protocol 1 to 1, this side 2: update the other side"):
        push(service.address, small)
    (entry,) = service.logged("closing a connection")
    assert "speaks protocol 2 to 2" in entry["why"]


def test_what_a_later_release_may_say_is_ignored(daemon):
    """Unknown fields, unknown capabilities and a wider range of versions are no reason to part."""
    with attacker(daemon.port) as peer:
        peer.greet(capabilities=["teleport"], version_max=9, zeta={"later": [1, 2]})
        peer.send("StatusRequest", {"later": True})
        peer.expect("StatusIs")


@pytest.mark.parametrize("what", ANSWERS)
def test_a_daemon_that_breaks_the_protocol(small, what):
    with FakeDaemon(after_hello(ANSWERS[what])) as fake, pytest.raises(shipd.ShipError) as caught:
        push(fake.address, small, stall=5)
    assert isinstance(caught.value, shipd.PeerError), f"{caught.value!r}"
    assert fake.address in str(caught.value)


def test_an_abort_of_a_later_release(small):
    def answer(peer, offered):
        peer.send("Abort", {"code": "not-invented-yet", "message": "why", "transfer": offered["transfer"]})

    with FakeDaemon(after_hello(answer)) as fake, pytest.raises(shipd.TransferFailed, match="why"):
        push(fake.address, small)


# --- attackers -------------------------------------------------------------------------------------------------------


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


def test_silence_before_the_handshake_is_not_waited_out(start_daemon, medium, monkeypatch):
    monkeypatch.setattr("shipd.service.server._HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon()
    with healthy_push(daemon, medium), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(attacker(daemon.port)) for _ in range(20)]
        for peer in silent:
            assert peer.drain() == []


def test_a_handshake_byte_by_byte_is_cut_off_in_time(start_daemon, medium, monkeypatch):
    """Each byte shows life; the deadline is for the whole."""
    monkeypatch.setattr("shipd.service.server._HANDSHAKE_SECONDS", 0.3)
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon()
    with healthy_push(daemon, medium), attacker(daemon.port) as peer:

        def trickle():
            slowly = threading.Event()
            for byte in frame("Hello", hello(bytes(32)), b"", 0) * 100:
                peer.write(bytes((byte,)))
                slowly.wait(0.01)

        with pytest.raises(ConnectionError):
            trickle()


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
    monkeypatch.setattr("shipd.service.server._IDLE_SECONDS", 0.3)
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    monkeypatch.setattr("shipd.transfer.stream._FAREWELL_SECONDS", 0.1)
    daemon = start_daemon(models={"model": "1GiB", **{f"other.{at}": "1GiB" for at in range(100)}})
    with healthy_push(daemon, medium), attacker(daemon.port) as peer:
        # A small window, so that little is needed to fill it.
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.greet()
        while flood(peer, FLOODS["questions"], 0.2, 64 * MIB):
            pass
        until(lambda: len(daemon.server._peers) == 1, "the daemon has let go of the attacker")


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


def test_half_a_frame_and_then_nothing(start_daemon, small, monkeypatch):
    """A sender that stops in the middle of a frame keeps its model busy until the stall deadline, and no longer."""
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon(stall=0.3)
    structure = hostile.columns()
    with attacker(daemon.port) as peer:
        peer.greet().send("Offer", hostile.offer(structure, 1, 4, model="model"))
        peer.expect("StructureWanted")
        peer.send("StructureIs", {"transfer": hostile.TRANSFER}, structure)
        peer.expect("Want")
        peer.write(frame("Data", {"chunk": 0}, bytes(4), peer.sequence)[:-2])
        with pytest.raises(shipd.Busy):
            push(address_of(daemon), small)
        peer.drain()
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


def test_client_object_survives_a_refusal(daemon, small, medium):
    async def converse():
        async with shipd.connect(address_of(daemon)) as client:
            with pytest.raises(shipd.UnknownModel):
                await client.push(small, model="nobody")
            with pytest.raises(shipd.CheckpointError):
                await client.push("/nowhere", model="model")
            with pytest.raises(ValueError, match="label"):
                await client.push(small, model="model", label="a b")
            await client.push(medium, model="model", label="fine")
            with pytest.raises(shipd.LabelConflict):
                await client.push(small, model="model", label="fine")
            return await client.status()

    assert asyncio.run(converse()).models[0].label == "fine"
