"""What a continuous stream of pushes costs inference: MiniLM, answering as fast as it can, with and without it.

The serving process answers on one thread; the sender pushes again as soon as a push is committed. Nothing is pinned:
on two cores the serving process, the daemon and the sender share them, and that is what is reported.
"""

import threading
import time
from typing import Any, Final

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host
from tests.benchmarks.workers import CALL, Worker

SPAN: Final = 2.0
"""Seconds of answering, with and without pushes, in each round."""


class Answering(Side):
    """The serving process: the demo's encoder."""

    def __init__(self) -> None:
        from tests.demo.encoder import Encoder

        self.encoder = Encoder()
        self.total = payload.size(self.encoder.model.state_dict())

    def attach(self, socket: str) -> None:
        import shipd

        self.resident = shipd.attach(self.encoder.model, "minilm", socket=socket, timeout=CALL)

    def answer(self, seconds: float) -> dict[str, Any]:
        """Answers in a second, and how many versions gave them."""
        from tests.demo.encoder import QUESTIONS

        labels = set()
        count = 0
        end = time.monotonic() + seconds
        began = time.monotonic()
        while time.monotonic() < end:
            with self.resident.hold() as version:
                self.encoder.ask(QUESTIONS[count % len(QUESTIONS)])
            labels.add(version.label)
            count += 1
        return {"rate": count / (time.monotonic() - began), "versions": len(labels)}


class Stream(Side):
    """The sender: pushes until told to stop."""

    def __init__(self) -> None:
        from tests.demo.encoder import Encoder

        self.state = Encoder().model.state_dict()
        self._number = 0

    def begin(self, address: str) -> None:
        self._stop = threading.Event()
        self._pushed = 0
        self._began = time.monotonic()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(address,), daemon=True)
        self._thread.start()

    def _run(self, address: str) -> None:
        import asyncio

        import shipd

        async def push() -> None:
            async with shipd.connect(address) as client:
                await client.push(self.state, model="minilm", label=f"push-{self._number}")

        try:
            while not self._stop.is_set():
                self._number += 1
                # Finite values: what answers must still have something to compute with.
                for tensor in self.state.values():
                    if tensor.is_floating_point():
                        tensor.mul_(1.001 if self._number % 2 else 1 / 1.001)
                asyncio.run(push())
                self._pushed += 1
        except BaseException as error:  # noqa: BLE001  raised by end()
            self._error = error

    def end(self) -> float:
        """Pushes in a second."""
        self._stop.set()
        seconds = time.monotonic() - self._began
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._pushed / seconds


def measure(rounds: int) -> list[Row]:
    """Spans with and without pushes take turns."""
    alone, beside, pushes = [], [], []
    with (
        Worker("tests.benchmarks.inference:Answering") as serving,
        Worker("tests.benchmarks.inference:Stream") as sender,
        Host({"minilm": 1 << 28}) as host,
    ):
        serving.call("attach", socket=str(host.daemon.socket))
        serving.call("answer", seconds=0.5)
        for _ in range(rounds):
            alone.append(serving.call("answer", seconds=SPAN)["rate"])
            sender.call("begin", address=host.address)
            beside.append(serving.call("answer", seconds=SPAN)["rate"])
            pushes.append(sender.call("end"))
    ratios = [with_pushes / without for with_pushes, without in zip(beside, alone, strict=True)]
    return [
        Row(
            name="MiniLM during a continuous stream of pushes",
            value=median(beside),
            unit="answers/s",
            reference="no pushes",
            ratio=median(ratios),
            spread=spread(ratios),
            better="higher",
            note=f"{median(pushes):.1f} pushes of 91 MB a second",
        )
    ]
