"""Two processes of one peer, led through transfers, and the raw socket that is measured beside each of them."""

from typing import Any, Self

from tests.benchmarks.machine import Setting
from tests.benchmarks.workers import CALL, Worker


class Pair:
    """A Sender and a Receiver (see tests.benchmarks.peers.side), connected once constructed."""

    def __init__(self, module: str, **arguments: Any) -> None:
        self.sender = Worker(f"{module}:Sender", **arguments)
        try:
            self.receiver = Worker(f"{module}:Receiver", **arguments)
        except BaseException:
            self.sender.__exit__()
            raise
        try:
            offers = self._both("offer")
            self._both("meet", offer=offers[::-1])
        except BaseException:
            self.__exit__()
            raise

    def place(self, setting: Setting) -> None:
        """Put both sides on their cores."""
        self._both("pin", cores=[setting.sender, setting.receiver])

    def transfer(self, kind: str = "") -> float:
        """One transfer of other bytes than before; seconds from the first one's beginning to the last one's end."""
        self.sender.call("renew")
        spans = self._both("transfer", kind=[kind, kind])
        began = min(span[0] for span in spans if span[0] is not None)
        return float(max(span[1] for span in spans) - began)

    def check(self) -> None:
        """What was received is what was sent."""
        sent, received = self._both("digest")
        if sent != received:
            raise AssertionError(f"{self.sender.target}: other bytes arrived than were sent")

    def _both(self, method: str, *, deadline: float = CALL, **arguments: list[Any]) -> list[Any]:
        """Call a method of both at once; of each argument the sender gets the first value, the receiver the second."""
        # The receiver first: it waits.
        for side, worker in ((1, self.receiver), (0, self.sender)):
            worker.start(method, deadline=deadline, **{name: values[side] for name, values in arguments.items()})
        return [self.sender.finish(), self.receiver.finish()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (self.sender, self.receiver):
            worker.__exit__()
