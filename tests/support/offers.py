"""Offers that nobody has planned: what a sender says that does not ask what the model consists of."""

from pathlib import Path
from typing import Any

from shipd.address import parse_address
from shipd.checkpoints.source import open_source
from shipd.client.options import PushOptions
from shipd.client.push import Push
from shipd.client.receipt import Receipt


def offer(address: str, checkpoint: Any, *, model: str = "model", **options: Any) -> Receipt:
    """Push ``checkpoint`` as it is, so that the daemon alone says whether it fits. ``options``: of ``PushOptions``."""
    source = open_source(checkpoint)
    try:
        where = Path(address) if "/" in address else parse_address(address)
        return Push(source, where, PushOptions(model=model, **options)).run()
    finally:
        source.close()
