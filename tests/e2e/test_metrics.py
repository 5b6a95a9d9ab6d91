"""What a daemon tells Prometheus, from real pushes, real processes and real clients that behave badly."""

import contextlib
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import shipd
from shipd.release import VERSION
from shipd.service.tally import FAILURES, OUTCOMES
from shipproto.errors import AbortCode
from tests.conftest import StartDaemon
from tests.support import checkpoints
from tests.support.checkpoints import MIB
from tests.support.exact import state
from tests.support.frames import DATA
from tests.support.hostile import attacker
from tests.support.offers import offer
from tests.support.processes import Background, ShipdProcess, address_of, memory, push
from tests.support.proxy import Proxy, until
from tests.support.scraping import Scrape, get, raw, scrape
from tests.support.serving_process import Serve

pytest_plugins = ["tests.support.serving_process"]

LOOPBACK = "127.0.0.1:0"
LABELS = {"model", "outcome", "state", "transport", "reason", "label", "digest"}


def metrics_port(service: ShipdProcess) -> int:
    """Where a daemon that runs as a process gives its metrics."""
    (listening,) = service.logged("listening")
    return int(listening["metrics"].rpartition(":")[2])


@pytest.fixture
def watched(start_daemon: StartDaemon) -> shipd.Daemon:
    """A daemon with a model called "model" and metrics."""
    return start_daemon(metrics=LOOPBACK)


# --- what is told ----------------------------------------------------------------------------------------------------


def test_what_coded_runs_stood_for_is_counted(watched: shipd.Daemon, medium: Path) -> None:
    push(address_of(watched), medium, label="v1", prefer="bytes")
    receipt = push(address_of(watched), medium, label="v2", prefer="bytes")
    seen = scrape(watched)
    payload, decoded = (seen.value(f"shipd_{what}_bytes_total", model="model") for what in ("payload", "decoded"))
    assert payload is not None
    assert decoded is not None
    # The second push left everything out.
    assert receipt.bytes_unchanged >= receipt.bytes_total
    assert payload <= receipt.bytes_total * 1.01
    assert decoded >= receipt.bytes_total


def test_every_metric_follows_the_conventions(watched: shipd.Daemon, small: Path) -> None:
    offer(address_of(watched), small, label="v1")
    with pytest.raises(shipd.UnknownModel):
        offer(address_of(watched), small, model="nobody")
    seen = scrape(watched)
    assert len(seen.families) > 25
    for family in seen.families.values():
        assert re.fullmatch(r"shipd_[a-z]+(_[a-z]+)*", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert family.type in ("counter", "gauge", "histogram"), family
        for unit in ("seconds", "bytes"):
            assert unit not in family.name or family.name.endswith(unit), "the unit comes last"
        for sample in family.samples:
            if family.type == "counter":
                assert sample.name == f"{family.name}_total"
            assert set(sample.labels) <= LABELS | {"le"} or family.name == "shipd_build_info"
    # Prometheus takes the last line only with its end.
    assert seen.text.endswith("\n")
    (build,) = seen.labels("shipd_build_info")
    assert build["version"] == VERSION
    assert abs(time.time() - (seen.value("shipd_start_time_seconds") or 0)) < 3600


def test_what_can_be_counted_starts_at_nothing(watched: shipd.Daemon) -> None:
    """A rate needs a 0 to rise from."""
    seen = scrape(watched)
    outcomes = {labels["outcome"] for labels in seen.labels("shipd_transfers_total")}
    assert outcomes == set(OUTCOMES) == {"committed", "already", *map(str, AbortCode)}
    assert {labels["reason"] for labels in seen.labels("shipd_connection_failures_total")} == set(FAILURES)
    assert seen.counted("shipd_transfers_total", "outcome") == {}
    assert {labels["model"] for labels in seen.labels("shipd_transfers_total")} == {"model"}
    assert seen.labels("shipd_model_version_info") == []
    states = {labels["state"] for labels in seen.labels("shipd_processes")}
    assert states == {"attaching", "serving", "staging", "swapping", "stale"}
    assert seen.value("shipd_image_memory_limit_bytes") == 8 << 30


def test_pushes_by_how_they_ended(watched: shipd.Daemon, small: Path, medium: Path) -> None:
    first = push(address_of(watched), small, label="v1")
    seen = scrape(watched)
    travelled = _wire_bytes(watched)
    version = {"model": "model", "label": "v1", "digest": first.digest}
    assert seen.labels("shipd_model_version_info") == [version]
    assert seen.value("shipd_transfer_seconds_count", model="model") == 1
    assert seen.value("shipd_payload_bytes_total", model="model") == travelled
    assert abs(time.time() - (seen.value("shipd_model_version_committed_timestamp_seconds", model="model") or 0)) < 600
    assert push(address_of(watched), small, label="v1").already
    with pytest.raises(shipd.LabelConflict):
        push(address_of(watched), medium, label="v1")
    second = push(address_of(watched), medium, label="v2")
    seen = scrape(watched)
    assert seen.counted("shipd_transfers_total", "outcome") == {"committed": 2, "already": 1, "label-conflict": 1}
    version = {"model": "model", "label": "v2", "digest": second.digest}
    assert seen.labels("shipd_model_version_info") == [version], "the one before has gone"
    assert seen.value("shipd_transfer_seconds_count", model="model") == 2
    travelled += _wire_bytes(watched)
    assert seen.value("shipd_payload_bytes_total", model="model") == travelled, "comparing labels takes no bytes"
    assert seen.value("shipd_model_version_bytes", model="model") == checkpoints.medium().nbytes
    assert seen.value("shipd_model_version_tensors", model="model") == len(checkpoints.medium().rows)
    used = seen.value("shipd_image_memory_bytes")
    assert used == seen.value("shipd_model_image_bytes", model="model") == watched.server.images.budget.used > 0
    # Nothing serves it: nothing was staged and nothing paused.
    assert seen.value("shipd_stage_seconds_count", model="model") == 0
    assert seen.value("shipd_pause_seconds_count", model="model") == 0


def _wire_bytes(daemon: shipd.Daemon) -> int:
    """What travels of a version: its tensors, and the padding between small ones."""
    pool = daemon.server.models["model"].pool
    assert pool is not None
    return pool.layout.wire_bytes


def test_refused_pushes(start_daemon: StartDaemon, small: Path, medium: Path) -> None:
    daemon = start_daemon(models={"model": "1MiB"}, metrics=LOOPBACK)
    for number in range(3):
        with pytest.raises(shipd.UnknownModel):
            offer(address_of(daemon), small, model=f"made-up-{number}")
    with pytest.raises(shipd.MemoryLimit):
        push(address_of(daemon), medium)
    seen = scrape(daemon)
    assert seen.counted("shipd_transfers_total", "outcome", model="model") == {"memory-limit": 1}
    assert seen.counted("shipd_transfers_total", "outcome", model="") == {"unknown-model": 3}
    assert {labels["model"] for labels in seen.labels("shipd_transfers_total")} == {"model", ""}


def test_a_push_under_way_and_another_one(watched: shipd.Daemon, medium: Path) -> None:
    size = checkpoints.medium().nbytes
    with Proxy(watched.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium, label="v1") as pushing:
            held.wait()
            with pytest.raises(shipd.Busy):
                push(address_of(watched), medium, label="v2")
            until(lambda: (scrape(watched).value("shipd_transfer_held_bytes", model="model") or 0) > 0, "some is here")
            seen = scrape(watched)
            assert seen.value("shipd_transfers_in_progress", model="model") == 1
            assert 0 < (seen.value("shipd_payload_bytes_total", model="model") or 0) < size
            assert seen.value("shipd_transfer_size_bytes", model="model") == size
            assert (seen.value("shipd_connections", transport="tcp") or 0) >= 1
            assert seen.counted("shipd_transfers_total", "outcome") == {"busy": 1}
            held.release()
            pushing.result()
    seen = scrape(watched)
    assert seen.value("shipd_transfers_in_progress", model="model") == 0
    assert seen.labels("shipd_transfer_held_bytes") == []
    assert seen.value("shipd_payload_bytes_total", model="model") == size
    assert seen.counted("shipd_transfers_total", "outcome") == {"busy": 1, "committed": 1}


def test_damaged_frames(watched: shipd.Daemon, medium: Path) -> None:
    with Proxy(watched.port) as proxy:
        proxy.flip("payload", kind=DATA, nth=3)
        proxy.flip("payload", kind=DATA, nth=7)
        receipt = push(proxy.address, medium)
    assert receipt.frames_resent == 2
    seen = scrape(watched)
    assert seen.value("shipd_frames_damaged_total", model="model") == 2
    size = _wire_bytes(watched)
    assert seen.value("shipd_payload_bytes_total", model="model") == size, "what was damaged is not counted"
    assert (seen.value("shipd_received_bytes_total", transport="tcp") or 0) > size


def test_connections_that_do_not_end_well(start_daemon: StartDaemon, tmp_path: Path, small: Path) -> None:
    token = tmp_path / "token"
    token.write_text("correct horse battery staple")
    daemon = start_daemon(metrics=LOOPBACK, token_file=str(token))
    with attacker(daemon.port) as peer:
        peer.write(b"GET / HTTP/1.1\r\n\r\n").drain()
    with pytest.raises(shipd.AuthError):
        push(address_of(daemon), small, token="wrong horse battery staple")
    with attacker(daemon.port):
        pass
    push(address_of(daemon), small, token="correct horse battery staple")
    until(lambda: scrape(daemon).value("shipd_connections", transport="tcp") == 0, "all are closed")
    seen = scrape(daemon)
    assert seen.counted("shipd_connection_failures_total", "reason", transport="tcp") == {
        "foreign": 1,
        "auth": 1,
        "no-handshake": 1,
    }
    assert seen.value("shipd_connections_opened_total", transport="tcp") == 4


# --- serving processes -----------------------------------------------------------------------------------------------


def processes(daemon: shipd.Daemon) -> dict[str, float]:
    """How many there are in each state."""
    return scrape(daemon).counted("shipd_processes", "state", model="model")


def test_a_process_that_holds_on_is_stale_until_it_is_back(
    start_daemon: StartDaemon, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shipd.service.rollout.SWAP_GRACE", 2.0)
    daemon = start_daemon(models={}, metrics=LOOPBACK, commit_timeout=1.0)
    process, straggler = (serve(daemon.config.socket) for _ in range(2))
    assert processes(daemon) == {"serving": 2}
    assert scrape(daemon).value("shipd_connections", transport="unix") == 2
    straggler.ask("hold", "generation-7")
    receipt = push(address_of(daemon), state(1), label="v1")
    assert (receipt.swapped, receipt.stale) == (1, (str(straggler.pid),))
    # It has begun to attach again, perhaps, which takes as long as it holds on.
    assert {**processes(daemon), "attaching": 0} == {"serving": 1, "stale": 1, "attaching": 0}
    seen = scrape(daemon)
    assert seen.value("shipd_stage_seconds_count", model="model") == 1
    assert seen.value("shipd_pause_seconds_count", model="model") == 1
    assert seen.value("shipd_pause_seconds_sum", model="model") == pytest.approx(receipt.pause_seconds)
    assert straggler.ask("let_go", "generation-7")
    straggler.ask("await_label", "v1")
    until(lambda: processes(daemon) == {"serving": 2}, "it has caught up")
    process.ask("detach")
    until(lambda: processes(daemon) == {"serving": 1}, "one has left")


def test_a_stopped_process_is_evicted_and_counts_until_it_is_dead(start_daemon: StartDaemon, serve: Serve) -> None:
    daemon = start_daemon(models={}, metrics=LOOPBACK, stage_timeout=3.0)
    process, stopped = (serve(daemon.config.socket) for _ in range(2))
    stopped.stop()
    receipt = push(address_of(daemon), state(1), label="v1")
    assert (receipt.swapped, receipt.stale) == (1, (str(stopped.pid),))
    until(lambda: scrape(daemon).value("shipd_evictions_total", model="model") == 1, "its session has ended")
    assert processes(daemon) == {"serving": 1, "stale": 1}
    stopped.kill()
    until(lambda: processes(daemon) == {"serving": 1}, "nobody waits for the dead")
    assert process.ask("label") == "v1"


def test_what_a_model_has_counted_outlives_it(start_daemon: StartDaemon, serve: Serve) -> None:
    """It exists because a process serves it, and no longer."""
    daemon = start_daemon(models={}, metrics=LOOPBACK)
    process = serve(daemon.config.socket)
    with pytest.raises(shipd.TensorMismatch):
        offer(address_of(daemon), {"other": state(1)[next(iter(state(1)))]}, label="v1")
    assert scrape(daemon).counted("shipd_transfers_total", "outcome", model="model") == {"mismatch": 1}
    (initial,) = scrape(daemon).labels("shipd_model_version_info")
    assert initial["label"] == "initial"
    assert scrape(daemon).labels("shipd_model_version_committed_timestamp_seconds") == []
    process.ask("detach")
    until(lambda: not daemon.server.models, "the model has gone")
    seen = scrape(daemon)
    assert seen.labels("shipd_model_version_info") == seen.labels("shipd_processes") == []
    assert seen.counted("shipd_transfers_total", "outcome") == {"mismatch": 1}
    assert {labels["model"] for labels in seen.labels("shipd_transfers_total")} == {""}


# --- health ----------------------------------------------------------------------------------------------------------


def test_healthy_and_ready(watched: shipd.Daemon) -> None:
    port = watched.server.metrics.port
    assert (get(port, "/healthz").status, get(port, "/healthz").body) == (200, "ok\n")
    assert (get(port, "/readyz").status, get(port, "/readyz").body) == (200, "ready\n")
    assert get(port, "/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_a_daemon_that_drains_is_healthy_and_not_ready(start_shipd: Any, medium: Path) -> None:
    service = start_shipd(metrics=LOOPBACK)
    port = metrics_port(service)
    assert get(port, "/readyz").status == 200
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, medium, label="last") as pushing:
            held.wait()
            service.signal(signal.SIGTERM)
            service.wait_for_log("draining")
            answer = get(port, "/readyz")
            assert (answer.status, answer.body.count("\n")) == (503, 1)
            assert answer.body.startswith("draining")
            assert get(port, "/healthz").status == 200
            seen = Scrape(port)
            assert (seen.value("shipd_draining"), seen.value("shipd_transfers_in_progress", model="model")) == (1, 1)
            held.release()
            assert pushing.result().label == "last"
    assert service.wait() == 0, service.describe()
    with pytest.raises(ConnectionRefusedError):
        get(port, "/healthz")


def test_the_lag_of_a_loop_that_is_held_up(watched: shipd.Daemon) -> None:
    lag = watched.server.metrics.lag
    until(lambda: lag.histogram.count > 0, "it is measured")
    before = lag.histogram.copy()

    async def hold_up() -> None:
        time.sleep(0.35)  # noqa: ASYNC251  that is the point

    watched.call(hold_up())
    until(lambda: lag.histogram.since(before).quantile(1.0) >= 0.3, "what was due has been counted")
    assert lag.histogram.since(before).count >= 4
    seen = scrape(watched)
    assert (seen.value("shipd_event_loop_lag_max_seconds") or 0) >= 0.2
    count = seen.value("shipd_event_loop_lag_seconds_count") or 0
    assert (seen.value("shipd_event_loop_lag_seconds_bucket", le="0.2") or 0) < count


def test_the_lag_is_measured_also_where_nothing_listens(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert (daemon.server.metrics.port, daemon.server.metrics.address) == (0, "off")
    until(lambda: daemon.server.metrics.lag.histogram.count > 0, "it is measured")


# --- clients that behave badly ---------------------------------------------------------------------------------------


def test_bad_clients_do_not_disturb_a_push(watched: shipd.Daemon, medium: Path) -> None:
    """Two hundred that say nothing, some that trickle, garbage, endless headers; and a scrape in the middle."""
    port = watched.server.metrics.port
    with contextlib.ExitStack() as stack, Proxy(watched.port) as proxy:
        held = proxy.hold(nth=12)
        pushing = stack.enter_context(Background(push, proxy.address, medium, label="v1"))
        held.wait()
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(200)]
        for number, sock in enumerate(idle[::10]):
            # Who has been put out already hears of it here.
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n"[: number + 1])
        assert raw(port, bytes(range(256)) * 16).startswith(b"HTTP/1.1 400 ")
        assert raw(port, b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 20_000).startswith(b"HTTP/1.1 431 ")
        assert get(port, "/metrics", "POST").status == 405
        assert get(port, "/").status == 404
        assert get(port, "/healthz").status == 200
        assert scrape(watched).value("shipd_transfers_in_progress", model="model") == 1
        held.release()
        assert pushing.result().label == "v1"
        assert scrape(watched).counted("shipd_transfers_total", "outcome") == {"committed": 1}


def test_many_scrapes_at_once_get_the_same_answer(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(models={f"model-{number}": "1GiB" for number in range(30)}, metrics=LOOPBACK)
    port = daemon.server.metrics.port
    with contextlib.ExitStack() as stack:
        asking = [stack.enter_context(Background(Scrape, port)) for _ in range(12)]
        seen = [each.result() for each in asking]
    assert all(len(each.labels("shipd_transfers_in_progress")) == 30 for each in seen)


def test_a_client_that_leaves_does_not_take_the_answer_from_others(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(models={f"model-{number}": "1GiB" for number in range(30)}, metrics=LOOPBACK)
    port = daemon.server.metrics.port
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as sock, Background(Scrape, port) as asking:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
            assert len(asking.result().labels("shipd_transfers_in_progress")) == 30


def test_a_daemon_stops_in_the_middle_of_a_scrape(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(models={f"model-{number}": "1GiB" for number in range(200)}, metrics=LOOPBACK)
    port = daemon.server.metrics.port
    with socket.create_connection(("127.0.0.1", port)) as idle, socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: daemon.server.metrics._rendering is not None, "it is being rendered")
        daemon.stop()
        for each in (idle, sock):
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""


# --- one process, several daemons; configuration ---------------------------------------------------------------------


def test_two_daemons_in_one_process(start_daemon: StartDaemon, small: Path) -> None:
    one, other = start_daemon(metrics=LOOPBACK), start_daemon(metrics=LOOPBACK, models={"other": "1GiB"})
    push(address_of(one), small, label="v1")
    assert scrape(one).counted("shipd_transfers_total", "outcome") == {"committed": 1}
    assert scrape(other).counted("shipd_transfers_total", "outcome") == {}
    assert {labels["model"] for labels in scrape(other).labels("shipd_transfers_total")} == {"other"}


def test_the_global_registry_is_left_alone(watched: shipd.Daemon) -> None:
    """A program around a daemon has metrics of its own."""
    import prometheus_client

    assert not [family for family in prometheus_client.REGISTRY.collect() if family.name.startswith("shipd")]


def test_a_daemon_with_metrics_stays_small(start_shipd: Any, medium: Path) -> None:
    service = start_shipd(metrics=LOOPBACK, models={"model": "1GiB", **{f"other-{at}": "1GiB" for at in range(20)}})
    port = metrics_port(service)
    push(service.address, medium)
    for _ in range(3):
        Scrape(port)
    before = memory(service.pid)
    for _ in range(10):
        Scrape(port)
    after = memory(service.pid)
    assert after["RssAnon"] + after["RssFile"] < 64 * MIB, after
    assert after["RssAnon"] - before["RssAnon"] < 2 * MIB, (before, after)


def test_metrics_are_off_unless_asked_for() -> None:
    assert shipd.Config().metrics == ""
    assert shipd.Config().metrics_address is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [("127.0.0.1", "127.0.0.1:9747"), ("[::1]:1234", "[::1]:1234"), ("localhost:0", "localhost:0")],
)
def test_addresses_for_metrics(text: str, meant: str) -> None:
    assert str(shipd.Config(metrics=text).metrics_address) == meant


@pytest.mark.parametrize("beyond", ["0.0.0.0:9747", "[::]:9747", "10.0.0.7:9747", "gpu-01:9747"])
def test_metrics_beyond_loopback_are_refused(beyond: str, tmp_path: Path) -> None:
    """Also with a token: nobody is asked for it here."""
    with pytest.raises(shipd.ConfigError, match=r"metrics = .* is reachable from other hosts.*Use 127\.0\.0\.1"):
        shipd.Config(metrics=beyond, token_file=str(tmp_path / "token"))


@pytest.mark.parametrize("nonsense", ["http://127.0.0.1/metrics", "127.0.0.1:http", ":9747"])
def test_what_is_no_address_for_metrics(nonsense: str) -> None:
    with pytest.raises(shipd.ConfigError, match="metrics = "):
        shipd.Config(metrics=nonsense)


def test_a_port_that_is_taken(watched: shipd.Daemon, start_daemon: StartDaemon, place: Path) -> None:
    """Nothing is left of a daemon that could not listen everywhere."""
    port = watched.server.metrics.port
    with pytest.raises(shipd.ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port} for metrics"):
        start_daemon(metrics=f"127.0.0.1:{port}", socket=str(place / "taken.sock"))
    assert not (place / "taken.sock").exists()
    with pytest.raises(shipd.ConfigError, match="another daemon is listening"):
        start_daemon(metrics=LOOPBACK, socket=watched.config.socket)


def test_from_the_environment_and_only_with_a_restart(start_shipd: Any) -> None:
    service = start_shipd(env={"SHIPD_METRICS": LOOPBACK})
    assert get(metrics_port(service), "/readyz").status == 200
    service = start_shipd(metrics=LOOPBACK)
    service.write_config(metrics="")
    service.reload()
    assert service.wait_for_log("configuration reloaded")["needs_restart"] == ["metrics"]
    assert get(metrics_port(service), "/healthz").status == 200


def test_descriptors_do_not_leak(watched: shipd.Daemon) -> None:
    for _ in range(50):
        scrape(watched)
    until(lambda: not watched.server.metrics._endpoint._exchanges, "every connection is closed")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(50):
        scrape(watched)
    until(lambda: not watched.server.metrics._endpoint._exchanges, "every connection is closed")
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
