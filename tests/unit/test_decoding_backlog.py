"""How much may wait to be decoded before whoever brings it is made to wait: by payload, and by what it stands for."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shipd.codecs import registry
from shipd.codecs.egr import EGR
from shipd.service.decoding import MOST_WAITING, Decoding, Speeds, Target
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE, MAX_PAYLOAD
from shipproto.outcomes import RunToDecode
from tests.support.bases import model

RUN = 32
"""Chunks of the longest run."""

LAYOUT = Layout.of(model(1000 * RUN * LEAF_SIZE))


def run(number: int, payload: int, codec: int = EGR.number, chunks: int = RUN) -> RunToDecode:
    first = number * chunks
    connection = cast("Any", SimpleNamespace())
    return RunToDecode(range(first, first + chunks), codec, memoryview(bytes(payload)), connection, number)


async def until_held_back(payload: int, most: int, codec: int = EGR.number) -> int | None:
    """How many runs of so many bytes may wait before more is taken from nobody; None where ``most`` may."""
    told: list[bool] = []
    go_on = asyncio.Event()

    async def work(*_: object) -> Any:
        await go_on.wait()
        return 0, 0.0

    done: list[RunToDecode] = []
    decoding = Decoding(
        cast("Any", work), Speeds(lambda: None), took=done.append, refused=done.append, hold_back=told.append
    )
    target = Target(LAYOUT, memoryview(b""), cast("Any", None), None, lambda _: False)
    decoding.begin(target, None)
    count = 0
    while not told and count < most:
        decoding.submit(run(count, payload, codec))
        count += 1
    held_back = bool(told)
    go_on.set()
    await decoding.end()
    assert len(done) == count
    assert not told or told[-1] is False, "and in the end it is listened to again"
    return count if held_back else None


@pytest.mark.parametrize(
    ("payload", "runs"),
    [(MAX_PAYLOAD, MOST_WAITING // MAX_PAYLOAD + 1), (40_000, 17), (0, 17)],
    ids=["long payloads", "a small step", "next to nothing"],
)
def test_runs_that_stand_for_much_count_for_more_than_their_payload(payload, runs):
    """A quarter of a gigabyte is decoded before a sender takes this side for dead, whatever decodes it."""
    assert asyncio.run(until_held_back(payload, 1000)) == runs


def test_what_is_the_same_may_be_any_number_of_runs():
    assert asyncio.run(until_held_back(0, 1000, registry.SAME)) is None
