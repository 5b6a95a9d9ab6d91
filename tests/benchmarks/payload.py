"""What is shipped: state dicts of random bits, in bfloat16, and how to make other ones of them.

Random and never zeros: zeros compress, share pages and are what a lazy transport sends by accident.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
import xxhash

GB: Final = 10**9

State = dict[str, torch.Tensor]


def model(total: int = GB) -> State:
    """The tensors of a small language model, uninitialised: large embeddings, layers, norms of 4 KiB.

    ``total`` bytes of bfloat16 in all. Each tensor has a storage of its own, as in a module. 1 GB has 67 of them, the
    largest of 131 MB.
    """
    hidden, inner, words = 2048, 5632, 32000
    left = total // 2
    shapes: dict[str, tuple[int, ...]] = {}

    def take(name: str, *shape: int) -> None:
        nonlocal left
        shapes[name] = shape
        left -= int(np.prod(shape))

    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    if left > 2 * words * hidden + layer:
        take("embed.weight", words, hidden)
        take("head.weight", words, hidden)
    number = 0
    while left > layer:
        for part in "qkvo":
            take(f"layers.{number}.{part}.weight", hidden, hidden)
        take(f"layers.{number}.gate.weight", inner, hidden)
        take(f"layers.{number}.up.weight", inner, hidden)
        take(f"layers.{number}.down.weight", hidden, inner)
        take(f"layers.{number}.norm.weight", hidden)
        take(f"layers.{number}.norm2.weight", hidden)
        number += 1
    take("last.weight", left)
    return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def even(count: int, total: int) -> State:
    """``count`` tensors of the same size, ``total`` bytes of bfloat16 in all, uninitialised.

    At most 128 in a module: load_state_dict looks through all of a module's names for each child, which would take it
    tens of seconds for 20,000.
    """
    size = total // 2 // count
    places = (divmod(number, 128) for number in range(count))
    return {f"layers.{one}.experts.{other}.weight": torch.empty(size, dtype=torch.bfloat16) for one, other in places}


def randomise(state: Mapping[str, torch.Tensor]) -> None:
    """Fill with random bits, which also touches every page."""
    generator = np.random.Generator(np.random.SFC64())
    for tensor in state.values():
        view = bits(tensor)
        step = 1 << 22
        for at in range(0, len(view), step):
            part = view[at : at + step]
            part[:] = np.frombuffer(generator.bytes(len(part)), dtype=np.uint8)


def renew(state: Mapping[str, torch.Tensor]) -> None:
    """Change every byte, cheaply: no chunk of the next version is one of the version before."""
    mask = np.random.default_rng().integers(1, 256, 8, dtype=np.uint8)
    word = mask.view(np.uint64)[0]
    for tensor in state.values():
        view = bits(tensor)
        whole = len(view) // 8 * 8
        np.bitwise_xor(view[:whole].view(np.uint64), word, out=view[:whole].view(np.uint64))
        view[whole:] ^= mask[: len(view) - whole]


def bits(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor, as an array to read and write."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Of every byte, in the order of the names: equal on both sides, or something was lost on the way."""
    hasher = xxhash.xxh3_128()
    for name in sorted(state):
        hasher.update(name.encode())
        hasher.update(bits(state[name]))
    return hasher.hexdigest()


def size(state: Mapping[str, torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in state.values())
