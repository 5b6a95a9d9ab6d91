"""Mooncake's transfer engine over TCP: the sender writes into memory that the receiver has registered.

All tensors in one call, transfer_sync_write of a flat buffer: the engine slices it by itself. Handshake and
registration lie outside the timer, and the receiver's memory has been written to before.

The engine needs libibverbs.so.1 even for TCP (Debian: apt install libibverbs1).
"""

import os
from typing import Any

# Otherwise it prints a page for every engine.
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

import torch
from mooncake.engine import TransferEngine

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side, now


class _End(Side):
    def __init__(self, total: int) -> None:
        shapes = payload.model(total)
        self.flat = torch.empty(total // 2, dtype=torch.bfloat16)
        views = self.flat.split([tensor.numel() for tensor in shapes.values()])
        self.state = {name: view.view(shapes[name].shape) for name, view in zip(shapes, views, strict=True)}
        payload.randomise(self.state)
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("the engine did not start")
        if self.engine.register_memory(self.flat.data_ptr(), self.flat.nbytes):
            raise RuntimeError("the memory was not registered")

    def offer(self) -> dict[str, Any]:
        return {"host": f"127.0.0.1:{self.engine.get_rpc_port()}", "address": self.flat.data_ptr()}


class Sender(_End):
    """Writes."""

    def meet(self, offer: dict[str, Any]) -> None:
        self.target = offer

    def transfer(self, kind: str) -> list[float | None]:
        source, target = self.flat.data_ptr(), self.target["address"]
        began = now()
        if self.engine.transfer_sync_write(self.target["host"], source, target, self.flat.nbytes):
            raise RuntimeError("the transfer failed")
        return [began, now()]


class Receiver(_End):
    """Is written to."""

    def transfer(self, kind: str) -> list[float | None]:
        return [None, 0.0]
