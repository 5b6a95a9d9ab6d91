"""Files on web servers that are read: whatever the server can do, and whatever happens meanwhile."""

import functools
import json

import pytest
import torch

from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, TensorChanged
from tests.support.checkpoints import Content, as_state_dict, content, medium, tiny
from tests.support.containers import CONTAINERS
from tests.support.file_servers import FileServer, file_of, quick
from tests.support.naive import Tensor
from tests.support.proxy import until
from tests.support.reading import content_of, digest_of

pytest_plugins = ["tests.support.file_server_fixtures"]

pytestmark = pytest.mark.usefixtures("no_proxies")

MIB = 1 << 20


@functools.cache
def blob() -> bytes:
    return file_of(medium())


# --- whatever the server can do --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "server",
    [
        {},
        {"ranges": False},
        {"validated": False},
        {"chunked": True},
        {"chunked": True, "ranges": False},
        {"closes": True},
        {"deaths": [0, 300_000, 5_000_000, 12_000_000]},
        {"ranges": False, "deaths": [0, 300_000, 5_000_000]},
        {"validated": False, "deaths": [300_000, 5_000_000]},
        {"chunked": True, "ranges": False, "deaths": [300_000, 5_000_000]},
    ],
    ids=str,
)
def test_it_is_read_bit_for_bit(server):
    with FileServer(**server) as files:
        source = open_source(files.serve("/a/w", blob()), fetching=quick())
        assert source.origin == files.url("/a/w")
        assert digest_of(source) == medium().digest
        assert source.changed() is None
        source.close()


@pytest.mark.parametrize("size", [0, 1, 63])
def test_a_file_may_have_hardly_any_bytes(server, size):
    message = "is empty: its save" if not size else f"has only {size} bytes|begins with"
    with pytest.raises(CheckpointError, match=message):
        open_source(server.serve("/w", bytes(size)), fetching=quick())


def test_of_a_file_without_parts_one_question_is_asked():
    with FileServer(ranges=False) as files:
        source = open_source(files.serve("/w", blob()), fetching=quick())
        assert digest_of(source) == medium().digest
        source.close()
    assert len(files.asked) == 1
    assert files.sent == len(blob())


def test_parts_come_once_each(server):
    source = open_source(server.serve("/w", blob()), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()
    assert server.sent == len(blob())
    assert server.asked[0].headers["accept-encoding"] == "identity"
    assert server.asked[0].headers["user-agent"].startswith("shipd/")
    assert "if-range" not in server.asked[0].headers
    assert {asked.headers["if-range"] for asked in server.asked[1:]} == {'"v1"'}


def test_what_breaks_off_goes_on_where_it_broke_off(server):
    server.deaths = [100_000, 1_000_001]
    source = open_source(server.serve("/w", blob()), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()
    assert {100_000, 1_000_001} < {asked.first for asked in server.asked}
    assert server.sent == len(blob())


def test_what_a_reader_waits_for_comes_first(server):
    """While all connections that fetch ahead are stuck."""
    whole = content(Tensor(name, "uint8", (8 * MIB,)) for name in "abcd")
    raw = file_of(whole)
    start = raw.index(bytes(whole.data["d"][:64]))
    server.answers = lambda asked, _headers: None if asked.first in (0, start) else server.speak.wait(20) and None
    source = open_source(server.serve("/w", raw), fetching=quick())
    until(lambda: len(server.asked) == 4, "three connections fetch ahead")
    assert source.read(3, 0, 1000) == whole.data["d"][:1000]
    assert server.asked[4].first == start
    assert server.sent < len(raw) // 2
    server.speak.set()
    assert content_of(source, 0) == whole.data["a"]
    source.close()


def test_a_tensor_is_read_while_the_rest_is_on_its_way():
    whole = content([Tensor("a", "uint8", (4 * MIB,)), Tensor("b", "uint8", (4 * MIB,))])
    with FileServer(ranges=False, silent_at=5 * MIB) as files:
        source = open_source(files.serve("/w", file_of(whole)), fetching=quick())
        assert content_of(source, 0) == whole.data["a"]
        assert files.sent < 6 * MIB
        files.speak.set()
        assert content_of(source, 1) == whole.data["b"]
        source.close()


# --- every kind ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize(
    "container",
    ["torch.save", "torch.save, legacy", "TorchScript", "npz", "npz, compressed", "HDF5", "HDF5, compressed"],
)
def test_every_kind_of_file_can_be_fetched(tmp_path, container, ranges):
    raw = CONTAINERS[container](tmp_path / "w", tiny()).read_bytes()
    with FileServer(ranges=ranges) as files:
        source = open_source(files.serve("/w", raw), fetching=quick())
        assert digest_of(source) == tiny().digest
        source.close()


def test_what_is_read_whole_reports_how_it_gets_on(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(as_state_dict(medium()), path)
    size = path.stat().st_size
    with FileServer(silent_at=6_000_000) as files:
        told: list[tuple[int, int]] = []

        def report(done: int, total: int) -> None:
            told.append((done, total))
            if done:
                files.speak.set()

        source = open_source(files.serve("/w", path.read_bytes()), fetching=quick(on_progress=report))
        assert digest_of(source) == medium().digest
        source.close()
    assert told == sorted(told)
    assert {total for _, total in told} == {size}


def sharded(server: FileServer, folder: str, whole: Content, count: int = 3) -> str:
    weight_map: dict[str, str] = {}
    for at in range(count):
        part = Content(whole.rows[at::count], whole.data)
        server.serve(f"{folder}/part-{at}.safetensors", file_of(part))
        weight_map |= {row.name: f"part-{at}.safetensors" for row in part.rows}
    return server.serve(f"{folder}/model.index.json", json.dumps({"weight_map": weight_map}).encode())


def test_an_index_leads_to_the_files_beside_it(server):
    url = sharded(server, "/a b", medium()).replace(" ", "%20")
    server.files = {path.replace(" ", "%20"): raw for path, raw in server.files.items()}
    source = open_source(f"{url}?key=1", fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()
    assert {asked.path for asked in server.asked if "part-2" in asked.path} == {"/a%20b/part-2.safetensors?key=1"}


def test_missing_files_of_an_index_are_named(server):
    url = sharded(server, "/a", tiny(), 2)
    del server.files["/a/part-1.safetensors"]
    with pytest.raises(CheckpointError) as caught:
        open_source(url, fetching=quick())
    assert str(caught.value) == (
        f"of the files that '{url}' names, 1 of 2 is missing in '{server.url('/a/')}': 'part-1.safetensors'. Upload "
        "what is missing to there, or push a checkpoint that is whole"
    )


def test_an_index_leads_nowhere_else(server):
    for name in ("../x", "/x", "http://evil/x/../y"):
        url = server.serve("/a/index.json", json.dumps({"weight_map": {"w": name}}).encode())
        with pytest.raises(CheckpointError, match="only files in the directory of the index and below it are read"):
            open_source(url, fetching=quick())
    url = server.serve("/a/index.json", json.dumps({"weight_map": {"w": "http://evil/x"}}).encode())
    with pytest.raises(CheckpointError, match=r"1 of 1 is missing in .*: 'http://evil/x'"):
        open_source(url, fetching=quick())
    assert server.asked[-1].path == "/a/http%3A//evil/x"


# --- what changes meanwhile ------------------------------------------------------------------------------------------


def changes(source, message: str) -> None:
    with pytest.raises(TensorChanged) as caught:
        digest_of(source)
    assert message in str(caught.value)
    assert str(caught.value).endswith("; push it again when it is complete, or a copy that nobody writes to")
    assert caught.value.tensor is not None
    assert source.changed() == f"the file {source.origin!r}"
    source.close()


def stuck(server: FileServer, raw: bytes):
    """A source of which the opening is there, while nothing more is answered; and what lets it go on."""
    server.answers = lambda asked, _headers: None if asked.first == 0 else server.speak.wait(20) and None
    source = open_source(server.serve("/w", raw), fetching=quick())
    until(lambda: len(server.asked) > 1, "more is asked for")
    return source


def test_a_file_that_is_replaced_is_not_mixed(server):
    source = stuck(server, blob())
    server.etag = '"v2"'
    server.serve("/w", file_of(medium(1)))
    server.speak.set()
    changes(source, "changed while it was being fetched (its ETag was '\"v1\"', and now is '\"v2\"')")


def test_a_server_may_say_itself_that_it_was_replaced(server):
    source = stuck(server, blob())
    server.answers = lambda _asked, _headers: 412
    server.speak.set()
    server.deaths = [at * MIB + 1000 for at in range(12)]
    changes(source, "(its server says so)")


def test_a_part_of_another_version_is_noticed(server):
    source = stuck(server, blob())
    server.extra = {"ETag": '"v2"'}
    server.speak.set()
    changes(source, "(its ETag was '\"v1\"', and now is '\"v2\"')")


def test_a_time_of_change_will_do(server):
    server.validated, server.extra = False, {"Last-Modified": "Fri, 27 Nov 2026 10:00:00 GMT"}
    source = stuck(server, blob())
    server.extra = {"Last-Modified": "Fri, 27 Nov 2026 10:00:01 GMT"}
    server.speak.set()
    message = "(it was last modified 'Fri, 27 Nov 2026 10:00:00 GMT', and now is 'Fri, 27 Nov 2026 10:00:01 GMT')"
    changes(source, message)
    assert server.asked[-1].headers["if-range"] == "Fri, 27 Nov 2026 10:00:00 GMT"


def test_a_file_that_grows_is_noticed(server):
    source = stuck(server, blob())
    server.serve("/w", blob() + b"more")
    server.speak.set()
    changes(source, f"(it had {len(blob())} bytes, and now has {len(blob()) + 4})")


def test_a_file_that_begins_anew_must_be_the_same():
    with FileServer(ranges=False, validated=False, silent_at=8_000_000) as files:
        source = open_source(files.serve("/w", blob()), fetching=quick())
        assert files.silent.acquire(timeout=20)
        files.deaths = [9_000_000]
        files.serve("/w", blob()[:1_000_000] + bytes(len(blob()) - 1_000_000))
        files.speak.set()
        changes(source, "(its bytes from ")


def test_a_server_may_forget_that_it_has_parts(server):
    """Asked again for the first of them it sends everything, of which version nobody knows, while others arrive."""
    server.deaths = [0]
    until_then = lambda asked, _headers: setattr(server, "ranges", bool(server.deaths))  # noqa: E731
    server.answers, server.chunked, server.validated = until_then, True, False
    server.extra = {"Last-Modified": "Fri, 27 Nov 2026 10:00:00 GMT"}
    with pytest.raises(CheckpointError, match="it answers with the whole file where a part was asked for"):
        open_source(server.serve("/w", blob()), fetching=quick())


def test_a_weak_tag_promises_nothing(server):
    """So the file comes as a whole."""
    server.etag = 'W/"v1"'
    source = open_source(server.serve("/w", blob()), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()
    assert "range" not in server.asked[-1].headers


# --- redirections ----------------------------------------------------------------------------------------------------


def leads(to: str, status: int = 302):
    def answer(asked, headers):
        if asked.path.startswith("/from"):
            headers["Location"] = to
            return status
        return None

    return answer


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirections_are_followed(server, status):
    server.answers = leads("there/w?signature=1", status)
    server.serve("/there/w", blob())
    source = open_source(server.url("/from"), fetching=quick())
    assert source.origin == server.url("/from")
    assert digest_of(source) == medium().digest
    source.close()
    assert [asked.path for asked in server.asked].count("/from") == 1


def test_name_and_password_go_only_where_they_were_meant_for(server):
    with FileServer() as other:
        server.answers = leads(other.serve("/w", blob()))
        source = open_source(server.url("/from").replace("://", "://me:pa%3Ass@"), fetching=quick())
        assert digest_of(source) == medium().digest
        source.close()
    assert server.asked[0].headers["authorization"] == "Basic bWU6cGE6c3M="
    assert not any("authorization" in asked.headers for asked in other.asked)
    server.answers = leads("/w")
    server.serve("/w", blob())
    open_source(server.url("/from").replace("://", "://me:pa%3Ass@"), fetching=quick()).close()
    assert server.asked[-1].headers["authorization"] == "Basic bWU6cGE6c3M="


def test_a_redirection_may_have_bytes_that_a_url_may_not(server):
    """As they are, and not taken for Latin-1."""
    server.answers = leads("/größe %25")
    server.serve("/gr%C3%B6%C3%9Fe%20%25", blob())
    source = open_source(server.url("/from"), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()


def test_a_link_that_expires_is_asked_for_anew(server):
    def answer(asked, headers):
        if asked.path == "/from":
            headers["Location"] = "/1" if len(server.asked) == 1 else "/2"
            return 302
        # The first link is good for one question.
        return 403 if asked.path == "/1" and asked.first else None

    server.answers = answer
    server.serve("/1", blob())
    server.serve("/2", blob())
    source = open_source(server.url("/from"), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()
    assert [asked.path for asked in server.asked[:2]] == ["/from", "/1"]
    assert {asked.path for asked in server.asked} == {"/from", "/1", "/2"}
