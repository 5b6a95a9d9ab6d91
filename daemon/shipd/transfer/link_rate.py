"""What a connection's link carries, as the kernel knows it, and how much of it may be used.

Linux measures the rate at which the peer acknowledges bytes, on every connection and without being asked; where there
is no such thing (other systems, Unix sockets) nothing is known, and callers go by what they have seen themselves.
"""

import contextlib
import math
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Final

_TCP_INFO_SIZE: Final = 192
_RTT: Final = struct.Struct("=I")
_RTT_AT: Final = 68
_RATE: Final = struct.Struct("=Q")
_RATE_AT: Final = 160
_ACKED_AT: Final = 120
_FLAGS_AT: Final = 7
"""Offsets of tcpi_rtt, tcpi_delivery_rate, tcpi_bytes_acked and tcpi_delivery_rate_app_limited in struct tcp_info
(linux/tcp.h): part of the kernel's interface to programs, which only ever grows at its end."""

_SO_MAX_PACING_RATE: Final = 47
"""asm-generic/socket.h; not in the socket module. TCP keeps to it by itself since Linux 4.13, whatever the queueing
discipline."""

_NOT_SENT: Final = 128 * 1024
"""Bytes: a tenth of a second at 10 Mbit/s, and two milliseconds at a gigabit a second, in which more is written."""

_UNLIMITED: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class LinkRate:
    """Of one connection.

    rate          bytes a second
    at_least      whether the sender had too little to send for the link to show more
    round_trip    seconds
    acknowledged  bytes that have arrived so far
    """

    rate: float
    at_least: bool
    round_trip: float
    acknowledged: int


def measure(sock: socket.socket) -> LinkRate | None:
    """The rate of the latest bytes that the peer has acknowledged; None where nothing is known (yet)."""
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    except OSError:
        return None
    if len(info) < _RATE_AT + _RATE.size:
        return None
    (rate,) = _RATE.unpack_from(info, _RATE_AT)
    (round_trip,) = _RTT.unpack_from(info, _RTT_AT)
    (acknowledged,) = _RATE.unpack_from(info, _ACKED_AT)
    return LinkRate(float(rate), bool(info[_FLAGS_AT] & 1), round_trip / 1e6, acknowledged) if rate else None


def hold_little(sock: socket.socket, little: bool) -> None:
    """Have the kernel keep little that it has not sent yet, so that what is queued last does not wait for seconds; or
    as much as it likes, which a fast link needs."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT") and sock.family in (socket.AF_INET, socket.AF_INET6):
        # macOS sets nothing on a connection that the peer has reset; whoever reads next is told that it is lost.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOT_SENT if little else 0)


def pace(sock: socket.socket, rate: float) -> bool:
    """Have the kernel send at most ``rate`` bytes a second on this connection, evenly. Whether it does."""
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    value = _UNLIMITED if math.isinf(rate) else min(max(1, int(rate)), _UNLIMITED)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("=Q", value))
    except OSError:
        return False
    return True
