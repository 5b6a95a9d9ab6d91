"""A daemon that has one version, and the next one, to be pushed to it through a proxy.

    OLD, NEW      the two, of one structure
    fixtures      ``old_daemon`` has OLD, ``new`` is a file of NEW, and ``proxy`` stands before whatever ``daemon`` is;
                  ``short_backoff`` and ``short_goodbye`` spare a test what it does not test
    assert_fit    OLD has come to no harm, and NEW still arrives

Test modules say ``pytest_plugins = ["tests.support.upgrades"]`` and import names from here as well, so pytest comes too
late to rewrite this module's asserts, and would warn: PYTEST_DONT_REWRITE.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shipd
import shipd.client.push
import shipd.transfer.lane
from tests.support import checkpoints
from tests.support.checkpoints import assert_installed
from tests.support.processes import address_of, push
from tests.support.proxy import Proxy

OLD = checkpoints.medium(0)
NEW = checkpoints.medium(1)
CHUNKS = NEW.chunks


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for when a connection is opened anew is not what is tested."""
    monkeypatch.setattr(shipd.client.push, "_BACKOFF", (0.01, 0.02, 0.05, 0.1))


@pytest.fixture
def short_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what is waited for when one is given up."""
    monkeypatch.setattr(shipd.transfer.lane, "_GOODBYE_SECONDS", 0.1)


@pytest.fixture
def old_daemon(start_daemon: Callable[[], shipd.Daemon], tmp_path: Path) -> shipd.Daemon:
    """A daemon that has a version already, of the same structure."""
    daemon = start_daemon()
    push(address_of(daemon), checkpoints.write_safetensors(tmp_path / "old", OLD), label="old")
    return daemon


@pytest.fixture
def proxy(daemon: shipd.Daemon) -> Iterator[Proxy]:
    """Before the daemon of the test."""
    with Proxy(daemon.port) as proxy:
        yield proxy


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A file of the next version."""
    return checkpoints.write_safetensors(tmp_path / "new", NEW)


def assert_fit(daemon: shipd.Daemon, new: Path) -> None:
    """Nothing has happened to the version that serves, and the next push goes through."""
    assert_installed(daemon, OLD, label="old")
    push(address_of(daemon), new, label="after")
    assert_installed(daemon, NEW, label="after")
