"""Which chunks a sender still has to send: wanted, handed out to be read, come back since they did not get through."""

from collections import Counter
from itertools import takewhile

from shipproto.digests import LeafDigests
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.limits import MAX_CHUNK_ATTEMPTS
from shipproto.rangeset import RangeSet


class Outgoing:
    """The chunks of one layout, over all connections of a transfer. ``sent`` may be called on any thread.

    wanted   what is to be sent and has not been handed out
    refused  how often each chunk came back
    """

    def __init__(self, layout: Layout) -> None:
        self.wanted = RangeSet()
        self.refused = Counter[int]()
        self._layout = layout
        self._out: set[int] = set()
        self._undigested = iter(range(layout.chunks))

    @property
    def out(self) -> bool:
        """Whether chunks that were handed out are not sent yet."""
        return bool(self._out)

    def restart(self) -> None:
        """On another connection nothing is wanted yet, and nothing under way."""
        self.wanted = RangeSet()
        self._out.clear()

    def hand_out(self, most: int) -> range:
        """Chunks that follow each other, and are all of large tensors or all packed, and all refused before or none."""
        chunks = self.wanted.pop_run(most, self._layout.large_chunks)
        if chunks and self.refused:
            refused = chunks.start in self.refused
            alike = sum(1 for _ in takewhile(lambda chunk: (chunk in self.refused) is refused, chunks))
            self.wanted.add(chunks.start + alike, chunks.stop)
            chunks = chunks[:alike]
        self._out.update(chunks)
        return chunks

    def sent(self, chunks: range) -> None:
        """These are queued on some connection."""
        self._out.difference_update(chunks)

    def put_back(self, chunks: range) -> None:
        """These were handed out for nothing."""
        self._out.difference_update(chunks)
        self.wanted.add(chunks.start, chunks.stop)

    def come_back(self, chunks: tuple[int, ...]) -> None:
        """The receiver wants these again. Raises TransferError for one that keeps coming back."""
        for chunk in chunks:
            self.refused[chunk] += 1
            self.wanted.add(chunk)
            if self.refused[chunk] >= MAX_CHUNK_ATTEMPTS:
                names = self._layout.chunk_names(chunk)
                raise TransferError(
                    AbortCode.INTEGRITY,
                    f"chunk {chunk} ({_listing(names)}) arrived damaged {MAX_CHUNK_ATTEMPTS} times",
                    tensor=names[0],
                )

    def next_undigested(self, digests: LeafDigests) -> int:
        """A chunk whose digest is not known; there must be one."""
        for chunk in self._undigested:
            if not digests.knows(chunk):
                return chunk
        # One was asked for before the one before it was done.
        self._undigested = iter(range(self._layout.chunks))
        return self.next_undigested(digests)


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
