"""What web servers answer instead of a file, and what the user is told."""

import contextlib
import datetime as dt
import http
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, ShipError, Stalled, TensorChanged
from tests.support.checkpoints import medium, tiny
from tests.support.file_servers import FileServer, cut, file_of, quick
from tests.support.reading import digest_of

pytest_plugins = ["tests.support.file_server_fixtures"]

pytestmark = pytest.mark.usefixtures("no_proxies")


def refused(url: str, kind: type[ShipError] = CheckpointError, **options: object) -> str:
    """What opening it says."""
    with pytest.raises(kind) as caught:
        open_source(url, fetching=quick(**options))
    assert str(caught.value).isprintable()
    return str(caught.value)


def always(status: int) -> Callable[[object, dict[str, str]], int]:
    return lambda _asked, _headers: status


# --- statuses --------------------------------------------------------------------------------------------------------

_URL = "put name and password into the URL, as in https://NAME:PASSWORD@HOST/PATH"


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, f": it asks who you are; {_URL}, or make a link that needs none (a signed one)"),
        (
            403,
            (
                ": reading it is not allowed. A signed link may have expired: make a new one; otherwise have its owner "
                f"allow it, or {_URL}"
            ),
        ),
        (404, ": there is no such file; check the URL"),
        (410, ": there is no such file; check the URL"),
        (
            407,
            (
                ": the proxy asks who you are; put name and password into its URL, as in "
                "https_proxy=http://NAME:PASSWORD@HOST:PORT"
            ),
        ),
        (302, ", and not where to; open it in a browser, and name the URL of the file itself"),
        (204, " and not with the file; check the URL, or download the file and push that"),
        (451, " and not with the file; check the URL, or download the file and push that"),
    ],
)
def test_a_status_is_told_with_what_to_do(server, status, told):
    server.answers = always(status)
    url = server.url("/w?signature=secret")
    shown = url.partition("?")[0] + "?…"
    assert refused(url) == f"{shown!r} is answered with {status} {http.HTTPStatus(status).phrase}{told}"
    assert len(server.asked) == 1


def test_a_password_that_is_not_accepted_is_not_shown(server):
    server.answers = always(401)
    shown = server.url("/w").replace("://", "://…@")
    assert refused(server.url("/w").replace("://", "://me:secret@")) == (
        f"{shown!r} is answered with 401 Unauthorized: the name and the password in the URL are not accepted; check "
        "them"
    )


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_be_over_soon_is_tried_again(server, status):
    server.answers = lambda _asked, _headers: status if len(server.asked) < 3 else None
    source = open_source(server.serve("/w", file_of(tiny())), fetching=quick())
    assert digest_of(source) == tiny().digest
    source.close()
    server.answers = always(status)
    server.asked.clear()
    assert refused(server.url("/w")) == (
        f"{server.url('/w')!r} cannot be fetched: it answers {status} {http.HTTPStatus(status).phrase}. It was tried 3 "
        "times without a byte more, and nothing of it is there. Try again later, or download the file and push that"
    )
    assert len(server.asked) == 3


# --- redirections ----------------------------------------------------------------------------------------------------


def leading(server: FileServer, to: str) -> str:
    def answer(_asked: object, headers: dict[str, str]) -> int:
        headers["Location"] = to
        return 302

    server.answers = answer
    return server.url("/from")


def test_redirections_end_somewhere(server):
    url = leading(server, "/from")
    assert refused(url) == (
        f"{url!r} is redirected more than 10 times; open it in a browser, and name the URL of the file itself"
    )
    assert len(server.asked) == 11


@pytest.mark.parametrize("to", ["ftp://host/w", "file:///etc/passwd", "http://host:port/w", "http://[host/w"])
def test_redirections_stay_on_the_web(server, to):
    url = leading(server, to)
    assert refused(url) == f"{url!r} is redirected to {to!r}, which is no URL of http or https"


def test_no_range_that_nobody_asked_for_is_asked_for_again(server):
    """A server that has no range of anything, not even of all of it."""
    server.answers = always(416)
    assert refused(server.url("/w")) == (
        f"{server.url('/w')!r} cannot be fetched: it answers 416 {http.HTTPStatus(416).phrase}, although no range was "
        "asked for. It was tried 3 times without a byte more, and nothing of it is there. Try again later, or download "
        "the file and push that"
    )
    assert len(server.asked) == 4


def test_who_refuses_behind_a_redirection_is_named(server):
    with FileServer() as other:
        url = leading(server, other.url("/gone").replace("127.0.0.1", "localhost"))
        assert refused(url) == (
            f"{url!r} is answered with 404 Not Found (from localhost, where it is redirected to): there is no such "
            "file; check the URL"
        )


# --- what is no file -------------------------------------------------------------------------------------------------


def test_a_page_is_no_file(server):
    url = server.serve("/w", b"\n<!DOCTYPE html><html><title>Log in</title>")
    assert refused(url) == (
        f"{url!r} is answered with a web page and not with a file: a page about the file, a login, or the list of a "
        "directory. Name the URL of the file itself (on Hugging Face with /resolve/ in it and not /blob/, on GitHub "
        "with /raw/); where it asks for a login, put name and password into the URL, or use a signed link"
    )


def test_a_directory_is_no_file(server):
    url = server.url("/models/bert/")
    assert refused(url) == (
        f"{url!r} is a directory, and over http there is no telling what is in one; name the file, or the index of a "
        f"checkpoint in several files (such as {url}model.safetensors.index.json)"
    )
    assert server.asked == []


def test_what_comes_compressed_is_refused(server):
    server.extra = {"Content-Encoding": "gzip"}
    url = server.serve("/w", file_of(tiny()))
    assert refused(url) == (
        f"{url!r} comes compressed ('gzip'), although it was asked for as it is; have the server send it without "
        "Content-Encoding, or download it, decompress it, and push that"
    )


# --- lies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", ["bytes 1-100/1000", "bytes 0-999999/2000000", "bytes 0-99", "items 0-9/10", "bytes 5-0/10", ""]
)
def test_parts_that_were_not_asked_for_are_refused(server, said):
    server.extra = {"Content-Range": said}
    url = server.serve("/w", file_of(tiny()))
    what = f"is answered with the range {said!r}" if said else "is answered with a part of it, and not which"
    assert refused(url) == (
        f"{url!r}: a question for the bytes 0 to 262143 {what}; its server's ranges cannot be relied on. Download the "
        "file, and push that"
    )


def test_more_than_there_is_cannot_be_claimed(server):
    server.extra = {"Content-Range": "bytes 0-99/50"}
    url = server.serve("/w", file_of(tiny()))
    assert refused(url) == f"{url!r}: its server claims bytes up to 100 of 50. Download the file, and push that"


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_length_is_not_believed(ranges):
    raw = file_of(tiny())
    with FileServer(ranges=ranges, claims=len(raw) + 5, closes=True) as files:
        url = files.serve("/w", raw)
        if ranges:
            told = f"changed while it was being fetched (it now ends before byte {len(raw)})"
            assert told in refused(url, TensorChanged)
        else:
            assert refused(url) == (
                f"{url!r} cannot be fetched: it broke off at byte {len(raw)}. It was tried 3 times without a byte "
                f"more, and {len(raw)} B of its {len(raw) + 5} B are there. Try again later, or download the file and "
                "push that"
            )


def test_no_size_is_too_large_to_be_refused(server):
    server.claims = 1 << 46
    url = server.serve("/w", file_of(tiny()))
    assert refused(url) == (f"{url!r} has {1 << 46} bytes by its server's account, and at most {1 << 45} can be pushed")


def test_a_server_that_always_breaks_off_is_given_up():
    with FileServer(ranges=False, dies_at=5_000_000) as files:
        source = open_source(files.serve("/w", file_of(medium())), fetching=quick())
        with pytest.raises(CheckpointError) as caught:
            digest_of(source)
        source.close()
    assert str(caught.value) == (
        f"{source.origin!r} cannot be fetched: it broke off at byte 5000000. It was tried 3 times without a byte more, "
        "and 5.0 MB of its 12.6 MB are there. Try again later, or download the file and push that"
    )
    assert caught.value.tensor == "block.2.weight"


# --- who is no web server --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def speaking(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where every connection is handed to ``talk``, on one thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            cut(listener)
            thread.join()


def test_who_speaks_something_else_is_told():
    with speaking(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as port:
        assert refused(f"http://127.0.0.1:{port}/w") == (
            f"'http://127.0.0.1:{port}/w' cannot be fetched: what answers does not speak HTTP (BadStatusLine: 'SSH-2.0-"
            "OpenSSH_9.6\\r\\n'). It was tried 3 times without a byte more, and nothing of it is there. Try again "
            "later, or download the file and push that"
        )


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert refused(f"http://127.0.0.1:{port}/w") == (
        f"'http://127.0.0.1:{port}/w': nobody answers at 127.0.0.1:{port} (connection refused); check the host and "
        "the port"
    )


def test_there_is_no_such_host():
    told = refused("http://no-such-host.invalid/w")
    assert re.fullmatch(
        r"'http://no-such-host\.invalid/w': (there is no host of the name in no-such-host\.invalid:80; check the URL|"
        r"the name in no-such-host\.invalid:80 cannot be looked up now \(.*\); check the network)",
        told,
    )


def test_a_header_that_never_ends_is_not_waited_for():
    stopped = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not stopped.wait(0.01):
            connection.sendall(b"x")

    with speaking(drip) as port:
        told = refused(f"http://127.0.0.1:{port}/w", Stalled, stall=0.3)
        stopped.set()
    assert told == (
        f"fetching 'http://127.0.0.1:{port}/w' has stalled: nothing came for 0.3 s, and nothing of it is there; try "
        "again, with more time (stall=, --stall) where the server is only slow"
    )


def test_a_server_that_falls_silent_is_not_waited_for():
    with FileServer(ranges=False, silent_at=5_000_000) as files:
        source = open_source(files.serve("/w", file_of(medium())), fetching=quick(stall=2.0, pauses=(10.0,)))
        with pytest.raises(Stalled) as caught:
            digest_of(source)
        source.close()
    assert str(caught.value) == (
        f"fetching {source.origin!r} has stalled: nothing came for 2 s, and 5.0 MB of its 12.6 MB are there; try "
        "again, with more time (stall=, --stall) where the server is only slow"
    )
    assert caught.value.tensor == "block.2.weight"


def test_why_nothing_came_is_told(server):
    """More time would not help with a server that answers, and never with the file."""
    server.answers = always(503)
    assert refused(server.url("/w"), Stalled, pauses=(0.01, 60.0), stall=0.3) == (
        f"fetching {server.url('/w')!r} has stalled: nothing came for 0.3 s (it answers 503 Service Unavailable), and "
        "nothing of it is there; try again, with more time (stall=, --stall) where the server is only slow"
    )


# --- proxies ---------------------------------------------------------------------------------------------------------


def test_a_proxy_from_the_environment_is_asked(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{server.port}")
    server.serve("http://far.invalid:81/w", file_of(tiny()))
    source = open_source("http://you:hidden@far.invalid:81/w", fetching=quick())
    assert digest_of(source) == tiny().digest
    source.close()
    assert server.asked[0].headers["host"] == "far.invalid:81"
    assert server.asked[0].headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"
    assert server.asked[0].headers["authorization"] == "Basic eW91OmhpZGRlbg=="
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = open_source(server.serve("/near", file_of(tiny())), fetching=quick())
    source.close()
    assert "proxy-authorization" not in server.asked[-1].headers


def test_a_proxy_of_another_kind_is_refused(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://me:secret@127.0.0.1:1080")
    assert refused(server.url("/w")) == (
        "the proxy 'socks5://…@127.0.0.1:1080' that the environment names (http_proxy) cannot be used: only "
        "http://HOST:PORT can. Set NO_PROXY for this host where it is reached without one"
    )


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "shipd's tests")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def secure(no_proxies: None, certificate: Path) -> Iterator[FileServer]:
    """A server of https."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with FileServer(tls=context, deaths=[5_000_000]) as files:
        yield files


def test_https_is_read_where_the_authority_is_trusted(secure, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    source = open_source(secure.serve("/w", file_of(medium())), fetching=quick())
    assert digest_of(source) == medium().digest
    source.close()


def test_https_is_refused_where_it_is_not(secure):
    assert refused(secure.url("/w")) == (
        f"{secure.url('/w')!r}: the certificate of 127.0.0.1:{secure.port} is not trusted (self-signed certificate); "
        "where it is signed by an authority of your own, set SSL_CERT_FILE to the file with that authority's "
        "certificate"
    )


def test_https_is_not_left_by_a_redirection(secure, server, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    url = leading(secure, server.url("/w?key=secret"))
    assert refused(url) == (
        f"{url!r} is redirected from https to '{server.url('/w')}?…', which anyone on the way could change; name that "
        "URL itself where you trust the way to it"
    )
    assert server.asked == []


def test_https_where_there_is_only_http_is_told(server):
    url = server.url("/w").replace("http:", "https:")
    assert re.fullmatch(
        rf"'{url}': 127\.0\.0\.1:{server.port} does not speak TLS as it should \(.*\); if it has none, the URL is http://",
        refused(url),
    )
