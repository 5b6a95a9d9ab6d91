"""The unit, its GPU drop-in and the example configuration, checked as an administrator would check them.

systemd-analyze needs no running systemd, but it insists that the program of ExecStart= exists. So the unit is
rendered into a temporary directory with programs that do; nothing else in it is changed.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

from shipd.service import config

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
EXAMPLE = SYSTEMD / "shipd.toml"
PROGRAMS = ("/opt/shipd/bin/shipd", "/bin/kill")
COMMENTED_KEY = re.compile(r"^# (?=[a-z_]+ = )", re.MULTILINE)

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def render(directory, *, gpu, unit=None):
    """The unit with programs that exist here, and beside it the drop-in where asked for."""
    text = (SYSTEMD / "shipd.service").read_text() if unit is None else unit
    for program in PROGRAMS:
        assert text.count(f"={program} ") == 1
        text = text.replace(f"={program} ", f"={sys.executable} ")
    rendered = directory / "shipd.service"
    rendered.write_text(text)
    if gpu:
        (directory / "shipd.service.d").mkdir()
        shutil.copy(SYSTEMD / "gpu.conf", directory / "shipd.service.d")
    return rendered


def analyze(verb, *arguments):
    command = ["systemd-analyze", verb, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)


def verify(unit):
    # Without both flags a misspelt key is reported and forgiven: exit code 0.
    return analyze("verify", "--man=no", "--recursive-errors=yes", unit)


def exposure(unit):
    """The figure of systemd-analyze security: 0 is a closed box, 10 is root on the host."""
    result = analyze("security", "--no-pager", "--offline=true", "--threshold=20", unit)
    assert result.returncode == 0, result.stdout
    found = re.search(r"Overall exposure level for shipd\.service: ([0-9.]+)", result.stdout)
    assert found, result.stdout
    return float(found[1])


@needs_systemd
@pytest.mark.parametrize("gpu", [False, True], ids=["plain", "gpu"])
def test_unit_is_valid(tmp_path, gpu):
    result = verify(render(tmp_path, gpu=gpu))
    assert result.returncode == 0, result.stdout
    assert result.stdout == ""


@needs_systemd
def test_verify_would_notice_a_misspelt_key(tmp_path):
    text = (SYSTEMD / "shipd.service").read_text().replace("ProtectSystem=", "ProtectSystm=")
    result = verify(render(tmp_path, gpu=False, unit=text))
    assert result.returncode != 0
    assert "ProtectSystm" in result.stdout


@needs_systemd
def test_exposure_is_at_most_two_and_the_drop_in_is_what_raises_it(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "gpu").mkdir()
    plain = exposure(render(tmp_path / "plain", gpu=False))
    gpu = exposure(render(tmp_path / "gpu", gpu=True))
    assert plain < gpu <= 2.0


@needs_systemd
def test_what_forbids_compiled_code_is_one_commented_line(tmp_path):
    text = (SYSTEMD / "shipd.service").read_text()
    assert text.count("\n#MemoryDenyWriteExecute=yes\n") == 1
    (tmp_path / "allowed").mkdir()
    (tmp_path / "forbidden").mkdir()
    forbidding = render(tmp_path / "forbidden", gpu=False, unit=text.replace("#MemoryDeny", "MemoryDeny"))
    allowed, forbidden = exposure(render(tmp_path / "allowed", gpu=False)), exposure(forbidding)
    # What the README says of both.
    assert (allowed, forbidden) == (1.4, 1.4)


def test_compiled_code_is_kept_where_the_service_may_write(unit):
    assert unit["Environment"] == f"NUMBA_CACHE_DIR=/var/cache/{unit['CacheDirectory']}/numba"


@pytest.mark.parametrize("name", ["shipd.service", "gpu.conf"])
def test_every_setting_of_the_service_is_explained(name):
    section = (SYSTEMD / name).read_text().partition("[Service]\n")[2].partition("[Install]\n")[0]
    explained = False
    for line in section.splitlines():
        if line.startswith("#"):
            explained = not line.startswith("# ---")
        elif line:
            assert explained, line
        else:
            explained = False


def directives(text):
    """KEY=VALUE lines; of a repeated key the last."""
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Za-z]+=", line))


@pytest.fixture(scope="module")
def unit():
    return directives((SYSTEMD / "shipd.service").read_text())


@pytest.fixture
def complete(tmp_path):
    """The example with its commented keys switched on, and a token file that exists."""
    token = tmp_path / "token"
    token.write_text("a secret that only senders know, 64 characters of it or thereabouts\n")
    token.chmod(0o600)
    text, switched_on = COMMENTED_KEY.subn("", EXAMPLE.read_text())
    assert switched_on == 1
    text, replaced = re.subn(r'^token_file = ".*"$', f'token_file = "{token}"', text, flags=re.MULTILINE)
    assert replaced == 1
    path = tmp_path / "shipd.toml"
    path.write_text(text)
    return path


def test_example_is_accepted_as_it_stands():
    config.load(EXAMPLE, environ={})


def test_every_key_of_the_example_is_accepted(complete):
    config.load(complete, environ={})


def test_every_key_there_is_stands_in_the_example(complete):
    known = typing.get_type_hints(type(config.load(complete, environ={})))
    assert set(tomllib.loads(complete.read_text())) == set(known)


def test_every_key_of_the_example_is_explained():
    blocks = EXAMPLE.read_text().split("\n\n")
    for block in blocks:
        lines = block.strip().splitlines()
        settings = [line for line in lines if COMMENTED_KEY.match(line) or not line.startswith("#")]
        assert lines[0].startswith("#"), block
        assert len([line for line in settings if " = " in line]) <= 1, block


def test_unit_and_example_agree(unit):
    example = EXAMPLE.read_text()
    values = tomllib.loads(COMMENTED_KEY.sub("", example))
    assert Path(values["socket"]).parent == Path("/run") / unit["RuntimeDirectory"]
    assert values["socket_group"] == unit["Group"]
    assert values["token_file"] == f"/run/credentials/shipd.service/{unit['LoadCredential']}"
    assert int(unit["TimeoutStopSec"]) > (
        values["drain_timeout"] + 2 * values["stage_timeout"] + values["commit_timeout"]
    )
    # The images and a GiB for everything else.
    assert values["memory_limit"] == f"{int(unit['MemoryMax'].removesuffix('G')) - 1}GiB"
    assert values["listen"].startswith("127.0.0.1:"), "loopback as long as no token is set"
    assert values["metrics"] == f"127.0.0.1:{config.METRICS_PORT}"


def test_sysusers_creates_the_user_of_the_unit(unit):
    lines = (SYSTEMD / "sysusers.d" / "shipd.conf").read_text().splitlines()
    (kind, name, *_), *others = [line.split() for line in lines if not line.startswith("#")]
    assert (kind, name) == ("u", unit["User"])  # "u" creates the group of that name too
    assert unit["Group"] == name
    assert not others


def test_the_drop_in_changes_nothing_but_devices_and_memory(unit):
    drop_in = directives((SYSTEMD / "gpu.conf").read_text())
    loosened = {key for key in drop_in if key in unit}
    assert loosened == {"PrivateDevices", "ProcSubset"}
    assert set(drop_in) - loosened == {"DevicePolicy", "DeviceAllow", "MemoryDenyWriteExecute"}
