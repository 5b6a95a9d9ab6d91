"""Successive versions of a model in bfloat16, as an optimiser makes them, and pushes that send them as deltas.

    first, following   the first version of a model, and the one that a step makes of another
    push_small         a push that sends as few bytes as it can: on loopback nothing else is ever encoded
    fresh_bases        a fixture: what earlier tests have pushed is forgotten, and so is what this one does
    used               what a push has made of each codec

Test modules say ``pytest_plugins = ["tests.support.successive"]`` and import names from here as well, so pytest comes
too late to rewrite this module's asserts, and would warn: PYTEST_DONT_REWRITE.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import shipd
from shipd.bases.store import kept_versions
from shipd.client import incremental
from shipd.client.receipt import CodecUse
from shipd.codecs import compiled
from tests.support import synthetic
from tests.support.checkpoints import MIB, Content
from tests.support.finetune import Words
from tests.support.naive import Tensor
from tests.support.processes import push


@pytest.fixture
def fresh_bases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of earlier pushes of this process, and nothing will be of this test's."""
    # Else the first push would leave a thread behind that compiles, which takes half a minute where nothing is cached.
    compiled.warm_up()
    monkeypatch.setattr(incremental, "_rates", {})
    kept_versions.clear()
    yield
    kept_versions.clear()


def push_small(address: str, checkpoint: Any, **options: Any) -> shipd.Receipt:
    """See ``tests.support.processes.push``."""
    return push(address, checkpoint, prefer="bytes", **options)


def used(receipt: shipd.Receipt) -> dict[str, CodecUse]:
    """By the names of the codecs."""
    return {use.codec: use for use in receipt.codecs}


def of_words(rows: Sequence[Tensor], words: Words) -> Content:
    """A version of these rows, whose weights are ``words`` end to end."""
    data: dict[str, bytes | memoryview] = {}
    at = 0
    for row in rows:
        data[row.name] = words[at : at + row.nbytes // 2].tobytes()
        at += row.nbytes // 2
    return Content(tuple(rows), data)


def words_of(version: Content) -> Words:
    """The weights of a version in bfloat16, end to end."""
    return np.concatenate([np.frombuffer(version.data[row.name], dtype="<u2") for row in version.rows])


def first(mib: int = 6, seed: int = 0) -> Content:
    """A model of so many MiB: matrices of a few MiB each."""
    rows = synthetic.layers(mib * MIB)
    return of_words(rows, synthetic.first(rows, seed))


def following(version: Content, seed: int = 1, learning_rate: float = synthetic.LEARNING_RATE) -> Content:
    """The version one step later."""
    return of_words(version.rows, synthetic.following(words_of(version), seed=seed, learning_rate=learning_rate))


def changed_in(version: Content, places: Mapping[str, Sequence[int]]) -> Content:
    """The same, but for one bit of the elements of 16 bits at these places of these tensors."""
    data = dict(version.data)
    for name, indices in places.items():
        words = np.frombuffer(data[name], dtype="<u2").copy()
        words[list(indices)] ^= 1
        data[name] = words.tobytes()
    return Content(version.rows, data)
