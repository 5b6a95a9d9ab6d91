"""Payloads of sparse deltas, as inputs to their decoders; and what they are made from."""

from functools import cache
from itertools import product
from typing import Final

from shipd.codecs.codec import Codec
from shipd.codecs.gz import GZ
from tests.support import sparse

_LARGEST_SEED: Final = 4096
_SIZES: Final = (1, 63, 64, 100, 300, 2049, 5000)
"""Words of the runs that payloads are decoded for."""



@cache
def _base(which: int) -> sparse.Words:
    """The base that the first byte of an input stands for."""
    return sparse.weights(_SIZES[which % len(_SIZES)], 0.0, seed=which)[1]


def egr(data: bytes) -> None:
    """An EGR payload for any of some bases; the first byte says which. All engines must make the same of it."""
    if data:
        base = _base(data[0])
        outcomes = {sparse.outcome(sparse.decode_with(by), data[1:], base) for by in sparse.engines().values()}
        assert len(outcomes) == 1


def gz(data: bytes) -> None:
    """A GZ payload for any of some bases; the first byte says which."""
    if data:
        sparse.outcome(lambda payload, base: sparse.decoded(GZ, payload, base), data[1:], _base(data[0]))


def seeds(codec: Codec) -> list[bytes]:
    """Payloads of few changes and of many, of small steps and of any."""
    made = []
    for which, (share, step) in enumerate(product((0.0, 0.01, 0.3, 1.0), (1, 40, 40_000))):
        base = _base(which)
        changed, other = sparse.weights(len(base), share, seed=which, step=step)
        made.append(bytes((which,)) + sparse.encoded(codec, base ^ changed ^ other, base)[:_LARGEST_SEED])
    return made
