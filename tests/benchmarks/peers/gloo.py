"""torch.distributed with gloo: broadcast in buckets of 64 MiB, alone and with what shipd does besides.

The tensors lie in one flat buffer on both sides, which is the best case for gloo: nothing is packed. The kinds:

    plain        the broadcasts
    copy         followed by a copy into the tensors of a model, as one torch._foreach_copy_
    checks+copy  and each bucket followed by its CRC32C and xxh3-128 on both sides, which work on it at the same time
"""

import datetime as dt
from typing import Any, Final

import crc32c
import torch
import torch.distributed as dist
import xxhash

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side, now

BUCKET: Final = 64 << 20
_TIMEOUT: Final = dt.timedelta(seconds=60)


class _Rank(Side):
    rank = 0

    def __init__(self, total: int) -> None:
        shapes = payload.model(total)
        self.flat = torch.empty(total // 2, dtype=torch.bfloat16)
        views = self.flat.split([tensor.numel() for tensor in shapes.values()])
        self.state = {name: view.view(shapes[name].shape) for name, view in zip(shapes, views, strict=True)}
        self.buckets = self.flat.view(torch.uint8).split(BUCKET)

    def _join(self, store: Any) -> None:
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=2, timeout=_TIMEOUT)

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
    """Rank 0; keeps the store through which the two meet."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        payload.randomise(self.state)
        self.store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, timeout=_TIMEOUT, wait_for_workers=False
        )

    def offer(self) -> dict[str, Any]:
        return {"port": self.store.port}

    def meet(self, offer: dict[str, Any]) -> None:
        self._join(self.store)


class Receiver(_Rank):
    """Rank 1, with a model to copy into."""

    rank = 1

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.model = payload.model(total)
        for tensor in self.model.values():
            payload.bits(tensor)[:] = 1

    def meet(self, offer: dict[str, Any]) -> None:
        self._join(dist.TCPStore("127.0.0.1", offer["port"], timeout=_TIMEOUT))  # type: ignore[attr-defined]

    def apply(self) -> None:
        torch._foreach_copy_(list(self.model.values()), list(self.state.values()))
