"""A checkpoint named as the base of a push, where the model's structure is not the checkpoint's."""

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import shipd
import shipd.client.push
from shipd.checkpoints.chunks import SourceChunks
from tests.support.processes import address_of, push
from tests.support.proxy import DEADLINE, until
from tests.support.serving_process import Attach

pytest_plugins = ["tests.support.patience", "tests.support.serving_process"]


class Counting(nn.Module):
    """A layer of 8 MB, tied to another name, and a buffer that is in checkpoints but not in versions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16)
        self.other = self.one
        self.register_buffer("positions", torch.arange(64), persistent=False)
        self.requires_grad_(False)


def checkpoint(seed: int, changed: int = 0) -> dict[str, torch.Tensor]:
    """As a trainer has it that knows of neither: each name with bytes of its own."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(seed)).bfloat16()
    weight.view(-1)[: changed * 1000 : 1000] *= 2
    return {"one.weight": weight, "other.weight": weight.clone(), "positions": torch.arange(64)}


def test_a_base_with_tensors_that_the_model_skips_and_ties(daemon: shipd.Daemon, attach: Attach) -> None:
    resident = attach(Counting(), daemon)
    first = push(address_of(daemon), checkpoint(1), label="first")
    assert first.skipped == ("positions",)
    second = push(
        address_of(daemon), checkpoint(1, changed=900), label="second", base=checkpoint(1), prefer="bytes", stall=5.0
    )
    assert second.base == first.digest
    assert second.base_unused == ""
    assert second.bytes_sent < 20_000
    assert resident.verify() == second.digest == resident.digest


def test_another_version_than_the_daemon_has(daemon: shipd.Daemon, attach: Attach) -> None:
    resident = attach(Counting(), daemon)
    push(address_of(daemon), checkpoint(1), label="first")
    second = push(address_of(daemon), checkpoint(2), label="second", base=checkpoint(3), prefer="bytes")
    assert second.base == ""
    assert second.base_unused == "it is not the version that the daemon has"
    assert resident.verify() == second.digest


# --- one that takes long to read -------------------------------------------------------------------------------------


class SlowChunks(SourceChunks):
    """Of a base on a disk that takes its time: each read waits until it may end."""

    reads = 0
    reading: threading.Event
    may_end: Callable[[], object]

    def read(self, chunk: int) -> memoryview:
        SlowChunks.reads += 1
        SlowChunks.reading.set()
        SlowChunks.may_end()
        return super().read(chunk)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowChunks]:
    """Every base is on such a disk."""
    SlowChunks.reads, SlowChunks.reading = 0, threading.Event()
    monkeypatch.setattr("shipd.bases.checkpoint.SourceChunks", SlowChunks)
    monkeypatch.setattr("shipd.bases.checkpoint.ACT_SECONDS", 0.0)
    return SlowChunks


def test_a_push_whose_time_is_over_reads_no_further(
    daemon: shipd.Daemon, slow: type[SlowChunks], out_of_patience: Callable[[], None]
) -> None:
    push(address_of(daemon), checkpoint(1), label="first")

    def may_end() -> None:
        clock = vars(shipd.client.push)["time"]
        over = clock.monotonic() + 60.0
        out_of_patience()
        until(lambda: clock.monotonic() > over, "the push's time is over")

    slow.may_end = may_end
    with pytest.raises(shipd.Stalled, match="longer than its timeout of 60 s"):
        push(address_of(daemon), checkpoint(2), label="second", base=checkpoint(1), prefer="bytes", timeout=60.0)
    assert slow.reads == 1


def test_a_push_that_is_cancelled_reads_no_further(daemon: shipd.Daemon, slow: type[SlowChunks]) -> None:
    push(address_of(daemon), checkpoint(1), label="first")
    cancelled = threading.Event()
    slow.may_end = lambda: cancelled.wait(DEADLINE)

    async def cancel() -> None:
        async with shipd.connect(address_of(daemon)) as client:
            pushing = asyncio.create_task(
                client.push(checkpoint(2), model="model", label="second", base=checkpoint(1), prefer="bytes")
            )
            await asyncio.to_thread(slow.reading.wait, DEADLINE)
            pushing.cancel()
            # The push hears of it before this goes on.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            cancelled.set()
            with pytest.raises(asyncio.CancelledError):
                await pushing

    asyncio.run(cancel())
    assert slow.reads == 1
