"""A source as a plan has it: the model's names, its dtypes, and nothing that the model does not have."""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Final, NamedTuple

import numpy as np

from shipd.checkpoints.extents import Extent, InFiles
from shipd.checkpoints.source import MAX_READ, Source, check_range, join, pick
from shipd.checkpoints.wording import quoted
from shipd.errors import CastError, TensorMismatch
from shipd.matching.plan import Plan
from shipproto.dtypes import BY_CODE, BY_NAME
from shipproto.frame import Buffer

_SMALLEST: Final = 4096
"""Bytes of the smallest buffer."""


class _Buffer(bytearray):
    """Memory of casts, which is used again: by its type it is known not to be a source's."""


class _Cast(NamedTuple):
    given: str
    wanted: str

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of an element before and after."""
        return BY_NAME[self.given].itemsize, BY_NAME[self.wanted].itemsize


def planned(source: Source, plan: Plan) -> Source:
    """``source`` as ``plan`` sends it; itself where nothing is changed. Closing it closes ``source``."""
    return source if plan.identity else PlannedSource(source, plan)


class PlannedSource:
    """A ``Source`` over another one, whose structure is ``plan.offered``. Takes ownership of it once constructed.

    Tensors are cast as they are read. Reading raises CastError where a value does not fit the model's dtype, and
    TensorMismatch where tensors differ that the model ties.
    """

    def __init__(self, source: Source, plan: Plan) -> None:
        if plan.problems:
            raise ValueError(f"{source.origin} cannot be pushed: {plan.problems[0].text}")
        if source.structure.digest != plan.offered.digest:
            raise ValueError(f"the plan is of another checkpoint than {source.origin}")
        self.origin = source.origin
        self.structure = plan.structure
        self._source = source
        self._offered = plan.offered
        self._rows: list[int] = plan.rows.tolist()
        self._sizes: list[int] = plan.structure.nbytes.tolist()
        given, wanted = plan.offered.dtypes[plan.rows], plan.structure.dtypes
        other = np.flatnonzero(given != wanted)
        codes = list(zip(given[other].tolist(), wanted[other].tolist(), strict=True))
        kinds = {pair: _Cast(*(BY_CODE[code].name for code in pair)) for pair in set(codes)}
        self._casts = dict(zip(other.tolist(), map(kinds.__getitem__, codes), strict=True))
        self._equal: dict[int, list[int]] = {}
        for row, twin in plan.equal_pairs:
            self._equal.setdefault(row, []).append(twin)
        # Of what the structure says already: rows that are not just read from the source.
        self._special = self._casts.keys() | self._equal.keys()
        self._buffers = threading.local()
        if self._casts or any(plan.offered.dtype(twin) != plan.structure.dtype(row) for row, twin in plan.equal_pairs):
            # It imports torch, which nothing else here needs.
            from shipd.checkpoints.cast import Misfit, cast, holds

            self._cast, self._misfit, self._holds = cast, Misfit, holds

    def read(self, row: int, start: int, stop: int) -> memoryview:
        """See ``Source.read``; a view of the source's memory where the source gives one and nothing is cast."""
        size = self._sizes[row]
        if not 0 <= start <= stop <= size or stop - start > MAX_READ:
            check_range(self.structure, row, size, start, stop)
        if row not in self._equal:
            return self._read(row, self._rows[row], start, stop)
        # bytes(): what was read before may lie in the buffer that is read into next.
        twins = [(twin, bytes(self._read(row, twin, start, stop))) for twin in self._equal[row]]
        content = self._read(row, self._rows[row], start, stop)
        for twin, other in twins:
            if content != other:
                raise self._differ(self._rows[row], twin)
        return content

    def _read(self, row: int, at: int, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of ``row``, out of the source's row ``at``."""
        kind = _Cast(self._offered.dtype(at), self.structure.dtype(row))
        if kind.given == kind.wanted:
            return self._source.read(at, start, stop)
        before, after = kind.sizes
        first, last = start // after, -(-stop // after)
        out = self._buffer((last - first) * after)
        step = MAX_READ // before
        for begin in range(first, last, step):
            end = min(begin + step, last)
            content = self._source.read(at, begin * before, end * before)
            try:
                self._cast(content, kind.given, kind.wanted, out, (begin - first) * after)
            except self._misfit as misfit:
                raise self._refusal(row, at, begin + misfit.element, misfit.value) from None
        return memoryview(out)[start - first * after : stop - first * after].toreadonly()

    def read_packed(self, rows: Sequence[int], gaps: list[int] | None) -> memoryview:
        """See ``Source.read_packed``; a view of the source's memory where the source gives one and nothing is cast."""
        if not self._special or self._special.isdisjoint(rows):
            return self._source.read_packed(_consecutive(pick(self._rows, rows)), gaps)
        parts: list[Buffer] = []
        after: list[int] = []
        at = 0
        for kind, members in groupby(rows, self._kind):
            run = list(members)
            end = at + len(run)
            between = gaps[at : end - 1] if gaps is not None else None
            if kind is None:
                parts.append(self._source.read_packed(_consecutive(pick(self._rows, run)), between))
            elif isinstance(kind, _Cast):
                parts += _apart(self._cast_packed(run, kind), [self._sizes[row] for row in run] if between else None)
                after += between or ()
            else:
                # bytes(): the next is read into the same buffer.
                parts.append(bytes(self.read(run[0], 0, self._sizes[run[0]])))
            if gaps is not None and end < len(rows):
                after.append(gaps[end - 1])
            at = end
        return join(parts, after if gaps is not None else None)

    def _kind(self, row: int) -> "_Cast | int | None":
        """What is read together: tensors that are cast alike; by itself what must be equal to others."""
        return row if row in self._equal else self._casts.get(row)

    def _cast_packed(self, rows: list[int], kind: _Cast) -> bytearray:
        """All bytes of ``rows``, one after the other, of memory of their own."""
        before, after = kind.sizes
        counts = [self._sizes[row] // after for row in rows]
        out = _Buffer(sum(counts) * after)
        ends = list(accumulate(counts))
        start = 0
        while start < len(rows):
            # As many as one read may have; one that has more by itself is read slice by slice.
            done = ends[start] - counts[start]
            stop = bisect_right(ends, done + MAX_READ // before, start)
            if stop == start:
                size = self._sizes[rows[start]]
                out[done * after : ends[start] * after] = self.read(rows[start], 0, size)
                start += 1
                continue
            members = [self._rows[row] for row in rows[start:stop]]
            content = self._source.read_packed(_consecutive(members), None)
            try:
                self._cast(content, kind.given, kind.wanted, out, done * after)
            except self._misfit as misfit:
                of = bisect_right(ends, done + misfit.element)
                element = done + misfit.element - (ends[of] - counts[of])
                raise self._refusal(rows[of], self._rows[rows[of]], element, misfit.value) from None
            start = stop
        return out

    def extent(self, row: int) -> Extent | None:
        """See ``InFiles``; where its bytes travel as they are in the file, and need not be compared with others."""
        if row in self._special or not isinstance(self._source, InFiles):
            return None
        return self._source.extent(self._rows[row])

    def lends(self, content: memoryview) -> bool:
        """See ``Source.lends``; what was cast is not lent."""
        return not isinstance(content.obj, _Buffer) and self._source.lends(content)

    def changed(self) -> str | None:
        """See ``Source.changed``."""
        return self._source.changed()

    def close(self) -> None:
        """See ``Source.close``."""
        self._source.close()
        self._buffers = threading.local()

    def _buffer(self, size: int) -> _Buffer:
        """The calling thread's buffer, of at least ``size`` bytes."""
        held: _Buffer | None = getattr(self._buffers, "out", None)
        if held is None or len(held) < size:
            held = self._buffers.out = _Buffer(max(_SMALLEST, 1 << (size - 1).bit_length()))
        return held

    def _shown(self, row: int, at: int) -> str:
        name, own = self.structure.names[row], self._offered.names[at]
        return quoted(name) if name == own else f"{quoted(name)} ({quoted(own)} in the checkpoint)"

    def _refusal(self, row: int, at: int, element: int, value: "int | float") -> CastError:
        wanted = self.structure.dtype(row)
        place = [int(index) for index in np.unravel_index(element, self.structure.shape(row))]
        where = f" at {place}" if place else ""
        return CastError(
            f"tensor {self._shown(row, at)} of {self.origin} has the value {value}{where}, which {wanted} cannot hold "
            f"({self._holds(wanted)}): serve the model in {self._offered.dtype(at)}, or bring the value into range "
            "where the checkpoint is made",
            tensor=self.structure.names[row],
        )

    def _differ(self, row: int, twin: int) -> TensorMismatch:
        one, other = self._offered.names[row], self._offered.names[twin]
        return TensorMismatch(
            f"the resident model ties {quoted(one)} and {quoted(other)}, but {self.origin} has different values for "
            "them: push a checkpoint in which they are equal, or serve the model untied",
            tensor=other,
        )


def _consecutive(rows: list[int]) -> Sequence[int]:
    """``rows``, as a range where they are one."""
    whole = range(rows[0], rows[0] + len(rows))
    return whole if rows == list(whole) else rows


def _apart(content: bytearray, sizes: list[int] | None) -> list[memoryview]:
    """``content`` in pieces of ``sizes``."""
    view = memoryview(content)
    if sizes is None:
        return [view]
    return [view[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
