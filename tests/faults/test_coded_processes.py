"""Processes that are killed, cancelled or crippled while runs are encoded and decoded."""

import asyncio
import os
import threading
from typing import Any

import pytest

import shipd
import shipd.client.encoding
import shipd.service.decoding
from shipd.bases.store import kept_versions
from tests.support.checkpoints import MIB, as_state_dict, assert_installed, write_safetensors
from tests.support.coded_by_hand import CodedSender
from tests.support.exact import right_answer, state
from tests.support.frames import CODED, PRELUDE
from tests.support.processes import ROOT, Background, Helper, address_of, memory, push, shipctl, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import both
from tests.support.successive import first, following, push_small, used

pytest_plugins = [
    *("tests.support.successive", "tests.support.upgrades", "tests.support.serving_process", "tests.support.patience"),
]

pytestmark = pytest.mark.usefixtures("fresh_bases", "short_backoff", "short_goodbye")

V0 = first(24)
V1 = following(V0, learning_rate=3e-4)


@pytest.fixture
def daemon(start_daemon):
    """A daemon that has V0, which was pushed from here."""
    daemon = start_daemon()
    push_small(address_of(daemon), as_state_dict(V0), label="v0")
    return daemon


# --- killed ----------------------------------------------------------------------------------------------------------


def _push_with_base(report, address, path, base, label):
    import asyncio

    import shipd

    async def main():
        async with shipd.connect(address) as client:
            receipt = await client.push(path, model="model", label=label, base=base, prefer="bytes")
            report([receipt.bytes_sent, receipt.base, [use.codec for use in receipt.codecs]])

    asyncio.run(main())


def test_a_sender_that_is_killed_halfway(daemon, proxy, tmp_path):
    paths = [write_safetensors(tmp_path / f"{at}", version) for at, version in enumerate((V0, V1))]
    held = proxy.hold(kind=CODED, nth=5)
    with Helper(_push_with_base, proxy.address, paths[1], paths[0], "killed") as sender:
        held.wait()
        sender.kill()
        held.release()
        proxy.sever_all()
        incoming = daemon.server.models["model"].incoming
        until(lambda: not incoming.receiver.attended, "the daemon sees that the sender is gone")
    assert_installed(daemon, V0, label="v0")
    with Helper(_push_with_base, address_of(daemon), paths[1], paths[0], "v1") as sender:
        bytes_sent, base, codecs = sender.next()
    assert bytes_sent < V1.nbytes
    assert base == V0.digest
    assert codecs
    assert incoming.receiver.error.code == "superseded"
    assert_installed(daemon, V1, label="v1")


def test_a_sender_that_is_gone_while_its_runs_are_decoded(daemon, proxy, monkeypatch):
    """The image is not given to anybody else before nothing writes to it any more."""
    decode = shipd.service.decoding.Target.decode
    go_on, decoding = threading.Event(), threading.Event()
    hers: list[bool] = []

    def slowly(self, run, base):
        hers.append(True)
        if len(hers) == 1:
            decoding.set()
            assert go_on.wait(20)
        return decode(self, run, base)

    monkeypatch.setattr("shipd.service.decoding.Target.decode", slowly)
    with CodedSender(daemon.port, V1, V0, model="model") as sender:
        sender.right("duh", 0, 1)
        assert decoding.wait(20)
    model = daemon.server.models["model"]
    incoming = model.incoming
    until(lambda: not incoming.receiver.attended, "the daemon sees that the sender is gone")
    other = following(V0, seed=30)
    with Background(push_small, address_of(daemon), as_state_dict(other), label="other") as pushing:
        until(lambda: incoming.receiver.ended or pushing.done, "the first transfer is over")
        assert model.incoming is incoming, "it has the image until nothing writes to it"
        go_on.set()
        receipt = pushing.result()
    assert receipt.digest == other.digest
    assert_installed(daemon, other, label="other")


@pytest.mark.parametrize("nth", [1, 6])
def test_a_daemon_that_is_killed_while_it_decodes(start_shipd, out_of_patience, nth):
    here = start_shipd()
    push_small(here.address, as_state_dict(V0), label="v0")
    with Proxy(here.port) as proxy:
        held = proxy.hold(kind=CODED, nth=nth)
        with Background(push_small, proxy.address, as_state_dict(V1), label="v1") as pushing:
            held.wait()
            proxy.refuse()
            here.kill()
            held.release()
            out_of_patience()
            assert isinstance(pushing.error(20), shipd.ConnectError)
    there = start_shipd(directory=here.directory)
    receipt = push_small(there.address, as_state_dict(V1), label="v1")
    assert receipt.base == ""
    (model,) = status(there.address).models
    assert model.digest == V1.digest


@both
def test_a_served_model_after_a_push_that_ended_halfway(start_daemon, serve, mode, out_of_patience):
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, version=0, mode=mode, kind="wide")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=CODED, nth=1)
        with Background(push_small, proxy.address, state(1, "wide"), label="v1") as pushing:
            held.wait()
            proxy.refuse()
            proxy.sever_all()
            out_of_patience()
            assert isinstance(pushing.error(20), shipd.ConnectError)
    assert process.ask("answer") == right_answer(0, "wide")
    receipt = push_small(address_of(daemon), state(1, "wide"), label="v1")
    process.ask("await_label", "v1")
    assert process.ask("answer") == right_answer(1, "wide")
    assert process.ask("verify") == receipt.digest


# --- cancelled -------------------------------------------------------------------------------------------------------


def test_cancelled_while_a_run_is_encoded(daemon, monkeypatch):
    """The threads that encode end with the push, and the base is let go of."""
    encode = shipd.client.encoding._Worker.encode
    encoding, go_on = threading.Event(), threading.Event()

    def slowly(self, codec, chunks):
        encoding.set()
        assert go_on.wait(20)
        return encode(self, codec, chunks)

    monkeypatch.setattr("shipd.client.encoding._Worker.encode", slowly)

    async def main():
        async with shipd.connect(address_of(daemon)) as client:
            pushing = asyncio.create_task(client.push(as_state_dict(V1), model="model", label="v1", prefer="bytes"))
            await asyncio.to_thread(encoding.wait, 20)
            pushing.cancel()
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await pushing

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "shipd encoder"]
    assert_installed(daemon, V0, label="v0")
    monkeypatch.undo()
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert receipt.base == V0.digest
    assert_installed(daemon, V1, label="v1")


def test_cancelled_while_the_daemon_takes_nothing(daemon, proxy):
    held = proxy.hold(kind=CODED, nth=0)

    async def main():
        async with shipd.connect(proxy.address) as client:
            pushing = asyncio.create_task(client.push(as_state_dict(V1), model="model", label="v1", prefer="bytes"))
            await asyncio.to_thread(held.wait)
            pushing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pushing

    asyncio.run(main())
    held.release()
    assert_installed(daemon, V0, label="v0")
    push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert_installed(daemon, V1, label="v1")


def test_a_codec_that_fails_ends_the_push_and_nothing_else(daemon, monkeypatch):
    """A bug, that is: it is raised where the push was called, and no thread is left behind."""

    def fail(self, codec, chunks):
        raise RuntimeError("a bug")

    monkeypatch.setattr("shipd.client.encoding._Worker.encode", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert_installed(daemon, V0, label="v0")
    monkeypatch.undo()
    push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert_installed(daemon, V1, label="v1")


def test_a_decoder_that_fails_has_the_chunks_sent_as_they_are(daemon, monkeypatch, caplog):
    """A bug as well: the daemon says so in its log, and gets what it needs."""
    decode = shipd.service.decoding.Target.decode
    failures: list[range] = []

    def fail(self, run, base):
        if len(failures) < 2:
            failures.append(run.chunks)
            raise MemoryError
        return decode(self, run, base)

    monkeypatch.setattr("shipd.service.decoding.Target.decode", fail)
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert receipt.frames_resent == 2
    assert used(receipt)["raw"].runs == sum(map(len, failures))
    assert [record.message for record in caplog.records].count("decoding failed unexpectedly") == 2
    # A traceback holds on to the images.
    caplog.clear()
    assert_installed(daemon, V1, label="v1")


# --- crippled --------------------------------------------------------------------------------------------------------

_SHIM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "numba" or name.startswith("numba."):
            raise OSError(1, "not permitted")

sys.meta_path.insert(0, Refuse())
"""


def _push_steps(report, address, paths):
    import asyncio

    import shipd
    from shipd.codecs import compiled

    async def main():
        async with shipd.connect(address) as client:
            for at, path in enumerate(paths):
                receipt = await client.push(path, model="model", label=f"v{at}", prefer="bytes")
                report([receipt.digest, receipt.bytes_sent, [use.codec for use in receipt.codecs]])
                compiled.warm_up()
        report(compiled.why_not())

    asyncio.run(main())


def test_without_numba_on_either_side_the_same_bytes_travel(start_shipd, tmp_path):
    """What else numba may raise makes no difference: tests/unit/codecs/test_compiled.py."""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(_SHIM)
    versions = [first(6)]
    for seed in range(3):
        versions.append(following(versions[-1], seed=seed))
    paths = [str(write_safetensors(tmp_path / f"v{at}", version)) for at, version in enumerate(versions)]
    told: dict[bool, list[Any]] = {}
    for crippled in (False, True):
        env = _with_path(tmp_path / "shim") if crippled else {}
        with start_shipd(env=env) as service:
            with Helper(_push_steps, service.address, paths, env=env) as sender:
                told[crippled] = [sender.next(60) for _ in paths]
                assert bool(sender.next(60)) is crippled
            said = status(service.address)
            assert said.models[0].digest == versions[-1].digest
            if crippled:
                until(lambda: _codecs(service).startswith("numpy"), "the daemon says what it does without")
                assert "slowly than they could be, by numpy (" in shipctl("status", "--to", service.address).out
    assert told[False] == told[True]
    assert [digest for digest, *_ in told[True]] == [version.digest for version in versions]


def _codecs(service):
    return status(service.address).codecs


def _with_path(directory):
    """Modules of this directory come before all others."""
    return {"PYTHONPATH": os.pathsep.join([str(directory), *(str(ROOT / part) for part in ("protocol", "daemon", ""))])}


# --- how much is kept ------------------------------------------------------------------------------------------------


def test_runs_that_wait_to_be_decoded_hold_the_sender_back(daemon, monkeypatch):
    """Payloads of more than the daemon keeps: it reads no further until some are decoded."""
    decode = shipd.service.decoding.Target.decode
    go_on = threading.Event()

    def slowly(self, run, base):
        assert go_on.wait(20)
        return decode(self, run, base)

    monkeypatch.setattr("shipd.service.decoding.Target.decode", slowly)
    most: list[int] = []
    submit = shipd.service.decoding.Decoding.submit

    def watched(self, run):
        submit(self, run)
        most.append(self._waiting)

    monkeypatch.setattr("shipd.service.decoding.Decoding.submit", watched)
    version = first(24, seed=8)
    state_dict = as_state_dict(version)
    with Proxy(daemon.port) as proxy, Background(push_small, proxy.address, state_dict, label="new") as running:
        until(lambda: bool(most) and most[-1] > shipd.service.decoding.MOST_WAITING, "enough waits")
        until(lambda: proxy.count(CODED) > len(most), "more has come to the proxy than is read")
        go_on.set()
        receipt = running.result()
    assert max(most) <= shipd.service.decoding.MOST_WAITING + 512 * 1024 + PRELUDE
    assert receipt.digest == version.digest
    assert_installed(daemon, version, label="new")


def test_thousands_of_runs_in_flight_take_no_memory(start_shipd):
    service = start_shipd(models={"model": "1GiB", "victim": "1GiB"})
    version = first(48)
    push(service.address, as_state_dict(version), model="victim", label="v0")
    after = following(version, learning_rate=1e-3)
    with CodedSender(service.port, after, version) as sender:
        payloads = [(at, sender.payload("duh", at, 1)) for at in range(sender.chunks)]
        before = memory(service.pid)
        for at, payload in payloads:
            sender.coded(5, at, 1, payload)
            # The same again, which is thrown away: a thousand times.
            for _ in range(20):
                sender.coded(5, at, 1, payload[:1000])
        sender.finish().commit()
        grown = memory(service.pid)["RssAnon"] - before["RssAnon"]
    assert grown < 160 * MIB + 16 * MIB, f"the daemon grew by {grown / MIB:.0f} MiB"
    (victim,) = [model for model in status(service.address).models if model.name == "victim"]
    assert victim.digest == after.digest


def test_the_store_is_not_what_a_fork_inherits(daemon):
    """A child has nothing in memory, and its parent has."""
    assert kept_versions.memory_used
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, str(kept_versions.memory_used).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    assert os.read(read, 100) == b"0"
    os.close(read)
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert receipt.base == V0.digest
