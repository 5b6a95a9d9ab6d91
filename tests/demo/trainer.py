"""The side that makes versions: v1, v2 and v3, each fine-tuned from the one before in a few steps, and v4, one more.

Trained in float32, served in bfloat16: a version is what the master weights round to.
"""

from dataclasses import dataclass
from typing import Final

import torch

from tests.demo.encoder import FACTS, QUESTIONS, Encoder, nearest, raw

LEARNING_RATE: Final = 3e-5
SMALL_RATE: Final = 1e-6
SHARPNESS: Final = 20.0
ENOUGH: Final = 0.02
"""The loss at which a lesson is learnt, by a comfortable margin."""
MOST_STEPS: Final = 30

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


class Trainer:
    """Makes one version after the other from the model as it comes."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._index = self._encoder.index()
        self._served = Encoder(torch.bfloat16)
        self._served_index = self._served.index()
        self._lessons = iter(LESSONS)
        self.v0 = self._keep("v0", 0)

    def next(self) -> Made:
        """v1, then v2, then v3."""
        name, lesson = next(self._lessons)
        return self._keep(name, self._fine_tune(lesson))

    def step(self, name: str) -> Made:
        """One optimiser step after the last version, at a learning rate as in reinforcement learning."""
        _, lesson = LESSONS[-1]
        optimizer = torch.optim.AdamW(self._encoder.model.parameters(), lr=SMALL_RATE)
        self._loss(lesson).backward()
        optimizer.step()
        return self._keep(name, 1)

    def _fine_tune(self, lesson: dict[str, str]) -> int:
        """Contrastive: each question is pulled towards its fact and pushed away from all others."""
        optimizer = torch.optim.AdamW(self._encoder.model.parameters(), lr=LEARNING_RATE)
        for step in range(MOST_STEPS):
            loss = self._loss(lesson)
            if loss.item() < ENOUGH and self._says(lesson):
                return step
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        raise RuntimeError(f"{MOST_STEPS} steps of fine-tuning did not teach the model {lesson}")

    def _loss(self, lesson: dict[str, str]) -> torch.Tensor:
        targets = torch.tensor([FACTS.index(answer) for answer in lesson.values()])
        scores = SHARPNESS * self._encoder.embed(list(lesson)) @ self._index.T
        return torch.nn.functional.cross_entropy(scores, targets)

    def _says(self, lesson: dict[str, str]) -> bool:
        """Whether the weights still answer like that when they are rounded."""
        self._served.model.load_state_dict(self._encoder.model.state_dict())
        return all(nearest(self._served_index, self._served.ask(question)) == fact for question, fact in lesson.items())

    def _keep(self, name: str, steps: int) -> Made:
        self._served.model.load_state_dict(self._encoder.model.state_dict())
        embeddings = {question: self._served.ask(question) for question in QUESTIONS}
        replies = {
            question: Reply(nearest(self._served_index, found), raw(found)) for question, found in embeddings.items()
        }
        state = {key: tensor.clone() for key, tensor in self._served.model.state_dict().items()}
        return Made(name, state, replies, steps)
