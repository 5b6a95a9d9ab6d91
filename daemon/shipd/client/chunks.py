"""Reading the chunks of a version out of its source: views where a chunk is one tensor's, else gathered."""

from shipd.checkpoints.source import Source
from shipproto.errors import AbortCode, TransferError
from shipproto.limits import LEAF_SIZE
from shipproto.sender import Sender

_SLICE = LEAF_SIZE


class ChunkReader:
    """Reads chunks of ``sender``'s layout from ``source``. Not thread-safe: gathered chunks share a buffer."""

    def __init__(self, sender: Sender, source: Source) -> None:
        self._sender = sender
        self._source = source
        self._scratch = memoryview(bytearray(LEAF_SIZE))

    def read(self, chunk: int) -> memoryview:
        """The bytes of a chunk as they lie in the image; valid until the next ``read``."""
        layout = self._sender.layout
        rows = self._sender.source_rows
        start, size = layout.chunk(chunk)
        if chunk < layout.large_chunks:
            row = int(layout.chunk_tensors(chunk)[0])
            begin = start - int(layout.offsets[row])
            return self._source.read(int(rows[row]), begin, begin + size)
        content = self._scratch[:size]
        tensors = layout.chunk_tensors(chunk)
        end = 0
        for row, at, length in zip(
            rows[tensors].tolist(),
            (layout.offsets[tensors] - start).tolist(),
            layout.structure.nbytes[tensors].tolist(),
            strict=True,
        ):
            if at > end:
                content[end:at] = bytes(at - end)
            content[at : at + length] = self._source.read(row, 0, length)
            end = at + length
        return content

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
