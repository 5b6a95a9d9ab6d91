"""Pushes that are refused, with typed errors: for their token, model, name, label, size or checkpoint."""

import asyncio
import contextlib
from pathlib import Path

import pytest

import shipd
from tests.support import checkpoints
from tests.support.checkpoints import MIB, assert_installed
from tests.support.fake_daemon import FakeDaemon
from tests.support.frames import DATA, OFFER
from tests.support.hostile import attacker
from tests.support.naive import hello
from tests.support.offers import offer
from tests.support.processes import TOKEN, Background, address_of, memory, push, shipctl, status
from tests.support.proxy import Proxy

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
    with pytest.raises(shipd.UnknownModel, match=r"no model 'other'.*models here: that, this") as caught:
        offer(address_of(daemon), small, model="other")
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
