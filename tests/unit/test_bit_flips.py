"""Every bit of every golden frame flipped, one at a time: none is ever accepted.

A flipped bit ends in a NACK for exactly that frame, after which the stream goes on, or in a ProtocolError. It never
yields the same message, another one, or silence.
"""

import pytest

from shipproto.connection import ChunkDamaged, MessageArrived, RunDamaged
from shipproto.errors import BadPrelude, ForeignPeer
from tests.support import naive
from tests.support.golden.book import TRANSFER
from tests.support.link import feed
from tests.support.vectors import Vector, describe_event, load, make_connection, read, run

_LARGEST = 1000
"""Bytes of a frame whose every bit is flipped."""

GOLDEN = {
    name: vector
    for name, vector in load("accept")
    if vector["kind"] == "connection"
    and not name.startswith(("damaged", "data-not-wanted"))
    and all(frame.size <= _LARGEST for frame in naive.frames(read(vector["input"])))
}


def targets(vector: Vector) -> list[naive.Frame]:
    """The last frame; in a handshake, every frame; every DATA and CODED frame."""
    cut = list(naive.frames(read(vector["input"])))
    return cut if "token" in vector else [frame for frame in cut if frame.name in ("Data", "Coded")] or cut[-1:]


@pytest.mark.parametrize("name", GOLDEN)
def test_no_flipped_bit_is_accepted(name: str) -> None:
    vector = GOLDEN[name]
    stream = read(vector["input"])
    for frame in targets(vector):
        shaking_hands = frame.name in ("Hello", "Auth")
        # What comes next, to see whether the stream goes on.
        following = naive.Stream(sequence=frame.sequence + 1).add("Commit", {"transfer": TRANSFER}).data
        before = stream[: frame.start]
        expected = describe(feed(make_connection(vector), before).events)
        for bit in range(8 * frame.size):
            raw = bytearray(stream[frame.start : frame.start + frame.size])
            raw[bit // 8] ^= 1 << (bit % 8)
            connection = make_connection(vector)
            fed = feed(connection, before + raw + following)
            if bit < 8 * 32 or shaking_hands:
                assert isinstance(fed.error, BadPrelude | ForeignPeer), bit
                assert describe(fed.events) == expected
                assert connection.established == bool(expected)
                continue
            assert fed.error is None
            arrived = fed.events[len(expected) :]
            if isinstance(arrived[0], ChunkDamaged | RunDamaged):
                assert arrived.pop(0).sequence == frame.sequence  # type: ignore[union-attr]
            (after,) = arrived
            assert isinstance(after, MessageArrived)
            assert type(after.message).__name__ == "Commit"
            *_, nack = naive.frames(fed.output)
            assert (nack.name, nack.fields) == ("Nack", {"sequences": [frame.sequence]})


def describe(events: list) -> list:
    return [describe_event(event) for event in events]


def test_there_are_enough() -> None:
    assert len(GOLDEN) >= 20
    for vector in GOLDEN.values():
        assert run(vector).error is None
