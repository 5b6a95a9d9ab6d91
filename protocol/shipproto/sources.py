"""What a sender sends for each tensor that a receiver wants: the structure that rules need not be the one offered."""

import numpy as np
import numpy.typing as npt

from shipproto.errors import MalformedMessage
from shipproto.structure import Structure, alike, rows_in


def sources(offered: Structure, wanted: Structure) -> tuple[npt.NDArray[np.int64], list[tuple[int, int]]]:
    """For each wanted row the offered row that has its bytes, and pairs of offered rows that must be equal.

    The wanted structure may lack offered tensors (non-persistent buffers) and may tie what was offered
    apart; it can contain nothing that was not offered. Raises MalformedMessage otherwise.
    """
    if wanted is offered:
        return np.arange(len(offered), dtype=np.int64), []
    rows = rows_in(wanted.names, offered)
    there = np.flatnonzero(rows >= 0)
    same = alike(wanted, there, offered, rows[there])
    if not bool(same.all()):
        name = wanted.names[int(there[np.argmin(same)])]
        raise MalformedMessage(f"the receiver wants tensor {name!r} with another dtype or shape than was offered")
    # Of each group of the wanted structure: the bytes that the first offered tensor of the group has.
    groups, sources = wanted.primary[there], offered.primary[rows[there]]
    firsts, first = np.unique(groups, return_index=True)
    chosen = np.full(len(wanted), -1, dtype=np.int64)
    chosen[firsts] = sources[first]
    differs = np.flatnonzero(chosen[groups] != sources)
    equal = list(zip(chosen[groups[differs]].tolist(), sources[differs].tolist(), strict=True))
    absent = np.flatnonzero(rows < 0)
    rows[absent] = chosen[wanted.primary[absent]]
    if not bool((rows >= 0).all()):
        name = wanted.names[int(np.argmin(rows))]
        raise MalformedMessage(f"the receiver wants tensor {name!r}, which was not offered")
    return rows, equal
