"""Files on web servers, http and https: by ranges where the server has them, resumed, and never of two versions."""

import http.client
from typing import Final

from shipd.checkpoints.remote import location
from shipd.checkpoints.remote.answers import NoParts, Validator, refuse, understand
from shipd.checkpoints.remote.connections import Connection, Pool, Target, broken
from shipd.checkpoints.remote.server import Answer, Broken, Refusal
from shipd.checkpoints.wording import quoted
from shipd.release import VERSION

_REDIRECTS: Final = 10

_REDIRECTED: Final = (301, 302, 303, 307, 308)

_MOST: Final = 1 << 30
"""Nothing of an answer is kept in memory, so it may be of any size."""


class WebFile:
    """A ``Remote`` of http or https. ``timeout`` is how long a connection may be silent, in seconds."""

    most = _MOST

    def __init__(self, url: str, pool: Pool, timeout: float) -> None:
        """Raises CheckpointError for a malformed URL."""
        self.shown = location.shown(url)
        self.folder = location.folder_of(url)
        self.original = Target.of(url)
        self.target = self.original
        """Where redirections have led to."""
        self.validator: Validator | None = None
        """Of the first answer, once there was one."""
        self.in_parts = True
        """Whether it is worth asking for a part."""
        self.pool = pool
        self.timeout = timeout
        self._url = url

    def line(self) -> "WebLine":
        """See ``Remote.line``."""
        return WebLine(self)

    def confirm(self) -> None:
        """See ``Remote.confirm``; each answer has been looked at."""

    def beside(self, name: str) -> "WebFile":
        """See ``Remote.beside``."""
        return WebFile(location.beside(self._url, name), self.pool, self.timeout)


class WebLine:
    """A ``Line`` to a web server."""

    def __init__(self, file: WebFile) -> None:
        self._file = file
        self._connection: Connection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._aborted = False

    def ask(self, start: int, stop: int | None) -> Answer:
        """See ``Line.ask``."""
        file = self._file
        known = file.validator
        if not file.in_parts:
            stop = None
        while True:
            response = self._follow(self._headers(start, stop))
            try:
                answer = understand(response, file.shown, (start, stop), known)
            except NoParts:
                # As a whole, then; and this is asked once for each file.
                self.close()
                file.in_parts, start, stop = False, 0, None
                continue
            if known is None:
                file.validator = Validator.of(response)
                file.in_parts = answer.in_parts
            elif file.in_parts and not answer.in_parts:
                raise Broken("it answers with the whole file where a part was asked for")
            return answer

    def _headers(self, start: int, stop: int | None) -> dict[str, str]:
        file = self._file
        headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": f"shipd/{VERSION}"}
        if stop is not None:
            headers["Range"] = f"bytes={start}-{stop - 1}"
            if file.validator is not None:
                headers["If-Range"] = file.validator.condition
        return headers

    def _follow(self, headers: dict[str, str]) -> http.client.HTTPResponse:
        """The answer at the end of all redirections."""
        file = self._file
        target = begun = file.target
        for _ in range(_REDIRECTS + 1):
            more = {"Authorization": target.authorization} if target.authorization else {}
            response = self._request(target, headers | more)
            place = response.getheader("Location")
            if response.status in _REDIRECTED and place:
                self.close()
                target = target.redirected(place, file.shown)
                continue
            if response.status >= 400 and begun != file.original and response.status != 416:
                # A signed link that redirections had led to, and that has expired: they lead to a new one.
                file.target = file.original
                raise Broken(f"it answers {response.status}")
            elsewhere = "" if target.host == file.original.host else target.host
            refuse(response.status, file.shown, elsewhere, authorized=bool(target.authorization))
            file.target = target
            return response
        raise Refusal(
            f"{quoted(file.shown)} is redirected more than {_REDIRECTS} times; open it in a browser, and name the "
            "URL of the file itself"
        )

    def _request(self, target: Target, headers: dict[str, str]) -> http.client.HTTPResponse:
        while True:
            connection = self._connection = self._file.pool.take(target)
            if not connection.reused:
                self._connect(connection)
            if self._aborted:
                raise Broken("it was given up")
            try:
                self._response = connection.request(target.path, headers)
                return self._response
            except Broken:
                connection.close()
                # One that was kept may have been closed by the server meanwhile.
                if not connection.reused or self._aborted:
                    raise

    def _connect(self, connection: Connection) -> None:
        """A server that has answered before may be starting again; one that has not is probably not there."""
        try:
            connection.connect(self._file.timeout, self._file.shown)
        except Refusal as error:
            connection.close()
            if self._file.validator is None:
                raise
            raise Broken(str(error).removeprefix(f"{quoted(self._file.shown)}: ")) from error

    def read(self, into: memoryview) -> int:
        """See ``Line.read``."""
        assert self._response is not None
        try:
            return self._response.readinto(into)
        except (OSError, http.client.HTTPException) as error:
            raise broken(error) from error

    def done(self) -> None:
        """See ``Line.done``."""
        connection, response = self._connection, self._response
        if connection is None or response is None or not response.isclosed() or not connection.reusable:
            self.close()
            return
        self._connection = self._response = None
        self._file.pool.put(connection)

    def close(self) -> None:
        """See ``Line.close``."""
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            self._connection.close()
        self._connection = self._response = None

    def abort(self) -> None:
        """See ``Line.abort``; all but looking up a name and connecting, which take ten seconds at most."""
        self._aborted = True
        if (connection := self._connection) is not None:
            connection.abort()
