"""Pushes of a part of a model, with no plan made for them: what a daemon makes of them is what is tested.

PartialPush    one push, on a thread; ``push_part`` waits for it
patched        what the model must be afterwards
"""

import threading
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

import shipd
from shipd.address import parse_address
from shipd.checkpoints.source import open_source
from shipd.client.incremental import Incremental
from shipd.client.options import PushOptions
from shipd.client.push import Push
from tests.support.processes import DEADLINE


class PartialPush:
    """Ends when the block does; ``receipt`` waits for it before."""

    def __init__(self, address: str, tensors: Mapping[str, Tensor], label: str | None = None, **options: Any) -> None:
        prefer = options.pop("prefer", "time")
        self._source = open_source(tensors)
        chosen = PushOptions(model=options.pop("model", "model"), label=label, partial=True, **options)
        self._push = Push(self._source, parse_address(address), chosen, Incremental(prefer=prefer))
        self._receipt: shipd.Receipt | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="partial push")

    def _run(self) -> None:
        try:
            self._receipt = self._push.run()
        except BaseException as error:  # noqa: BLE001  raised again where the receipt is asked for
            self._error = error
        finally:
            self._source.close()

    def cancel(self) -> None:
        """End it."""
        self._push.cancel()

    @property
    def receipt(self) -> shipd.Receipt:
        """What it came to; raises what it raised."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        assert self._receipt is not None
        return self._receipt

    @property
    def live(self) -> str:
        """Digest of what is live now, in hexadecimal."""
        return self._push._sender.live.hex()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.cancel()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()


def push_part(
    address: str, tensors: Mapping[str, Tensor], label: str | None = None, **options: Any
) -> tuple[shipd.Receipt, str]:
    """The receipt, and the digest of what is live then."""
    with PartialPush(address, tensors, label, **options) as push:
        return push.receipt, push.live


def patched(whole: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``whole`` with the tensors of ``part``, which it has all."""
    assert part.keys() <= whole.keys()
    return {**whole, **part}
