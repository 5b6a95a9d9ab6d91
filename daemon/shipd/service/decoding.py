"""Coded runs on their way into an image: decoded and digested on threads, from the current version's image into the next.

The loop hands runs over and is told when they are in their place. A thread takes one run after the other, so what waits
is encoded, and small; past ``MOST_WAITING`` bytes the connection that brings more is not read.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from shipd.codecs import registry
from shipd.codecs.codec import CodecError
from shipd.service.speeds import DecodingSpeeds
from shipproto.digests import LeafDigests
from shipproto.outcomes import RunToDecode

log = logging.getLogger("shipd.transfer")

MOST_WAITING: Final = 8 << 20
"""Bytes of payloads, and of what their decoders take at most beside the image."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What runs are decoded from: the current version's image and its digests."""

    digest: bytes
    image: memoryview
    digests: LeafDigests
