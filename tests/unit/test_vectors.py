"""The golden vectors of protocol/vectors, each on whole, split and byte-by-byte input."""

import pytest

from shipd.codecs.registry import BY_NUMBER
from tests.support import make_vectors
from tests.support.link import CHOPS, Chop
from tests.support.vectors import DIRECTORY, Vector, load, read, run

ACCEPT = dict(load("accept"))
REJECT = dict(load("reject"))

_PATIENCE = 20_000
"""Bytes of input up to which byte by byte is quick enough."""


def chops(vector: Vector) -> list[Chop]:
    if vector["kind"] not in ("connection", "receiver", "sender"):
        return ["whole"]
    return [chop for chop in CHOPS if chop != "bytes" or len(read(vector["input"])) <= _PATIENCE]


@pytest.mark.parametrize("name", ACCEPT)
def test_accepted(name: str) -> None:
    vector = ACCEPT[name]
    for seed, chop in enumerate(chops(vector)):
        result = run(vector, chop, seed)
        assert result.error is None, f"{chop}: {result.error}"
        assert result.found == {key: vector[key] for key in result.found}, chop


@pytest.mark.parametrize("name", REJECT)
def test_rejected(name: str) -> None:
    vector = REJECT[name]
    for seed, chop in enumerate(chops(vector)):
        result = run(vector, chop, seed)
        assert type(result.error).__name__ == vector["error"], f"{chop}: {result.error!r}"
        assert str(result.error), "an error says what is wrong"
        for key in ("events", "output"):
            if key in vector:
                assert result.found[key] == vector[key], (chop, key)


def test_there_are_enough() -> None:
    assert len(ACCEPT) >= 25
    assert len(REJECT) >= 60
    assert len({vector["what"] for vector in REJECT.values()}) > 0.9 * len(REJECT), "each for a reason of its own"


@pytest.mark.parametrize("codec", BY_NUMBER)
def test_there_are_enough_of_each_codec(codec: int) -> None:
    accepted, refused = (
        [vector["what"] for vector in vectors.values() if vector.get("codec") == codec] for vectors in (ACCEPT, REJECT)
    )
    assert len(accepted) >= 4
    assert len(set(refused)) == len(refused) >= 6, "each for a reason of its own"


def test_the_script_writes_exactly_these() -> None:
    made = make_vectors.make()
    there = {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8") for path in DIRECTORY.glob("*/*.json")}
    assert there.keys() == made.keys()
    assert [path for path in made if there[path] != made[path]] == []
