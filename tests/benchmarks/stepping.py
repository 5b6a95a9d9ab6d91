"""The sender of successive versions: one client that stays, as in a training loop, in a process of its own.

What may differ between two pushes of a version is a way: a name in WAYS, and ``push`` says to the client what it means.
"""

import asyncio
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import shipd
from tests.benchmarks.peers.side import Side
from tests.support import finetune, naive, synthetic, thin_link
from tests.support.finetune import LAYERS, Words
from tests.support.naive import Tensor
from tests.support.processes import memory

WHOLE: Final = "whole"
TIME: Final = "time"
BYTES: Final = "bytes"

WAYS: Final[Mapping[str, Mapping[str, Any]]] = {
    WHOLE: {"base": False},
    TIME: {"prefer": "time"},
    BYTES: {"prefer": "bytes"},
}
"""Options of the client's push: every byte as it is; soonest there; in the fewest bytes."""


async def push(
    client: shipd.Client, state: Mapping[str, torch.Tensor], *, model: str, label: str, way: str
) -> shipd.Receipt:
    """Push ``state`` in one of the WAYS."""
    return await client.push(state, model=model, label=label, **WAYS[way])


class Stepping(Side):
    """Has one version at a time, of MiniLM or synthetic, and pushes it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._client: shipd.Client | None = None
        self._rows: tuple[Tensor, ...] = ()
        self._words: Words = np.zeros(0, dtype=np.uint16)
        self._kept: dict[str, Words] = {}
        self._steps: Iterator[tuple[int, Words]] = iter(())
        self._made = 0
        self._pushes = 0

    # --- where, and to whom ------------------------------------------------------------------------------------------

    def enter(self, namespace: str) -> None:
        """Move to another host of a thin link, with everything that is started from now on."""
        thin_link.enter(Path(namespace))

    def open(self, address: str, token: str | None = None) -> None:
        """Connect. What the client keeps of a version, it keeps until ``close``."""
        self._client = shipd.connect(address, token=token)
        self._loop.run_until_complete(self._client.__aenter__())

    def close(self) -> None:
        """Disconnect."""
        assert self._client is not None
        self._loop.run_until_complete(self._client.__aexit__())

    # --- versions ----------------------------------------------------------------------------------------------------

    def real(self) -> list[int]:
        """Begin with the first of MiniLM's real versions; the steps that there are."""
        self._rows = finetune.tensors()
        self._steps = finetune.words()
        self.advance()
        return list(finetune.DIGESTS)

    def advance(self) -> None:
        """To the next real version; where there is none, one synthetic step further. Embeddings hardly ever change."""
        if (found := next(self._steps, None)) is not None:
            self._words = found[1]
            return
        self._made += 1
        first, last = _layers(self._rows)
        following = self._words.copy()
        following[first:last] = synthetic.following(self._words[first:last], seed=self._made)
        self._words = following

    def synthetic(self, total: int) -> None:
        """Make two versions of so many bytes, a step apart; take up the first."""
        self._rows = synthetic.layers(total)
        first = synthetic.first(self._rows, seed=1)
        self._kept = {"before": first, "after": synthetic.following(first, seed=2)}
        self.take("before")

    def keep(self, name: str) -> None:
        """Remember this version under that name."""
        self._kept[name] = self._words

    def take(self, name: str) -> None:
        """Take up a version that was remembered."""
        self._words = self._kept[name]

    def content_digest(self) -> str:
        """The version digest by the second implementation, hexadecimal."""
        ends = np.cumsum([math.prod(row.shape) for row in self._rows])
        parts = np.split(self._words, ends[:-1])
        contents = {row.name: part.view(np.uint8).data for row, part in zip(self._rows, parts, strict=True)}
        return naive.version_digest(self._rows, contents).hex()  # type: ignore[arg-type]  # views of bytes will do

    # --- pushing -----------------------------------------------------------------------------------------------------

    def push(self, model: str, way: str) -> dict[str, Any]:
        """One push; its receipt, and ``seconds`` of the call."""
        assert self._client is not None
        self._pushes += 1
        state = finetune.state_dict(self._rows, self._words)
        began = time.monotonic()
        receipt = self._loop.run_until_complete(
            push(self._client, state, model=model, label=f"push-{self._pushes}", way=way)
        )
        return {**receipt.as_dict(), "seconds": time.monotonic() - began}

    def live(self, model: str) -> str:
        """The digest of the version that the daemon has, by its own word."""
        assert self._client is not None
        found: str = self._loop.run_until_complete(self._client.status(model)).models[0].digest
        return found

    def memory(self) -> int:
        """Bytes of its own."""
        found = memory()
        return found["RssAnon"] + found["RssFile"]


def _layers(rows: tuple[Tensor, ...]) -> tuple[int, int]:
    """Where the words of the layers begin and end: they are neighbours, for names are sorted."""
    ends = np.cumsum([math.prod(row.shape) for row in rows]).tolist()
    inside = [at for at, row in enumerate(rows) if row.name.startswith(LAYERS)]
    return ends[inside[0] - 1], ends[inside[-1]]
