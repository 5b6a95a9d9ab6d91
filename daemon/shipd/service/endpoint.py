"""A small HTTP/1.1 server on the daemon's own loop: GET and HEAD of a few fixed paths, one request a connection.

h11 parses. What is here bounds what a client may cost: bytes of a request, seconds of a connection, connections. A
client that sends nothing, or slowly, or stays when it has been answered, keeps nobody else from being answered; only as
many as there are places, all being answered at once, keep a newcomer out.
"""

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Final, cast

import h11

from shipd.address import Address
from shipd.errors import ConfigError

log = logging.getLogger("shipd.metrics")

MAX_REQUEST: Final = 8 * 1024
"""Bytes of a request line and its headers; Prometheus sends less than 500."""

MAX_IGNORED: Final = 64 * 1024
"""Bytes that a client may send beyond its request: they are read so that the answer is not lost, and dropped."""

MAX_CONNECTIONS: Final = 32
"""At once. Beyond it, whoever has been connected longest without having asked anything gives up its place."""

SECONDS: Final = 10.0
"""A connection's whole life. Prometheus itself waits no longer, unless it is told to."""

PLAIN: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Reply:
    """``body`` in full; ``status`` is the HTTP status code."""

    status: int
    body: bytes
    content_type: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()


Route = Callable[[], Awaitable[Reply]]


class Endpoint:
    """Answers ``routes``, which map paths to what makes the replies. ``start``, then ``stop``."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self.routes = routes
        self.port = 0
        """Where it listens; 0 where it does not."""
        self._server: asyncio.Server | None = None
        self._exchanges: dict[Exchange, None] = {}

    async def start(self, address: Address) -> None:
        """Listen. Raises ConfigError where that is not possible."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Exchange(self), address.host, address.port, reuse_address=True
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {address} for metrics: {error.strerror or error}") from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Cut off whoever is connected. Harmless where it does not listen."""
        server, self._server = self._server, None
        if server is None:
            return
        self.port = 0
        server.close()
        answering = [exchange.answering for exchange in self._exchanges if exchange.answering is not None]
        for exchange in list(self._exchanges):
            exchange.abort()
        if answering:
            await asyncio.wait(answering)
        await server.wait_closed()

    def opened(self, exchange: "Exchange") -> None:
        """A client has connected."""
        self._exchanges[exchange] = None
        if len(self._exchanges) > MAX_CONNECTIONS:
            # Whoever has not asked, longest first; then whoever has its answer and does not go; else the newcomer.
            others = [other for other in self._exchanges if other is not exchange]
            idle = (other for other in others if not other.asked)
            victim = next(chain(idle, (other for other in others if other.answered)), exchange)
            self.closed(victim)
            victim.abort()

    def closed(self, exchange: "Exchange") -> None:
        """A client has gone, or is about to."""
        self._exchanges.pop(exchange, None)


class Exchange(asyncio.Protocol):
    """One connection: a request, its answer, and the end."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.asked = False
        """Whether there is anything to answer."""
        self.answering: asyncio.Task[None] | None = None
        self._endpoint = endpoint
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.answered = False
        """Whether the whole answer has been written."""
        self._heard_out = False
        """The client has nothing more to say."""
        self._ignored = 0

    # --- what the transport calls --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = self._loop.call_later(SECONDS, self.abort)
        self._endpoint.opened(self)

    def data_received(self, data: bytes) -> None:
        if self.asked:
            self._ignored += len(data)
            if self._ignored > MAX_IGNORED:
                self.abort()
            return
        self._http.receive_data(data)
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            self.asked = True
            self._write(_refusal(error.error_status_hint), head=False)
            return
        if isinstance(event, h11.Request):
            self.asked = True
            self.answering = self._loop.create_task(self._answer(event.method, event.target))

    def eof_received(self) -> bool:
        self._heard_out = True
        # A client may close its side of the connection as soon as it has asked.
        return self.asked and not self.answered

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  nobody is left to be told
        self._endpoint.closed(self)
        if self._deadline is not None:
            self._deadline.cancel()
        if self.answering is not None:
            self.answering.cancel()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # --- answering -----------------------------------------------------------------------------------------

    async def _answer(self, method: bytes, target: bytes) -> None:
        reply = _refusal(405, (("Allow", "GET, HEAD"),))
        if method in (b"GET", b"HEAD"):
            route = self._endpoint.routes.get(target.partition(b"?")[0].decode("ascii", "replace"))
            try:
                reply = _refusal(404) if route is None else await route()
            except Exception:
                log.exception("a request could not be answered")
                reply = _refusal(500)
        self._write(reply, head=method == b"HEAD")

    def _write(self, reply: Reply, *, head: bool) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        response = h11.Response(
            status_code=reply.status,
            reason=http.HTTPStatus(reply.status).phrase,
            headers=[
                ("Content-Type", reply.content_type),
                ("Content-Length", str(len(reply.body))),
                ("Cache-Control", "no-store"),
                ("Connection", "close"),
                *reply.headers,
            ],
        )
        pieces = [self._http.send(response)]
        if not head:
            pieces.append(self._http.send(h11.Data(reply.body)))
        self.answered = True
        self._transport.write(b"".join(piece for piece in pieces if piece))
        if self._heard_out:
            self._transport.close()
        else:
            # Closing with something unread would reset the connection, and the answer with it: the client closes.
            self._transport.write_eof()


def _refusal(status: int, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    return Reply(status, f"{status} {http.HTTPStatus(status).phrase}\n".encode(), headers=headers)
