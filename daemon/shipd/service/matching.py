"""Whether an offered structure can become a version of a resident model, and if not, every reason why."""

from shipproto.structure import Structure


def mismatches(offered: Structure, resident: Structure, transient: Structure) -> list[str]:
    """Every difference that stands in the way, as load_state_dict would list them; empty if there is none.

    resident    what a version must have: the model's state_dict()
    transient   non-persistent buffers: an offered tensor that matches one is skipped, not refused
    A tensor that the resident model ties to one that was offered need not be offered itself.
    """
    missing: list[str] = []
    wrong: list[str] = []
    offered_groups = {int(resident.primary[resident.index[name]]) for name in offered.names if name in resident.index}
    for row, name in enumerate(resident.names):
        at = offered.index.get(name)
        if at is None:
            if int(resident.primary[row]) not in offered_groups:
                missing.append(f"missing: {name} ({resident.dtype(row)} {_shape(resident, row)})")
            continue
        if offered.shape(at) != resident.shape(row):
            wrong.append(f"shape: {name} is {_shape(offered, at)}, the resident model has {_shape(resident, row)}")
        if offered.dtypes[at] != resident.dtypes[row]:
            wrong.append(f"dtype: {name} is {offered.dtype(at)}, the resident model has {resident.dtype(row)}")
    unexpected = [
        f"unexpected: {name} ({offered.dtype(at)} {_shape(offered, at)})"
        for at, name in enumerate(offered.names)
        if name not in resident.index and not _is_transient(offered, at, transient)
    ]
    return missing + unexpected + wrong


def _is_transient(offered: Structure, row: int, transient: Structure) -> bool:
    at = transient.index.get(offered.names[row])
    return (
        at is not None
        and bool(transient.dtypes[at] == offered.dtypes[row])
        and transient.shape(at) == offered.shape(row)
    )


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
