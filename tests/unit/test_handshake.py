"""shipproto.handshake on its own; whole exchanges are in test_connection and in the vectors."""

import pytest

from shipproto.errors import AbortCode, AuthFailed, BadPrelude, UnexpectedMessage, VersionMismatch
from shipproto.handshake import Handshake, Step
from shipproto.headers import encode_header
from shipproto.messages import Abort, Auth, Hello, Message, Ping
from tests.support import naive
from tests.support.link import nonce

TOKEN = b"sixteen or more bytes"


def side(*, initiator: bool, token: bytes | None = None, seed: int | None = None) -> Handshake:
    agent = "left" if initiator else "right"
    return Handshake(initiator=initiator, nonce=nonce(seed or 100 * initiator), agent=agent, token=token)


def give(to: Handshake, message: Message) -> list[Message]:
    return to.receive(message, encode_header(message))


def exchange(left: Handshake, right: Handshake) -> list[Message]:
    """Everything that is said, in order."""
    opening = left.opening()
    assert opening is not None
    assert right.opening() is None
    said: list[Message] = []
    waiting: list[tuple[Handshake, Message]] = [(right, opening)]
    while waiting:
        to, message = waiting.pop(0)
        said.append(message)
        waiting += [(left if to is right else right, reply) for reply in give(to, message)]
    return said


def test_without_a_token() -> None:
    left, right = side(initiator=True), side(initiator=False)
    assert [type(message) for message in exchange(left, right)] == [Hello, Hello]
    assert left.step is right.step is Step.DONE
    assert left.peer is not None
    assert right.peer is not None
    assert (left.peer.agent, right.peer.agent) == ("right", "left")
    assert not left.peer.auth


def test_with_a_token() -> None:
    left, right = side(initiator=True, token=TOKEN), side(initiator=False, token=TOKEN)
    hello, answer, first, second = exchange(left, right)
    assert left.step is right.step is Step.DONE
    assert isinstance(hello, Hello)
    assert isinstance(answer, Hello)
    assert not hello.auth
    assert answer.auth
    theirs = {"agent": "left", "nonce": nonce(100), "version_max": 1, "version_min": 1}
    ours = {"agent": "right", "auth": True, "nonce": nonce(0), "version_max": 1, "version_min": 1}
    assert first == Auth(proof=naive.proof(TOKEN, "initiator", theirs, ours))
    assert second == Auth(proof=naive.proof(TOKEN, "acceptor", theirs, ours))
    for message in (hello, answer, first, second):
        assert TOKEN not in encode_header(message)


@pytest.mark.parametrize("token", [TOKEN + b"!", TOKEN[:-1], b"", TOKEN.upper()])
def test_another_token(token: bytes) -> None:
    left, right = side(initiator=True, token=token), side(initiator=False, token=TOKEN)
    with pytest.raises(AuthFailed, match="the token is wrong"):
        exchange(left, right)
    assert right.step is Step.EXPECT_AUTH
    error = AuthFailed("the token is wrong")
    assert right.last_words(error) == [Abort(code=AbortCode.AUTH, message="the token is wrong")]
    with pytest.raises(AuthFailed, match="the token is wrong"):
        give(left, right.last_words(error)[0])


def test_an_acceptor_that_does_not_know_the_token() -> None:
    left, right = side(initiator=True, token=TOKEN), side(initiator=False, token=b"another")
    hello = left.opening()
    assert hello is not None
    (answer,) = give(right, hello)
    (first,) = give(left, answer)
    for proof in (bytes(32), first.proof):  # type: ignore[attr-defined]
        with pytest.raises(AuthFailed):
            give(left, Auth(proof=proof))
    assert left.step is Step.EXPECT_AUTH


def test_one_side_has_no_token() -> None:
    with pytest.raises(AuthFailed, match="asks for a token and none was given"):
        exchange(side(initiator=True), side(initiator=False, token=TOKEN))
    with pytest.raises(AuthFailed, match="it cannot prove who it is"):
        exchange(side(initiator=True, token=TOKEN), side(initiator=False))


def test_a_proof_is_worth_nothing_on_another_connection() -> None:
    proofs = []
    for seed in (3, 4):
        left, right = side(initiator=True, token=TOKEN), side(initiator=False, token=TOKEN, seed=seed)
        proofs.append(exchange(left, right)[2])
    assert proofs[0] != proofs[1]
    left, right = side(initiator=True, token=TOKEN), side(initiator=False, token=TOKEN, seed=4)
    hello = left.opening()
    assert hello is not None
    give(right, hello)
    with pytest.raises(AuthFailed):
        give(right, proofs[0])


def test_the_proof_covers_fields_that_this_release_does_not_know() -> None:
    """Found here: the proof covered what was understood of a HELLO, so that a newer peer with a token was refused."""
    right = side(initiator=False, token=TOKEN)
    theirs = {"agent": "new", "nonce": nonce(7), "version_max": 2, "version_min": 1, "zone": "eu"}
    hello = Hello(agent="new", nonce=nonce(7), version_max=2, version_min=1)
    (answer,) = right.receive(hello, naive.pack(theirs))
    ours = {"agent": "right", "auth": True, "nonce": nonce(0), "version_max": 1, "version_min": 1}
    assert encode_header(answer) == naive.pack(ours)
    give(right, Auth(proof=naive.proof(TOKEN, "initiator", theirs, ours)))
    assert right.step is Step.DONE


@pytest.mark.parametrize(("low", "high"), [(2, 2), (2, 9), (0xFFFF, 0xFFFF)])
def test_no_version_in_common(low: int, high: int) -> None:
    hello = Hello(agent="other", nonce=nonce(1), version_max=high, version_min=low)
    right = side(initiator=False)
    says = f"other speaks protocol {low} to {high}, this side 1: update this side"
    with pytest.raises(VersionMismatch, match=says) as caught:
        give(right, hello)
    own, abort = right.last_words(caught.value)
    assert isinstance(own, Hello)
    assert abort == Abort(code=AbortCode.VERSION, message=str(caught.value))
    left = side(initiator=True)
    with pytest.raises(VersionMismatch):
        give(left, hello)
    assert left.last_words(caught.value) == []
    with pytest.raises(VersionMismatch):
        give(left, abort)


def test_an_older_peer_is_to_be_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shipproto.handshake.PROTOCOL_VERSION", 3)
    with pytest.raises(VersionMismatch, match="the peer speaks protocol 1 to 2, this side 3: update the other side"):
        give(side(initiator=False), Hello(nonce=nonce(1), version_max=2, version_min=1))


@pytest.mark.parametrize("initiator", [True, False])
def test_anything_else_is_unexpected(initiator: bool) -> None:
    for message in (Ping(), Auth(proof=bytes(32)), Abort(code="busy"), *([] if initiator else [Abort(code="auth")])):
        with pytest.raises(UnexpectedMessage, match=type(message).__name__):
            give(side(initiator=initiator), message)
    done = side(initiator=False)
    hello = Hello(nonce=nonce(1), version_max=1, version_min=1)
    give(done, hello)
    for message in (hello, Auth(proof=bytes(32))):
        with pytest.raises(UnexpectedMessage):
            give(done, message)


def test_last_words_are_few() -> None:
    assert side(initiator=False).last_words(BadPrelude("damaged")) == []
    assert side(initiator=True).last_words(AuthFailed("x")) == []


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_nonce_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Handshake(initiator=True, nonce=bytes(size), agent="", token=None)
