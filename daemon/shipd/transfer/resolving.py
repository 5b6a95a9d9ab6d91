"""A host's addresses by its name, in time: getaddrinfo(3) takes as long as name servers do, and is not interrupted.

It asks each of them several times, for seconds each, before it gives up. A thread of its own does that, which is left
behind where nobody can wait for it any longer.
"""

import ipaddress
import select
import socket
import threading
import time
from typing import Any

from shipd.address import Address
from shipd.errors import Interrupted
from shipd.transfer.waker import Waker


def resolve(address: Address, deadline: float, waker: Waker | None = None) -> list[Any]:
    """What getaddrinfo(3) says of ``address``, by ``deadline`` (time.monotonic).

    Raises OSError where it says nothing, or nothing in time, and Interrupted where ``waker`` becomes readable before.
    """
    if _is_number(address.host):
        return _ask(address)
    asking = _Asking(address)
    try:
        asking.wait(deadline, waker)
    finally:
        asking.leave()
    return asking.answer()


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _ask(address: Address) -> list[Any]:
    return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)


class _Asking:
    """One question, on a thread of its own."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._found: list[Any] = []
        self._error: Exception | None = None
        # Whose other end is closed once there is an answer: that can be waited for together with the waker.
        self._answered, self._other = socket.socketpair()
        try:
            threading.Thread(target=self._run, name="shipd resolving", daemon=True).start()
        except RuntimeError:
            # No thread to be had: rather wait than not connect.
            self._run()

    def _run(self) -> None:
        try:
            self._found = _ask(self._address)
        except Exception as error:  # noqa: BLE001  raised by answer, on the thread that asks
            self._error = error
        finally:
            self._other.close()

    def wait(self, deadline: float, waker: Waker | None) -> None:
        """Until there is an answer."""
        poll = select.poll()
        poll.register(self._answered, select.POLLIN)
        if waker is not None:
            poll.register(waker, select.POLLIN)
        ready = [fd for fd, _mask in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if waker is not None and waker.fileno() in ready:
            raise Interrupted("interrupted while connecting")
        if not ready:
            raise socket.gaierror(socket.EAI_AGAIN, "no name server has said in time what its address is")

    def answer(self) -> list[Any]:
        """What has been found."""
        if self._error is not None:
            raise self._error
        return self._found

    def leave(self) -> None:
        """Nobody waits any longer."""
        self._answered.close()
