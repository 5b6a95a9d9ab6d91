"""Which reading of the names of both sides fits: as they are, or without what wrapping, nesting and peft do to them.

A view is a pair of columns of keys, made of the names of both sides: tensors with equal keys are one. Views are tried
from the plainest on, and the first that fits is taken: one that leaves nothing over that may not be left over. Of two
of a kind that both fit neither is taken, since only the user can know: no encoder's tensors may become a decoder's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shipd.matching.adapters import adapters_in, saved_names
from shipd.matching.differences import are_transient
from shipd.matching.names import (
    UNMISTAKABLE,
    WRAPPERS,
    common_prefix,
    likely_prefixes,
    unwrap,
    without_prefix,
    wrapping,
)
from shipd.units import count_tensors
from shipproto.structure import Structure, same_shapes

_Rows = npt.NDArray[np.int64]

_CANDIDATES: Final = 3
"""Prefixes of a side that are tried."""


@dataclass(frozen=True)
class Names:
    """Both sides, as they are to be matched.

    own      the offered tensors' names after the user's rules; of dropped rows something that is no name
    offered, resident, transient  the structures
    pinned   {offered row: row of the model} that the user has said
    dropped  offered rows that take no part
    policy   what may be left over
    cast     whether dtypes may differ
    """

    own: Sequence[str]
    offered: Structure
    resident: Structure
    transient: Structure
    pinned: dict[int, int]
    dropped: frozenset[int]
    policy: str
    cast: bool


class Reading(NamedTuple):
    """How names become keys: wrappers and then a prefix are taken off on both sides, and of the model's an adapter's
    name in between."""

    wrappers: tuple[str, ...] = ()
    adapter: str = ""
    own_prefix: str = ""
    its_prefix: str = ""

    @property
    def exchanges(self) -> bool:
        """Whether one prefix is put in place of another."""
        return bool(self.own_prefix and self.its_prefix)


PLAIN: Final = Reading()
"""Names as they are."""


@dataclass(frozen=True)
class View:
    """What a reading makes of the names.

    found      i64[len(offered)], the row of the model that each offered tensor is, -1 for none
    transient  bool[len(offered)], whether it is a non-persistent buffer of the model
    shared     bool[len(offered)], whether the model lacks it, and it is tied to one that the model has
    placed     how many offered tensors the model has with that shape
    left       offered rows that are none of these
    lacking    how many of the model's tensors nothing is sent for
    """

    reading: Reading
    found: _Rows
    transient: npt.NDArray[np.bool_]
    shared: npt.NDArray[np.bool_]
    placed: int
    left: _Rows
    lacking: int


@dataclass(frozen=True)
class Collision:
    """Two names of one side that become one key.

    rival  what the prefix would mean for the names that begin with it alone: it is not taken, but another view of the
           kind is not either where this may be what is meant
    """

    reading: Reading
    side: str
    one: str
    other: str
    key: str
    rival: View | None = None


@dataclass(frozen=True)
class Choice:
    """The view that is taken, what it would do where there is more than one of a kind, and those that did not work."""

    view: View
    ambiguous: tuple[View, ...] = ()
    collisions: tuple[Collision, ...] = ()


class _Keys(NamedTuple):
    own: list[str]
    resident: list[str]
    transient: list[str]


def choose(names: Names) -> Choice:
    """The view to take. Where none fits, the one that places most, so that what is said about the rest is of use."""
    plain = _Keys(list(names.own), list(names.resident.names), list(names.transient.names))
    best = _view(names, PLAIN, plain)
    assert isinstance(best, View), "names of a structure are unique, and of those that are not rows are dropped"
    if _fits(names, best):
        return Choice(best)
    collisions: list[Collision] = []
    loose: list[View] = []
    at_most = min(len(names.offered) - len(names.dropped), len(names.resident))
    for stage in _stages(names, plain):
        if best.placed >= at_most:
            break
        views: list[View] = []
        rivals: list[View] = []
        for view in stage.views:
            if isinstance(view, Collision):
                collisions.append(view)
                if view.rival is not None and _fits(names, view.rival):
                    rivals.append(view.rival)
            elif not any(np.array_equal(view.found, other.found) for other in views):
                views.append(view)
        fitting = [view for view in views if _fits(names, view)]
        # What fits only since tensors are shared may place fewer of them than a later view, and the wrong ones.
        whole = [view for view in fitting if not view.shared.any() or stage.single]
        if whole:
            whole += [rival for rival in rivals if _contradict(names, rival, whole[0])]
            return (
                Choice(best, tuple(whole), tuple(collisions))
                if len(whole) > 1
                else Choice(whole[0], (), tuple(collisions))
            )
        loose += fitting
        views = [view for view in views if view.placed > best.placed and (stage.single or _is_most(names, view))]
        if views:
            views.sort(key=lambda view: -view.placed)
            if names.policy == "partial" and (ways := _ways(names, views)):
                return Choice(best, ways, tuple(collisions))
            best = views[0]
    if loose:
        loose.sort(key=lambda view: -view.placed)
        best = loose[0]
        return Choice(best, _ways(names, loose), tuple(collisions))
    return Choice(best, (), tuple(collisions))


def _ways(names: Names, views: Sequence[View]) -> tuple[View, ...]:
    """The first of ``views`` and those that it cannot be reconciled with; empty where there are none."""
    others = tuple(view for view in views[1:] if _contradict(names, view, views[0]))
    return (views[0], *others) if others else ()


def _contradict(names: Names, one: View, other: View) -> bool:
    """Whether the two would give a tensor of the model other bytes each, or send one to two places."""
    bytes_of, place_of = names.offered.primary, names.resident.primary
    both = np.flatnonzero((one.found >= 0) & (other.found >= 0))
    if bool((place_of[one.found[both]] != place_of[other.found[both]]).any()):
        return True
    given = np.full((2, len(names.resident)), -1, dtype=np.int64)
    for at, view in enumerate((one, other)):
        rows = np.flatnonzero(view.found >= 0)
        given[at, view.found[rows]] = bytes_of[rows]
    return bool(((given[0] != given[1]) & (given >= 0).all(axis=0)).any())


def _fits(names: Names, view: View) -> bool:
    # One prefix for another says that two modules are one. Of a part of the model that is a guess: decoder.layers.* are
    # not encoder.layers.*, though each of them has a place there.
    if names.policy == "strict" or view.reading.exchanges:
        return not len(view.left) and not view.lacking
    if names.policy == "subset":
        return not len(view.left) and bool((view.found >= 0).any())
    return bool((view.found >= 0).any()) and (not len(view.left) or not view.lacking)


def _is_most(names: Names, view: View) -> bool:
    """Whether it places more than half of the smaller side: a few names that agree say nothing."""
    if view.reading.exchanges and names.policy != "strict":
        return False
    return 2 * view.placed > min(len(names.offered) - len(names.dropped), len(names.resident))


class _Stage(NamedTuple):
    """Views of a kind, and whether there is only one of it."""

    views: Iterable[View | Collision]
    single: bool = False


def _stages(names: Names, plain: _Keys) -> Iterator[_Stage]:
    """The plainest first."""
    unwrapped = _unwrapped(plain)
    for wrappers, keys in unwrapped:
        if wrappers:
            yield _Stage([_view(names, Reading(wrappers), keys)], single=True)
    for wrappers, keys in unwrapped:
        yield _Stage(_prefixed(names, Reading(wrappers), keys))
    adapters = adapters_in(plain.resident)
    if adapters:
        yield _Stage(view for wrappers, keys in unwrapped for view in _adapted(names, wrappers, keys, adapters))


def _unwrapped(plain: _Keys) -> list[tuple[tuple[str, ...], _Keys]]:
    """The keys as they are, without wrappers, and without those that cannot be mistaken, where that is not the same."""
    found: list[tuple[tuple[str, ...], _Keys]] = [((), plain)]
    text = "\n".join(map("\n".join, plain))
    for listed in (WRAPPERS, UNMISTAKABLE):
        wrappers = tuple(wrapper for wrapper in listed if wrapper in text)
        keys = _Keys(*(unwrap(column, wrappers) for column in plain))
        if all(keys != other for _, other in found):
            found.append((wrappers, keys))
    return found


def _prefixed(names: Names, reading: Reading, keys: _Keys) -> Iterator[View | Collision]:
    """With prefixes taken off either side, or both."""
    own, its = frozenset(keys.own), frozenset(keys.resident)
    pairs = [(prefix, "") for prefix in likely_prefixes(keys.own, its, _CANDIDATES)]
    pairs += [("", prefix) for prefix in likely_prefixes(keys.resident, own, _CANDIDATES)]
    apart = names.dropped | names.pinned.keys()
    pinned = frozenset(names.pinned.values())
    left = [key for row, key in enumerate(keys.own) if row not in apart] if apart else keys.own
    open_names = [key for row, key in enumerate(keys.resident) if row not in pinned] if pinned else keys.resident
    pairs.append((common_prefix(left), common_prefix(open_names)))
    for own_prefix, its_prefix in dict.fromkeys(pairs):
        if own_prefix == its_prefix:
            continue
        cut = _Keys(
            without_prefix(keys.own, own_prefix) if own_prefix else keys.own,
            without_prefix(keys.resident, its_prefix) if its_prefix else keys.resident,
            without_prefix(keys.transient, its_prefix) if its_prefix else keys.transient,
        )
        prefixed = reading._replace(own_prefix=own_prefix, its_prefix=its_prefix)
        view = _view(names, prefixed, cut)
        if isinstance(view, Collision):
            inner = _Keys(
                _beginning(keys.own, own_prefix, "own"),
                _beginning(keys.resident, its_prefix, "resident"),
                _beginning(keys.transient, its_prefix, "transient"),
            )
            rival = _view(names, prefixed, inner)
            view = replace(view, rival=rival if isinstance(rival, View) else None)
        yield view


def _beginning(keys: Sequence[str], prefix: str, side: str) -> list[str]:
    """``keys`` without ``prefix``, and something that is none, and on no other side, in place of all others."""
    return [key.removeprefix(prefix) if key.startswith(prefix) else f"\n{side} {row}" for row, key in enumerate(keys)]


def _adapted(
    names: Names, wrappers: tuple[str, ...], keys: _Keys, adapters: Sequence[str]
) -> Iterator[View | Collision]:
    """As peft saves each adapter; with prefixes, where that alone does not fit."""
    for adapter in adapters:
        reading = Reading(wrappers, adapter)
        saved = keys._replace(resident=saved_names(keys.resident, adapter))
        view = _view(names, reading, saved)
        yield view
        if not isinstance(view, View) or not _fits(names, view):
            yield from _prefixed(names, reading, saved)


def _view(names: Names, reading: Reading, keys: _Keys) -> View | Collision:
    index = dict(zip(keys.resident, range(len(keys.resident)), strict=True))
    if len(index) < len(keys.resident):
        return _collision(reading, "model", names.resident.names, keys.resident)
    if len(set(keys.own)) < len(keys.own):
        return _collision(reading, "checkpoint", names.own, keys.own)
    found = np.fromiter((index.get(key, -1) for key in keys.own), dtype=np.int64, count=len(keys.own))
    for row, at in names.pinned.items():
        others = np.flatnonzero(found == at)
        found[others[others != row]] = -1
        found[row] = at
    open_rows = np.flatnonzero(found < 0)
    if names.dropped:
        open_rows = open_rows[~np.isin(open_rows, list(names.dropped))]
    transient = np.zeros(len(found), dtype=np.bool_)
    shared = np.zeros(len(found), dtype=np.bool_)
    if len(open_rows):
        spare = dict(zip(keys.transient, range(len(keys.transient)), strict=True))
        if len(spare) < len(keys.transient):
            return _collision(reading, "model", names.transient.names, keys.transient)
        at_spare = np.fromiter(
            (spare.get(keys.own[row], -1) for row in open_rows), dtype=np.int64, count=len(open_rows)
        )
        transient[open_rows] = are_transient(names.offered, open_rows, names.transient, at_spare, cast=names.cast)
        there = np.zeros(len(found), dtype=np.bool_)
        there[names.offered.primary[found >= 0]] = True
        shared[open_rows] = there[names.offered.primary[open_rows]] & ~transient[open_rows]
        open_rows = open_rows[~transient[open_rows] & ~shared[open_rows]]
    placed = np.flatnonzero(found >= 0)
    covered = np.zeros(len(names.resident), dtype=np.bool_)
    covered[names.resident.primary[found[placed]]] = True
    return View(
        reading=reading,
        found=found,
        transient=transient,
        shared=shared,
        placed=int(same_shapes(names.offered, placed, names.resident, found[placed]).sum()),
        left=open_rows,
        lacking=int((~covered[names.resident.primary]).sum()),
    )


def _collision(reading: Reading, side: str, names: Sequence[str], keys: Sequence[str]) -> Collision:
    first: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        other = first.setdefault(key, name)
        if other is not name:
            return Collision(reading, side, other, name, key)
    raise AssertionError("the keys are unique")


def keys(reading: Reading, own: Sequence[str], resident: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a reading makes of names of the checkpoint, after the user's rules, and of names of the model."""
    given, wanted = unwrap(own, reading.wrappers), unwrap(resident, reading.wrappers)
    if reading.adapter:
        wanted = saved_names(wanted, reading.adapter)
    return without_prefix(given, reading.own_prefix), without_prefix(wanted, reading.its_prefix)


def describe(view: View, own: Sequence[str], resident: Sequence[str]) -> list[str]:
    """What the view does to names, a line for each thing: "module.* -> * (365 tensors)"."""
    rows = np.flatnonzero(view.found >= 0)
    pairs = [(own[row], resident[at]) for row, at in zip(rows.tolist(), view.found[rows].tolist(), strict=True)]
    pairs = [(name, target) for name, target in pairs if name != target]
    lines = []
    reading = view.reading
    if reading.wrappers:
        given = wrapping([name for name, _ in pairs], reading.wrappers)
        wanted = wrapping([target for _, target in pairs], reading.wrappers)
        if given & wanted:
            # Taken off one name and put before another: pair by pair, or the one would hide the other.
            given, wanted = Counter(), Counter()
            for name, target in pairs:
                one, other = wrapping([name], reading.wrappers), wrapping([target], reading.wrappers)
                given.update(one - other)
                wanted.update(other - one)
        lines += [f"{_taken(part, '*')} ({count_tensors(count)})" for part, count in given.items()]
        lines += [f"{_put(part, '*')} ({count_tensors(count)})" for part, count in wanted.items()]
    if reading.own_prefix or reading.its_prefix:
        count = sum(
            without.startswith(reading.own_prefix) and target.startswith(reading.its_prefix)
            for without, target in zip(
                unwrap([name for name, _ in pairs], reading.wrappers or ()),
                unwrap([target for _, target in pairs], reading.wrappers or ()),
                strict=True,
            )
        )
        lines.append(f"{reading.own_prefix}* -> {reading.its_prefix}* ({count_tensors(count)})")
    if reading.adapter:
        saved = saved_names([target for _, target in pairs], reading.adapter)
        count = sum(short != target for short, (_, target) in zip(saved, pairs, strict=True))
        lines.append(f"adapter {reading.adapter!r} ({count_tensors(count)})")
    return lines


def _taken(part: str, rest: str) -> str:
    return f"*{part}* -> *.{rest}" if part.startswith(".") else f"{part}* -> {rest}"


def _put(part: str, rest: str) -> str:
    return f"*.{rest} -> *{part}*" if part.startswith(".") else f"{rest} -> {part}*"


def attempted(reading: Reading) -> str:
    """What a reading does, as the beginning of a sentence."""
    parts = [*(f"{wrapper}." for wrapper in reading.wrappers), reading.own_prefix, reading.its_prefix]
    listed = ", ".join(dict.fromkeys(part for part in parts if part))
    adapter = f"the name of the adapter {reading.adapter!r}" if reading.adapter else ""
    return f"taking {' and '.join(filter(None, (listed, adapter)))} off names"
