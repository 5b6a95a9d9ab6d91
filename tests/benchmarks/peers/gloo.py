"""torch.distributed with gloo: broadcast in buckets of 64 MiB, alone and with what shipd does besides.

The tensors lie in one flat buffer on both sides, which is the best case for gloo: nothing is packed. The kinds:

    plain        the broadcasts
    copy         followed by a copy into the tensors of a model, as one torch._foreach_copy_
    checks+copy  and each bucket followed by its CRC32C and xxh3-128 on both sides, which work on it at the same time
"""

import datetime as dt
import tempfile
from pathlib import Path
from typing import Any, Final

import crc32c
import torch
import torch.distributed as dist
import xxhash

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side, now

BUCKET: Final = 64 << 20


class _Rank(Side):
    rank = 0

    def __init__(self, total: int) -> None:
        shapes = payload.model(total)
        self.flat = torch.empty(total // 2, dtype=torch.bfloat16)
        views = self.flat.split([tensor.numel() for tensor in shapes.values()])
        self.state = {name: view.view(shapes[name].shape) for name, view in zip(shapes, views, strict=True)}
        self.buckets = self.flat.view(torch.uint8).split(BUCKET)

    def meet(self, offer: dict[str, Any]) -> None:
        timeout = dt.timedelta(seconds=30)
        # Two hosts would find each other by name; here the name of this one may not resolve.
        dist.init_process_group(
            "gloo", init_method=f"file://{offer['store']}", rank=self.rank, world_size=2, timeout=timeout
        )

    def transfer(self, kind: str) -> list[float | None]:
        dist.barrier()
        began = now()
        for bucket in self.buckets:
            dist.broadcast(bucket, src=0)
            if "checks" in kind:
                check(bucket)
        if "copy" in kind:
            self.apply()
        return [began if self.rank == 0 else None, now()]

    def apply(self) -> None:
        pass


def check(bucket: torch.Tensor) -> tuple[int, bytes]:
    """Both sums of a bucket."""
    view = memoryview(payload.bits(bucket))
    return crc32c.crc32c(view), xxhash.xxh3_128_digest(view)


class Sender(_Rank):
    """Rank 0."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.directory = tempfile.TemporaryDirectory(prefix="shipd-bench-")
        payload.randomise(self.state)

    def offer(self) -> dict[str, Any]:
        return {"store": str(Path(self.directory.name) / "store")}

    def meet(self, offer: dict[str, Any]) -> None:
        super().meet(self.offer())


class Receiver(_Rank):
    """Rank 1, with a model to copy into."""

    rank = 1

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.model = payload.model(total)
        for tensor in self.model.values():
            payload.bits(tensor)[:] = 1

    def apply(self) -> None:
        torch._foreach_copy_(list(self.model.values()), list(self.state.values()))
