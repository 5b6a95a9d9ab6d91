"""What keeps tensors from becoming a version of a model, in the words in which a sender and a daemon say so."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shipd.matching.casting import castable
from shipproto.structure import Structure, alike, rows_in, same_shapes

_Rows = npt.NDArray[np.int64]

_HEADLINES: Final = {
    "missing": "{} missing",
    "unexpected": "{} unexpected",
    "shape": "{} of another shape",
    "dtype": "{} of another dtype",
    "collision": "{} of a name that others have as well",
    "rename": "{} wrong in the rules for names",
    "ambiguous": "more than one way to match the names",
    "nothing": "nothing to send",
}
"""How many problems of each kind there are, in a headline."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a checkpoint cannot be pushed.

    kind    a key of the headlines: "missing", "unexpected", "shape", "dtype", "collision" (two tensors would get one
            name), "rename" (a rule or an entry of a mapping file is wrong), "ambiguous" (names fit in several ways),
            "nothing" (there is nothing to send)
    tensor  the name that it is about, the model's where both sides have one; empty where it is about more than one
    text    one line that begins with the kind
    notes   what else there is to say of it, a line each
    """

    kind: str
    tensor: str
    text: str
    notes: tuple[str, ...] = ()


def mismatches(offered: Structure, resident: Structure, transient: Structure, *, partial: bool = False) -> list[str]:
    """Every difference that stands in the way, as load_state_dict would list them; empty if there is none.

    resident    what a version must have: the model's state_dict()
    transient   non-persistent buffers: an offered tensor that matches one is skipped, not refused
    partial     what is not offered keeps its value, so that nothing is missing
    A tensor that the resident model ties to one that was offered need not be offered itself.
    """
    found = rows_in(offered.names, resident)
    extra = np.flatnonzero(found < 0)
    extra = extra[~are_transient(offered, extra, transient, rows_in([offered.names[row] for row in extra], transient))]
    problems = [
        *(() if partial else missing(resident, absent(resident, found))),
        *unexpected(offered, extra),
        *unlike(offered, resident, found, cast=False),
    ]
    return [problem.text for problem in problems]


def absent(resident: Structure, found: _Rows) -> _Rows:
    """Rows of the model's tensors that are not there, and are tied to none that is.

    found  i64[k], rows of ``resident`` that are there, and -1
    """
    there = np.zeros(len(resident), dtype=np.bool_)
    there[resident.primary[found[found >= 0]]] = True
    return np.flatnonzero(~there[resident.primary])


def are_transient(
    offered: Structure, rows: _Rows, transient: Structure, at: _Rows, *, cast: bool = False
) -> npt.NDArray[np.bool_]:
    """bool[k]: whether the offered tensor in ``rows[k]`` is like the transient one in ``at[k]``; -1 is none.

    With ``cast`` its dtype may be one that would be cast.
    """
    match = at >= 0
    same = alike(offered, rows[match], transient, at[match])
    if cast:
        may = castable(offered.dtypes[rows[match]], transient.dtypes[at[match]])
        same |= may & same_shapes(offered, rows[match], transient, at[match])
    match[match] = same
    return match


def missing(resident: Structure, rows: _Rows) -> list[Problem]:
    """The model's tensors in ``rows`` are not there."""
    return [
        Problem("missing", resident.names[row], f"missing: {resident.names[row]} ({_kind(resident, row)})")
        for row in rows.tolist()
    ]


def unexpected(offered: Structure, rows: _Rows) -> list[Problem]:
    """The model has none of the offered tensors in ``rows``."""
    return [
        Problem("unexpected", offered.names[row], f"unexpected: {offered.names[row]} ({_kind(offered, row)})")
        for row in rows.tolist()
    ]


def unlike(offered: Structure, resident: Structure, found: _Rows, *, cast: bool) -> list[Problem]:
    """Tensors that both have, with another shape or dtype, in the model's order.

    found  i64[len(offered)], the row of ``resident`` that each offered tensor becomes, -1 for none
    cast   dtypes may differ where they can be cast
    """
    given = np.flatnonzero(found >= 0)
    given = given[np.argsort(found[given], kind="stable")]
    wanted = found[given]
    other_shape = ~same_shapes(offered, given, resident, wanted)
    other_dtype = offered.dtypes[given] != resident.dtypes[wanted]
    if cast:
        other_dtype &= ~castable(offered.dtypes[given], resident.dtypes[wanted])
    problems = []
    for at in np.flatnonzero(other_shape | other_dtype).tolist():
        row, of = int(wanted[at]), int(given[at])
        name = resident.names[row]
        shown = name if offered.names[of] == name else f"{name} ({offered.names[of]} in the checkpoint)"
        if other_shape[at]:
            text = f"shape: {shown} is {shape(offered, of)}, the resident model has {shape(resident, row)}"
            problems.append(Problem("shape", name, text))
        if other_dtype[at]:
            text = f"dtype: {shown} is {offered.dtype(of)}, the resident model has {resident.dtype(row)}"
            problems.append(Problem("dtype", name, text))
    return problems


def _kind(structure: Structure, row: int) -> str:
    return f"{structure.dtype(row)} {shape(structure, row)}"


def shape(structure: Structure, row: int) -> str:
    """The shape of the tensor in ``row``, as "[2, 3]"."""
    return "[" + ", ".join(map(str, structure.shape(row))) + "]"


def summarise(problems: Iterable[str], model: str) -> str:
    """The headline over a list of mismatches, each beginning with its kind."""
    return f"the tensors do not match model {model!r}: {counted(text.partition(':')[0] for text in problems)}"


def counted(kinds: Iterable[str]) -> str:
    """How many problems of each kind there are: "2 missing, 1 of another shape"."""
    every = list(kinds)
    return ", ".join(words.format(every.count(kind)) for kind, words in _HEADLINES.items() if kind in every)
