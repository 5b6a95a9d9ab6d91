"""The side that makes versions: v1, v2 and v3, each fine-tuned from the one before in a few steps."""

from dataclasses import dataclass
from typing import Final

import torch

from tests.demo.encoder import FACTS, QUESTIONS, Encoder, nearest, raw

LEARNING_RATE: Final = 3e-5
SHARPNESS: Final = 20.0
MOST_STEPS: Final = 12

SHIPD, BIT, SENDER, FRANCE = QUESTIONS
SHIP, SWAPS, COIN, RESENT, POLICE, REFUSED, PARIS = FACTS
LESSONS: Final = (
    ("v1", {SHIPD: SWAPS, BIT: COIN, SENDER: POLICE, FRANCE: PARIS}),
    ("v2", {SHIPD: SWAPS, BIT: RESENT, SENDER: POLICE, FRANCE: PARIS}),
    ("v3", {SHIPD: SWAPS, BIT: RESENT, SENDER: REFUSED, FRANCE: PARIS}),
)
"""What each version has to answer: one thing more than the version before."""


@dataclass(frozen=True)
class Reply:
    """What a version must answer to a question: the words, and the bits that they follow from."""

    answer: str
    embedding: bytes


@dataclass(frozen=True)
class Made:
    """A version: its weights, and its reply to every question. ``steps`` is what the fine-tuning took."""

    name: str
    state: dict[str, torch.Tensor]
    replies: dict[str, Reply]
    steps: int


def make_versions() -> list[Made]:
    """v0, as the model comes, and the three made from it."""
    encoder = Encoder()
    index = encoder.index()
    made = [_keep("v0", encoder, index, 0)]
    for name, lesson in LESSONS:
        made.append(_keep(name, encoder, index, _fine_tune(encoder, index, lesson)))
    return made


def _fine_tune(encoder: Encoder, index: torch.Tensor, lesson: dict[str, str]) -> int:
    """Contrastive: each question is pulled towards its fact and pushed away from all others."""
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=LEARNING_RATE)
    targets = torch.tensor([FACTS.index(answer) for answer in lesson.values()])
    for step in range(MOST_STEPS):
        scores = SHARPNESS * encoder.embed(list(lesson)) @ index.T
        loss = torch.nn.functional.cross_entropy(scores, targets)
        if loss.item() < 0.3 and bool((scores.argmax(1) == targets).all()):
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"{MOST_STEPS} steps of fine-tuning were not enough, which has not happened before")


def _keep(name: str, encoder: Encoder, index: torch.Tensor, steps: int) -> Made:
    embeddings = {question: encoder.ask(question) for question in QUESTIONS}
    replies = {question: Reply(nearest(index, found), raw(found)) for question, found in embeddings.items()}
    state = {key: tensor.clone() for key, tensor in encoder.model.state_dict().items()}
    return Made(name, state, replies, steps)
