"""A raw Python socket: sendall and recv_into, tensor after tensor, no checks. What everything is compared with.

The kernel's own socket buffers (autotuned), as recommended for long transfers on one host. The receiver's memory has
been written to before: the first transfer is not counted.
"""

import socket
from typing import Any

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side, now


class Sender(Side):
    """Connects and sends."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        payload.randomise(self.state)
        self.views = [memoryview(payload.bits(tensor)) for tensor in self.state.values()]

    def meet(self, offer: dict[str, Any]) -> None:
        self.sock = socket.create_connection(("127.0.0.1", offer["port"]), timeout=30)
        self.sock.settimeout(None)

    def transfer(self, kind: str) -> list[float | None]:
        began = now()
        for view in self.views:
            self.sock.sendall(view)
        return [began, now()]


class Receiver(Side):
    """Listens and receives into the tensors."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.views = [memoryview(payload.bits(tensor)) for tensor in self.state.values()]
        self.listener = socket.create_server(("127.0.0.1", 0))

    def offer(self) -> dict[str, Any]:
        return {"port": self.listener.getsockname()[1]}

    def meet(self, offer: dict[str, Any]) -> None:
        self.listener.settimeout(30)
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(None)

    def transfer(self, kind: str) -> list[float | None]:
        for view in self.views:
            at = 0
            while at < len(view):
                count = self.sock.recv_into(view[at:])
                if not count:
                    raise ConnectionError("the sender has gone")
                at += count
        return [None, now()]
