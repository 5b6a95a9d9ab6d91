"""Patience that ends when a test says so, and not because a busy machine has taken its time until then.

    out_of_patience   a fixture: once called, pushes of this process have soon tried for long enough to connect again
    reconfigure       settings of a daemon in this process that count from now on

Test modules say ``pytest_plugins = ["tests.support.patience"]`` and may import names from here as well, so pytest comes
too late to rewrite this module's asserts, and would warn: PYTEST_DONT_REWRITE.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import pytest

import shipd
import shipd.client.push

_FASTER: Final = 1000
"""Half a minute of waiting for a connection takes as long as opening one."""


@pytest.fixture
def out_of_patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes the clock run fast by which pushes count how long they have been without a connection."""
    since: list[float] = []

    def monotonic() -> float:
        now = time.monotonic()
        return since[0] + (now - since[0]) * _FASTER if since else now

    monkeypatch.setattr(shipd.client.push, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    return lambda: since.append(time.monotonic())


def reconfigure(daemon: shipd.Daemon, **changes: Any) -> None:
    """Also what otherwise takes a restart. What is under way may go on with what it began with."""
    daemon.server.config = msgspec.structs.replace(daemon.server.config, **changes)
