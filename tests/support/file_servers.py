"""Web servers that serve files: with ranges and without, and in all the ways in which servers fail or lie.

A ``FileServer`` answers as its fields say, which a test may change while it runs, and remembers what it was asked.
"""

import contextlib
import http.server
import re
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from shipd.checkpoints.remote.fetching import Fetching
from tests.support.checkpoints import Content, write_safetensors

_PIECE = 64 * 1024


@dataclass(frozen=True)
class Asked:
    """One request. Names of headers are in lower case."""

    path: str
    headers: Mapping[str, str]

    @property
    def first(self) -> int:
        """The first byte that was asked for."""
        match = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else 0


@dataclass
class FileServer:
    """Serves ``files`` by path; from the start of the block to its end.

    ranges     whether parts can be asked for
    validated  whether it sends entity tags and takes If-Range
    etag       tag of every file
    deaths     offsets in the file at which a connection is cut, each of them once
    dies_at    offset at which every connection that comes so far is cut
    silent_at  offset at which every answer stops, with the connection open, until ``speak`` is set
    chunked    whether answers come in chunks and without a length
    closes     whether a connection is for one answer only
    claims     the length that is claimed instead of the true one
    extra      headers that are sent as well, or instead
    answers    called first: what it returns is the status of an answer without a file, None goes on as usual
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    validated: bool = True
    etag: str = '"v1"'
    deaths: list[int] = field(default_factory=list)
    dies_at: int | None = None
    silent_at: int | None = None
    chunked: bool = False
    closes: bool = False
    claims: int | None = None
    extra: dict[str, str] = field(default_factory=dict)
    answers: Callable[[Asked, dict[str, str]], int | None] = lambda _asked, _headers: None
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self.asked: list[Asked] = []
        self.sent = 0
        """Bytes of files."""
        self.speak = threading.Event()
        self.silent = threading.Semaphore(0)
        """Released by each answer that stops."""
        self.lock = threading.Lock()
        self.sockets: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.files = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="file server")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and every connection. Harmless when repeated."""
        self.speak.set()
        self._server.shutdown()
        self._thread.join()
        with self.lock:
            for one in self.sockets:
                cut(one)
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def url(self, path: str) -> str:
        """The URL of a file."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}{path}"

    def serve(self, path: str, content: bytes | memoryview) -> str:
        """Serve ``content`` at ``path`` from now on. Its URL."""
        self.files[path] = bytes(content)
        return self.url(path)


def cut(connection: socket.socket) -> None:
    """Have a connection end at once, for both sides."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    files: FileServer

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        if self.files.tls is not None:
            # The handshake is the handler's, on its own thread.
            connection = self.files.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self.files.lock:
            self.files.sockets.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]  # ours are streams
        with self.files.lock:
            self.files.sockets.discard(request)
        cut(request)
        request.close()

    def handle_error(self, *_: object) -> None:
        """Senders break off, and are meant to."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        files = self.server.files
        asked = Asked(self.path, {name.lower(): value for name, value in self.headers.items()})
        with files.lock:
            files.asked.append(asked)
        headers: dict[str, str] = {}
        status = files.answers(asked, headers)
        if status is not None:
            self._answer(status, {"Content-Length": "0", **headers}, ())
            return
        content = files.files.get(self.path.partition("?")[0])
        if content is None:
            self._answer(404, {"Content-Length": "0"}, ())
            return
        self._send_file(asked, content)

    def _send_file(self, asked: Asked, content: bytes) -> None:
        files = self.server.files
        start, stop, status = 0, len(content), 200
        headers = {"ETag": files.etag} if files.validated else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("range", ""))
        current = asked.headers.get("if-range", files.etag) == files.etag
        if match and files.ranges and current:
            start, status = int(match[1]), 206
            stop = min(len(content), int(match[2]) + 1) if match[2] else len(content)
            if start >= len(content):
                self._answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}, ())
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{files.claims or len(content)}"
        if files.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(stop - start if status == 206 else files.claims or stop)
        self._answer(status, {**headers, **files.extra}, self._pieces(memoryview(content), start, stop))

    def _answer(self, status: int, headers: Mapping[str, str], pieces: "Iterator[memoryview] | tuple[()]") -> None:
        files = self.server.files
        known = status in set(HTTPStatus)
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase if known else 'Odd'}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Connection: close"] if files.closes else []
        self.wfile.write("\r\n".join([*lines, "", ""]).encode())
        chunked = headers.get("Transfer-Encoding") == "chunked"
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            with files.lock:
                files.sent += len(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = files.closes

    def _pieces(self, content: memoryview, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes, up to where this server dies or falls silent."""
        files = self.server.files
        while start < stop:
            end = min(stop, start + _PIECE)
            death = self._dies_in(start, end)
            if death is not None:
                yield content[start:death]
                raise ConnectionAbortedError
            if files.silent_at is not None and start <= files.silent_at < end and not files.speak.is_set():
                yield content[start : files.silent_at]
                start = files.silent_at
                files.silent.release()
                files.speak.wait(30)
            yield content[start:end]
            start = end

    def _dies_in(self, start: int, end: int) -> int | None:
        files = self.server.files
        with files.lock:
            for death in files.deaths:
                if start <= death < end:
                    files.deaths.remove(death)
                    return death
        if files.dies_at is not None and start <= files.dies_at < end:
            return files.dies_at
        return None


def quick(**options: Any) -> Fetching:
    """Deadlines and pauses for tests."""
    return Fetching(**{"pauses": (0.01, 0.01), "stall": 20.0, **options})


def file_of(version: Content) -> bytes:
    """The safetensors file of a version."""
    with tempfile.TemporaryDirectory() as folder:
        return write_safetensors(Path(folder) / "w", version).read_bytes()
