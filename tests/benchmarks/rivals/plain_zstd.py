"""The words as they are, through zstd level 1: what a transport that compresses, and knows of no weights, does."""

from collections.abc import Sequence
from typing import Final

import zstandard

from shipproto.frame import Buffer
from tests.benchmarks.rivals.rival import Matrix, Rival, squeeze

_PIECE: Final = 1 << 18


def encode(content: Buffer, _base: Buffer, _tensors: Sequence[Matrix]) -> bytes:
    """Without the base."""
    return squeeze(content)


def apply(payload: Buffer, target: memoryview, _tensors: Sequence[Matrix]) -> None:
    """Write the content."""
    with zstandard.ZstdDecompressor().stream_reader(payload) as reader:
        at = 0
        while count := reader.readinto(target[at : at + _PIECE]):
            at += count


RIVAL: Final = Rival("zstd-1", delta=False, encode=encode, apply=apply)
