"""torchft's HTTPTransport: the receiver fetches a state dict from the sender by HTTP.

send_checkpoint only stages on the CPU, where everything is already; it and the metadata lie outside the timer.
recv_checkpoint returns a new state dict each time, that is how it is used. The one before is let go of before the
timer starts, and the allocator gives its pages back to the kernel: that they are faulted in again is part of the call.
The kind is the number of chunks, fetched by as many threads; 0, torchft's default, fetches everything in one.
"""

import datetime as dt
from typing import Any, Final
from urllib.parse import urlsplit

from torchft.checkpointing.http_transport import HTTPTransport

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side, now

_TIMEOUT: Final = dt.timedelta(seconds=60)


class Sender(Side):
    """Serves the state dict."""

    def __init__(self, total: int, chunks: int) -> None:
        super().__init__(total)
        payload.randomise(self.state)
        self.transport: HTTPTransport[Any] = HTTPTransport(_TIMEOUT, num_chunks=chunks)
        self.transport.send_checkpoint([1], step=1, state_dict=self.state, timeout=_TIMEOUT)

    def offer(self) -> dict[str, Any]:
        url = urlsplit(self.transport.metadata())
        # It names this host, which may not resolve.
        return {"metadata": url._replace(netloc=f"127.0.0.1:{url.port}").geturl()}

    def transfer(self, kind: str) -> list[float | None]:
        return [None, now()]


class Receiver(Side):
    """Fetches it."""

    def __init__(self, total: int, chunks: int) -> None:
        self.transport: HTTPTransport[Any] = HTTPTransport(_TIMEOUT, num_chunks=chunks)

    def meet(self, offer: dict[str, Any]) -> None:
        self.metadata = offer["metadata"]

    def transfer(self, kind: str) -> list[float | None]:
        self.state = {}
        began = now()
        self.state = self.transport.recv_checkpoint(0, metadata=self.metadata, step=1, timeout=_TIMEOUT)
        return [began, now()]
