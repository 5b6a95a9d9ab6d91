"""What both sides of every peer have in common: a state dict, cores, and the clock."""

import os
import time
from typing import Any

import torch

from tests.benchmarks import machine, payload


class Side:
    """One side of a peer. The methods are called in this order, on both sides at once where it says so:

    offer()           what the other side must know: a port, an address
    meet(offer)       both at once: connect, register memory, shake hands. Outside the timer
    pin(cores)
    transfer(kind)    both at once: one transfer; returns when it began and when it ended on this side, in seconds of
                      CLOCK_MONOTONIC, which all processes of a machine share. A side that only waits returns no
                      beginning
    digest()          of what it has sent or received, outside the timer
    renew()           at the sender: other bytes for the next transfer
    """

    def __init__(self, total: int) -> None:
        self.state = payload.model(total)

    def offer(self) -> dict[str, Any]:
        return {}

    def meet(self, offer: dict[str, Any]) -> None:
        pass

    def pin(self, cores: list[int]) -> None:
        machine.pin(cores)
        torch.set_num_threads(max(1, len(cores) or (os.cpu_count() or 1)))

    def digest(self) -> str:
        return payload.digest(self.state)

    def renew(self) -> None:
        payload.renew(self.state)


def now() -> float:
    """The clock that processes share."""
    return time.monotonic()
