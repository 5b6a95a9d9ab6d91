"""Makes inputs of seeds: a few bytes changed, moved, repeated, or taken from another seed."""

import random
from typing import Final

_NUMBERS: Final = tuple(
    number.to_bytes(width, order)
    for width in (1, 2, 4, 8)
    for order in ("big", "little")
    for number in (0, 1, (1 << (8 * width - 1)) - 1, 1 << (8 * width - 1), (1 << (8 * width)) - 1)
)
_SPELT: Final = """
    80 81 8f de0000 deffff df00000000 dfffffffff 90 91 9f dcffff ddffffffff a0 a1 bf a121 d9ff daffff dbffffffff
    c400 c410 c5ffff c6ffffffff c0 c1 c2 c3 c70001 d40000 d6ff00000000 ca7fc00000 cb7ff8000000000000
    cb8000000000000000 ccff cdffff ceffffffff cfffffffffffffffff d0ff d3ffffffffffffffff e0 ff
"""
_MSGPACK: Final = tuple(map(bytes.fromhex, _SPELT.split()))
_LARGEST: Final = 64 * 1024


class Mutator:
    """``next()`` is the next input. Everything follows from the seed of the generator."""

    def __init__(self, seeds: list[bytes], seed: int) -> None:
        self._seeds = seeds
        self._rng = random.Random(seed)
        self._count = 0

    def next(self) -> bytes:
        """The seeds themselves first, then mutations of them."""
        self._count += 1
        if self._count <= len(self._seeds):
            return self._seeds[self._count - 1]
        data = bytearray(self._rng.choice(self._seeds))
        for _ in range(1 << self._rng.randrange(5)):
            self._change(data)
        return bytes(data[:_LARGEST])

    def _change(self, data: bytearray) -> None:
        rng = self._rng
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(10)
        if kind == 0:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif kind == 1:
            del data[at : at + rng.choice((1, 1, 2, 4, 16, 100))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 4, 16, 100, 1000))] * rng.choice((1, 1, 2, 10))
        elif kind == 3:
            number = rng.choice(_NUMBERS)
            data[at : at + len(number)] = number
        elif kind == 4:
            token = rng.choice(_MSGPACK)
            data[at : at + rng.choice((0, 1, len(token)))] = token
        elif kind == 5:
            other = rng.choice(self._seeds)
            start = rng.randrange(len(other) + 1)
            data[at:] = other[start:]
        elif kind == 6 and len(data) > 1:
            other_at = rng.randrange(len(data))
            size = rng.randrange(1, 20)
            data[at : at + size] = data[other_at : other_at + size]
        elif kind == 7:
            del data[at:]
        elif data:
            at %= len(data)
            if kind == 8:
                data[at] = (data[at] + rng.choice((-1, 1))) & 0xFF
            else:
                data[at] ^= 1 << rng.randrange(8)
