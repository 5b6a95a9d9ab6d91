"""Reading the chunks that a push sends, in the layout that its receiver rules."""

from shipd.checkpoints.chunks import SourceChunks
from shipd.checkpoints.source import Source
from shipproto.errors import AbortCode, TransferError
from shipproto.limits import LEAF_SIZE
from shipproto.sender import Sender

_SLICE = LEAF_SIZE


class ChunkReader(SourceChunks):
    """Reads chunks of ``sender``'s layout from ``source``; for how many threads, see ``SourceChunks``."""

    def __init__(self, sender: Sender, source: Source) -> None:
        super().__init__(sender.layout, sender.source_rows, source)
        self._sender = sender

    def check_ties(self) -> None:
        """What the receiver ties must be equal here. Raises TransferError naming the tensor."""
        structure = self._sender.offered
        for one, other in self._sender.equal_rows:
            for start in range(0, int(structure.nbytes[one]), _SLICE):
                stop = min(start + _SLICE, int(structure.nbytes[one]))
                # bytes(): a source may reuse the memory that it returned.
                if bytes(self.source.read(one, start, stop)) != self.source.read(other, start, stop):
                    names = structure.names
                    raise TransferError(
                        AbortCode.MISMATCH,
                        f"the resident model ties {names[one]!r} and {names[other]!r}, but the checkpoint has "
                        "different values for them",
                        tensor=names[other],
                    )
