"""shipctl's commands: what they import, what they print and as --json, and their exit codes."""

import dataclasses
import os
import resource
import subprocess
import sys

import pytest

import shipd
from tests.support import checkpoints
from tests.support.checkpoints import assert_installed
from tests.support.processes import Process, Shipctl, address_of, environment, push, push_arguments, shipctl
from tests.support.proxy import Proxy, until

# --- starting --------------------------------------------------------------------------------------------------------


HEAVY = ("torch", "numpy", "rich", "asyncio", "msgspec", "uvloop", "shipproto.sender")


@pytest.mark.parametrize("command", [[], ["push"], ["status"], ["verify"]])
def test_help_imports_nothing_heavy(command):
    code = f"""
import sys
from shipd.cli.shipctl import shipctl
try:
    shipctl([*{command!r}, "--help"])
finally:
    print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    with Process([sys.executable, "-c", code]) as process:
        assert process.wait() == 0, process.describe()
        assert "Usage:" in process.out
        assert "loaded: []" in process.out


def test_help_answers_at_once():
    """In processor time, which does not depend on what else the machine does; the best of three."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shipctl("--help").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3


def test_version():
    finished = shipctl("--version")
    assert finished.code == 0
    assert finished.out.startswith("shipctl, version ")


def test_push_of_safetensors_loads_no_torch(daemon, small):
    code = f"""
import sys
from shipd.cli.shipctl import shipctl
try:
    shipctl(["push", {str(small)!r}, "--to", {address_of(daemon)!r}, "--model", "model"])
finally:
    print("torch:", "torch" in sys.modules)
"""
    with Process([sys.executable, "-c", code]) as process:
        assert process.wait() == 0, process.describe()
        assert "torch: False" in process.out


def test_runs_as_an_installed_command():
    """The entry point in pyproject.toml is the function that is tested here."""
    code = "import sys; sys.argv = ['shipctl', '--version']; from shipd.cli.shipctl import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert finished.returncode == 0, finished.stderr


# --- what it prints --------------------------------------------------------------------------------------------------


def test_push_for_people(daemon, medium):
    finished = shipctl(*push_arguments(daemon, medium, "--label", "v1"))
    assert finished.code == 0, finished
    assert finished.out.startswith("model is at v1\n")
    assert checkpoints.medium().digest in finished.out
    assert "12 tensors" in finished.out
    assert "nothing is attached" in finished.out
    assert finished.err == "", "no progress where there is no terminal"
    again = shipctl(*push_arguments(daemon, medium, "--label", "v1"))
    assert "already" in again.out
    assert "nothing to send" in again.out


def test_push_with_a_profile_says_where_the_time_went(daemon, medium):
    finished = shipctl(*push_arguments(daemon, medium, "--profile"))
    assert finished.code == 0, finished
    lines = finished.out.partition("where ")[2].splitlines()
    stages = [line.split()[0] for line in lines[1:]]
    assert stages == [
        "open",
        "plan",
        "connect",
        "agree",
        "wire",
        "sender",
        "receiver",
        "verify",
        "stage",
        "commit",
        "between",
    ]
    assert "over 1 connection" in finished.out
    shares = [int(line.split(" %")[0].split()[-1]) for line in lines[1:] if " %" in line]
    assert 90 <= sum(shares) <= 110, "the stages are the whole push"


def test_push_over_as_many_connections_as_are_asked_for(daemon, medium):
    finished = shipctl(*push_arguments(daemon, medium, "--lanes", "3", "--json"))
    assert finished.answer["profile"]["lanes"] <= 3
    assert shipctl(*push_arguments(daemon, medium, "--lanes", "17")).code == 2


def test_push_as_json(daemon, medium):
    finished = shipctl(*push_arguments(daemon, medium, "--label", "v1", "--json"))
    assert finished.code == 0, finished
    assert finished.err == ""
    answer = finished.answer
    assert set(answer) == {"type", *(field.name for field in dataclasses.fields(shipd.Receipt))}
    assert answer["type"] == "receipt"
    assert answer["digest"] == checkpoints.medium().digest
    assert (answer["model"], answer["label"], answer["tensors"]) == ("model", "v1", 12)
    assert answer["bytes_total"] == checkpoints.medium().nbytes
    assert answer["pause_seconds"] is None
    assert len(bytes.fromhex(answer["transfer_id"])) == 16
    assert_installed(daemon, checkpoints.medium(), label="v1")


def test_push_with_damage_says_what_was_resent(daemon, medium):
    with Proxy(daemon.port) as proxy:
        proxy.flip("payload", nth=7)
        finished = shipctl("push", medium, "--to", proxy.address, "--model", "model")
    assert finished.code == 0, finished
    assert "1 damaged frame(s): block.1.weight" in finished.out


def test_status_for_people_and_as_json(daemon, medium):
    before = shipctl("status", "--to", address_of(daemon))
    assert before.code == 0, before
    assert "none" in before.out
    push(address_of(daemon), medium, label="v1")
    finished = shipctl("status", "--to", address_of(daemon))
    assert finished.code == 0, finished
    row = next(line for line in finished.out.splitlines() if line.startswith("model "))
    assert "v1" in row
    assert checkpoints.medium().digest[:16] in row
    answer = shipctl("status", "--to", address_of(daemon), "--json").answer
    assert answer["type"] == "status"
    assert answer["pid"] == os.getpid()
    (model,) = answer["models"]
    assert (model["name"], model["label"], model["digest"]) == ("model", "v1", checkpoints.medium().digest)
    assert model["processes"] == []
    assert model["transfer"] is None
    assert answer["memory_used"] == model["image_bytes"] == daemon.server.images.budget.used


def test_status_shows_a_push_under_way(daemon, medium):
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Shipctl("push", medium, "--to", proxy.address, "--model", "model") as pushing:
            held.wait()
            until(lambda: daemon.server.models["model"].incoming.receiver.held, "chunks that are held")
            finished = shipctl("status", "--to", address_of(daemon))
            transfer = shipctl("status", "--to", address_of(daemon), "--json").answer["models"][0]["transfer"]
            held.release()
            assert pushing.wait() == 0, pushing.describe()
    assert "receiving a push from 127.0.0.1:" in finished.out
    assert transfer["connected"]
    assert 0 < transfer["bytes_held"] < transfer["bytes_total"]


def test_verify(daemon, small):
    empty = shipctl("verify", "--to", address_of(daemon), "--model", "model")
    assert empty.code == 0, empty
    push(address_of(daemon), small, label="v1")
    finished = shipctl("verify", "--to", address_of(daemon), "--model", "model")
    assert finished.code == 0, finished
    assert checkpoints.tiny().digest in finished.out
    assert "nothing is attached" in finished.out
    answer = shipctl("verify", "--to", address_of(daemon), "--model", "model", "--json").answer
    assert answer["type"] == "verification"
    assert (answer["label"], answer["digest"]) == ("v1", checkpoints.tiny().digest)
    assert answer["processes"] == []


def test_over_the_unix_socket_and_by_environment(daemon, small):
    finished = shipctl("push", small, "--model", "model", "--to", daemon.config.socket, "--json")
    assert finished.code == 0, finished
    finished = shipctl("status", "--json", env={"SHIPD_HOST": address_of(daemon)})
    assert finished.answer["models"][0]["digest"] == checkpoints.tiny().digest


def test_token_from_a_file_or_the_environment(start_daemon, small, tmp_path):
    token = tmp_path / "token"
    token.write_text("sixteen characters and more\n")
    daemon = start_daemon(token_file=str(token))
    assert shipctl(*push_arguments(daemon, small, "--token-file", token)).code == 0
    assert shipctl("status", "--to", address_of(daemon), env={"SHIPD_TOKEN_FILE": str(token)}).code == 0
    refused = shipctl("status", "--to", address_of(daemon), "--json")
    assert refused.code == 12, refused
    assert refused.answer["error"] == "AuthError"


# --- exit codes ------------------------------------------------------------------------------------------------------


def assert_failed(finished, code, error, said):
    """The code, one line on stderr, and the same as an object on stdout."""
    assert finished.code == code, finished
    assert finished.err.startswith("shipctl: "), finished
    assert "Traceback" not in finished.err
    assert said in finished.err, finished
    answer = finished.answer
    assert answer["type"] == "error"
    assert answer["error"] == error
    assert answer["exit_code"] == code
    assert said in answer["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["push"],
        ["push", "file"],
        ["push", "file", "--model", "model", "--no-such-option"],
        ["push", "file", "--model", "model", "--stall", "0"],
        ["push", "file", "--model", "model", "--stall", "soon"],
        ["push", "file", "--model", "model", "--to", "http://host/"],
        ["push", "file", "--model", "model", "--to", "host:99999"],
        ["push", "file", "--model", "model", "--to", "a:b:c"],
        ["no-such-command"],
        ["verify"],
    ],
)
def test_wrong_usage_is_2(arguments):
    finished = shipctl(*arguments)
    assert finished.code == 2, finished
    assert finished.out == ""
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("option", ["--model", "--label"])
def test_names_that_cannot_be_one_are_2(daemon, small, option):
    options = {"--model": "model", "--label": "label", option: "a b"}
    finished = shipctl("push", small, "--to", address_of(daemon), *(part for pair in options.items() for part in pair))
    assert finished.code == 2, finished
    assert "'a b' cannot be a" in finished.err
    assert "Traceback" not in finished.err


def test_nobody_there_is_1(daemon, small):
    with Proxy(daemon.port) as proxy:
        proxy.refuse()
        finished = shipctl("push", small, "--to", proxy.address, "--model", "model", "--json")
    assert_failed(finished, 1, "ConnectError", "Is shipd running there?")


def test_unknown_model_is_10(daemon, small):
    finished = shipctl("push", small, "--to", address_of(daemon), "--model", "other", "--json")
    assert_failed(finished, 10, "UnknownModel", "no model 'other'")
    assert finished.answer["model"] == "other"
    for command in ("status", "verify"):
        assert shipctl(command, "--to", address_of(daemon), "--model", "other").code == 10


def test_busy_is_11_and_names_the_push_that_runs(daemon, small, medium):
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Shipctl("push", medium, "--to", proxy.address, "--model", "model", "--json") as pushing:
            held.wait()
            finished = shipctl(*push_arguments(daemon, small, "--json"))
            running = daemon.server.models["model"].incoming.transfer_id
            held.release()
            assert pushing.wait() == 0, pushing.describe()
            assert pushing.answer["transfer_id"] == running
    assert_failed(finished, 11, "Busy", running)


def test_label_conflict_is_12(daemon, small, tmp_path):
    push(address_of(daemon), small, label="v1")
    other = checkpoints.write_safetensors(tmp_path / "other", checkpoints.tiny(1))
    finished = shipctl(*push_arguments(daemon, other, "--label", "v1", "--json"))
    assert_failed(finished, 12, "LabelConflict", "choose another label")


def test_too_large_is_12(start_daemon, medium):
    daemon = start_daemon(models={"model": "1MB"})
    finished = shipctl(*push_arguments(daemon, medium, "--json"))
    assert_failed(finished, 12, "MemoryLimit", "12.6 MB")


def test_damage_that_does_not_end_is_13(daemon, medium):
    with Proxy(daemon.port) as proxy:
        proxy.flip("payload", nth=5, every=True)
        finished = shipctl("push", medium, "--to", proxy.address, "--model", "model", "--json")
    assert_failed(finished, 13, "IntegrityError", "block.1.weight")
    assert finished.answer["tensor"] == "block.1.weight"


def test_a_stall_is_1(daemon, medium):
    with Proxy(daemon.port) as proxy:
        proxy.stall(nth=5)
        finished = shipctl("push", medium, "--to", proxy.address, "--model", "model", "--stall", "0.4", "--json")
    assert_failed(finished, 1, "Stalled", proxy.address)


def test_the_timeout_is_1(daemon, medium):
    with Proxy(daemon.port) as proxy:
        proxy.throttle(2e6)
        finished = shipctl("push", medium, "--to", proxy.address, "--model", "model", "--timeout", "0.5", "--json")
    assert_failed(finished, 1, "Stalled", "timeout")


@pytest.mark.parametrize("content", [None, "short"])
def test_a_token_file_that_will_not_do_is_78(daemon, small, tmp_path, content):
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    finished = shipctl(*push_arguments(daemon, small, "--token-file", token))
    assert finished.code == 78, finished
    assert str(token) in finished.err
    assert "Traceback" not in finished.err
