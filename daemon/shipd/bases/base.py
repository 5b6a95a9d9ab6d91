"""What a base is: an older version that can be read in the layout of the next one; and who knows some."""

from collections.abc import Callable
from typing import Final, Protocol

from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from shipproto.structure import Structure

MAX_BASES: Final = 8
"""Version digests in one OFFER, and so versions of a model worth keeping."""


class BaseLost(Exception):
    """A base that cannot be read any more: dropped for room, or its file was changed. Then chunks travel whole."""


class Base(Protocol):
    """One version, readable by ranges of its image. Usable on several threads at once until it is closed."""

    @property
    def digest(self) -> bytes:
        """Its version digest, 16 bytes."""
        ...

    def read(self, first: int, count: int, into: memoryview) -> None:
        """Write what the image holds from the start of chunk ``first`` to the end of the last of ``count`` chunks.

        into    writable bytes, as many as ``run_range`` says; zeros are written where there is padding
        Raises BaseLost, ``into`` may then have been written to in part; ValueError for another length.
        """
        ...

    def close(self) -> None:
        """Let go of it. Harmless when repeated."""
        ...


class Bases(Protocol):
    """Someone who knows versions of models. What they keep of a version is theirs: memory, a file, a checkpoint."""

    def digests(self, model: str, offered: Structure) -> tuple[bytes, ...]:
        """Digests of the versions that may serve a push of ``offered``, the likeliest first; at most MAX_BASES.

        A receiver's structure rules, and it may lack some of what is offered: versions of every structure that can be
        made from the offered one count. Makes no pass over content that has been made before.
        """
        ...

    def open(self, model: str, layout: Layout, digest: bytes) -> Base | None:
        """The version with this digest in this layout, proved to be it, or None. The caller closes it."""
        ...


class Keeper(Bases, Protocol):
    """A ``Bases`` that takes in what was committed."""

    def keep(self, model: str, digests: LeafDigests, read_chunk: Callable[[int], memoryview]) -> str | None:
        """A receiver has committed a version of ``model``: keep it for the next push.

        digests      of what was sent; all of them known
        read_chunk   gives the bytes of a chunk as they lie in the image, valid until its next call
        Returns why the version is not kept, as the end of a sentence; None where it is.
        """
        ...


def run_range(layout: Layout, first: int, count: int) -> tuple[int, int]:
    """Start and end in the image of the run of ``count`` chunks that begins with ``first``.

    Raises ValueError where there are no such chunks.
    """
    if first < 0 or count < 1 or first + count > layout.chunks:
        raise ValueError(f"no run of {count} chunks from chunk {first} on: there are {layout.chunks}")
    last, size = layout.chunk(first + count - 1)
    return layout.chunk(first)[0], last + size


def check_room(into: memoryview, size: int) -> None:
    """Raise ValueError where ``into`` is not ``size`` writable bytes."""
    if into.nbytes != size or into.readonly:
        raise ValueError(f"a run of {size} bytes is read into as many writable ones, not into {into.nbytes}")
