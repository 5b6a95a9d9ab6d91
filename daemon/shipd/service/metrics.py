"""What a daemon tells those who watch over it: /metrics for Prometheus, /healthz and /readyz.

A registry, an endpoint and the books behind them for each daemon: several may live in one process. The books are kept
also where nothing listens, so that a program around the daemon can read them.
"""

import asyncio
import copy
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from shipd.address import Address
from shipd.service.endpoint import Endpoint, Reply
from shipd.service.families import Families, Watched
from shipd.service.looplag import LoopLag
from shipd.service.tally import Tally
from shipd.transfer.peer import Peer

_TEXT_FORMAT: Final = "text/plain; version=0.0.4; charset=utf-8"
"""What ``generate_latest`` writes; every Prometheus takes it, whatever else it would like better."""

_SLICE: Final = 50
"""Samples rendered at once: a third of a millisecond. On a thread it would be worse: that and the loop would take turns
of 5 ms at the interpreter."""

_TURN: Final = 0.001
"""Seconds of work after which it is the loop's turn."""

_REST: Final = 2.0
"""Rendering takes a third of the loop's time at most, however many ask: it rests so many times as long as it works."""

_GRAIN: Final = 0.001
"""The shortest time that libuv's timers know; anything less would be no rest at all."""


class Metrics:
    """The metrics of one daemon. ``peers`` are its open connections."""

    def __init__(self, daemon: Watched, peers: Mapping[Peer, float]) -> None:
        self.tally = Tally(daemon.models)
        self.lag = LoopLag()
        self.registry = CollectorRegistry()
        self.registry.register(Families(daemon, peers, self.tally, self.lag))
        self._daemon = daemon
        self._rendering: asyncio.Task[bytes] | None = None
        self._host = ""
        self._endpoint = Endpoint({"/metrics": self._metrics, "/healthz": self._healthy, "/readyz": self._ready})

    @property
    def port(self) -> int:
        """Where the endpoint listens; 0 where there is none."""
        return self._endpoint.port

    @property
    def address(self) -> str:
        """The same as HOST:PORT, or "off"."""
        return str(Address(self._host, self.port)) if self.port else "off"

    async def start(self, address: Address | None) -> None:
        """Measure the loop, and listen where there is an address. Raises ConfigError."""
        self.lag.start()
        if address is not None:
            self._host = address.host
            await self._endpoint.start(address)

    async def stop(self) -> None:
        """Neither measure nor listen any longer. Harmless twice."""
        self.lag.stop()
        await self._endpoint.stop()
        if self._rendering is not None:
            self._rendering.cancel()
            await asyncio.wait({self._rendering})

    # --- what is asked for ---------------------------------------------------------------------------------

    async def _healthy(self) -> Reply:
        """The process lives, and its loop turns: that this is answered says it."""
        return Reply(200, b"ok\n")

    async def _ready(self) -> Reply:
        """Whether a push would be taken. The endpoint itself is open no longer than the listeners."""
        if self._daemon.draining:
            return Reply(503, b"draining: the daemon is stopping and takes no new pushes\n")
        return Reply(200, b"ready\n")

    async def _metrics(self) -> Reply:
        """Rendered once for all that ask at the same time."""
        if self._rendering is None:
            self._rendering = asyncio.get_running_loop().create_task(self._render())
        # One who leaves must not take it from the others.
        return Reply(200, await asyncio.shield(self._rendering), _TEXT_FORMAT)

    async def _render(self) -> bytes:
        """All of it, in slices between which the loop does what else there is to do."""
        rendered = []
        begun = time.perf_counter()
        try:
            for family in self.registry.collect():
                for piece in chain([b""], _slices(family)):
                    rendered.append(piece)
                    worked = time.perf_counter() - begun
                    if worked > _TURN:
                        await asyncio.sleep(max(_GRAIN, _REST * worked))
                        begun = time.perf_counter()
        finally:
            self._rendering = None
        return b"".join(rendered)


class _Only:
    """A registry of one family, or of a part of it."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


def _slices(family: Metric) -> Iterator[bytes]:
    """The family's text, a few samples at a time; only the first piece has the lines with its help and type."""
    for start in range(0, max(1, len(family.samples)), _SLICE):
        part = copy.copy(family)
        part.samples = family.samples[start : start + _SLICE]
        text = generate_latest(_Only(part))
        yield text if start == 0 else text.split(b"\n", 2)[2]
