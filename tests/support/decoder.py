"""A small GPT-2 of transformers, whose head is its embedding, and greedy generation of many forwards with it."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

TIED: Final = ("lm_head.weight", "transformer.wte.weight")
"""Two names of one tensor."""

PROMPT: Final = tuple(range(1, 9))
STEPS: Final = 16
"""Tokens that ``generate`` adds."""


def gpt2(seed: int) -> Any:
    """A GPT2LMHeadModel by its seed. Its weights are so large that every version has something else to say."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 32}
    config = GPT2Config(**sizes, initializer_range=0.5, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return GPT2LMHeadModel(config).eval()


def generate(model: Any, watch: Callable[[int], object] | None = None) -> list[int]:
    """What it says after the prompt, greedily, with its cache of earlier tokens.

    ``watch(n)`` is called between two forwards, when n tokens have been said.
    """
    prompt = torch.tensor([PROMPT])

    def after_each(tokens: torch.Tensor, _scores: object, **_options: object) -> torch.Tensor:
        if watch is not None:
            watch(tokens.shape[1] - len(PROMPT))
        return torch.zeros(len(tokens), dtype=torch.bool)

    with torch.no_grad():
        tokens: torch.Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=STEPS,
            max_new_tokens=STEPS,
            do_sample=False,
            stopping_criteria=[after_each],
        )
    said: list[int] = tokens[0, len(PROMPT) :].tolist()
    return said


def untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict in which nothing shares memory, as many trainers write it."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def still_tied(model: nn.Module) -> bool:
    """Whether the head is still the embedding."""
    return model.get_parameter(TIED[0]) is model.get_parameter(TIED[1])
