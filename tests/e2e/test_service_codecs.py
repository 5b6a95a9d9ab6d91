"""What a daemon says of the loops that its codecs run in: nothing before they are needed, then what they are."""

import os
from pathlib import Path

import pytest

from tests.support.checkpoints import write_safetensors
from tests.support.processes import ROOT, ShipdProcess, push, shipctl, status
from tests.support.proxy import until
from tests.support.successive import first, following, push_small, used

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

V0 = first(3)
V1 = following(V0)

_SHIM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "numba" or name.startswith("numba."):
            raise OSError(1, "not permitted")

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def without_numba(tmp_path) -> dict[str, str | None]:
    """An environment in which numba cannot be imported, as where memory may not be made executable."""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(_SHIM)
    folders = (tmp_path / "shim", *(ROOT / part for part in ("protocol", "daemon", "")))
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def push_a_step(service: ShipdProcess, folder: Path) -> None:
    paths = [write_safetensors(folder / f"v{at}", version) for at, version in enumerate((V0, V1))]
    push(service.address, paths[0])
    assert codecs(service) == "", "whole tensors need no codec"
    receipt = push_small(service.address, paths[1], base=paths[0])
    assert receipt.digest == V1.digest
    assert "egr" in used(receipt)


def codecs(service: ShipdProcess) -> str:
    said: str = status(service.address).codecs
    return said


def shown(service: ShipdProcess) -> str:
    finished = shipctl("status", "--to", service.address)
    assert finished.code == 0, finished
    return finished.out


def test_compiled_loops_are_loaded_once_deltas_come(start_shipd, tmp_path):
    pytest.importorskip("numba")
    service = start_shipd()
    assert codecs(service) == ""
    push_a_step(service, tmp_path)
    # It compiles beside what it serves, which takes half a minute where nothing is cached.
    until(lambda: codecs(service) == "compiled", "the loops are compiled", deadline=90)
    assert shipctl("status", "--to", service.address, "--json").answer["codecs"] == "compiled"
    assert "decoded" not in shown(service)


def test_without_numba_it_says_so_and_why(start_shipd, tmp_path, without_numba):
    service = start_shipd(env=without_numba)
    assert "decoded" not in shown(service)
    push_a_step(service, tmp_path)
    why = "numpy (PermissionError: [Errno 1] not permitted)"
    until(lambda: codecs(service) == why, "the daemon says what it does without")
    assert shipctl("status", "--to", service.address, "--json").answer["codecs"] == why
    assert f"deltas are decoded more slowly than they could be, by {why}" in shown(service)
    (model,) = status(service.address).models
    assert model.digest == V1.digest
