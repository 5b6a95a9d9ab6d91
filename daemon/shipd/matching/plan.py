"""What a push would send for a model, made of the structures of both sides: every name, cast and omission, and every
reason why it cannot be done.

Nothing here looks at bytes. What only they tell (a value that does not fit, tied tensors that differ) is checked where
they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shipd.matching import differences, views
from shipd.matching.differences import Problem
from shipd.matching.renames import Rename, Renamed, Rule, apply_renames
from shipd.units import count_tensors
from shipproto.description import POLICIES
from shipproto.dtypes import BY_CODE
from shipproto.structure import Structure

_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """What a push may do to make a checkpoint fit. Hashable, so that plans can be kept by it.

    policy   "strict", "subset" (the checkpoint may lack tensors, which keep their values) or "partial" (and it may have
             others, which are left out)
    cast     whether tensors may be cast to the dtypes of the model's
    renames  rules and mapping files of the user's, see ``parse_rename`` and ``load_renames``
    """

    policy: str = "strict"
    cast: bool = False
    renames: tuple[Rename, ...] = ()

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"the policy is {self.policy!r}: it is one of {', '.join(POLICIES)}")


class Cast(NamedTuple):
    """How much is cast from one dtype to another: tensors, and bytes as they are sent."""

    tensors: int
    nbytes: int


STRICT: Final = Rules()
"""Nothing may be left over, and nothing is cast."""


class Alternative(NamedTuple):
    """One of several ways to match the names that all fit.

    how      as in ``Plan``
    reading  of the names of both sides
    found    i64[len(offered)], the row of the model that each offered tensor would be, -1 for none
    """

    how: tuple[str, ...]
    reading: views.Reading
    found: _Rows


def _no_rows() -> _Rows:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Plan:
    """What becomes what. Whether it can be pushed: ``problems`` is empty then.

    offered, resident, transient, rules  what the plan was made of
    structure    what is sent: the model's names, dtypes and ties, sorted
    rows         i64[len(structure)], the row of ``offered`` that each tensor comes from
    identity     nothing is changed: what is offered is sent as it is
    how          a line for each rule by which names were matched, the user's and those that were found:
                 "module.* -> * (365 tensors)"
    renamed      (name in the checkpoint, name in the model) where they differ
    casts        {(from, to): how much}, by dtypes
    tied         (name, other name): the checkpoint lacks the first, and the model ties it to the other, which is sent
    equal_pairs  (row of ``structure``, row of ``offered``): the model ties tensors that the checkpoint has apart. The
                 offered tensor is not sent, and its bytes must be those that are sent for the row
    skipped      offered tensors that are not sent: non-persistent buffers of the model
    shared       offered tensors that are not sent: the model lacks them, and they share bytes with others that are
    ignored      offered tensors that are not sent: the policy allows that the model lacks them
    kept         tensors of the model that nothing is sent for; they keep their values
    notes        what was tried and not done, a line each
    problems     why this cannot be pushed
    called       what each offered tensor is called after the user's rules
    unused       of the user's rules those that match nothing
    reading      how these and the model's names were read
    left         rows of ``offered`` that became nothing, whether that is allowed or not
    lacking      rows of ``resident`` that nothing is sent for, whether that is allowed or not
    choices      where more than one way to match the names fits, all of them
    """

    offered: Structure
    resident: Structure
    transient: Structure
    rules: Rules
    structure: Structure
    rows: _Rows
    identity: bool = False
    how: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    casts: Mapping[tuple[str, str], Cast] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    equal_pairs: tuple[tuple[int, int], ...] = ()
    skipped: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    called: tuple[str, ...] = ()
    unused: tuple[Rule, ...] = ()
    reading: views.Reading = views.PLAIN
    left: _Rows = field(default_factory=_no_rows)
    lacking: _Rows = field(default_factory=_no_rows)
    choices: tuple[Alternative, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether tensors of the model keep their values, so that what is sent is not a whole version."""
        return bool(self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes that are sent, each tied group once."""
        return self.structure.total_bytes


def make_plan(offered: Structure, resident: Structure, transient: Structure, rules: Rules = STRICT) -> Plan:
    """How ``offered`` becomes a version of the model ``resident``, or a part of one.

    transient  non-persistent buffers of the model, which a checkpoint may have and nothing is sent for

    Whatever does not fit is among the plan's problems; this raises nothing for it.
    """
    if not rules.renames and _same(offered, resident):
        rows = np.arange(len(offered), dtype=np.int64)
        empty = rules.policy != "strict" and not len(offered)
        return Plan(
            *(offered, resident, transient, rules, offered, rows),
            identity=True,
            called=offered.names,
            problems=(_nothing(offered),) if empty else (),
        )
    renamed = apply_renames(offered.names, rules.renames)
    problems = _rename_problems(renamed, rules, offered, resident)
    own, dropped, collisions = _unique(renamed.names, offered)
    problems += collisions
    pinned = {row: resident.index[own[row]] for row in renamed.touched if own[row] in resident.index}
    choice = views.choose(
        views.Names(own, offered, resident, transient, pinned, frozenset(dropped), rules.policy, rules.cast)
    )
    view = choice.view
    if choice.ambiguous:
        problems.append(_ambiguity(choice, own, resident))
    lacking = differences.absent(resident, view.found)
    if not choice.ambiguous:
        if rules.policy == "strict":
            problems += differences.missing(resident, lacking)
        if rules.policy != "partial":
            problems += differences.unexpected(offered, view.left)
        if rules.policy != "strict" and not (view.found >= 0).any() and not problems:
            problems.append(_nothing(offered))
        problems += differences.unlike(offered, resident, view.found, cast=rules.cast)
    sent = _Sent.of(offered, resident, view.found, lacking)
    pairs = [
        (offered.names[row], resident.names[at])
        for row, at in zip(sent.given.tolist(), view.found[sent.given].tolist(), strict=True)
    ]
    return Plan(
        *(offered, resident, transient, rules, sent.structure, sent.rows),
        identity=_same(offered, sent.structure) and bool((sent.rows == np.arange(len(offered))).all()),
        how=(*_said(renamed, rules), *views.describe(view, own, resident.names)),
        renamed=tuple((name, target) for name, target in pairs if name != target),
        casts=_casts(offered, sent),
        tied=sent.tied,
        equal_pairs=sent.equal_pairs,
        skipped=_names(offered, np.flatnonzero(view.transient)),
        shared=_names(offered, np.flatnonzero(view.shared)),
        ignored=_names(offered, view.left) if rules.policy == "partial" else (),
        kept=_names(resident, lacking) if rules.policy != "strict" else (),
        notes=tuple(map(_collided, choice.collisions)),
        problems=tuple(problems),
        called=tuple(own),
        unused=tuple(
            rename
            for rename, count in zip(rules.renames, renamed.counts, strict=True)
            if isinstance(rename, Rule) and not count
        ),
        reading=view.reading,
        left=view.left,
        lacking=lacking,
        choices=tuple(
            Alternative(tuple(views.describe(other, own, resident.names)), other.reading, other.found)
            for other in choice.ambiguous
        ),
    )


def _same(one: Structure, other: Structure) -> bool:
    return one is other or (
        one.names == other.names
        and np.array_equal(one.dtypes, other.dtypes)
        and np.array_equal(one.ndims, other.ndims)
        and np.array_equal(one.dims, other.dims)
        and np.array_equal(one.primary, other.primary)
    )


def _names(structure: Structure, rows: _Rows) -> tuple[str, ...]:
    return tuple(structure.names[row] for row in rows.tolist())


# --- names -----------------------------------------------------------------------------------------------------------


def _unique(names: list[str], offered: Structure) -> tuple[list[str], list[int], list[Problem]]:
    """``names`` with something that is none in place of those that others have already, their rows, and why."""
    if len(set(names)) == len(names):
        return names, [], []
    own, dropped, problems = list(names), [], []
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        other = first.setdefault(name, row)
        if other != row:
            own[row] = f"\n{row}"
            dropped.append(row)
            text = f"collision: {offered.names[other]} and {offered.names[row]} would both be called {name}"
            problems.append(Problem("collision", name, text))
    return own, dropped, problems


def _rename_problems(renamed: Renamed, rules: Rules, offered: Structure, resident: Structure) -> list[Problem]:
    problems = []
    for rename, count in zip(rules.renames, renamed.counts, strict=True):
        if isinstance(rename, Rule):
            if not count:
                text = f"rename: the rule '{rename}' matches none of the checkpoint's {len(offered)} names"
                problems.append(Problem("rename", "", text))
            continue
        for name, target in rename.entries:
            if name not in offered.index:
                text = f"rename: {rename.origin} maps {name}, which the checkpoint does not have"
                problems.append(Problem("rename", name, text))
            if target not in resident.index:
                text = f"rename: {rename.origin} maps {name} to {target}, which the model does not have"
                problems.append(Problem("rename", target, text))
    return problems


def _said(renamed: Renamed, rules: Rules) -> list[str]:
    """What the user's rules did."""
    return [
        f"{rename.option if isinstance(rename, Rule) else rename.origin} ({count_tensors(count)})"
        for rename, count in zip(rules.renames, renamed.counts, strict=True)
        if count
    ]


def _ambiguity(choice: views.Choice, own: list[str], resident: Structure) -> Problem:
    adapters = [view.reading.adapter for view in choice.ambiguous]
    if all(adapters):
        listed = " and ".join(", ".join(map(repr, adapters)).rsplit(", ", 1))
        text = f"ambiguous: the checkpoint fits {len(adapters)} adapters of the model: {listed}"
    else:
        text = f"ambiguous: the checkpoint's names fit the model in {len(choice.ambiguous)} ways"
    ways = (", ".join(views.describe(view, own, resident.names)) for view in choice.ambiguous)
    return Problem("ambiguous", "", text, () if all(adapters) else tuple(ways))


def _collided(collision: views.Collision) -> str:
    return (
        f"{views.attempted(collision.reading)} would make {collision.key} of two names of the {collision.side}, "
        f"{collision.one} and {collision.other}: it was not done"
    )


def _nothing(offered: Structure) -> Problem:
    if not len(offered):
        return Problem("nothing", "", "nothing: the checkpoint has no tensors")
    return Problem("nothing", "", f"nothing: none of the checkpoint's {len(offered)} tensors is one of the model's")


# --- what is sent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    """``given``: the offered rows that the model has, in the model's order. For the rest see ``Plan``."""

    structure: Structure
    rows: _Rows
    given: _Rows
    tied: tuple[tuple[str, str], ...]
    equal_pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, offered: Structure, resident: Structure, found: _Rows, lacking: _Rows) -> "_Sent":
        source = np.full(len(resident), -1, dtype=np.int64)
        given = np.flatnonzero(found >= 0)
        given = given[np.argsort(found[given], kind="stable")]
        source[found[given]] = given
        sent = np.ones(len(resident), dtype=np.bool_)
        sent[lacking] = False
        kept = np.flatnonzero(sent)
        structure = _part(resident, kept)
        rows = source[kept]
        there = np.flatnonzero(rows >= 0)
        # Of each tied group the bytes that the first of its tensors that is there has.
        groups, first = np.unique(structure.primary[there], return_index=True)
        chosen = np.full(len(structure), -1, dtype=np.int64)
        chosen[groups] = there[first]
        absent = np.flatnonzero(rows < 0)
        mates = chosen[structure.primary[absent]]
        tied = tuple(
            (structure.names[row], structure.names[mate])
            for row, mate in zip(absent.tolist(), mates.tolist(), strict=True)
        )
        rows[absent] = rows[mates]
        apart = offered.primary[rows[structure.primary[there]]] != offered.primary[rows[there]]
        apart = there[apart]
        pairs: dict[tuple[int, int], int] = {}
        for row in apart.tolist():
            # Those that the checkpoint ties to each other are the same bytes.
            pairs.setdefault((int(structure.primary[row]), int(offered.primary[rows[row]])), int(rows[row]))
        return cls(structure, rows, given, tied, tuple((row, other) for (row, _), other in pairs.items()))


def _part(structure: Structure, rows: _Rows) -> Structure:
    """The tensors in ``rows``, of tied groups all or none."""
    if len(rows) == len(structure):
        return structure
    at = np.full(len(structure), -1, dtype=np.int64)
    at[rows] = np.arange(len(rows))
    inside = np.zeros(len(structure), dtype=np.bool_)
    inside[rows] = True
    return Structure(
        names=tuple(structure.names[row] for row in rows.tolist()),
        dtypes=structure.dtypes[rows],
        ndims=structure.ndims[rows],
        dims=structure.dims[np.repeat(inside, structure.ndims)],
        primary=at[structure.primary[rows]],
    )


def _casts(offered: Structure, sent: _Sent) -> dict[tuple[str, str], Cast]:
    given, wanted = offered.dtypes[sent.rows], sent.structure.dtypes
    own = sent.structure.primary == np.arange(len(sent.structure))
    other = (given != wanted) & own
    pairs = given[other].astype(np.int64) << 8 | wanted[other]
    sizes = sent.structure.nbytes[other]
    return {
        (BY_CODE[pair >> 8].name, BY_CODE[pair & 255].name): Cast(
            int((pairs == pair).sum()), int(sizes[pairs == pair].sum())
        )
        for pair in np.unique(pairs).tolist()
    }
