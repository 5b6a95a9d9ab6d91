"""Reading the chunks of a version out of its source: views where its bytes lie side by side, else gathered."""

from collections.abc import Sequence

from shipd.checkpoints.source import Source
from shipproto.errors import AbortCode, TransferError
from shipproto.limits import LEAF_SIZE
from shipproto.sender import Sender

_SLICE = LEAF_SIZE


class ChunkReader:
    """Reads chunks of ``sender``'s layout from ``source``; from several threads where each has a reader of its own or
    none reads a chunk while it still needs the one before."""

    def __init__(self, sender: Sender, source: Source) -> None:
        self._sender = sender
        self._source = source
        # Of each chunk of a large tensor: the source's row, and where in its tensor the chunk begins.
        layout = sender.layout
        tensors = layout.leaf_rows()[: layout.large_chunks]
        begins = layout.chunk_starts[: layout.large_chunks] - layout.offsets[tensors]
        self._slices: list[tuple[int, int]] = list(
            zip(sender.source_rows[tensors].tolist(), begins.tolist(), strict=True)
        )
        # Rows that follow one another are a range, and columns are cut by those instead of picked from.
        self._rows: Sequence[int] = sender.source_rows.tolist()
        if self._rows == list(range(len(self._rows))):
            self._rows = range(len(self._rows))

    def read(self, chunk: int) -> memoryview:
        """The bytes of a chunk as they lie in the image; valid until the same thread's next ``read``."""
        layout = self._sender.layout
        if chunk < layout.large_chunks:
            row, begin = self._slices[chunk]
            return self._source.read(row, begin, begin + layout.chunk(chunk)[1])
        wanted = layout.chunk_tensors(chunk).tolist()
        first, end = wanted[0], wanted[0] + len(wanted)
        consecutive = wanted == list(range(first, end))
        rows = self._rows[first:end] if consecutive else list(map(self._rows.__getitem__, wanted))
        return self._source.read_packed(rows, layout.packed_gaps(chunk))

    def lends(self, content: memoryview) -> bool:
        """Whether what ``read`` returned keeps its bytes until the push is over."""
        return self._source.lends(content)

    def check_ties(self) -> None:
        """What the receiver ties must be equal here. Raises TransferError naming the tensor."""
        structure = self._sender.offered
        for one, other in self._sender.equal_rows:
            for start in range(0, int(structure.nbytes[one]), _SLICE):
                stop = min(start + _SLICE, int(structure.nbytes[one]))
                # bytes(): a source may reuse the memory that it returned.
                if bytes(self._source.read(one, start, stop)) != self._source.read(other, start, stop):
                    names = structure.names
                    raise TransferError(
                        AbortCode.MISMATCH,
                        f"the resident model ties {names[one]!r} and {names[other]!r}, but the checkpoint has "
                        "different values for them",
                        tensor=names[other],
                    )
