"""URLs: which texts are some, what they name, and what of them may be shown.

A name and a password in a URL, and everything behind its question mark (where links carry their signatures), are used
and never shown.
"""

import re
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
"""Of two letters and more: one is a drive of Windows."""

_CREDENTIALS: Final = re.compile(r"://[^/?#]*@")

_UNESCAPED: Final = re.compile(r"://(?![^/?#@]*::)[^/?#@\[]*:[^/?#@\[]*[^/?#@\[\d][^/?#@\[]*[/?#].*@")
"""A password with one of / ? # in it, which then looks like a port and a path."""

_PASSWORD: Final = re.compile(r"://[^/?#:]*:([^/?#]*)@")

_COLLAPSED: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/[^/]")
"""What is left of a URL that was made a Path."""


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL, and no path. A file that is really called so is meant by "./" in front of its name."""
    return _URL.match(text) is not None


def was_url(path: str) -> bool:
    """Whether ``path`` looks like a URL that was a Path in between, and so has lost a slash."""
    return _COLLAPSED.match(path) is not None


def shown(url: str) -> str:
    """``url`` without anything in it that may be secret."""
    url = _UNESCAPED.sub("://…@", url)
    return _CREDENTIALS.sub("://…@", url.partition("#")[0].partition("?")[0]) + ("?…" if "?" in url else "")


def without_secrets(text: str, url: str) -> str:
    """``text``, in which somebody may have quoted ``url`` or parts of it."""
    text = text.replace(url, shown(url))
    passwords = _PASSWORD.findall(url)
    for secret in (url.partition("?")[2], *passwords, *map(unquote, passwords)):
        if secret:
            text = text.replace(secret, "…")
    return text


def scheme_of(url: str) -> str:
    """Its scheme, in lower case."""
    return url.partition("://")[0].lower()


def split(url: str) -> SplitResult:
    """Its parts. Raises CheckpointError where it is malformed, with nothing secret in the message."""
    try:
        parts = urlsplit(url)
        # The port raises ValueError where it is no number.
        usable = parts if parts.hostname and parts.port != 0 else None
    except ValueError:
        usable = None
    if usable is None:
        scheme = scheme_of(url)
        raise CheckpointError(
            f"the {scheme} URL has no valid host and port: it is {scheme}://HOST[:PORT]/PATH, and in a name and a "
            "password before the host the characters / ? # @ : are written as %2F %3F %23 %40 %3A"
        )
    return usable


def local_path(url: str) -> str:
    """The path that a URL of the scheme file names. Raises CheckpointError where it is on another host."""
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise CheckpointError(
            f"{quoted(shown(url))} names a file on another host: write file:///PATH for one on this host, or just its "
            "path"
        )
    return unquote(slash + path)


def beside(url: str, name: str) -> str:
    """The URL of the file ``name``, a relative path, beside the file that ``url`` names. What is behind the question
    mark stays: an access key for all of them is there."""
    path, mark, query = url.partition("#")[0].partition("?")
    return f"{path.rpartition('/')[0]}/{quote(name)}{mark}{query}"


def folder_of(url: str) -> str:
    """What all files beside the one that ``url`` names begin with, as it may be shown."""
    return shown(url.partition("?")[0]).rpartition("/")[0] + "/"
