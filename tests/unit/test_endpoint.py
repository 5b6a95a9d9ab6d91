"""The HTTP endpoint by itself, over real sockets: what it answers, and what a client may cost."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable

import pytest

from shipd.address import Address
from shipd.errors import ConfigError
from shipd.service import endpoint as module
from shipd.service.endpoint import MAX_CONNECTIONS, MAX_IGNORED, MAX_REQUEST, Endpoint, Reply
from tests.support.proxy import until
from tests.support.scraping import DEADLINE, get, raw, receive_all

REQUEST = b"GET /fine HTTP/1.1\r\nHost: x\r\n\r\n"


async def _fine() -> Reply:
    return Reply(200, b"fine\n", headers=(("X-Also", "this"),))


async def _broken() -> Reply:
    raise RuntimeError("it is broken")


class Serving:
    """An endpoint on a loop of its own, with the routes of a test."""

    def __init__(self) -> None:
        self.routes = {"/fine": _fine, "/broken": _broken}
        self.port = 0
        self.endpoint = Endpoint(self.routes)
        self._listening = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="endpoint")

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.endpoint.start(Address("127.0.0.1", 0))
        self.port = self.endpoint.port
        self._listening.set()
        await self._stop.wait()
        await self.endpoint.stop()

    @property
    def clients(self) -> int:
        """Connections that it has open."""
        return len(self.endpoint._exchanges)

    def do(self, function: Callable[[], object]) -> None:
        """Call it on the loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function)

    def start(self) -> None:
        self._thread.start()
        assert self._listening.wait(DEADLINE)

    def stop(self) -> None:
        """Harmless twice."""
        assert self._stop is not None
        if self._thread.is_alive():
            self.do(self._stop.set)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()


@pytest.fixture
def serving():
    running = Serving()
    running.start()
    yield running
    running.stop()


@contextlib.contextmanager
def connected(serving, sent=b""):
    with socket.create_connection(("127.0.0.1", serving.port), timeout=DEADLINE) as sock:
        sock.sendall(sent)
        yield sock


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# --- answers ---------------------------------------------------------------------------------------------------------


def test_get(serving):
    answer = get(serving.port, "/fine")
    assert (answer.status, answer.body) == (200, "fine\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert (answer.headers["connection"], answer.headers["cache-control"]) == ("close", "no-store")
    assert answer.headers["x-also"] == "this"


def test_head_has_the_length_and_no_body(serving):
    answer = get(serving.port, "/fine", "HEAD")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, "", "5")
    assert raw(serving.port, REQUEST.replace(b"GET", b"HEAD")).endswith(b"\r\n\r\n")


@pytest.mark.parametrize("path", ["/fine?name[]=x", "/fine?"])
def test_a_query_does_not_matter(serving, path):
    assert get(serving.port, path).status == 200


@pytest.mark.parametrize("path", ["/", "/fine/", "/Fine", "/fine/../fine", "//fine", "/%66ine", "/metrics"])
def test_another_path(serving, path):
    answer = get(serving.port, path)
    assert (answer.status, answer.body) == (404, "404 Not Found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
def test_another_method(serving, method):
    answer = get(serving.port, "/fine", method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        REQUEST.replace(b"\r\n", b"\n"),
        b"GET /fine HTTP/1.0\r\n\r\n",
        REQUEST[:-2] + b"Connection: keep-alive\r\n\r\n",
        REQUEST[:-2] + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        REQUEST + REQUEST,
    ],
    ids=["1.1", "bare newlines", "1.0", "keep-alive", "100-continue", "pipelined"],
)
def test_one_answer_and_the_end(serving, request_):
    answer = raw(serving.port, request_)
    assert status_of(answer) == 200
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.endswith(b"\r\n\r\nfine\n")


def test_byte_by_byte(serving):
    assert status_of(raw(serving.port, *(REQUEST[at : at + 1] for at in range(len(REQUEST))))) == 200


def test_a_client_that_closes_its_side_as_it_has_asked(serving):
    assert status_of(raw(serving.port, REQUEST, half_close=True)) == 200


def test_a_client_that_closes_before_it_has_asked(serving):
    assert raw(serving.port, REQUEST[:-1], half_close=True) == b""
    until(lambda: not serving.clients, "it is gone")


def test_a_body_that_nobody_wants_does_not_cost_the_answer(serving):
    head = b"POST /fine HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n"
    assert status_of(raw(serving.port, head, bytes(50_000))) == 405


def test_what_makes_the_answer_fails(serving, caplog):
    answer = get(serving.port, "/broken")
    assert (answer.status, answer.body) == (500, "500 Internal Server Error\n")
    assert "it is broken" in caplog.text
    assert get(serving.port, "/fine").status == 200


def test_the_port_is_taken(serving):
    async def again():
        await Endpoint({}).start(Address("127.0.0.1", serving.port))

    with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{serving.port} for metrics: "):
        asyncio.run(again())


# --- no HTTP, and too much of it -------------------------------------------------------------------------------------

GARBAGE = {
    "binary": bytes(range(256)) + b"\r\n\r\n",
    "nothing but an end": b"\r\n\r\n\r\n\r\n",
    "0.9": b"GET /fine\r\n\r\n",
    "a shipd sender": b"SHPD" + bytes(60) + b"\r\n\r\n",
    "header without a colon": REQUEST[:-2] + b"nonsense\r\n\r\n",
    "two hosts": REQUEST[:-2] + b"Host: y\r\n\r\n",
    "no host": b"GET /fine HTTP/1.1\r\n\r\n",
    "zero byte": b"GET /f\0ine HTTP/1.1\r\nHost: x\r\n\r\n",
    "space before the colon": REQUEST[:-2] + b"X : y\r\n\r\n",
    "two lengths": REQUEST[:-2] + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "negative length": REQUEST[:-2] + b"Content-Length: -1\r\n\r\n",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_answered_as_such(serving, what):
    answer = raw(serving.port, GARBAGE[what])
    assert status_of(answer) == 400
    assert b"fine" not in answer
    assert get(serving.port, "/fine").status == 200


def test_http_2(serving):
    """Its preface is made to look like a request of a method that nobody has."""
    assert status_of(raw(serving.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")) == 405


def test_tls(serving):
    """A ClientHello has no line ends to wait for, and is refused by its first bytes."""
    assert status_of(raw(serving.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506))) == 400


def sized(size: int) -> bytes:
    """A request of so many bytes."""
    return REQUEST[:-2] + b"X: " + b"y" * (size - len(REQUEST) - 5) + b"\r\n\r\n"


def test_the_largest_request(serving):
    request = sized(MAX_REQUEST)
    assert len(request) == MAX_REQUEST
    # In two pieces, so that it is judged before it is complete.
    assert status_of(raw(serving.port, request[:-1], request[-1:])) == 200


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /" + b"x" * MAX_REQUEST],
        [REQUEST[:-2] + b"X: " + b"y" * MAX_REQUEST],
        [REQUEST[:-2], *[b"X: y\r\n"] * (MAX_REQUEST // 5)],
    ],
    ids=["path", "header", "headers"],
)
def test_a_request_without_an_end(serving, pieces):
    assert status_of(raw(serving.port, b"".join(pieces))) == 431


def test_a_flood_after_the_request_is_cut_off(serving):
    with connected(serving, REQUEST) as sock:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            _send_again_and_again(sock, bytes(MAX_IGNORED), 10_000, 0.0)
        until(lambda: not serving.clients, "it is gone")


# --- clients that take their time ------------------------------------------------------------------------------------


def test_whoever_asks_nothing_is_cut_off(monkeypatch, serving):
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with connected(serving) as silent, connected(serving, REQUEST[:-2]) as half:
        assert _ends(silent)
        assert _ends(half)
    assert get(serving.port, "/fine").status == 200


def test_whoever_trickles_is_cut_off(monkeypatch, serving):
    """A byte now and then is no way to stay."""
    monkeypatch.setattr(module, "SECONDS", 0.3)
    cut_off = pytest.raises((ConnectionResetError, BrokenPipeError))
    with connected(serving, b"GET /fine HTTP/1.1\r\nX: ") as sock, cut_off:
        _send_again_and_again(sock, b"y", int(DEADLINE / 0.01), 0.01)


def test_whoever_does_not_read_is_cut_off(monkeypatch, serving):
    monkeypatch.setattr(module, "SECONDS", 0.5)

    async def much() -> Reply:
        return Reply(200, bytes(32 << 20))

    serving.routes["/much"] = much
    with connected(serving) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(REQUEST.replace(b"/fine", b"/much"))
        until(lambda: serving.clients == 1, "it has been accepted")
        until(lambda: serving.clients == 0, "it is cut off")


def test_whoever_stays_after_the_answer_is_cut_off(monkeypatch, serving):
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with connected(serving, REQUEST) as sock:
        assert status_of(receive_all(sock)) == 200
        until(lambda: not serving.clients, "it is cut off")


def test_idle_connections_give_up_their_places(serving):
    """The oldest first, so that whoever asks is answered, however many there are that do not."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(serving)) for _ in range(MAX_CONNECTIONS)]
        until(lambda: serving.clients == MAX_CONNECTIONS, "all are connected")
        for number in range(3):
            assert get(serving.port, "/fine").status == 200
            assert _ends(idle[number])
            until(lambda: serving.clients == MAX_CONNECTIONS - 1, "whoever asked has gone")
            idle.append(stack.enter_context(connected(serving)))
            until(lambda: serving.clients == MAX_CONNECTIONS, "and another has come")
        idle[3].sendall(REQUEST)
        assert status_of(receive_all(idle[3])) == 200, "the others are still there"


def test_who_is_being_answered_keeps_its_place(serving):
    asked = threading.Semaphore(0)
    released = []

    async def slow() -> Reply:
        event = asyncio.Event()
        released.append(event)
        asked.release()
        await event.wait()
        return Reply(200, b"at last\n")

    serving.routes["/slow"] = slow
    request = REQUEST.replace(b"/fine", b"/slow")
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connected(serving, request)) for _ in range(MAX_CONNECTIONS)]
        for _ in waiting:
            assert asked.acquire(timeout=DEADLINE)
        assert raw(serving.port, REQUEST) == b"", "there is no place left"
        for event in released:
            serving.do(event.set)
        assert all(receive_all(sock).endswith(b"at last\n") for sock in waiting)
    assert get(serving.port, "/fine").status == 200


def test_who_stays_when_answered_gives_way(serving):
    with contextlib.ExitStack() as stack:
        staying = [stack.enter_context(connected(serving, REQUEST)) for _ in range(MAX_CONNECTIONS)]
        for sock in staying:
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            assert get(serving.port, "/fine").status == 200


def test_whoever_leaves_is_not_answered(serving):
    begun, ended = threading.Event(), threading.Event()

    async def endless() -> Reply:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    serving.routes["/endless"] = endless
    with connected(serving, REQUEST.replace(b"/fine", b"/endless")) as sock:
        assert begun.wait(DEADLINE)
        # With a reset: a client that has only closed its side may still want the answer.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert ended.wait(DEADLINE)


def test_stops_in_the_middle_of_everything(serving):
    begun = threading.Event()

    async def endless() -> Reply:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    serving.routes["/endless"] = endless
    with connected(serving), connected(serving, REQUEST[:9]), connected(serving, REQUEST) as answered:
        receive_all(answered)
        with connected(serving, REQUEST.replace(b"/fine", b"/endless")):
            assert begun.wait(DEADLINE)
            serving.stop()
    assert serving.endpoint.port == 0
    assert not serving.clients


def _ends(sock: socket.socket) -> bool:
    """Whether the other side closes, which it must."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def _send_again_and_again(sock: socket.socket, piece: bytes, times: int, pause: float) -> None:
    """More often than any socket buffers, so that it ends by being cut off."""
    waiting = threading.Event()
    for _ in range(times):
        sock.sendall(piece)
        waiting.wait(pause)
