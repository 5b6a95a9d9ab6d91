"""Daemons of before DESCRIBE and partial offers, as a sender sees them: such a one says nothing of either in HELLO."""

from typing import Any

import pytest

from shipproto.connection import Connection


@pytest.fixture
def older_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are the daemons of this process, on connections that are opened from now on."""

    def made(**fields: Any) -> Connection:
        return Connection(**{**fields, "capabilities": ()})

    monkeypatch.setattr("shipd.service.server.Connection", made)
