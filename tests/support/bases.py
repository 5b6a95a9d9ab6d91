"""Versions for the tests of what a sender keeps: images as plain bytes, and the proof that a base is one of them."""

from collections.abc import Callable

import numpy as np

from shipd.bases.base import Base, run_range
from shipproto.digests import LeafDigests, digest_image
from shipproto.layout import Layout
from shipproto.structure import Structure
from tests.support.models import build, contents, make_image
from tests.support.naive import Tensor


class Version:
    """One version of a model, known in full."""

    def __init__(self, layout: Layout, image: bytes) -> None:
        self.layout = layout
        self.image = image
        self.digests: LeafDigests = digest_image(layout, memoryview(image))
        self.digest = self.digests.version_digest()

    @classmethod
    def of(cls, structure: Structure, version: int = 0) -> "Version":
        """With contents that everyone can compute."""
        layout = Layout.of(structure)
        return cls(layout, bytes(make_image(layout, contents(structure, version))))

    def chunk(self, number: int) -> memoryview:
        """The bytes of a chunk."""
        start, size = self.layout.chunk(number)
        return memoryview(self.image)[start : start + size]

    def run(self, first: int, count: int) -> bytes:
        """The bytes of a run."""
        start, stop = run_range(self.layout, first, count)
        return self.image[start:stop]

    def next(self, generator: np.random.Generator, share: float, chunks: float = 1.0) -> "Version":
        """Another version: in a share of the chunks, a share of the tensors' bytes is another. Padding stays zeros."""
        image = np.frombuffer(self.image, dtype=np.uint8).copy()
        structure = self.layout.structure
        mask = np.zeros(len(image), dtype=np.bool_)
        for start, size in zip(self.layout.offsets.tolist(), structure.nbytes.tolist(), strict=True):
            mask[start : start + size] = True
        chosen = np.zeros(len(image), dtype=np.bool_)
        for number in range(self.layout.chunks):
            if generator.random() < chunks:
                start, size = self.layout.chunk(number)
                chosen[start : start + size] = True
        places = np.flatnonzero(mask & chosen & (generator.random(len(image)) < share))
        image[places] ^= generator.integers(1, 256, len(places), dtype=np.uint8)
        return Version(self.layout, image.tobytes())


def model(*sizes: int, dtype: str = "uint8") -> Structure:
    """A structure of tensors with these many elements."""
    return build(Tensor(f"t{at:02}", dtype, (size,)) for at, size in enumerate(sizes))


def read(base: Base, first: int, count: int, layout: Layout) -> bytes:
    """A run of a base, into memory that held something else."""
    start, stop = run_range(layout, first, count)
    into = bytearray(b"\xa5" * (stop - start))
    base.read(first, count, memoryview(into))
    return bytes(into)


def assert_reads(base: Base | None, version: Version) -> None:
    """That ``base`` is ``version``: chunk by chunk, and every run from the first chunk and to the last."""
    assert base is not None
    assert base.digest == version.digest
    layout = version.layout
    for chunk in range(layout.chunks):
        for first, count in ((chunk, 1), (0, chunk + 1), (chunk, layout.chunks - chunk)):
            assert read(base, first, count, layout) == version.run(first, count)


def raising(version: Version, at: int, error: BaseException) -> Callable[[int], memoryview]:
    """Chunks of ``version``; the ``at``-th that is asked for raises."""
    asked = iter(range(1 << 30))

    def chunk(number: int) -> memoryview:
        if next(asked) == at:
            raise error
        return version.chunk(number)

    return chunk
