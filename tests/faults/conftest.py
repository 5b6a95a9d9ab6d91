"""What tests of faults share: daemons that have a version already, or wait for nobody; attempts that are refused."""

import threading
from typing import Any

import pytest

import shipd
from shipd.transfer.lane import Lane
from tests.conftest import StartDaemon


@pytest.fixture
def daemon(old_daemon: shipd.Daemon) -> shipd.Daemon:
    """A daemon that has a version already: tests.support.upgrades has it."""
    return old_daemon


@pytest.fixture
def impatient(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> shipd.Daemon:
    """A daemon that waits for nobody longer than three seconds, in which whoever is not to be given up gets a turn also
    on a machine that is busy."""
    monkeypatch.setattr("shipd.service.rollout.SWAP_GRACE", 2.0)
    return start_daemon(models={}, stage_timeout=3.0, commit_timeout=1.0)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts the attempts to connect that were refused."""
    refused = threading.Semaphore(0)
    opened = Lane.open

    def counting(*arguments: Any, **options: Any) -> Lane:
        try:
            return opened(*arguments, **options)
        except shipd.ConnectError:
            refused.release()
            raise

    monkeypatch.setattr(Lane, "open", counting)
    return refused
