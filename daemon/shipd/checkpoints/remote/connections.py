"""Connections of HTTP: direct and through proxies, with and without TLS, kept and reused; what their failures mean."""

import base64
import contextlib
import http.client
import socket
import ssl
import string
import threading
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urljoin
from urllib.request import getproxies, proxy_bypass

from shipd.checkpoints.remote.location import shown, split
from shipd.checkpoints.remote.server import Broken, Refusal, Silent
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError

_CONNECT_SECONDS: Final = 10.0

_DEFAULT: Final = {"http": 80, "https": 443}

_SAFE: Final = "/%:@!$&'()*+,;=~-._?"
"""Characters of a path and query that go as they are; others are escaped, as browsers do it."""

_NO_SUCH_HOST: Final = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class Target(NamedTuple):
    """What a request goes to.

    path           what is asked for, query included
    authorization  the header of that name; empty for none
    """

    scheme: str
    host: str
    port: int
    path: str
    authorization: str = ""

    @classmethod
    def of(cls, url: str) -> "Target":
        """Raises CheckpointError for a malformed URL."""
        parts = split(url)
        path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
        assert parts.hostname is not None
        return cls(
            parts.scheme,
            parts.hostname,
            parts.port or _DEFAULT[parts.scheme],
            path,
            "" if parts.username is None else _basic(parts.username, parts.password),
        )

    @property
    def place(self) -> tuple[str, str, int]:
        """What may be told what this target may be told."""
        return self.scheme, self.host, self.port

    @property
    def url(self) -> str:
        """Without name and password."""
        port = "" if self.port == _DEFAULT[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{_in_url(self.host)}{port}{self.path}"

    def redirected(self, location: str, asked: str) -> "Target":
        """Where a redirection leads; name and password go along only to the same place. Raises Refusal.

        Bytes that no URL may have, which servers send nevertheless, are escaped as they are and not taken for text.
        """
        url = quote(location.encode("latin-1", "replace"), safe=string.punctuation)
        try:
            url = urljoin(self.url, url)
            leads_to_web = url.partition("://")[0].lower() in _DEFAULT
            target = Target.of(url) if leads_to_web else None
        except (CheckpointError, ValueError):  # The latter where what looks like an address in brackets is none.
            target = None
        if target is None:
            raise Refusal(f"{quoted(asked)} is redirected to {quoted(shown(url))}, which is no URL of http or https")
        if self.scheme == "https" and target.scheme == "http":
            raise Refusal(
                f"{quoted(asked)} is redirected from https to {quoted(shown(url))}, which anyone on the way could "
                "change; name that URL itself where you trust the way to it"
            )
        return target._replace(authorization=self.authorization if target.place == self.place else "")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _basic(user: str, password: str | None) -> str:
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()


class Connection:
    """A connection to a place, and how requests are put on it."""

    def __init__(self, target: Target, context: ssl.SSLContext) -> None:
        """Connects nothing yet. Raises Refusal for a proxy that cannot be used."""
        self.place = target.place
        self.reused = False
        self._prefix = ""
        self._headers: dict[str, str] = {}
        self._sock: socket.socket | None = None
        host, port = target.host, target.port
        proxy = _proxy_for(target)
        authorization = {"Proxy-Authorization": proxy.authorization} if proxy and proxy.authorization else {}
        if proxy is not None:
            host, port = proxy.host, proxy.port
            if target.scheme == "http":
                self._prefix, self._headers = target._replace(path="").url, authorization
        self._where = f"{_in_url(host)}:{port}" + (" (a proxy, from the environment)" if proxy else "")
        self._client: http.client.HTTPConnection
        if target.scheme == "http":
            self._client = http.client.HTTPConnection(host, port, timeout=_CONNECT_SECONDS)
        else:
            self._client = http.client.HTTPSConnection(host, port, timeout=_CONNECT_SECONDS, context=context)
            if proxy is not None:
                self._client.set_tunnel(target.host, target.port, headers=authorization)

    def connect(self, timeout: float, asked: str) -> None:
        """Connect; from then on a read may take ``timeout`` seconds. Raises Refusal where it cannot be done."""
        self._client.timeout = min(timeout, _CONNECT_SECONDS)
        try:
            self._client.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refusal(f"{quoted(asked)}: {self._why(error)}") from error
        self._sock = self._client.sock
        self._sock.settimeout(timeout)

    def request(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Ask, and wait for the head of the answer. Raises Broken."""
        try:
            self._client.request("GET", self._prefix + path, headers={**self._headers, **headers})
            return self._client.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise broken(error) from error

    @property
    def reusable(self) -> bool:
        """Whether it may be asked again, once an answer was read to its end."""
        return self._client.sock is not None

    def abort(self) -> None:
        """Have whoever reads from it end now. Any thread."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                # Not TLS's own way of ending, which would wait for the other side.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Harmless when repeated."""
        self._client.close()

    def _why(self, error: Exception) -> str:
        """Why nothing can be asked of the place, and what to do."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {self._where} is not trusted ({error.verify_message}); where it is signed by an "
                "authority of your own, set SSL_CERT_FILE to the file with that authority's certificate"
            )
        if isinstance(error, ssl.SSLError):
            return f"{self._where} does not speak TLS as it should ({error.reason}); if it has none, the URL is http://"
        if isinstance(error, socket.gaierror):
            if error.errno in _NO_SUCH_HOST:
                return f"there is no host of the name in {self._where}; check the URL"
            return f"the name in {self._where} cannot be looked up now ({error.strerror}); check the network"
        if isinstance(error, ConnectionRefusedError):
            return f"nobody answers at {self._where} (connection refused); check the host and the port"
        if isinstance(error, TimeoutError):
            return f"nobody answers at {self._where} (no answer in time); check the host, the port and the network"
        return f"{self._where} cannot be reached ({_text(error)})"


def broken(error: Exception) -> Broken:
    """What a failure in the middle of a conversation amounts to."""
    if isinstance(error, TimeoutError):
        return Silent("nothing came in time")
    if isinstance(error, http.client.RemoteDisconnected):
        return Broken("the connection was closed without an answer")
    if isinstance(error, http.client.IncompleteRead):
        return Broken("it broke off")
    if isinstance(error, http.client.HTTPException):
        return Broken(f"what answers does not speak HTTP ({type(error).__name__}: {_text(error)})")
    return Broken(f"the connection broke ({_text(error)})")


def _text(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return quoted(text)


def _proxy_for(target: Target) -> Target | None:
    """The proxy that the environment names for ``target``. Raises Refusal where it is of a kind that cannot be used."""
    named = getproxies().get(target.scheme)
    if not named or proxy_bypass(target.host):
        return None
    url = named if "://" in named else f"http://{named}"
    try:
        usable = url.lower().startswith("http://")
        proxy = Target.of(url) if usable else None
    except CheckpointError:
        proxy = None
    if proxy is None:
        raise Refusal(
            f"the proxy {quoted(shown(url))} that the environment names ({target.scheme}_proxy) cannot be used: only "
            "http://HOST:PORT can. Set NO_PROXY for this host where it is reached without one"
        )
    return proxy


class Pool:
    """Connections that are not in use. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._context: ssl.SSLContext | None = None

    def take(self, target: Target) -> Connection:
        """One to there: one that is there already, or one that is to be connected. Raises Refusal."""
        with self._lock:
            for connection in self._idle:
                if connection.place == target.place:
                    self._idle.remove(connection)
                    connection.reused = True
                    return connection
            if self._context is None:
                # Reads the certificates of some hundred authorities.
                self._context = ssl.create_default_context()
            return Connection(target, self._context)

    def put(self, connection: Connection) -> None:
        """It may be used again."""
        with self._lock:
            self._idle.append(connection)

    def close(self) -> None:
        """Close what is not in use. More may be taken afterwards."""
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()
