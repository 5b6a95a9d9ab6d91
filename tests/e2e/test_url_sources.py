"""Pushes of checkpoints by URL: from web servers of every kind, from S3 and from fsspec's memory."""

import asyncio
import json
import math
import signal
import threading

import fsspec
import pytest

import shipd
from tests.e2e.test_push import _push_and_watch
from tests.support import checkpoints
from tests.support.checkpoints import MIB, Content, assert_installed, minilm_content
from tests.support.containers import CONTAINERS
from tests.support.file_servers import FileServer, file_of
from tests.support.frames import PING
from tests.support.processes import Background, Helper, Shipctl, address_of, push, shipctl
from tests.support.proxy import Proxy, until

pytest_plugins = ["tests.support.file_server_fixtures", "tests.support.object_store"]

pytestmark = pytest.mark.usefixtures("no_proxies", "object_store")


def arrives(daemon: shipd.Daemon, url: str) -> shipd.Receipt:
    receipt = push(address_of(daemon), url, label="v1")
    assert receipt.digest == minilm_content().digest
    assert receipt.tensors == len(minilm_content().rows)
    assert_installed(daemon, minilm_content(), label="v1")
    return receipt


@pytest.mark.parametrize(
    "served",
    [{}, {"ranges": False}, {"deaths": [0, 10_000_000, 45_000_000]}, {"ranges": False, "deaths": [45_000_000]}],
    ids=["ranges", "no ranges", "dies halfway", "no ranges, dies halfway"],
)
def test_minilm_arrives_from_a_web_server(daemon, served):
    with FileServer(**served) as files:
        arrives(daemon, files.serve("/models/w", checkpoints.minilm().read_bytes()))


def test_it_may_take_for_ever(daemon, server):
    url = server.serve("/w", file_of(checkpoints.tiny()))
    push(address_of(daemon), url, label="v1", stall=math.inf)
    assert_installed(daemon, checkpoints.tiny(), label="v1")


@pytest.mark.parametrize("container", ["torch.save", "TorchScript", "npz", "HDF5"])
def test_minilm_arrives_in_every_kind_of_file(daemon, server, tmp_path, container):
    path = CONTAINERS[container](tmp_path / "w", minilm_content())
    server.deaths = [45_000_000]
    arrives(daemon, server.serve("/w", path.read_bytes()))


def test_minilm_arrives_in_several_files(daemon, server, tmp_path):
    folder = CONTAINERS["sharded safetensors"](tmp_path / "checkpoint", minilm_content())
    for path in folder.iterdir():
        server.serve(f"/a/{path.name}", path.read_bytes())
    arrives(daemon, server.url("/a/model.safetensors.index.json"))


def test_minilm_arrives_from_s3(daemon, bucket):
    arrives(daemon, bucket("run-7/model.safetensors", checkpoints.minilm().read_bytes()))


def test_minilm_arrives_from_a_filesystem_of_fsspec(daemon):
    files = fsspec.filesystem("memory")
    files.pipe("/run/model.safetensors", checkpoints.minilm().read_bytes())
    files.pipe("/run/config.json", b"{}")
    arrives(daemon, "memory://run")
    files.store.clear()


def test_a_base_may_be_a_url(daemon, server):
    before = checkpoints.medium()
    after = Content(before.rows, {**before.data, "block.0.bias": bytes(4096)})
    old, new = server.serve("/old", file_of(before)), server.serve("/new", file_of(after))
    push(address_of(daemon), old)
    receipt = push(address_of(daemon), new, base=old)
    assert receipt.bytes_sent < 100_000 < receipt.bytes_total
    assert_installed(daemon, after)


def test_a_push_from_a_url_costs_little_memory_and_no_torch(daemon, server):
    version = checkpoints.large(100)
    with Helper(_push_and_watch, address_of(daemon), server.serve("/w", file_of(version)), "large") as sender:
        report = sender.next(60)
        assert sender.wait() == 0
    assert report["growth"] <= 80 * MIB
    assert not report["torch"]
    assert report["digest"] == version.digest


def test_a_server_that_dies_for_good_leaves_the_old_version(daemon, server):
    old, new = checkpoints.medium(0), checkpoints.medium(1)
    push(address_of(daemon), server.serve("/old", file_of(old)), label="old")
    server.ranges, server.dies_at = False, 5_000_000
    server.answers = lambda _asked, _headers: 404 if len(server.asked) > 2 else None
    server.asked.clear()
    with pytest.raises(shipd.CheckpointError, match=r"'http://.*/new' is answered with 404 Not Found"):
        push(address_of(daemon), server.serve("/new", file_of(new)))
    assert_installed(daemon, old, label="old")
    server.dies_at, server.answers = None, lambda _asked, _headers: None
    push(address_of(daemon), server.url("/new"), label="new")
    assert_installed(daemon, new, label="new")


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_server_that_makes_the_sender_wait_does_not_cost_its_connections(start_daemon, server, lanes):
    """For longer than the daemon waits for one that shows no sign of life."""
    daemon = start_daemon(models={"model": "1GiB"}, stall=6.0)
    server.ranges, server.silent_at = False, 5_000_000
    url = server.serve("/w", file_of(checkpoints.medium()))
    with (
        Proxy(daemon.port) as proxy,
        Background(push, proxy.address, url, label="v1", lanes=lanes) as pushing,
    ):
        assert server.silent.acquire(timeout=30)
        until(lambda: proxy.count(PING, connection=0) >= 8, "it has been waited for long: there is one a second")
        server.speak.set()
        assert pushing.result().digest == checkpoints.medium().digest
        assert proxy.connections == lanes
    assert_installed(daemon, checkpoints.medium(), label="v1")


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_server_that_falls_silent_is_not_taken_for_the_daemon(daemon, server, lanes):
    server.ranges, server.silent_at = False, 5_000_000
    url = server.serve("/w", file_of(checkpoints.medium()))
    with pytest.raises(shipd.Stalled, match=r"fetching .http.*. has stalled"):
        push(address_of(daemon), url, label="v1", lanes=lanes, stall=1.0)
    # Each time the pause before it is doubled. A push that began again would ask as often once more.
    assert sum(asked.path == "/w" for asked in server.asked) <= 5


def test_a_broken_connection_does_not_wait_for_a_silent_server(daemon, server):
    """The sender is back long before the server is: the daemon waits for it no longer than a minute."""
    server.ranges, server.silent_at = False, 5_000_000
    url = server.serve("/w", file_of(checkpoints.medium()))
    with (
        Proxy(daemon.port) as proxy,
        Background(push, proxy.address, url, label="v1", prefer="bytes", stall=600.0) as pushing,
    ):
        assert server.silent.acquire(timeout=20)
        until(lambda: any(thread.name == "shipd encoder" for thread in threading.enumerate()), "runs are being encoded")
        proxy.sever_all()
        proxy.wait_until_connections(2)
        server.speak.set()
        assert pushing.result().digest == checkpoints.medium().digest
    assert_installed(daemon, checkpoints.medium(), label="v1")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_takes_urls(daemon, server):
    before, after = checkpoints.medium(0), checkpoints.medium(1)
    to = ("--to", address_of(daemon), "--model", "model")
    old, new = server.serve("/old", file_of(before)), server.serve("/new", file_of(after))
    finished = shipctl("push", old, *to)
    assert finished.code == 0, finished
    assert_installed(daemon, before)
    secret = new.replace("://", "://me:secret@") + "?key=secret"
    finished = shipctl("push", new, *to, "--base", secret, "--prefer", "bytes")
    assert finished.code == 0, finished
    assert_installed(daemon, after)
    shown = new.replace("://", "://…@") + "?…"
    assert f"shipctl: --base {shown} is of no use here: it is not the version that the daemon has" in finished.err
    finished = shipctl("push", f"{secret}&more=1".replace("/new", "/gone"), *to)
    assert finished.code == 1
    assert "is answered with 404 Not Found: there is no such file; check the URL" in finished.err
    assert "secret" not in finished.err


def test_what_is_read_whole_is_shown_to_be_fetched(daemon, server, tmp_path):
    server.silent_at = 6_000_000
    stages: dict[str, list[shipd.Progress]] = {}

    def show(progress: shipd.Progress) -> None:
        stages.setdefault(progress.stage, []).append(progress)
        if progress.bytes_done:
            server.speak.set()

    path = CONTAINERS["torch.save"](tmp_path / "w", checkpoints.medium())
    push(address_of(daemon), server.serve("/w", path.read_bytes()), on_progress=show)
    assert stages["fetching"][-1].bytes_total == path.stat().st_size
    assert 0 < stages["fetching"][-1].bytes_done <= path.stat().st_size


# --- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent_at", [0, 5_000_000], ids=["while it is opened", "while it is sent"])
def test_cancelling_ends_the_push_at_once(daemon, server, silent_at):
    server.ranges, server.silent_at = False, silent_at
    url = server.serve("/w", file_of(checkpoints.medium()))

    async def main() -> None:
        async with shipd.connect(address_of(daemon)) as client:
            pushing = asyncio.create_task(client.push(url, model="model", stall=600.0))
            await asyncio.to_thread(server.silent.acquire)
            pushing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pushing

    asyncio.run(asyncio.wait_for(main(), 20))
    server.speak.set()
    push(address_of(daemon), url, label="v1")
    assert_installed(daemon, checkpoints.medium(), label="v1")


def test_interrupting_the_command_ends_it_at_once(daemon, server):
    server.ranges, server.silent_at = False, 5_000_000
    url = server.serve("/w", file_of(checkpoints.medium()))
    with Shipctl("push", url, "--to", address_of(daemon), "--model", "model", "--stall", "600") as command:
        assert server.silent.acquire(timeout=30)
        command.signal(signal.SIGINT)
        assert command.wait(20) == 130
        assert "interrupted; nothing was swapped" in command.err


def test_a_timeout_counts_the_fetching(daemon, server):
    server.ranges, server.silent_at = False, 0
    url = server.serve("/w", file_of(checkpoints.medium()))
    with pytest.raises(shipd.Stalled, match=r"was still being fetched when the timeout of 0\.3 s was over"):
        push(address_of(daemon), url, timeout=0.3)


def test_an_index_that_is_cut_off_is_told(daemon, server):
    url = server.serve("/index.json", json.dumps({"weight_map": {"w": "1"}}).encode()[:-1])
    with pytest.raises(shipd.CheckpointError, match="is the index of a checkpoint in several files, and damaged"):
        push(address_of(daemon), url)
