"""What the daemon is configured with: its file, the environment, and what it refuses to start with."""

import sys

import pytest

import shipd
from tests.support.processes import TOKEN, Process, push, status, toml

WRONG = {
    "an unknown key": ("listne = 1", "listne"),
    "an unknown key of a model": ("[models.m]\nmax_bytes = 1\nmin_bytes = 1", "min_bytes"),
    "a model of which nothing is said": ("[models.m]", "models.m: nothing is said of it"),
    "a policy of its own": (
        '[models."m.1"]\npolicy = "lax"',
        "[models.\"m.1\"]: Invalid enum value 'lax' - at `$.policy`: it is one of 'strict', 'subset', 'partial'",
    ),
    "a text for whether to cast": ('[models.m]\ncast = "yes"', "cast"),
    "a model of no bytes": ("[models.m]\nmax_bytes = 0", "models.m.max_bytes"),
    "a model with an impossible name": ('[models."a b"]\nmax_bytes = 1', "a b"),
    "no TOML": ("listen = ", "no valid TOML"),
    "no UTF-8": (b"listen = '\xff'", "no valid TOML"),
    "a number for a text": ("listen = 7447", "listen"),
    "an address without a host": ('listen = ":7447"', "listen"),
    "a port that is none": ('listen = "127.0.0.1:70000"', "70000"),
    "an address that is not here": ('listen = "192.0.2.1:0"\ntoken_file = "TOKEN"', "cannot listen on 192.0.2.1"),
    "beyond loopback without a token": ('listen = "0.0.0.0:0"', "token_file"),
    "beyond loopback by IPv6": ('listen = "[::]:0"', "token_file"),
    "a token that is not there": ('token_file = "/nowhere/token"', "/nowhere/token"),
    "a token that is too short": ('token_file = "SHORT"', "at least 16"),
    "a size that is none": ('memory_limit = "8 elephants"', "memory_limit"),
    "no memory": ("memory_limit = 0", "memory_limit"),
    "a negative size": ("memory_limit = -1", "memory_limit"),
    "a stall of nothing": ("stall = 0", "stall"),
    "a log level of its own": ('log_level = "loud"', "`$.log_level`: it is one of 'debug', 'info', 'warning', 'error'"),
    "a socket with too long a path": (f'socket = "/tmp/{"x" * 110}"', "socket"),
    "a socket in no directory": ('socket = "/nowhere/shipd.sock"', "/nowhere/shipd.sock"),
    "a group that is none": ('socket_group = "no-such-group"', "no-such-group"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_configuration_exits_with_78(place, what):
    text, said = WRONG[what]
    (place / "token").write_text(TOKEN)
    (place / "short").write_text("short")
    if isinstance(text, str):
        text = text.replace("TOKEN", str(place / "token")).replace("SHORT", str(place / "short"))
        first, table, rest = text.partition("[")
        given = {line.partition(" ")[0] for line in text.splitlines()}
        defaults = {"listen": "127.0.0.1:0", "socket": str(place / "shipd.sock")}
        text = toml({key: value for key, value in defaults.items() if key not in given}) + first + table + rest
    path = place / "shipd.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with Process([sys.executable, "-m", "shipd.service.main", "--config", str(path)]) as process:
        assert process.wait() == 78, process.describe()
        lines = process.err.splitlines()
        assert lines[-1].startswith("shipd: "), process.describe()
        assert said in lines[-1]
        assert "Traceback" not in process.err
    assert not (place / "shipd.sock").exists()


def test_a_configuration_that_is_not_there_exits_with_78(place):
    with Process([sys.executable, "-m", "shipd.service.main", "--config", str(place / "none.toml")]) as process:
        assert process.wait() == 78
        assert "none.toml" in process.err


def test_check_says_whether_it_would_start(place):
    path = place / "shipd.toml"
    for text, code in (('listen = "127.0.0.1:0"', 0), ("nonsense = 1", 78)):
        path.write_text(text)
        with Process([sys.executable, "-m", "shipd.service.main", "--check", "--config", str(path)]) as process:
            assert process.wait() == code, process.describe()


def test_environment_beats_the_file(start_shipd, place):
    token = place / "token"
    token.write_text(TOKEN)
    service = start_shipd(
        memory_limit="1GiB",
        env={"SHIPD_MEMORY_LIMIT": "3GiB", "SHIPD_TOKEN_FILE": str(token), "SHIPD_LISTEN": "[::1]:0"},
    )
    assert service.logged("listening")[0]["address"].startswith("[::1]:")
    assert status(str(service.socket)).memory_limit == 3 << 30
    with pytest.raises(shipd.AuthError):
        status(f"[::1]:{service.port}")


def test_wrong_environment_exits_with_78(place):
    path = place / "shipd.toml"
    path.write_text('listen = "127.0.0.1:0"')
    command = [sys.executable, "-m", "shipd.service.main", "--config", str(path)]
    with Process(command, env={"SHIPD_LOG_LEVEL": "loud"}) as process:
        assert process.wait() == 78
        assert "log_level" in process.err


def test_beyond_loopback_with_a_token(start_shipd, place, small):
    token = place / "token"
    token.write_text(TOKEN)
    service = start_shipd(listen="0.0.0.0:0", token_file=str(token))
    push(service.address, small, token=TOKEN)


def test_a_port_that_is_taken_exits_with_78(start_shipd, place):
    service = start_shipd()
    directory = place / "second"
    directory.mkdir()
    with pytest.raises(AssertionError, match=rf"ended with 78[\s\S]*cannot listen on {service.address}"):
        start_shipd(directory=directory, listen=service.address)
    assert not (directory / "shipd.sock").exists()
    assert status(service.address)


def test_generated_configuration_is_toml():
    import tomllib

    values = {"listen": "127.0.0.1:0", "stall": 0.5, "memory_limit": 7, "models": {"a.b": "1GiB"}}
    assert tomllib.loads(toml(values)) == {**values, "models": {"a.b": {"max_bytes": "1GiB"}}}
