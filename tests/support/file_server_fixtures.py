"""Fixtures of tests that fetch: a plugin for their modules."""

from collections.abc import Iterator

import pytest

from tests.support.file_servers import FileServer


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this host needs to reach others."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(no_proxies: None) -> Iterator[FileServer]:
    """One that does what it should, until a test changes that."""
    with FileServer() as files:
        yield files
