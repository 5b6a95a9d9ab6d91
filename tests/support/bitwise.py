"""Answers of real models that are compared to the bit: computed on one thread, as bytes; and other versions of weights.

Test modules say ``pytest_plugins = ["tests.support.bitwise"]`` and import names from here as well, so pytest comes too
late to rewrite asserts, and would warn: PYTEST_DONT_REWRITE.
"""

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So that equal weights give equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(answers: Sequence[torch.Tensor]) -> bytes:
    """The bits of all of them."""
    return b"".join(answer.detach().contiguous().numpy().tobytes() for answer in answers)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its bytes, u8[n]: NaNs and signed zeros are equal where their bits are, and only there."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    return state.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        and torch.equal(as_bytes(tensor), as_bytes(other[name]))
        for name, tensor in state.items()
    )


def perturbed(state: Mapping[str, torch.Tensor], version: int) -> dict[str, torch.Tensor]:
    """Another version of these weights, close enough to make sense; tied where they were."""
    made: dict[int, torch.Tensor] = {}
    for at, tensor in enumerate(state.values()):
        if tensor.data_ptr() not in made:
            generator = torch.Generator().manual_seed(1000 * version + at)
            noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else 0
            made[tensor.data_ptr()] = (tensor + noise * tensor.float().abs().mean() * 0.05).to(tensor.dtype)
    return {name: made[tensor.data_ptr()] for name, tensor in state.items()}
