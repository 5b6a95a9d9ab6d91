"""What an answer of HTTP means: which bytes come, whether they are of the version that was asked for, or why none do.

Ranges and validators are those of RFC 9110 (https://www.rfc-editor.org/rfc/rfc9110), sections 8.8, 13 and 14.
"""

import re
from http import HTTPStatus
from typing import Final, NamedTuple, Protocol

from shipd.checkpoints.remote.server import Answer, Broken, Refusal, changed
from shipd.checkpoints.wording import quoted

_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

_NO_RANGE: Final = re.compile(r"bytes \*/(\d{1,19})")

_LENGTH: Final = re.compile(r"\d{1,19}")

_RETRIED: Final = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may be others when asked again."""


class Head(Protocol):
    """What is used of http.client.HTTPResponse."""

    status: int

    def getheader(self, name: str) -> str | None: ...


class Validator(NamedTuple):
    """What tells one version of a file from another: its entity tag, when it was last modified; both may be empty."""

    etag: str = ""
    modified: str = ""

    @classmethod
    def of(cls, head: Head) -> "Validator":
        """A weak tag does not promise that the bytes are the same, and counts as none."""
        etag = (head.getheader("ETag") or "").strip()
        return cls("" if etag.startswith("W/") else etag, (head.getheader("Last-Modified") or "").strip())

    @property
    def condition(self) -> str:
        """For If-Range; empty where the server gives nothing to go by."""
        return self.etag or self.modified

    def differs(self, now: "Validator") -> str:
        """What says that ``now`` is of another version; empty where nothing does."""
        if self.etag and now.etag and self.etag != now.etag:
            return f"its ETag was {quoted(self.etag)}, and now is {quoted(now.etag)}"
        if not (self.etag and now.etag) and self.modified and now.modified and self.modified != now.modified:
            return f"it was last modified {quoted(self.modified)}, and now is {quoted(now.modified)}"
        return ""


class NoParts(Exception):
    """The server sent a part of a file, and gives nothing to tell whether the next one will be of the same version."""


def understand(head: Head, shown: str, asked: tuple[int, int | None], known: Validator | None) -> Answer:
    """What the answer to a question for the bytes ``asked`` is.

    known   the validator of the file's first answer; None where this is the first, and where the file came without one
    Raises Refusal, Broken, and NoParts for a first answer.
    """
    encoding = (head.getheader("Content-Encoding") or "identity").strip().lower()
    if head.status in (200, 206) and encoding != "identity":
        raise Refusal(
            f"{quoted(shown)} comes compressed ({quoted(encoding)}), although it was asked for as it is; have the "
            "server send it without Content-Encoding, or download it, decompress it, and push that"
        )
    if head.status == 206:
        return _part(head, shown, asked, known)
    if head.status == 200:
        return _whole(head, shown, asked, known)
    if head.status == 412 and known is not None:
        raise changed(shown, "its server says so")
    if head.status == 416:
        return _nothing(head, shown, asked, known)
    raise Broken(f"it answers {_status(head.status)}")


def _part(head: Head, shown: str, asked: tuple[int, int | None], known: Validator | None) -> Answer:
    said = (head.getheader("Content-Range") or "").strip()
    match = _RANGE.fullmatch(said)
    start, stop = asked
    if stop is None:
        raise Refusal(
            f"{quoted(shown)}: asked for all of it, its server answers with a part ({quoted(said)}). Download the "
            "file, and push that"
        )
    if match is None or int(match[1]) != start or not start < int(match[2]) + 1 <= stop:
        what = f"is answered with the range {quoted(said)}" if said else "is answered with a part of it, and not which"
        raise Refusal(
            f"{quoted(shown)}: a question for the bytes {start} to {stop - 1} {what}; its server's ranges "
            "cannot be relied on. Download the file, and push that"
        )
    now = Validator.of(head)
    if known is not None and (what := known.differs(now)):
        raise changed(shown, what)
    size = None if match[3] == "*" else int(match[3])
    end = int(match[2]) + 1
    if size is not None and end > size:
        raise Refusal(
            f"{quoted(shown)}: its server claims bytes up to {end} of {size}. Download the file, and push that"
        )
    if known is None and (size is None or not now.condition):
        if size != end:
            raise NoParts
        return Answer(size, start, end, in_parts=False)
    return Answer(size, start, end, in_parts=True)


def _whole(head: Head, shown: str, asked: tuple[int, int | None], known: Validator | None) -> Answer:
    now = Validator.of(head)
    if known is not None and (what := known.differs(now)):
        raise changed(shown, what)
    if asked[0]:
        if known is None or known.condition != now.condition:
            raise changed(shown, "its server says so")
        raise Broken("it answers with the whole file where a part was asked for")
    length = (head.getheader("Content-Length") or "").strip()
    # A length beside chunks is not to be believed.
    size = int(length) if _LENGTH.fullmatch(length) and not head.getheader("Transfer-Encoding") else None
    return Answer(size, 0, size, in_parts=False)


def _nothing(head: Head, shown: str, asked: tuple[int, int | None], known: Validator | None) -> Answer:
    """There are no bytes where some were asked for."""
    match = _NO_RANGE.fullmatch((head.getheader("Content-Range") or "").strip())
    if known is not None:
        raise changed(shown, f"it now ends before byte {asked[0]}")
    if match is not None and int(match[1]) == 0:
        return Answer(0, 0, 0, in_parts=False)
    if asked[1] is None:
        raise Broken(f"it answers {_status(head.status)}, although no range was asked for")
    raise NoParts


def refuse(status: int, shown: str, host: str, *, authorized: bool) -> None:
    """Raise Refusal for a status that asking again does not change; nothing for others.

    host        where it was redirected to; empty where it was not
    authorized  whether a name and a password were given
    """
    if status in _RETRIED or status in (200, 206, 412, 416):
        return
    via = f" (from {host}, where it is redirected to)" if host else ""
    answer = f"{quoted(shown)} is answered with {_status(status)}{via}"
    if status in (404, 410):
        raise Refusal(f"{answer}: there is no such file; check the URL", absent=True)
    if status == 401 and authorized:
        raise Refusal(f"{answer}: the name and the password in the URL are not accepted; check them")
    if status == 401:
        raise Refusal(
            f"{answer}: it asks who you are; put name and password into the URL, as in "
            "https://NAME:PASSWORD@HOST/PATH, or make a link that needs none (a signed one)"
        )
    if status == 403:
        raise Refusal(
            f"{answer}: reading it is not allowed. A signed link may have expired: make a new one; otherwise have its "
            "owner allow it, or put name and password into the URL, as in https://NAME:PASSWORD@HOST/PATH"
        )
    if status == 407:
        raise Refusal(
            f"{answer}: the proxy asks who you are; put name and password into its URL, as in "
            "https_proxy=http://NAME:PASSWORD@HOST:PORT"
        )
    if 300 <= status < 400:
        raise Refusal(f"{answer}, and not where to; open it in a browser, and name the URL of the file itself")
    raise Refusal(f"{answer} and not with the file; check the URL, or download the file and push that")


def _status(status: int) -> str:
    """The number and the standard's words for it: a server's own are a stranger's text."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
