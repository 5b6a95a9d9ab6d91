"""Which texts are URLs, what of them is shown, and what they lead to."""

from pathlib import Path

import pytest

from shipd.checkpoints.remote import location
from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError
from tests.support.checkpoints import tiny, write_safetensors
from tests.support.processes import Helper
from tests.support.reading import digest_of


def refused(url: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(url)
    return str(caught.value)


@pytest.mark.parametrize("text", ["http://host/x", "HTTPS://host", "s3://bucket/key", "git+ssh://x", "memory://a b"])
def test_a_text_with_a_scheme_is_a_url(text):
    assert location.is_url(text)


@pytest.mark.parametrize(
    "text", ["", "model.pt", "./s3://x", "/a/http://x", "C://x", "c:\\x", "://x", "1s://x", "s3:/x"]
)
def test_everything_else_is_a_path(text):
    assert not location.is_url(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host:8/a/b@v1/c.pt", "https://host:8/a/b@v1/c.pt"),
        ("https://me:secret@host/a", "https://…@host/a"),
        ("https://me:sec@ret@host/a", "https://…@host/a"),
        ("https://host/a?X-Amz-Signature=secret", "https://host/a?…"),
        ("zip://in.pt::sftp://me:secret@host/a", "zip://in.pt::sftp://…@host/a"),
        ("sftp://me:sec/ret@host/a", "sftp://…@host/a"),
        ("ftp://me:sec?ret@host/a?b", "ftp://…@host/a?…"),
        ("http://[::1]:8/a@v1", "http://[::1]:8/a@v1"),
    ],
)
def test_nothing_secret_is_shown(url, shown):
    assert location.shown(url) == shown


def test_nothing_secret_is_told_by_others():
    url = "sftp://me:se%20cret@host/a?key=1"
    told = f"no {url}, nor host with se%20cret, se cret or key=1"
    assert location.without_secrets(told, url) == "no sftp://…@host/a?…, nor host with …, … or …"


def test_what_lies_beside_a_file_has_its_access_key():
    index = "https://me:secret@host/a%20b/model.index.json?key=1"
    assert location.beside(index, "part 1/x#.pt") == "https://me:secret@host/a%20b/part%201/x%23.pt?key=1"
    assert location.folder_of(index) == "https://…@host/a%20b/"


@pytest.mark.parametrize("url", ["http://", "https://me:sec/ret@host/x", "http://host:0x50/x", "http://[::1/x"])
def test_a_malformed_url_is_explained_and_not_shown(url):
    scheme = location.scheme_of(url)
    assert refused(url) == (
        f"the {scheme} URL has no valid host and port: it is {scheme}://HOST[:PORT]/PATH, and in a name and a password "
        "before the host the characters / ? # @ : are written as %2F %3F %23 %40 %3A"
    )


def test_a_url_of_the_scheme_file_is_the_path(tmp_path):
    path = write_safetensors(tmp_path / "a b.safetensors", tiny())
    for url in (path.as_uri(), f"file://localhost{path.as_uri().removeprefix('file://')}"):
        source = open_source(url)
        assert source.origin == str(path)
        assert digest_of(source) == tiny().digest
        source.close()
    assert refused("file://other/w.pt") == (
        "'file://other/w.pt' names a file on another host: write file:///PATH for one on this host, or just its path"
    )


def test_a_file_that_is_called_like_a_url_is_meant_by_a_dot_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("unheard-of:").mkdir()
    write_safetensors(Path("unheard-of:/w"), tiny())
    source = open_source("./unheard-of://w")
    assert digest_of(source) == tiny().digest
    source.close()
    assert "Protocol not known: unheard-of" in refused("unheard-of://w")


def test_a_url_that_was_made_a_path_is_noticed():
    assert refused(Path("https://host/w.pt")) == (  # type: ignore[arg-type]  # what the test is about
        "cannot open 'https:/host/w.pt': there is no such file. If it is meant to be a URL, pass it as text: a Path "
        "takes away one of its slashes"
    )


def _imports(report, path):
    import importlib
    import sys

    from shipd.bases.checkpoint import CheckpointBases
    from shipd.checkpoints.source import open_source

    importlib.import_module("shipd.client.client")
    open_source(path).close()
    CheckpointBases.of(path).close()
    report(sorted({"fsspec", "http.client", "torch", "urllib.request"} & set(sys.modules)))


def test_paths_import_nothing_that_speaks_to_servers(tmp_path):
    with Helper(_imports, write_safetensors(tmp_path / "w", tiny())) as helper:
        assert helper.next() == []
        assert helper.wait() == 0
