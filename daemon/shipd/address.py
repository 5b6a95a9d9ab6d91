"""Addresses of daemons as people write them: ``HOST[:PORT]``, with IPv6 addresses in brackets."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

DEFAULT_PORT: Final = 7447
"""Where a daemon listens unless its configuration says otherwise."""

_EXAMPLES: Final = "write HOST or HOST:PORT, such as 'gpu-01', '10.0.0.7:7447' or '[fd00::7]:7447'"

_MAX_HOST: Final = 253
"""Characters of a host name in the DNS."""

_LABEL: Final = re.compile(r"[\w-]{1,63}")
"""One part of a host name; letters of any script, which the resolver turns into IDNA."""

_NUMERIC: Final = re.compile(r"[0-9.]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port. ``host`` has no brackets; ``str()`` puts them back where IPv6 needs them."""

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, default_port: int = DEFAULT_PORT, listen: bool = False) -> Address:
    """The address that ``text`` names. Raises ValueError that says what is wrong with it.

    With ``listen`` port 0 is allowed: the system then picks a free one.
    """
    shown = repr(text if len(text) <= 80 else text[:80] + "…")
    if "://" in text:
        raise ValueError(f"{shown} is a URL and not an address; {_EXAMPLES}")
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        if not bracket:
            raise ValueError(f"{shown} has an opening bracket and no closing one; {_EXAMPLES}")
        host = _ipv6(inside, shown)
        if rest and not rest.startswith(":"):
            raise ValueError(f"{shown} has {rest[:20]!r} after the bracket; {_EXAMPLES}")
        port = rest[1:] if rest else None
    elif text.count(":") > 1:
        raise ValueError(f"{shown} looks like an IPv6 address, which needs brackets; {_EXAMPLES}")
    else:
        name, colon, rest = text.partition(":")
        host = _name(name, shown)
        port = rest if colon else None
    return Address(host, default_port if port is None else _port(port, shown, 0 if listen else 1))


def _ipv6(text: str, shown: str) -> str:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        raise ValueError(f"{shown} has no IPv6 address in its brackets; {_EXAMPLES}") from None
    _, zone, name = text.partition("%")
    if zone and not _LABEL.fullmatch(name):
        raise ValueError(f"{shown} has a zone that is no interface name; {_EXAMPLES}")
    return text


def _name(text: str, shown: str) -> str:
    if not text:
        raise ValueError(f"{shown} names no host; {_EXAMPLES}")
    if _NUMERIC.fullmatch(text):
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            raise ValueError(f"{shown} is neither an IPv4 address nor a host name; {_EXAMPLES}") from None
    labels = text.removesuffix(".").split(".")
    if len(text) > _MAX_HOST or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{shown} is not a host name; {_EXAMPLES}")
    return text


def _port(text: str, shown: str, lowest: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 5 or not lowest <= int(text) <= 65535:
        raise ValueError(f"{shown} has the port {text[:20]!r}; a port is a number from {lowest} to 65535")
    return int(text)
