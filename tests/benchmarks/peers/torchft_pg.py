"""torchft's PGTransport over gloo: the state dict is sent tensor by tensor, into tensors that are there already.

In place, by the ``state_dict`` argument: "much faster than having to allocate new tensors", says torchft.
"""

import datetime as dt
from typing import Any, Final

import torch
import torch.distributed as dist
from torchft.checkpointing.pg_transport import PGTransport
from torchft.process_group import ProcessGroupGloo

from tests.benchmarks import payload
from tests.benchmarks.peers.side import Side, now

_TIMEOUT: Final = dt.timedelta(seconds=60)


class _Rank(Side):
    rank = 0

    def _join(self, address: str) -> None:
        self.group = ProcessGroupGloo(timeout=_TIMEOUT)
        self.group.configure(store_addr=address, replica_id=str(self.rank), rank=self.rank, world_size=2)
        self.transport: PGTransport[Any] = PGTransport(
            self.group, timeout=_TIMEOUT, device=torch.device("cpu"), state_dict=lambda: self.state
        )
        # Connects the two.
        self.group.barrier(dist.BarrierOptions()).wait()


class Sender(_Rank):
    """Rank 0; keeps the store through which the two meet."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        payload.randomise(self.state)
        self.store = torch._C._distributed_c10d.TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=_TIMEOUT, wait_for_workers=False
        )

    def offer(self) -> dict[str, Any]:
        return {"store": f"127.0.0.1:{self.store.port}/checkpoint"}

    def meet(self, offer: dict[str, Any]) -> None:
        self._join(self.offer()["store"])

    def transfer(self, kind: str) -> list[float | None]:
        began = now()
        self.transport.send_checkpoint([1], step=1, state_dict=self.state, timeout=_TIMEOUT)
        return [began, now()]


class Receiver(_Rank):
    """Rank 1."""

    rank = 1

    def __init__(self, total: int) -> None:
        super().__init__(total)
        for tensor in self.state.values():
            payload.bits(tensor)[:] = 1

    def meet(self, offer: dict[str, Any]) -> None:
        self._join(offer["store"])

    def transfer(self, kind: str) -> list[float | None]:
        self.state = self.transport.recv_checkpoint(0, metadata="<n/a>", step=1, timeout=_TIMEOUT)
        return [None, now()]
