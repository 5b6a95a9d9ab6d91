"""Reading the chunks of a layout out of a source: views where their bytes lie side by side, else gathered."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shipd.checkpoints.source import Source
from shipproto.layout import Layout


class SourceChunks:
    """Reads chunks of ``layout`` from ``source``; from several threads where each has a reader of its own or none reads
    a chunk while it still needs the one before.

    rows    i64[n], for each row of the layout's structure the source's row that has its bytes: ``sender.sources``
    """

    def __init__(self, layout: Layout, rows: npt.NDArray[np.int64], source: Source) -> None:
        self.layout = layout
        self.source = source
        # Of each chunk of a large tensor: the source's row, and where in its tensor the chunk begins.
        tensors = layout.leaf_rows()[: layout.large_chunks]
        begins = layout.chunk_starts[: layout.large_chunks] - layout.offsets[tensors]
        self._slices: list[tuple[int, int]] = list(zip(rows[tensors].tolist(), begins.tolist(), strict=True))
        # Rows that follow one another are a range, and columns are cut by those instead of picked from.
        self._rows: Sequence[int] = rows.tolist()
        if self._rows == list(range(len(self._rows))):
            self._rows = range(len(self._rows))

    def read(self, chunk: int) -> memoryview:
        """The bytes of a chunk as they lie in the image; valid until the same thread's next ``read``."""
        layout = self.layout
        if chunk < layout.large_chunks:
            row, begin = self._slices[chunk]
            return self.source.read(row, begin, begin + layout.chunk(chunk)[1])
        wanted = layout.chunk_tensors(chunk).tolist()
        first, end = wanted[0], wanted[0] + len(wanted)
        consecutive = wanted == list(range(first, end))
        rows = self._rows[first:end] if consecutive else list(map(self._rows.__getitem__, wanted))
        return self.source.read_packed(rows, layout.packed_gaps(chunk))

    def lends(self, content: memoryview) -> bool:
        """Whether what ``read`` returned keeps its bytes until the source is closed."""
        return self.source.lends(content)
