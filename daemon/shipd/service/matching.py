"""Whether an offered structure can become a version of a resident model, and if not, every reason why."""

import numpy as np
import numpy.typing as npt

from shipproto.structure import Structure, alike, rows_in, same_shapes


def mismatches(offered: Structure, resident: Structure, transient: Structure, *, partial: bool = False) -> list[str]:
    """Every difference that stands in the way, as load_state_dict would list them; empty if there is none.

    resident    what a version must have: the model's state_dict()
    transient   non-persistent buffers: an offered tensor that matches one is skipped, not refused
    partial     what is not offered keeps its value, so that nothing is missing
    A tensor that the resident model ties to one that was offered need not be offered itself.
    """
    # As columns: what is wrong is put into words, what is right costs nothing that can be felt with 20,000 tensors.
    offered_rows = rows_in(resident.names, offered)
    resident_rows = rows_in(offered.names, resident)
    offered_groups = np.zeros(len(resident), dtype=np.bool_)
    offered_groups[resident.primary[resident_rows[resident_rows >= 0]]] = True
    absent = (offered_rows < 0) & ~offered_groups[resident.primary]
    missing = [
        f"missing: {resident.names[row]} ({resident.dtype(row)} {_shape(resident, row)})"
        for row in (() if partial else np.flatnonzero(absent).tolist())
    ]
    extra = np.flatnonzero(resident_rows < 0)
    unexpected = [
        f"unexpected: {offered.names[at]} ({offered.dtype(at)} {_shape(offered, at)})"
        for at in extra[~_are_transient(offered, extra, transient)].tolist()
    ]
    common = np.flatnonzero(offered_rows >= 0)
    theirs = offered_rows[common]
    other_shape = ~same_shapes(offered, theirs, resident, common)
    other_dtype = offered.dtypes[theirs] != resident.dtypes[common]
    wrong: list[str] = []
    for at in np.flatnonzero(other_shape | other_dtype).tolist():
        row, given = int(common[at]), int(theirs[at])
        name = resident.names[row]
        if other_shape[at]:
            wrong.append(f"shape: {name} is {_shape(offered, given)}, the resident model has {_shape(resident, row)}")
        if other_dtype[at]:
            wrong.append(f"dtype: {name} is {offered.dtype(given)}, the resident model has {resident.dtype(row)}")
    return missing + unexpected + wrong


def _are_transient(offered: Structure, rows: npt.NDArray[np.int64], transient: Structure) -> npt.NDArray[np.bool_]:
    """bool[k]: whether the offered tensor in ``rows[k]`` matches a transient one."""
    found = rows_in([offered.names[row] for row in rows.tolist()], transient)
    match = found >= 0
    match[match] = alike(offered, rows[match], transient, found[match])
    return match


def _shape(structure: Structure, row: int) -> str:
    return "[" + ", ".join(str(size) for size in structure.shape(row)) + "]"


def summarise(problems: list[str], model: str) -> str:
    """The headline over a list of mismatches."""
    counts = {
        kind: sum(problem.startswith(kind) for problem in problems)
        for kind in ("missing", "unexpected", "shape", "dtype")
    }
    parts = [
        f"{count} {word}"
        for (kind, count), word in zip(
            counts.items(), ("missing", "unexpected", "of another shape", "of another dtype"), strict=True
        )
        if count
    ]
    return f"the tensors do not match model {model!r}: {', '.join(parts)}"
