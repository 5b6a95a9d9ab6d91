"""Connecting to a daemon, by TCP or at its Unix socket: within a time, and interrupted by a waker."""

import errno
import os
import select
import socket
import time
from pathlib import Path
from typing import Any, Final

from shipd.address import Address
from shipd.errors import Interrupted
from shipd.transfer.resolving import resolve
from shipd.transfer.waker import Waker

_QUEUE_SECONDS: Final = 0.02
"""How often a daemon's Unix socket is tried where its queue is full, as when many processes start at once."""


def dial_tcp(address: Address, deadline: float, waker: Waker | None) -> socket.socket:
    """Try every address of the host; one that does not answer leaves the others their share of the time."""
    found = resolve(address, deadline, waker)
    failure: OSError | None = None
    for left, (family, kind, protocol, _name, where) in zip(range(len(found), 0, -1), found, strict=True):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(0)
            _connect(sock, where, (deadline - time.monotonic()) / left, waker)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure or OSError("the host has no address")


def _connect(sock: socket.socket, where: Any, timeout: float, waker: Waker | None) -> None:
    """connect(2) that ``waker`` interrupts."""
    error = sock.connect_ex(where)
    if error == errno.EINPROGRESS:
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        if waker is not None:
            poll.register(waker, select.POLLIN)
        ready = poll.poll(max(0.0, timeout) * 1000)
        if waker is not None and waker.woken:
            raise Interrupted("interrupted while connecting")
        if not ready:
            raise TimeoutError
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def dial_unix(path: Path, deadline: float, waker: Waker | None) -> socket.socket:
    """Connect. Where as many wait already as the daemon lets wait, the kernel says so instead of waiting itself."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(0)
        while (error := sock.connect_ex(str(path))) == errno.EAGAIN:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if waker is None:
                time.sleep(min(_QUEUE_SECONDS, left))
            elif waker.wait(min(_QUEUE_SECONDS, left)):
                raise Interrupted("interrupted while connecting")
        if error:
            raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock
