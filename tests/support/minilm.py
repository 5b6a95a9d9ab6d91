"""MiniLM as transformers has it, and the tensors of its file."""

import functools
from typing import Final

import torch
from torch import nn

from tests.support import checkpoints

POSITION_IDS: Final = "embeddings.position_ids"
"""What the file holds and the model computes itself."""


def minilm() -> nn.Module:
    """The architecture, with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: nn.Module = BertModel(BertConfig.from_json_file(checkpoints.minilm().parent / "config.json"))
    return model.eval()


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """What its file holds: the state dict, and ``POSITION_IDS``."""
    import safetensors.torch

    return safetensors.torch.load_file(checkpoints.minilm())
