"""shipd's processes in the benchmarks: a real daemon, a sender and a serving process.

The daemon is the command ``shipd`` as a service manager would start it. Everything of a push counts as the push, from
connecting to its receipt, in one call of the public client.
"""

import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import torch

from shipd.service.config import Config
from tests.benchmarks import machine, payload
from tests.benchmarks.peers.side import Side
from tests.benchmarks.workers import CALL, Worker
from tests.support.processes import ShipdProcess, memory


class Sender(Side):
    """Pushes a state dict, or a safetensors file of it: ``count`` tensors of equal size, or those of a model."""

    def __init__(self, total: int, count: int = 0) -> None:
        self.state = payload.even(count, total) if count else payload.model(total)
        payload.randomise(self.state)
        self.file: Path | None = None
        self.pushes = 0
        # Before the first push is timed, not by it.
        for name in ("shipd.client.client", "shipd.checkpoints.opened", "safetensors.torch"):
            importlib.import_module(name)

    def save(self, path: str) -> None:
        """Write what there is as a safetensors file. It stays in the page cache, and nothing of it is left to write."""
        from safetensors.torch import save_file

        save_file(self.state, path)
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())
        self.file = Path(path)

    def push(self, address: str, model: str, from_file: bool = False) -> dict[str, Any]:
        """One push; its receipt, and ``seconds`` from before the connection to after the receipt."""
        import asyncio

        import shipd

        self.pushes += 1

        async def converse() -> shipd.Receipt:
            async with shipd.connect(address) as client:
                what = self.file if from_file else self.state
                assert what is not None
                return await client.push(what, model=model, label=f"push-{self.pushes}")

        began = time.monotonic()
        receipt = asyncio.run(converse())
        seconds = time.monotonic() - began
        return {**receipt.as_dict(), "seconds": seconds}


class Serving(Side):
    """Holds models, idle."""

    def __init__(self) -> None:
        self.residents: dict[str, Any] = {}

    def attach(self, socket: str, name: str, total: int, count: int = 0, mode: str = "copy") -> None:
        """A model with tensors like the sender's."""
        import shipd

        state = payload.even(count, total) if count else payload.model(total)
        for tensor in state.values():
            payload.bits(tensor)[:] = 1
        self.residents[name] = shipd.attach(module_of(state), name, socket=socket, mode=mode, timeout=CALL)

    def verify(self, name: str) -> str:
        """The digest of what is live."""
        found: str = self.residents[name].verify()
        return found

    def memory(self) -> dict[str, int]:
        return memory()


class Holder(torch.nn.Module):
    """A node of a tree of modules with one weight."""


def module_of(state: payload.State) -> torch.nn.Module:
    """A module whose state dict is ``state``, without copying."""
    root = Holder().requires_grad_(False)
    for name, tensor in state.items():
        *path, last = name.split(".")
        node: torch.nn.Module = root
        for part in path:
            inner = node._modules.get(part)
            if inner is None:
                inner = Holder()
                node.add_module(part, inner)
            node = inner
        node.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root.eval()


class Host:
    """The receiving host: a daemon, and serving processes when asked for. Gone at the end of the block."""

    def __init__(self, models: dict[str, int], **settings: Any) -> None:
        # The path of a Unix socket has at most 107 bytes.
        self._directory = tempfile.TemporaryDirectory(prefix="shipd-bench-")
        self.directory = Path(self._directory.name)
        self.serving: list[Worker] = []
        self._cores: tuple[int, ...] = ()
        try:
            limit = 3 * sum(models.values()) + (64 << 20)
            room = {name: size + (16 << 20) for name, size in models.items()}
            if "metrics" in Config.__struct_fields__:
                settings.setdefault("metrics", "127.0.0.1:0")
            self.daemon = ShipdProcess(self.directory, models=room, memory_limit=limit, **settings)
        except BaseException:
            self._directory.cleanup()
            raise

    @property
    def address(self) -> str:
        """For senders."""
        return self.daemon.address

    @property
    def metrics(self) -> str | None:
        """HOST:PORT of the daemon's metrics, where it has any."""
        listening = self.daemon.logged("listening")
        return next((entry["metrics"] for entry in listening if entry.get("metrics", "off") != "off"), None)

    def place(self, cores: tuple[int, ...]) -> None:
        """Put the daemon and the serving processes on these cores."""
        self._cores = cores
        machine.pin(cores, self.daemon.pid)
        for worker in self.serving:
            worker.call("pin", cores=cores)

    def serve(
        self,
        name: str,
        total: int,
        count: int = 0,
        kind: str = "tests.benchmarks.shipd_side:Serving",
        **options: Any,
    ) -> Worker:
        """A process that serves a model; ``options`` are of its ``attach``."""
        worker = Worker(kind)
        self.serving.append(worker)
        if self._cores:
            worker.call("pin", cores=self._cores)
        worker.call("attach", socket=str(self.daemon.socket), name=name, total=total, count=count, **options)
        return worker

    def dismiss(self) -> None:
        """End the serving processes; the daemon has seen them go when the next one has attached."""
        while self.serving:
            self.serving.pop().__exit__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
        self.daemon.__exit__()
        self._directory.cleanup()


def push(host: Host, sender: Worker, *, model: str = "model", from_file: bool = False) -> dict[str, Any]:
    """A push of other bytes than the one before: of the file, or of a state dict that is changed first."""
    if not from_file:
        sender.call("renew")
    found: dict[str, Any] = sender.call("push", address=host.address, model=model, from_file=from_file)
    return found
