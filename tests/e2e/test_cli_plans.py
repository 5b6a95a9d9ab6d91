"""shipctl push --dry-run with all that maps names, and shipctl doctor: what they print, as --json, and exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import shipd
from shipd.cli.shipctl import shipctl as command
from tests.conftest import StartDaemon
from tests.support.bitwise import same
from tests.support.fake_daemon import FakeDaemon
from tests.support.file_servers import FileServer
from tests.support.hostile import Peer
from tests.support.processes import Finished, address_of, push
from tests.support.serving_process import Attach

pytest_plugins = ["tests.support.serving_process", "tests.support.bitwise", "tests.support.older"]


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)


def weights(version: int = 1) -> dict[str, torch.Tensor]:
    """A version of it."""
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in Net().state_dict().items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], Path]:
    """Saves tensors to a file."""

    def to_file(tensors: dict[str, torch.Tensor]) -> Path:
        save_file(tensors, tmp_path / "net.safetensors")
        return tmp_path / "net.safetensors"

    return to_file


Save = Callable[[dict[str, torch.Tensor]], Path]


@pytest.fixture
def served(start_daemon: StartDaemon, attach: Attach) -> tuple[shipd.Daemon, Net]:
    """A daemon, and a model that it serves."""
    daemon = start_daemon(models={})
    model = Net()
    attach(model, daemon)
    return daemon, model


Served = tuple[shipd.Daemon, Net]


def shipctl(*arguments: str | Path) -> Finished:
    """In this process: to start Python seventy times takes longer than all of these tests."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], prog_name="shipctl")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Finished(result.exit_code, result.stdout, result.stderr)


def dry(daemon: shipd.Daemon, file: Path, *more: str | Path) -> Finished:
    return shipctl("push", file, "--to", address_of(daemon), "--model", "model", "--dry-run", *more)


# --- push --dry-run --------------------------------------------------------------------------------------------------


def test_the_plan_of_what_fits(served: Served, save: Save) -> None:
    daemon, model = served
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = save(
        {**{f"module.{name}": tensor.double() for name, tensor in weights().items()}, "module.aux": torch.ones(5)}
    )
    finished = dry(daemon, file, "--policy", "partial", "--cast")
    assert (finished.code, finished.err) == (0, "")
    assert finished.out.splitlines() == [
        f"{file} fits model model",
        "  4 tensors to send, 104 B",
        "  names: module.* -> * (4 tensors)",
        (
            "  4 tensors renamed: module.body.bias -> body.bias, module.body.weight -> body.weight, "
            "module.head.bias -> head.bias, module.head.weight -> head.weight"
        ),
        "  cast: float64 -> float32 (4 tensors, 104 B)",
        "  left out, the model has none (1 tensor): module.aux",
    ]
    answer = dry(daemon, file, "--policy", "partial", "--cast", "--json").answer
    assert answer.pop("message") == finished.out.rstrip("\n")
    assert answer == {
        "type": "plan", "model": "model", "known": True, "fits": True, "policy": "partial", "cast": True, "tensors": 4,
        "bytes": 104, "partial": False, "renamed": [[f"module.{name}", name] for name in sorted(weights())],
        "rules": ["module.* -> * (4 tensors)"],
        "casts": [{"from": "float64", "to": "float32", "tensors": 4, "bytes": 104}],
        "tied": [], "skipped": [], "shared": [], "ignored": ["module.aux"], "kept": [], "notes": [], "problems": [],
    }  # fmt: skip
    assert same(model.state_dict(), before)
    assert daemon.server.models["model"].failed is None, "nothing was offered"


def test_the_plan_of_what_does_not_fit_says_what_to_add_and_that_does_it(served: Served, save: Save) -> None:
    daemon, model = served
    file = save({name.replace("body.", "trunk."): tensor for name, tensor in weights().items()})
    finished = dry(daemon, file)
    assert (finished.code, finished.err) == (12, "")
    assert finished.out.splitlines() == [
        f"the tensors of '{file}' do not match model 'model' ({__name__}.Net): 2 missing, 2 unexpected",
        "  missing: body.bias (float32 [4])",
        "  missing: body.weight (float32 [4, 3])",
        "  unexpected: trunk.bias (float32 [4]), body.bias by the rule below",
        "  unexpected: trunk.weight (float32 [4, 3]), body.weight by the rule below",
        "help: add --map '^trunk\\.=body.', which names 2 tensors as the model does",
    ]
    refused = dry(daemon, file, "--json")
    assert refused.code == 12
    assert refused.answer["message"] == finished.out.rstrip("\n")
    assert (refused.answer["fits"], len(refused.answer["problems"])) == (False, 4)
    assert refused.answer["problems"][0] == {
        "kind": "missing", "tensor": "body.bias", "text": "missing: body.bias (float32 [4])", "notes": [],
    }  # fmt: skip
    pushed = shipctl("push", file, "--to", address_of(daemon), "--model", "model", "--json")
    assert (pushed.code, pushed.answer["error"], pushed.answer["message"]) == (
        *(12, "TensorMismatch"),
        finished.out.rstrip("\n"),
    )
    helped = shipctl("push", file, "--to", address_of(daemon), "--model", "model", "--map", r"^trunk\.=body.")
    assert helped.code == 0, helped
    assert r"  renamed  --map '^trunk\.=body.' (2 tensors)" in helped.out.splitlines()
    assert same(model.state_dict(), weights())


def test_a_mapping_file_and_rules(served: Served, save: Save, tmp_path: Path) -> None:
    daemon, model = served
    own = {"body.weight": "w1", "body.bias": "b1", "head.weight": "h.weight", "head.bias": "h.bias"}
    file = save({own[name]: tensor for name, tensor in weights().items()})
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"w1": "body.weight", "b1": "body.bias"}))
    options: tuple[str | Path, ...] = ("--map-file", names, "--map", r"^h\.=head.")
    answer = dry(daemon, file, *options, "--json").answer
    assert answer["rules"] == [f"{names} (2 tensors)", r"--map '^h\.=head.' (2 tensors)"]
    assert shipctl("push", file, "--to", address_of(daemon), "--model", "model", *options).code == 0
    assert same(model.state_dict(), weights())
    names.write_text(json.dumps({"w1": "body.weights"}))
    finished = dry(daemon, file, *options)
    assert finished.code == 12
    assert finished.out.splitlines()[1:] == [
        f"  names were matched with {names} (1 tensor)",
        r"  names were matched with --map '^h\.=head.' (2 tensors)",
        f"  rename: {names} maps w1 to body.weights, which the model does not have",
        "  and 2 missing, 2 unexpected, which may come of it",
        (
            f"help: correct {names} or leave out what is not there; the model has body.weight, if body.weights should "
            "be that"
        ),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--map", "nothing"), "the rule 'nothing' is not of the form regex=replacement"),
        (("--map", "(=x"), "the rule '(=x' has a bad regular expression"),
        (("--map-file", "/nowhere/names.json"), "the mapping file '/nowhere/names.json' cannot be read: No such file"),
        (("--map-file", "a", "--map-file", "b"), "--map-file is given twice: one file has all names"),
        (("--policy", "lax"), "'lax' is not one of 'strict', 'subset', 'partial'"),
        (("--explain",), "--dry-run sends nothing: there is no --explain of it"),
        (("--profile",), "--dry-run sends nothing: there is no --profile of it"),
    ],
)
def test_wrong_usage_is_2(daemon: shipd.Daemon, small: Path, options: tuple[str, ...], said: str) -> None:
    finished = dry(daemon, small, *options)
    assert (finished.code, finished.out) == (2, "")
    assert said in finished.err
    assert "Traceback" not in finished.err


def test_the_plan_for_what_nothing_serves(daemon: shipd.Daemon, small: Path, save: Save) -> None:
    finished = dry(daemon, small)
    assert finished.code == 0
    said = f"{small} would be taken as it is: nothing is known yet of what model model consists of"
    assert finished.out == f"{said}\n"
    answer = dry(daemon, small, "--json").answer
    assert (answer["known"], answer["message"]) == (False, said)
    refused = dry(daemon, small, "--policy", "subset", "--json")
    assert (refused.code, refused.answer["error"]) == (12, "Refused")
    push(address_of(daemon), weights(), label="v1")
    assert dry(daemon, small).out == (
        f"{small} would be taken as it is: nothing serves model model, whose version v1 consists of other tensors, and "
        "it would be replaced\n"
    )


def test_what_is_secret_in_a_url_is_not_shown(served: Served, save: Save) -> None:
    daemon, _model = served
    file = save({**weights(), "aux": torch.ones(1)})
    with FileServer() as server:
        url = server.serve("/net.safetensors", file.read_bytes()) + "?signature=secret"
        for asked in (("push", url, "--to", address_of(daemon), "--dry-run"), ("doctor", address_of(daemon), url)):
            finished = shipctl(*asked, "--model", "model")
            assert "unexpected: aux" in finished.out
            assert "net.safetensors?…" in finished.out
            assert "secret" not in finished.out + finished.err


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_of_what_is_well(served: Served, save: Save) -> None:
    daemon, _model = served
    file = save({f"module.{name}": tensor for name, tensor in weights().items()})
    finished = shipctl("doctor", address_of(daemon), file, "--model", "model")
    assert (finished.code, finished.err) == (0, ""), finished
    lines = finished.out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["here", "daemon", "model", "checkpoint"]
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    assert f"serves {__name__}.Net in mode copy (torch {torch.__version__}{cuda}, Python" in finished.out
    assert lines[lines.index("checkpoint") + 1 :] == [
        "  ok       4 tensors to send, 104 B",
        "  ok       names: module.* -> * (4 tensors)",
        (
            "  ok       4 tensors renamed: module.body.bias -> body.bias, module.body.weight -> body.weight, "
            "module.head.bias -> head.bias, module.head.weight -> head.weight"
        ),
    ]
    findings = [json.loads(line) for line in shipctl("doctor", address_of(daemon), "--json").out.splitlines()]
    assert all(set(finding) == {"type", "level", "subject", "text", "help"} for finding in findings)
    assert {finding["type"] for finding in findings} == {"finding"}
    assert {finding["subject"] for finding in findings} == {"here", "daemon", "model"}
    assert daemon.server.models["model"].failed is None


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_the_doctor_of_a_checkpoint_that_does_not_fit(served: Served, save: Save, as_json: bool) -> None:
    daemon, _model = served
    file = save({name: tensor.double() for name, tensor in weights().items()})
    finished = shipctl("doctor", address_of(daemon), file, "--model", "model", *(["--json"] if as_json else []))
    assert (finished.code, finished.err) == (1, "")
    last = finished.out.splitlines()[-1]
    text = json.loads(last)["text"] if as_json else finished.out
    assert "do not match model 'model'" in text
    assert "4 of another dtype" in text
    assert "help: add --cast, which casts float64 -> float32 (4 tensors, 104 B)" in text
    helped = shipctl("doctor", address_of(daemon), file, "--model", "model", "--cast")
    assert helped.code == 0, helped


def test_the_doctor_of_a_model_that_is_not_there(served: Served) -> None:
    finished = shipctl("doctor", address_of(served[0]), "--model", "llama-3.1")
    assert (finished.code, finished.err) == (1, "")
    assert finished.out.splitlines()[-3:] == [
        "llama-3.1",
        "  error    the daemon has no model of that name; there are model",
        (
            "           help: attach it in the serving process: shipd.attach(model, 'llama-3.1'); or declare it in the "
            'daemon\'s configuration: [models."llama-3.1"]'
        ),
    ]


def test_the_doctor_of_a_checkpoint_that_cannot_be_read(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"nothing of the kind")
    finished = shipctl("doctor", address_of(served[0]), file, "--model", "model")
    assert (finished.code, finished.err) == (1, "")
    assert "  error    " in finished.out
    assert "which is neither safetensors nor torch.save; save it as safetensors" in finished.out


def test_the_doctor_of_a_part_for_which_there_is_no_room(start_daemon: StartDaemon, attach: Attach, save: Save) -> None:
    daemon = start_daemon(models={}, memory_limit="13KiB")
    attach(Net(), daemon)
    part = {name: tensor for name, tensor in weights().items() if name != "head.bias"}
    finished = shipctl("doctor", address_of(daemon), save(part), "--model", "model", "--policy", "subset")
    assert finished.code == 0, finished
    daemon.server.images.budget.limit = daemon.server.images.budget.used
    finished = shipctl("doctor", address_of(daemon), save(part), "--model", "model", "--policy", "subset")
    assert finished.code == 1, finished
    assert "that takes 96 B, and of the daemon's memory_limit 0 B are left" in finished.out
    assert finished.out.endswith("help: raise memory_limit in the daemon's configuration, and reload it\n")
    refused = shipctl(
        "push", save(part), "--to", address_of(daemon), "--model", "model", "--policy", "subset", "--json"
    )
    assert (refused.code, refused.answer["error"]) == (12, "MemoryLimit")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"models": {"model": 100}}, 'max_bytes in [models."model"]'),
        ({"models": {"model": 1000}, "memory_limit": 100}, "memory_limit"),
    ],
)
def test_of_a_version_that_is_too_large(
    start_daemon: StartDaemon, save: Save, options: dict[str, Any], key: str
) -> None:
    """While nothing serves the model, anything else would be taken."""
    daemon = start_daemon(**options)
    told = (
        f"model 'model' may have 100 B, and this version has 104 B: raise {key} of the daemon's configuration, and "
        "have the daemon reloaded\n"
    )
    planned = dry(daemon, save(weights()))
    assert (planned.code, planned.out, planned.err) == (12, "", f"shipctl: {told}")
    finished = shipctl("doctor", address_of(daemon), save(weights()), "--model", "model")
    assert (finished.code, finished.err) == (1, "")
    assert finished.out.endswith(f"checkpoint\n  error    {told}")
    refused = shipctl("push", save(weights()), "--to", address_of(daemon), "--model", "model", "--json")
    assert (refused.code, refused.answer["error"]) == (12, "MemoryLimit")


@pytest.mark.usefixtures("older_daemons")
def test_the_doctor_of_a_daemon_that_cannot_tell(served: Served, save: Save) -> None:
    finished = shipctl("doctor", address_of(served[0]), save(weights()), "--model", "model")
    assert finished.code == 0, finished
    assert "  warning  its release cannot tell what its models consist of" in finished.out
    assert finished.out.endswith(
        "  note     it can be read, and would be taken as it is: the daemon's release cannot tell what its models "
        "consist of\n"
    )
    asked = shipctl("doctor", address_of(served[0]), save(weights()), "--model", "model", "--cast")
    assert asked.code == 1
    assert "push without a policy, casts and renames, or update it" in asked.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("127.0.0.1:1", "{file}"), "CHECKPOINT is looked at for a model: name it with --model"),
        (("{file}", "--model", "model"), "{file} is a file: the daemon comes first, as in: shipctl doctor HOST {file}"),
        (("127.0.0.1:1", "--model", "model", "--cast"), "are of a CHECKPOINT: there is none"),
        (("127.0.0.1:1", "--map", "a=b"), "are of a CHECKPOINT: there is none"),
    ],
)
def test_wrong_usage_of_the_doctor_is_2(small: Path, arguments: tuple[str, ...], said: str) -> None:
    finished = shipctl("doctor", *(part.format(file=small) for part in arguments))
    assert (finished.code, finished.out) == (2, "")
    assert said.format(file=small) in " ".join(finished.err.split())


def test_a_daemon_that_is_not_there_is_1(small: Path) -> None:
    def silent(_peer: Peer) -> None:
        return

    with FakeDaemon(silent) as fake:
        address = fake.address
    finished = shipctl("doctor", address, small, "--model", "model", "--json")
    assert (finished.code, finished.answer["error"]) == (1, "ConnectError")
    assert "Is shipd running there?" in finished.err
