"""The processes of ``loading``: one that writes checkpoints, and one for each way of getting one into a model.

Each way of loading runs in a process that has imported what it needs and built the model beforehand. What is timed ends
with the weights in that very model.
"""

import asyncio
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side
from tests.benchmarks.shipd_side import module_of
from tests.support.processes import memory

FORMATS: Final = {"safetensors": ".safetensors", "torch": ".pt"}
"""What each format's files are called."""


class Maker(Side):
    """Writes versions of a model of ``count`` tensors of equal size, every byte of each another than in the others."""

    def __init__(self, total: int, count: int) -> None:
        self.state = payload.even(count, total)
        payload.randomise(self.state)

    def write(self, path: str) -> None:
        """A file of each format, ``path`` with its suffix. Nothing of them is left to write to the disk."""
        from safetensors.torch import save_file

        payload.renew(self.state)
        save_file(self.state, path + FORMATS["safetensors"])
        torch.save(self.state, path + FORMATS["torch"])
        for suffix in FORMATS.values():
            with Path(path + suffix).open("rb") as file:
                os.fsync(file.fileno())


def _plain(path: str) -> payload.State:
    state: payload.State = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _mapped(path: str) -> payload.State:
    state: payload.State = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _safetensors(path: str) -> payload.State:
    from safetensors.torch import load_file

    return load_file(path)


def _fastsafetensors(path: str) -> payload.State:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    # Without GPUDirect Storage, which there is none of for memory of the host.
    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [path]})
    files = loader.copy_files_to_device()
    return {name: files.get_tensor(name) for name in files.key_to_rank_lidx}


WAYS: Final[dict[str, tuple[str, Callable[[str], payload.State], str]]] = {
    "torch.load": ("torch", _plain, "torch"),
    "torch.load(mmap=True)": ("torch", _mapped, "torch"),
    "safetensors load_file": ("safetensors", _safetensors, "safetensors.torch"),
    "fastsafetensors": ("safetensors", _fastsafetensors, "fastsafetensors"),
}
"""Each way of loading: the format, what reads a file of it into a state dict, and the module that has to be there."""


class Loader(Side):
    """A process with a model, which it loads files into."""

    def __init__(self, total: int, count: int, way: str) -> None:
        self._load = WAYS[way][1]
        importlib.import_module(WAYS[way][2])
        state = payload.even(count, total)
        for tensor in state.values():
            payload.bits(tensor)[:] = 1
        self.model = module_of(state)
        self.state = self.model.state_dict()

    def load(self, path: str) -> dict[str, float]:
        """Seconds from the call to the new weights being live in the model."""
        began = time.monotonic()
        self.model.load_state_dict(self._load(path))
        return {"seconds": time.monotonic() - began}

    def rest(self) -> dict[str, int]:
        """See ``rest``."""
        return rest()


class Pusher(Side):
    """A process that pushes files, with nothing else in it."""

    def __init__(self) -> None:
        for name in ("shipd.client.client", "shipd.checkpoints.safetensors_file", "shipd.checkpoints.torch_file"):
            importlib.import_module(name)

    def push(self, address: str, path: str, model: str, label: str) -> dict[str, Any]:
        """``seconds`` from before the connection to after the receipt, when the weights are live; and the receipt."""
        import shipd

        async def converse() -> shipd.Receipt:
            async with shipd.connect(address) as client:
                return await client.push(path, model=model, label=label)

        began = time.monotonic()
        receipt = asyncio.run(converse())
        return {"seconds": time.monotonic() - began, **receipt.as_dict()}

    def rest(self) -> dict[str, int]:
        """See ``rest``."""
        return rest()


def rest() -> dict[str, int]:
    """What the process has now, in bytes; the most that it has had (VmHWM) is counted anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory()
