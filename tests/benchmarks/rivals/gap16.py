"""Gaps between changes as 16 bits, and the changes as XOR, through zstd level 1: the sparse refit of NeMo-RL.

Payload: zstd of the number of gaps (u32), the gaps (u16) and the values (u16). A gap counts the words from the change
before; 65535 stands for as many words without one. Source: the design note "sparse delta refit" of NVIDIA-NeMo/RL.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from shipproto.frame import Buffer
from tests.benchmarks.rivals.rival import Matrix, Rival, changed, squeeze, unsqueeze, words

_FAR: Final = 0xFFFF
"""No change here, so many words further."""


def encode(content: Buffer, base: Buffer, _tensors: Sequence[Matrix]) -> bytes:
    """Gaps and values."""
    new, old = words(content), words(base)
    at = changed(new, old)
    gaps = np.diff(at, prepend=0)
    far = gaps // _FAR
    # Each gap is preceded by as many full ones as it is too long for.
    ends = np.cumsum(far + 1) - 1
    spread = np.full(len(at) + int(far.sum()), _FAR, dtype="<u2")
    spread[ends] = gaps % _FAR
    return squeeze(len(spread).to_bytes(4, "little") + spread.tobytes() + (new[at] ^ old[at]).tobytes())


def apply(payload: Buffer, target: memoryview, _tensors: Sequence[Matrix]) -> None:
    """XOR into what is there."""
    plain = unsqueeze(payload)
    count = int.from_bytes(plain[:4], "little")
    gaps = np.frombuffer(plain, dtype="<u2", count=count, offset=4)
    at = np.cumsum(gaps, dtype=np.int64)[gaps != _FAR]
    words(target)[at] ^= np.frombuffer(plain, dtype="<u2", offset=4 + 2 * count)


RIVAL: Final = Rival("gap16 + XOR + zstd-1", delta=True, encode=encode, apply=apply)
