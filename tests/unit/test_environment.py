"""shipd.environment: what a process says that it runs on."""

import importlib.metadata
import json
import platform
import subprocess
import sys

import pytest
import torch

from shipd.environment import _word, environment
from shipd.release import VERSION
from shipproto.description import ENVIRONMENT
from tests.support.processes import environment as variables

_SAY = (
    "import json, sys; from shipd.environment import environment as e; print(json.dumps([e(), 'torch' in sys.modules]))"
)


def test_of_a_process_with_torch() -> None:
    found = environment()
    assert list(found) == [key for key in ENVIRONMENT if key in found]
    assert found["torch"] == torch.__version__
    assert type(found["torch"]) is str
    assert found.get("cuda") == torch.version.cuda
    assert (found["python"], found["shipd"]) == (platform.python_version(), VERSION)
    assert found["platform"].startswith(f"{sys.platform}-")


def test_of_a_process_without() -> None:
    said = subprocess.run([sys.executable, "-c", _SAY], env=variables(), capture_output=True, text=True, check=True)
    found, imported = json.loads(said.stdout)
    assert not imported
    assert found == {key: value for key, value in environment().items() if key != "cuda"} | {
        "torch": importlib.metadata.version("torch")
    }


@pytest.mark.parametrize(
    ("text", "word"), [("2.10.0+cu128", "2.10.0+cu128"), ("x" * 70, "x" * 64), ("2\n10\x1b", "2?10?"), ("é", "?")]
)
def test_anything_becomes_a_word(text: str, word: str) -> None:
    """A HELLO with anything else in it would be refused, and with it every connection."""
    assert _word(text) == word
