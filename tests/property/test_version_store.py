"""Sequences of versions against the plainest of stores: every version's image, kept as bytes."""

import threading
from typing import Self

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shipd.bases.base import BaseLost
from shipd.bases.store import VersionStore
from tests.property.strategies import LEAF, examples, models
from tests.support.bases import Version, assert_reads, read
from tests.support.models import build, leaves_of
from tests.support.naive import Tensor

shares = st.sampled_from((0.0, 0.001, 0.01, 0.05, 0.3, 1.0))


class Reader:
    """Reads random runs of random versions on a thread of its own, for as long as another takes versions in."""

    def __init__(self, store: VersionStore, seed: int) -> None:
        self.versions: dict[bytes, Version] = {}
        self.wrong: list[str] = []
        self.reads = 0
        self._store = store
        self._random = np.random.default_rng(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether nothing has ended it: what a thread raises fails the test by itself."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            for version in list(self.versions.values()):
                self._read(version)

    def _read(self, version: Version) -> None:
        layout = version.layout
        base = self._store.open("m", layout, version.digest)
        if base is None or not layout.chunks:
            return
        first = int(self._random.integers(layout.chunks))
        count = int(self._random.integers(1, layout.chunks - first + 1))
        try:
            if read(base, first, count, layout) != version.run(first, count):
                self.wrong.append(f"{count} chunks from {first} on of {version.digest.hex()}")
        except BaseLost:
            return
        self.reads += 1


@examples(60)
@given(models(), st.lists(st.tuples(shares, st.sampled_from((0.3, 1.0))), min_size=1, max_size=12), st.data())
def test_every_kept_version_is_read_bit_for_bit(rows, steps: list[tuple[float, float]], data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, 8))
    share = data.draw(st.sampled_from((0.0, 0.1, 0.25, 5.0)))
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    with leaves_of(LEAF):
        version = Version.of(build(rows))
        limit = data.draw(st.sampled_from((1 << 30, version.layout.size + 2000)))
        store = VersionStore(limit=limit, versions=kept, patch_share=share)
        images: dict[bytes, Version] = {}
        for density, chunks in steps:
            version = version.next(generator, density, chunks)
            images[version.digest] = version
            reason = store.keep("m", version.digests, version.chunk)
            found = store.digests("m", version.layout.structure)
            assert reason is None
            assert version.digest in found
            assert len(found) <= kept
            assert store.memory_used <= limit
            (history,) = store._histories.values()
            patches = sum(len(patch) for older in history._versions for patch in older.undo if patch is not None)
            assert store.memory_used == version.layout.size + len(version.digests.encoded) + patches
            assert patches <= share * version.layout.size
            for digest in found:
                assert_reads(store.open("m", version.layout, digest), images[digest])


@examples(15)
@given(models(), st.integers(0, 1 << 16))
def test_readers_never_see_a_mixture(rows, seed: int) -> None:
    generator = np.random.default_rng(seed)
    store = VersionStore(versions=4, patch_share=1.0)
    with leaves_of(LEAF):
        version = Version.of(build(rows))
        with Reader(store, seed) as one, Reader(store, seed + 1) as other:
            for step in range(20):
                version = version.next(generator, 0.02 if step % 3 else 0.5)
                one.versions[version.digest] = other.versions[version.digest] = version
                assert store.keep("m", version.digests, version.chunk) is None
        assert one.wrong == other.wrong == []


def test_readers_read_while_versions_are_taken_in() -> None:
    """The same with chunks of their real size, until the readers have read some hundred runs between them."""
    generator = np.random.default_rng(3)
    store = VersionStore(versions=4)
    version = Version.of(build(models_of_real_size()))
    with Reader(store, 1) as one, Reader(store, 2) as other:
        while one.reads + other.reads < 300 and one.alive and other.alive:
            version = version.next(generator, 0.002)
            for reader in (one, other):
                reader.versions = {
                    digest: kept
                    for digest, kept in {**reader.versions, version.digest: version}.items()
                    if digest == version.digest or digest in store.digests("m", version.layout.structure)
                }
            assert store.keep("m", version.digests, version.chunk) is None
    assert one.wrong == other.wrong == []


def models_of_real_size():
    """A large tensor of an odd size, and small ones: five chunks."""
    return [Tensor("large", "uint8", (3 * 512 * 1024 + 77,)), Tensor("a", "bool", (7,)), Tensor("b", "float32", (99,))]
