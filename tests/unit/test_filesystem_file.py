"""Files of other schemes, through fsspec: in memory, and on S3 as moto plays it."""

import functools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shipd.checkpoints.content import Kind, identify
from shipd.checkpoints.remote.opening import open_url
from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, Interrupted, Stalled, TensorChanged
from tests.support.checkpoints import MIB, Content, medium, tiny
from tests.support.containers import CONTAINERS
from tests.support.file_servers import file_of, quick
from tests.support.processes import Background, Helper
from tests.support.reading import digest_of

pytest_plugins = ["tests.support.object_store"]

# Before the first test, of which otherwise it would seem to be a leak.
pytestmark = pytest.mark.usefixtures("object_store")

Put = Callable[[str, bytes], str]


@functools.cache
def blob() -> bytes:
    return file_of(medium())


@pytest.fixture
def memory() -> Iterator[Put]:
    """``put(path, content)`` puts a file into fsspec's memory, and returns its URL."""
    files = fsspec.filesystem("memory")

    def put(path: str, content: bytes) -> str:
        files.pipe(f"/{path}", content)
        return f"memory://{path}"

    yield put
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def refused(url: str, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_source(url, fetching=quick())
    return str(caught.value)


def sharded(put: Put, folder: str, whole: Content) -> str:
    """Its index; the last shard is put first."""
    weight_map: dict[str, str] = {}
    for at in (2, 1, 0):
        part = Content(whole.rows[at::3], whole.data)
        put(f"{folder}/part-{at}.safetensors", file_of(part))
        weight_map |= {row.name: f"part-{at}.safetensors" for row in part.rows}
    return put(f"{folder}/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


@pytest.fixture(params=["memory", "s3"])
def put(request: pytest.FixtureRequest) -> Put:
    """Of each kind of place."""
    found: Put = request.getfixturevalue("memory" if request.param == "memory" else "bucket")
    return found


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_file_is_read_bit_for_bit(put):
    url = put("a/w", blob())
    source = open_source(url, fetching=quick())
    assert source.origin == url
    assert digest_of(source) == medium().digest
    assert source.changed() is None
    source.close()


def test_an_index_leads_to_the_files_beside_it(memory):
    source = open_source(sharded(memory, "a b", medium()), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()


def test_of_a_directory_the_checkpoint_is_taken(put, tmp_path):
    put("run/config.json", b"{}")
    put("run/optimizer.pt", CONTAINERS["torch.save"](tmp_path / "w", medium(1)).read_bytes())
    put("run/deeper/other.safetensors", file_of(tiny()))
    index = sharded(put, "run", medium())
    source = open_source(index.rpartition("/")[0], fetching=quick())
    assert source.origin == index
    assert digest_of(source) == medium().digest
    source.close()


def test_of_an_archive_that_is_looked_at_only_the_ends_are_fetched(memory, tmp_path, monkeypatch):
    fetched: list[range] = []
    read = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        fetched.append(range(start, end))
        content: bytes = read(self, path, start, end)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    raw = CONTAINERS["torch.save"](tmp_path / "w", medium()).read_bytes()
    file = open_url(memory("run/optimizer.pt", raw), quick())
    assert identify(file) is Kind.TORCH_ZIP
    file.close()
    assert sum(map(len, fetched)) < MIB < 12 * MIB < len(raw)
    assert max(part.stop for part in fetched) == len(raw)


def test_every_kind_of_file_is_read(memory, tmp_path):
    for container in ("torch.save", "HDF5"):
        source = open_source(
            memory("w", CONTAINERS[container](tmp_path / container, tiny()).read_bytes()), fetching=quick()
        )
        assert digest_of(source) == tiny().digest
        source.close()


def test_an_empty_file_is_told(memory):
    assert refused(memory("w", b"")).endswith("is empty: its save or download was interrupted")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_told(put):
    url = put("a/w", b"")
    assert refused(f"{url}x") == f"'{url}x': there is no such file; check the URL"


def test_missing_files_of_an_index_are_named(memory):
    url = memory("a/model.index.json", json.dumps({"weight_map": {"w": "1", "v": "2"}}).encode())
    memory("a/2", file_of(tiny()))
    assert refused(url) == (
        f"of the files that '{url}' names, 1 of 2 is missing in '{url.rpartition('/')[0]}/': '1'. Upload what is "
        "missing to there, or push a checkpoint that is whole"
    )


def test_a_directory_without_a_checkpoint_is_told(memory):
    url = memory("a/config.json", b"{}").rpartition("/")[0]
    assert refused(url) == f"'{url}' is a directory and not a checkpoint; it has none; name a file"


def test_a_directory_is_no_shard(memory):
    url = memory("a/model.index.json", json.dumps({"weight_map": {"w": "part"}}).encode())
    memory("a/part/w", b"")
    assert refused(url) == f"'{url.rpartition('/')[0]}/part' is a directory and not a file"


def test_a_scheme_that_nobody_knows_is_told():
    assert refused("unheard-of://me:secret@x/w?key=1") == (
        "'unheard-of://…@x/w?…' cannot be opened by fsspec ('ValueError: Protocol not known: unheard-of'); check the "
        "URL"
    )


def test_a_package_that_fsspec_lacks_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    told = refused("gs://bucket/w")
    assert told == (
        "'gs://bucket/w': for this scheme fsspec needs one more package: Please install gcsfs to access Google Storage"
    )


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert refused("s3://bucket/w") == (
        "'s3://bucket/w': to read URLs of other schemes than http and https takes fsspec: pip install 'shipd[fsspec]'"
    )


def test_what_may_not_be_read_is_told(memory, monkeypatch):
    url = memory("w", blob())

    def forbid(self: object, path: str, **_: object) -> dict[str, object]:
        raise PermissionError(f"no access to {path} for you")

    monkeypatch.setattr(MemoryFileSystem, "info", forbid)
    assert refused(url) == (
        "'memory://w': reading it is not allowed ('PermissionError: no access to /w for you'); check the credentials, "
        "which fsspec takes from where the tools of that service have theirs (the environment, their files)"
    )


# --- what happens meanwhile ------------------------------------------------------------------------------------------


def test_a_file_that_is_replaced_is_not_mixed(put):
    """The last bytes are not believed before it is known that all of them are of one version."""
    url = put("w", blob())
    file = open_url(url, quick())
    file.read_at(0, 8)
    put("w", file_of(medium(1)))
    with pytest.raises(TensorChanged) as caught:
        file.read_at(0, file.size)
    assert str(caught.value).startswith(f"'{url}' changed while it was being fetched (its ")
    file.close()


@pytest.mark.parametrize("read", [8, 12_000_000])
def test_a_file_that_goes_is_told(memory, read):
    url = memory("w", blob())
    file = open_url(url, quick())
    file.read_at(0, read)
    fsspec.filesystem("memory").rm("/w")
    with pytest.raises(TensorChanged) as caught:
        file.read_at(0, file.size)
    assert str(caught.value).startswith(f"'{url}' changed while it was being fetched (it is gone)")
    file.close()


def failing(monkeypatch: pytest.MonkeyPatch, fails: "list[Exception]") -> None:
    """As many parts fail as there are errors."""
    read = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, **options: object) -> bytes:
        if fails:
            raise fails.pop()
        content: bytes = read(self, path, **options)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_what_fails_is_tried_again(memory, monkeypatch):
    failing(monkeypatch, [OSError("reset"), OSError("reset")])
    source = open_source(memory("w", blob()), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()


def test_what_keeps_failing_is_given_up(memory, monkeypatch):
    failing(monkeypatch, [OSError("memory://w is reset")] * 10)
    assert refused(memory("w", blob())) == (
        "'memory://w' cannot be fetched: fsspec reports 'OSError: memory://w is reset'. It was tried 3 times without a "
        "byte more, and nothing of it is there. Try again later, or download the file and push that"
    )


@pytest.mark.parametrize(
    ("call", "answer", "told"),
    [
        ("info", None, "cannot be read (\"TypeError: 'NoneType' object"),
        ("info", {"type": "file", "size": "12"}, "fsspec cannot tell its size"),
        ("info", {"type": "file", "size": -1}, "fsspec cannot tell its size"),
        ("ls", ["w", "v"], "cannot be read ("),
        ("ls", [{"type": "file"}], "cannot be read ('TypeError: entries without names')"),
        ("cat_file", None, "cannot be fetched (TypeError"),
        ("cat_file", "text", "cannot be fetched ("),
        ("cat_file", b"", "cannot be fetched: it broke off at byte 0. It was tried 3 times"),
        ("cat_file", bytes(20_000_000), "bytes, fsspec returned 20000000"),
    ],
)
def test_a_filesystem_that_does_not_keep_to_its_interface_is_told(memory, monkeypatch, call, answer, told):
    url = memory("folder/w", blob())
    monkeypatch.setattr(MemoryFileSystem, call, lambda *_, **__: answer)
    assert told in refused(url.removesuffix("/w") if call == "ls" else url)


@pytest.mark.parametrize("call", ["info", "cat_file"])
def test_a_call_that_hangs_is_not_waited_for(memory, monkeypatch, call):
    url = memory("w", blob())
    let_go, hanging = threading.Event(), threading.Semaphore(0)

    def hang(*_: object, **__: object) -> None:
        hanging.release()
        let_go.wait(30)
        raise OSError

    monkeypatch.setattr(MemoryFileSystem, call, hang)
    with pytest.raises(Stalled, match="came for 1 s"):
        open_source(url, fetching=quick(stall=1.0))
    fetching = quick()
    with Background(open_source, url, fetching=fetching) as opening:
        assert hanging.acquire(timeout=20)
        assert hanging.acquire(timeout=20)
        fetching.cancel()
        assert isinstance(opening.error(), Interrupted)
    let_go.set()


def _read_from(report, url):
    """In a process of its own."""
    import sys

    from shipd.checkpoints.source import open_source
    from tests.support.reading import digest_of

    source = open_source(url)
    report([digest_of(source), "torch" in sys.modules])
    source.close()


def test_no_torch_is_needed(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(blob())
    with Helper(_read_from, f"local://{Path(path)}") as helper:
        assert helper.next() == [medium().digest, False]
        assert helper.wait() == 0
