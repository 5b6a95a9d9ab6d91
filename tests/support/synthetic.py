"""Synthetic successive versions of a model of any size, whose changes lie where those of a real model lie.

    rows = synthetic.layers(2 * 10**9)
    before = synthetic.first(rows, seed=0)
    after = synthetic.following(before, seed=1)

A bfloat16 weight is what is left of a float32 master, which may lie anywhere between the points at which it would be
rounded to a neighbour. An optimiser moves the master by a little, and the weight changes where that crosses such a
point: with a probability of E|update| / ulp, which is half as much for every binade that the weight is larger. That is
what happens here. The masters of a version are not kept but drawn anew: each is somewhere in the interval of its
weight, every place in it as likely. So each step has the density of one step, whatever came before it; that many steps
undo one another in part, which they do in real life, is not modelled.

The figures are those of the fine-tuned MiniLM of tests.support.finetune: standard deviations of weights by their place
in a layer, and a standard deviation of AdamW's warm updates of 0.26 times the learning rate (E|update| is 0.21 of it in
every binade). Nothing is tiled: every number is drawn, so a delta never repeats, and nothing finds in it what real ones
do not have. Results depend on the seed alone. Memory beyond what is returned is a few blocks of 4 MiB.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tests.support.finetune import Words, rounded
from tests.support.naive import Tensor

LEARNING_RATE: Final = 1e-6
UPDATE: Final = 0.26
"""Standard deviation of an update, in learning rates."""

_BLOCK: Final = 1 << 20
"""Elements that are drawn at once, each block from a generator of its own."""

_HIDDEN: Final = 1024
_INNER: Final = 4096
_PARTS: Final = (
    ("q.weight", (_HIDDEN, _HIDDEN), 0.095),
    ("k.weight", (_HIDDEN, _HIDDEN), 0.092),
    ("v.weight", (_HIDDEN, _HIDDEN), 0.044),
    ("o.weight", (_HIDDEN, _HIDDEN), 0.043),
    ("up.weight", (_INNER, _HIDDEN), 0.065),
    ("down.weight", (_HIDDEN, _INNER), 0.045),
)
"""Of a layer: name, shape, standard deviation."""

Floats = npt.NDArray[np.float32]


def layers(total: int, dtype: str = "bfloat16") -> tuple[Tensor, ...]:
    """Tensors of the layers of a transformer, of ``total`` bytes in all; the last of them is cut to that."""
    left = total // {"bfloat16": 2, "float32": 4}[dtype]
    rows: list[Tensor] = []
    while left:
        name, shape, _ = _PARTS[len(rows) % len(_PARTS)]
        full = f"layers.{len(rows) // len(_PARTS):04}.{name}"
        size = math.prod(shape)
        rows.append(Tensor(full, dtype, shape if size <= left else (left,)))
        left -= min(size, left)
    return tuple(rows)


def first(rows: Sequence[Tensor], seed: int) -> Words:
    """Weights for the tensors of ``layers``, end to end, as bfloat16."""
    made = np.empty(sum(math.prod(row.shape) for row in rows), dtype=np.uint16)
    for start, block in _weights(rows, seed):
        made[start : start + len(block)] = rounded(block)
    return made


def first_masters(rows: Sequence[Tensor], seed: int) -> Floats:
    """The same weights as float32."""
    made = np.empty(sum(math.prod(row.shape) for row in rows), dtype=np.float32)
    for start, block in _weights(rows, seed):
        made[start : start + len(block)] = block
    return made


def following(words: Words, *, seed: int, learning_rate: float = LEARNING_RATE) -> Words:
    """The version after ``words`` (finite bfloat16, end to end), real or synthetic: one step later."""
    made = np.empty_like(words)
    for number, start in enumerate(range(0, len(words), _BLOCK)):
        block = words[start : start + _BLOCK]
        generator = _generator(seed, number)
        places = generator.integers(0, 1 << 16, len(block), dtype=np.uint16)
        masters = _masters(block, places)
        masters += _updates(generator, len(block), learning_rate)
        made[start : start + len(block)] = rounded(masters)
    return made


def following_masters(values: Floats, *, seed: int, learning_rate: float = LEARNING_RATE) -> Floats:
    """The masters after ``values``: one step later."""
    made = np.empty_like(values)
    for number, start in enumerate(range(0, len(values), _BLOCK)):
        block = values[start : start + _BLOCK]
        updates = _updates(_generator(seed, number), len(block), learning_rate)
        np.add(block, updates, out=made[start : start + len(block)])
    return made


def _weights(rows: Sequence[Tensor], seed: int) -> Iterator[tuple[int, Floats]]:
    """Where each block begins, and its values."""
    deviations = {name: deviation for name, _, deviation in _PARTS}
    at = 0
    for number, row in enumerate(rows):
        size = math.prod(row.shape)
        deviation = np.float32(deviations[row.name.split(".", 2)[2]])
        for place, start in enumerate(range(0, size, _BLOCK)):
            count = min(_BLOCK, size - start)
            yield at + start, _generator(seed, number, place).standard_normal(count, dtype=np.float32) * deviation
        at += size


def _masters(words: Words, places: npt.NDArray[np.uint16]) -> Floats:
    """A master for each word, which is rounded to it.

    Bit patterns of floats grow with their magnitude, also across binades, where the interval below is half of that
    above: so a place in the interval is an offset of up to half a word in the pattern.
    """
    # An offset of a whole half would be a tie.
    offsets = np.minimum(places, np.uint16(0xFFFE)).astype(np.int32) - np.int32(0x7FFF)
    # Below zero there is no smaller pattern.
    np.abs(offsets, out=offsets, where=(words & np.uint16(0x7FFF)) == 0)
    return ((words.astype(np.uint32) << np.uint32(16)) + offsets.view(np.uint32)).view(np.float32)


def _updates(generator: np.random.Generator, count: int, learning_rate: float) -> Floats:
    return generator.standard_normal(count, dtype=np.float32) * np.float32(UPDATE * learning_rate)


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))
