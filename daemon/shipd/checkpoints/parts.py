"""Several sources as one: the shards of a checkpoint in several files."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from shipd.checkpoints import known
from shipd.checkpoints.extents import Extent, InFiles
from shipd.checkpoints.source import Source, join
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError
from shipproto.errors import ProtocolError


class Parts:
    """A ``Source`` over ``parts``, whose names are different. Takes ownership of them once it is constructed.

    Which bytes are copied is the parts' decision; what lies side by side in one of them is not copied here either.
    """

    def __init__(self, parts: Sequence[Source], origin: str) -> None:
        self.origin = origin
        self._parts = tuple(parts)
        names: list[str] = []
        dtypes: list[str] = []
        shapes: list[tuple[int, ...]] = []
        ties: dict[str, str] = {}
        places: list[tuple[Source, int]] = []
        for part in self._parts:
            structure = part.structure
            rows = range(len(structure))
            names += structure.names
            dtypes += map(structure.dtype, rows)
            shapes += map(structure.shape, rows)
            places += ((part, row) for row in rows)
            tied = [row for row, root in enumerate(structure.primary.tolist()) if root != row]
            ties |= {structure.names[row]: structure.names[int(structure.primary[row])] for row in tied}
        try:
            self.structure, order = known.structure_of(names, dtypes, shapes, ties)
        except ProtocolError as error:
            raise CheckpointError(f"{quoted(origin)}: {error}") from error
        self._places = places if order is None else list(map(places.__getitem__, order))

    def read(self, row: int, start: int, stop: int) -> memoryview:
        """See ``Source.read``."""
        part, inside = self._places[row]
        return part.read(inside, start, stop)

    def read_packed(self, rows: Sequence[int], gaps: list[int] | None) -> memoryview:
        """See ``Source.read_packed``; a view where one part gives a view of all of them."""
        runs = list(self._runs(rows, gaps))
        if len(runs) == 1:
            part, inside, between, _ = runs[0]
            return part.read_packed(inside, between)
        after = None if gaps is None else [gap for *_, gap in runs[:-1]]
        return join((part.read_packed(inside, between) for part, inside, between, _ in runs), after)

    def _runs(
        self, rows: Sequence[int], gaps: list[int] | None
    ) -> Iterator[tuple[Source, Sequence[int], list[int] | None, int]]:
        """``rows`` in runs of one part: its rows, the gaps between them, and the gap after the run."""
        at = 0
        for part, members in groupby((self._places[row] for row in rows), key=_part):
            inside = [row for _, row in members]
            end = at + len(inside)
            consecutive = inside == list(range(inside[0], inside[0] + len(inside)))
            between = None if gaps is None else gaps[at : end - 1]
            after = gaps[end - 1] if gaps is not None and end < len(rows) else 0
            yield part, range(inside[0], inside[-1] + 1) if consecutive else inside, between, after
            at = end

    def extent(self, row: int) -> Extent | None:
        """See ``InFiles``."""
        part, inside = self._places[row]
        return part.extent(inside) if isinstance(part, InFiles) else None

    def lends(self, content: memoryview) -> bool:
        """See ``Source.lends``."""
        return any(part.lends(content) for part in self._parts)

    def changed(self) -> str | None:
        """See ``Source.changed``; of the first part that knows of a change."""
        return next((what for what in (part.changed() for part in self._parts) if what), None)

    def close(self) -> None:
        """See ``Source.close``."""
        for part in self._parts:
            part.close()


def _part(place: tuple[Source, int]) -> Source:
    return place[0]
