"""Peers that are no shipd, or a shipd of another release, or one that breaks the protocol: the error says which."""

import pytest

import shipd
import shipproto.handshake
from tests.support.fake_daemon import ANSWERS, FakeDaemon, after_hello, speaking
from tests.support.hostile import attacker
from tests.support.naive import hello
from tests.support.processes import address_of, push, shipctl

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
    entry = service.wait_for_log("closing a connection")
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
