"""Sizes, counts and durations as people write and read them: for configuration, messages and the command line.

Sizes are shown in decimal units, as links and disks are; both decimal and binary ones are understood.
"""

import math
import re
from typing import Final

_SIZE: Final = re.compile(r"\s*([0-9]+)(?:\.([0-9]+))?\s*([A-Za-z]*)\s*", re.ASCII)

_BITS: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmgtKMGT]?)(?:[bB][iI][tT][sS]?|b)", re.ASCII)

_POWERS: Final = {"k": 1, "m": 2, "g": 3, "t": 4, "p": 5}

_LARGEST: Final = 2**63 - 1
"""What fits every field and system call that a size is handed to."""


def parse_size(text: str | int) -> int:
    """Bytes meant by ``text``: ``"8GiB"``, ``"1.5 GB"``, ``"512 kB"``, ``"8G"``, ``"4096"``, or a plain int.

    kB, MB, GB, … are powers of 1000; KiB, MiB, GiB, … are powers of 1024, and so is a bare K, M or G, as in
    systemd's MemoryMax=. Case does not matter; a fraction of a byte is dropped. Raises ValueError.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(  # noqa: TRY004 - in a configuration this is a wrong value like any other
            f"a size must be a whole number of bytes or a text such as '8GiB', not {text!r}"
        )
    if isinstance(text, int):
        return _bounded(text, str(text) if abs(text) <= _LARGEST else "that many bytes")
    shown = repr(text if len(text) <= 40 else text[:40] + "…")
    match = _SIZE.fullmatch(text[:100]) if len(text) <= 100 else None
    if match is None:
        raise ValueError(f"{shown} is not a size; write a number and a unit, such as '8GiB' or '1.5 GB'")
    whole, fraction, unit = match[1], match[2] or "", match[3]
    scale = _scale(unit)
    if scale is None:
        raise ValueError(f"{shown} has the unknown unit {unit!r}; use B, kB, MB, GB, KiB, MiB, GiB, …")
    return _bounded(int(whole + fraction) * scale // 10 ** len(fraction), shown)


def parse_rate(text: "str | float") -> float:
    """Bytes a second meant by ``text``: ``"100Mbit"``, ``"1.5 Gbit/s"``, ``"10MB/s"``, ``"512kB"``; a number is bytes.

    A small b means bits and a capital B bytes: ``"8Mbps"`` is ``"1MBps"``. Units of bits are powers of 1000, as links'
    are; others are as ``parse_size`` has them. Raises ValueError.
    """
    if not isinstance(text, str):
        # True is a number to Python, and in a configuration a wrong value like any other.
        rate = 0.0 if isinstance(text, bool) else float(text)
        if not math.isfinite(rate) or rate < 1:
            raise ValueError(f"a rate must be at least one byte a second, not {text!r}")
        return rate
    shown = repr(text if len(text) <= 40 else text[:40] + "…")
    plain = text.strip() if len(text) <= 100 else ""
    for ending in ("/s", "ps"):
        plain = plain.removesuffix(ending)
    match = _BITS.fullmatch(plain)
    try:
        rate = (
            float(match[1]) * 1000 ** _POWERS.get(match[2].lower(), 0) / 8
            if match is not None
            else float(parse_size(plain))
        )
    except ValueError:
        raise ValueError(f"{shown} is not a rate; write a number and a unit, such as '100Mbit' or '10MB/s'") from None
    if rate < 1:
        raise ValueError(f"a rate must be at least one byte a second, not {shown}")
    return rate


def _scale(unit: str) -> int | None:
    unit = unit.lower()
    if unit in ("", "b", "byte", "bytes"):
        return 1
    power = _POWERS.get(unit[0])
    base = {"": 1024, "ib": 1024, "b": 1000}.get(unit[1:])
    return None if power is None or base is None else base**power


def _bounded(size: int, shown: str) -> int:
    if size < 0:
        raise ValueError(f"{shown} is negative; a size is 0 bytes or more")
    if size > _LARGEST:
        raise ValueError(f"{shown} is too large; a size is at most {_LARGEST} bytes")
    return size


def format_bytes(size: float) -> str:
    """``size`` in bytes for a reader: ``"0 B"``, ``"512 B"``, ``"22.7 MB"``, ``"1.5 TB"``.

    A figure that is not finite becomes a dash, so that a rate over no time never breaks a message.
    """
    if not math.isfinite(size):
        return "-"
    sign = "-" if size < 0 else ""
    size = abs(size)
    if size < 999.5:
        return f"{sign}{size:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        # Compare what would be printed: 999,960 bytes are "1.0 MB", never "1000.0 kB".
        if size < 999.95:
            return f"{sign}{size:.1f} {unit}"
    return f"{sign}{size / 1000:.1f} PB"


def format_seconds(seconds: float) -> str:
    """A duration for a reader: ``"0 s"``, ``"450 µs"``, ``"3.1 ms"``, ``"12.3 s"``, ``"1m 12s"``.

    A figure that is not finite becomes a dash.
    """
    if not math.isfinite(seconds):
        return "-"
    sign = "-" if seconds < 0 else ""
    seconds = abs(seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 999.5e-6:
        return f"{sign}{seconds * 1e6:.0f} µs"
    if seconds < 999.95e-3:
        return f"{sign}{seconds * 1e3:.1f} ms"
    if seconds < 59.95:
        return f"{sign}{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{sign}{whole // 60}m {whole % 60}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{sign}{minutes // 60}h {minutes % 60}m"
    hours = round(seconds / 3600)
    return f"{sign}{hours // 24}d {hours % 24}h"


def count_tensors(count: int) -> str:
    """ "1 tensor", "1,200 tensors"."""
    return f"{count:,} tensor{'' if count == 1 else 's'}"
