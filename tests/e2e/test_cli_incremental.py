"""``shipctl push`` where only what has changed is sent: its options, its cache, and what it says of both.

The model has a few megabytes, so nothing here has loops compiled: numpy does the work.
"""

from pathlib import Path

import pytest

import shipd
from shipd.bases.cache import VersionCache
from tests.support.checkpoints import assert_installed, write_safetensors
from tests.support.frames import CODED, DATA
from tests.support.processes import Finished, address_of, push, push_arguments, shipctl
from tests.support.proxy import Proxy
from tests.support.successive import first, following

V0 = first(3)
V1 = following(V0)
V2 = following(V1, seed=2)

LIMIT = "400Mbit"
"""Less than any codec keeps up with, and little enough for loopback to count as a link; and no push waits for it."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    v0, v1, v2 = (write_safetensors(folder / f"v{at}", version) for at, version in enumerate((V0, V1, V2)))
    return v0, v1, v2


@pytest.fixture
def cache(tmp_path) -> Path:
    """Where versions are kept; not there yet."""
    return tmp_path / "cache"


def ship(daemon: shipd.Daemon, path: Path, *more: str | Path, cache: Path | str = "") -> Finished:
    return shipctl(*push_arguments(daemon, path, *more), env={"SHIPD_CACHE": str(cache)})


def answer(finished: Finished) -> dict:
    assert finished.code == 0, finished
    return finished.answer


def names(receipt: dict) -> set[str]:
    return {use["codec"] for use in receipt["codecs"]}


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--limit", LIMIT), ("--prefer", "bytes")], ids=["limit", "bytes"])
def test_the_second_push_of_a_model_sends_what_has_changed(daemon, paths, cache, options):
    whole = answer(ship(daemon, paths[0], *options, "--json", cache=cache))
    assert whole["base"] == ""
    assert whole["bytes_sent"] > V0.nbytes / 3
    assert whole["not_kept"] == []
    assert whole["keep_seconds"] > 0
    receipt = answer(ship(daemon, paths[1], *options, "--json", cache=cache))
    assert receipt["base"] == V0.digest
    assert receipt["bytes_sent"] < V1.nbytes / 100
    assert names(receipt) <= {"egr", "gz", "duh", "same"}
    assert_installed(daemon, V1)
    receipt = answer(ship(daemon, paths[2], *options, "--json", cache=cache))
    assert receipt["base"] == V1.digest
    assert_installed(daemon, V2)
    (kept,) = (path for path in cache.iterdir() if path.stat().st_size > V0.nbytes)
    assert kept.stat().st_size < V0.nbytes * 1.1, "the last version, and no other"


def test_on_this_host_nothing_is_kept_and_everything_sent(daemon, paths, cache):
    for path, version in ((paths[0], V0), (paths[1], V1)):
        receipt = answer(ship(daemon, path, "--json", cache=cache))
        assert (receipt["base"], receipt["codecs"], receipt["not_kept"]) == ("", [], [])
        assert receipt["bytes_sent"] > version.nbytes
        assert receipt["keep_seconds"] == 0
    assert not cache.exists()


def test_an_empty_variable_switches_the_cache_off(daemon, paths, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for path, version in ((paths[0], V0), (paths[1], V1)):
        finished = shipctl(
            *push_arguments(daemon, path, "--prefer", "bytes", "--json"),
            env={"SHIPD_CACHE": "", "HOME": str(home), "XDG_CACHE_HOME": None},
        )
        receipt = answer(finished)
        assert finished.err == ""
        assert receipt["base"] == ""
        assert receipt["not_kept"] == []
        assert_installed(daemon, version)
    assert list(home.iterdir()) == []


def test_without_the_variable_the_cache_is_the_users_own(daemon, paths, tmp_path):
    env = {"SHIPD_CACHE": None, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    receipts = [
        answer(shipctl(*push_arguments(daemon, path, "--prefer", "bytes", "--json"), env=env)) for path in paths[:2]
    ]
    assert [receipt["base"] for receipt in receipts] == ["", V0.digest]
    kept = VersionCache(tmp_path / "xdg" / "shipd" / "versions")
    assert [digest.hex() for digest in kept.digests("model", _structure(paths[1]))] == [V1.digest]


def _structure(path: Path):
    from shipd.checkpoints.source import open_source

    source = open_source(path)
    try:
        return source.structure
    finally:
        source.close()


@pytest.mark.parametrize("kind", ["a file", "in a file", "nowhere"])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_cache_that_cannot_be_written_is_said_once_and_fails_nothing(daemon, paths, tmp_path, kind, as_json):
    """Root may write anywhere but where there is no place."""
    cache = tmp_path / "cache"
    if kind == "a file":
        cache.write_text("not a folder")
    elif kind == "in a file":
        cache.write_text("not a folder")
        cache /= "versions"
    else:
        cache = Path("/proc/shipd/versions")
    json_option = ("--json",) if as_json else ()
    for path, version in ((paths[0], V0), (paths[1], V1)):
        finished = ship(daemon, path, "--prefer", "bytes", *json_option, cache=cache)
        assert finished.code == 0, finished
        (line,) = finished.err.splitlines()
        assert line.startswith("shipctl: ")
        assert "the next push will send everything" in line
        assert str(cache) in line
        if as_json:
            assert len(finished.answer["not_kept"]) == 1
            assert finished.answer["not_kept"][0] in line
        assert_installed(daemon, version)


def test_a_damaged_cache_is_a_push_of_everything(daemon, paths, cache):
    answer(ship(daemon, paths[0], "--prefer", "bytes", "--json", cache=cache))
    (kept,) = [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > V0.nbytes]
    with kept.open("r+b") as file:
        file.seek(V0.nbytes // 2)
        byte = file.read(1)
        file.seek(V0.nbytes // 2)
        file.write(bytes((byte[0] ^ 1,)))
    receipt = answer(ship(daemon, paths[1], "--prefer", "bytes", "--json", cache=cache))
    assert "egr" not in names(receipt)
    assert_installed(daemon, V1)
    # And what was pushed then is a base again.
    receipt = answer(ship(daemon, paths[2], "--prefer", "bytes", "--json", cache=cache))
    assert receipt["base"] == V1.digest
    assert "egr" in names(receipt)
    assert_installed(daemon, V2)


def test_a_push_that_fails_keeps_nothing(daemon, paths, cache):
    push(address_of(daemon), paths[0], label="v1")
    failed = ship(daemon, paths[1], "--label", "v1", "--prefer", "bytes", cache=cache)
    assert failed.code == 12, failed
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert_installed(daemon, V0, label="v1")


# --- a base that is named, and none ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--limit", LIMIT), ("--prefer", "bytes")], ids=["limit", "bytes"])
def test_a_base_that_is_named_is_used(daemon, paths, options):
    push(address_of(daemon), paths[0])
    receipt = answer(ship(daemon, paths[1], "--base", paths[0], *options, "--json"))
    assert receipt["base"] == V0.digest
    assert receipt["bytes_sent"] < V1.nbytes / 100
    assert_installed(daemon, V1)


def test_a_base_that_is_not_there_is_no_push(daemon, paths, tmp_path):
    push(address_of(daemon), paths[0], label="v0")
    finished = ship(daemon, paths[1], "--base", tmp_path / "gone", "--prefer", "bytes", "--json")
    assert finished.code not in (0, 2), finished
    assert finished.answer["error"] == "CheckpointError"
    assert str(tmp_path / "gone") in finished.err
    assert_installed(daemon, V0, label="v0")


def test_a_base_of_another_version_is_of_no_use_and_no_harm(daemon, paths):
    push(address_of(daemon), paths[0])
    receipt = answer(ship(daemon, paths[1], "--base", paths[2], "--prefer", "bytes", "--json"))
    assert names(receipt) <= {"xph", "same"}
    assert_installed(daemon, V1)


def test_whole_sends_everything_as_it_is(daemon, paths, cache):
    answer(ship(daemon, paths[0], "--prefer", "bytes", "--json", cache=cache))
    with Proxy(daemon.port) as proxy:
        finished = shipctl(
            *("push", paths[0], "--to", proxy.address, "--model", "model", "--whole", "--prefer", "bytes", "--json"),
            env={"SHIPD_CACHE": str(cache)},
        )
        assert proxy.count(CODED) == 0
        assert proxy.count(DATA) == V0.chunks
    receipt = answer(finished)
    assert (receipt["base"], receipt["codecs"], receipt["choices"]) == ("", [], [])


# --- what is said ----------------------------------------------------------------------------------------------------


def test_explain(daemon, paths):
    push(address_of(daemon), paths[0])
    finished = ship(daemon, paths[1], "--base", paths[0], "--prefer", "bytes", "--explain")
    assert finished.code == 0, finished
    assert finished.err == ""
    assert "times fewer)" in finished.out
    lines = finished.out.splitlines()
    at = lines.index(f"coded against {V0.digest[:16]}")
    assert lines[at + 1].startswith("  egr     1 run of ")
    assert lines[at + 1].endswith(" times fewer")
    chosen = lines[-1]
    assert chosen.startswith("  egr for ")
    assert "% of it changed, link " in chosen
    assert ": expected " in chosen
    for other in ("raw", "xph", "gz", "duh", "planes"):
        assert f" {other} " in chosen.replace("; not ", ", ")


def test_explain_without_a_base(daemon, paths):
    finished = ship(daemon, paths[0], "--prefer", "bytes", "--explain")
    assert "\ncoded without a base\n  xph " in finished.out
    assert "changed" not in finished.out


def test_explain_where_nothing_is_coded(daemon, start_daemon, paths):
    """Each for its own reason: the daemon is on this host; it takes nothing; nothing is wanted to be coded."""
    plain = start_daemon(incremental=False)
    for finished in (
        ship(daemon, paths[0], "--explain"),
        ship(plain, paths[0], "--prefer", "bytes", "--explain"),
        ship(daemon, paths[1], "--whole", "--explain"),
    ):
        assert finished.code == 0, finished
        assert "\neverything was sent as it is" in finished.out
    assert_installed(plain, V0)
    assert_installed(daemon, V1)


def test_json_has_what_was_done_and_why(daemon, paths):
    push(address_of(daemon), paths[0])
    receipt = answer(ship(daemon, paths[1], "--base", paths[0], "--limit", LIMIT, "--prefer", "bytes", "--json"))
    (use,) = receipt["codecs"]
    assert set(use) == {"codec", "runs", "content_bytes", "payload_bytes"}
    assert use["codec"] == "egr"
    assert use["content_bytes"] >= V1.nbytes
    assert 0 < use["payload_bytes"] < receipt["bytes_sent"]
    (choice,) = receipt["choices"]
    assert set(choice) == {"codec", "size", "link", "density", "seconds", "others"}
    assert set(choice["codec"]) == {"number", "name", "share", "encode", "decode"}
    assert choice["codec"]["name"] == "egr"
    assert choice["link"] <= 50_000_000, "the limit, or what the link has shown"
    assert 0.001 < choice["density"] < 0.05
    assert {name for name, _seconds, _size in choice["others"]} == {"raw", "xph", "gz", "duh", "planes"}
    assert receipt["profile"]["encode"] > 0


# --- wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--whole", "--base", "old"), "no use for --base"),
        (("--prefer", "money"), "'money' is not one of 'time', 'bytes'"),
        (("--limit", "fast"), "'fast' is not a rate"),
        (("--limit", "10Xbit"), "'10Xbit' is not a rate"),
        (("--limit", ""), "'' is not a rate"),
        (("--limit", "0"), "at least one byte a second"),
        (("--limit", "-5Mbit"), "'-5Mbit' is not a rate"),
        (("--base",), "requires an argument"),
    ],
)
def test_wrong_usage_is_2_before_anything_is_connected_to(daemon, paths, options, said):
    with Proxy(daemon.port) as proxy:
        finished = shipctl("push", paths[0], "--to", proxy.address, "--model", "model", *options)
        assert proxy.connections == 0
    assert finished.code == 2, finished
    assert said in " ".join(finished.err.replace("│", " ").split())
    assert finished.out == ""
    assert "Traceback" not in finished.err


def test_a_limit_on_a_unix_socket_is_2(daemon, paths):
    finished = shipctl(
        "push", paths[0], "--to", daemon.config.socket, "--model", "model", "--limit", "10Mbit", "--json"
    )
    assert finished.code == 2, finished
    assert "only TCP connections can be kept to a rate" in finished.err
    assert finished.answer["exit_code"] == 2
    assert daemon.server.models["model"].version is None


# --- the daemon's side -----------------------------------------------------------------------------------------------


def test_a_daemon_that_takes_nothing_coded_is_sent_everything(start_daemon, paths, cache):
    daemon = start_daemon(incremental=False)
    for path, version in ((paths[0], V0), (paths[1], V1)):
        receipt = answer(ship(daemon, path, "--prefer", "bytes", "--json", cache=cache))
        assert (receipt["base"], receipt["codecs"]) == ("", [])
        assert_installed(daemon, version)


def test_reloading_switches_it_off_and_on_again(start_shipd, paths):
    service = start_shipd()
    push(service.address, paths[0])
    for incremental in (False, True):
        service.write_config(incremental=incremental)
        service.reload()
        assert "needs_restart" not in service.logged("configuration reloaded")[-1]
        before, after, version = (0, 1, V1) if not incremental else (1, 2, V2)
        receipt = push(service.address, paths[after], base=paths[before], prefer="bytes")
        assert receipt.digest == version.digest
        assert receipt.base == (V1.digest if incremental else "")
        assert bool(receipt.codecs) is incremental
