"""All words XOR those of the base, through zstd level 1: what slime and miles write for their disk transport.

Zeros are what has not changed, and zstd finds their runs. Source: the delta weight updates of THUDM/slime and
radixark/miles (there for each tensor, here in one frame, in pieces that stay in the cache).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import zstandard

from shipproto.frame import Buffer
from tests.benchmarks.rivals.rival import Matrix, Rival

_PIECE: Final = 1 << 18


def encode(content: Buffer, base: Buffer, _tensors: Sequence[Matrix]) -> bytes:
    """The XOR of both."""
    new, old = (np.frombuffer(side, dtype=np.uint8) for side in (content, base))
    scratch = np.empty(_PIECE, dtype=np.uint8)
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=len(new))
    parts = []
    for at in range(0, len(new), _PIECE):
        piece = scratch[: len(new) - at]
        np.bitwise_xor(new[at : at + _PIECE], old[at : at + _PIECE], out=piece)
        parts.append(compressor.compress(piece.data))
    return b"".join((*parts, compressor.flush()))


def apply(payload: Buffer, target: memoryview, _tensors: Sequence[Matrix]) -> None:
    """XOR into what is there."""
    words = np.frombuffer(target, dtype=np.uint8)
    scratch = np.empty(_PIECE, dtype=np.uint8)
    at = 0
    with zstandard.ZstdDecompressor().stream_reader(payload) as reader:
        while count := reader.readinto(scratch):
            words[at : at + count] ^= scratch[:count]
            at += count


RIVAL: Final = Rival("XOR + zstd-1", delta=True, encode=encode, apply=apply)
