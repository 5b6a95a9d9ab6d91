"""A plan in words: what it would do, and what stands in its way with what to add to the command so that it fits.

Plain text in lines. Names come from files and other machines: nothing in them reaches a terminal as a command to it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from shipd.errors import TensorMismatch
from shipd.matching.differences import Problem, counted, shape
from shipd.matching.names import common_prefix
from shipd.matching.plan import Plan, make_plan
from shipd.matching.renames import Rule, Table
from shipd.matching.suggestions import Suggestion, closest, rules_for, suggest
from shipd.units import format_bytes
from shipproto.description import POLICIES
from shipproto.names import harmless

_SHOWN: Final = 8
"""Problems of a kind that are all shown."""

_FIRST: Final = 5
"""Of more than that so many are shown, and the rest counted."""

_FEW: Final = 3
"""Names in a sentence."""

_COMPARED: Final = 64
"""Names that one name is compared with."""

_NAMED: Final = ("missing", "unexpected", "nothing")
"""Kinds of problems of names that do not fit."""

_CAUSES: Final = ("rename", "collision", "ambiguous")
"""Kinds of problems that others may come of."""


def refusal(plan: Plan, *, model: str, origin: str, model_class: str = "") -> TensorMismatch:
    """The error that says why ``plan`` cannot be pushed, as ``explain`` does."""
    return TensorMismatch(
        explain(plan, model=model, origin=origin, model_class=model_class),
        problems=tuple(harmless(problem.text) for problem in plan.problems),
        model=model,
    )


def explain(plan: Plan, *, model: str, origin: str, model_class: str = "") -> str:
    """Why ``plan`` cannot be pushed, and what to do: a headline, the problems, and a last line with what to add.

    origin       where the tensors come from, as a source says
    model_class  of the resident model, where that is known
    """
    kinds = {problem.kind for problem in plan.problems}
    caused = bool(kinds & {*_CAUSES})
    suggestion = suggest(plan) if not caused and kinds & {*_NAMED} else None
    foreign = not caused and suggestion is None and _is_foreign(plan)
    named = f"model {model!r}" + (f" ({model_class})" if model_class else "")
    headline = f"the tensors of {_subject(origin)} do not match {named}: "
    if foreign:
        headline += f"not a single name fits, of {len(plan.offered)} there and {len(plan.resident)} in the model"
        lines = list(_both_sides(plan))
    else:
        headline += counted(problem.kind for problem in plan.problems)
        lines = [f"names were matched with {line}" for line in plan.how]
        lines += _problems(plan, suggestion)
    lines += [f"note: {note}" for note in plan.notes]
    help_line = _help(plan, suggestion, model_class, foreign=foreign)
    return "\n".join([harmless(headline), *(f"  {harmless(line)}" for line in lines), f"help: {harmless(help_line)}"])


def _subject(origin: str) -> str:
    return f"the {origin}" if origin == "state dict" else repr(harmless(origin))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _few(items: Iterable[str], most: int = _FEW) -> str:
    every = list(items)
    if len(every) <= most + 1:
        return ", ".join(every)
    return f"{', '.join(every[:most])} and {len(every) - most} more"


def _is_foreign(plan: Plan) -> bool:
    """Whether no name fits, however it is read."""
    found = len(plan.offered) - len(plan.left)
    return bool(len(plan.left) and len(plan.lacking)) and not found


def _both_sides(plan: Plan) -> Iterator[str]:
    for who, structure in (("checkpoint", plan.offered), ("model", plan.resident)):
        step = max(1, len(structure) // _FEW)
        rows = range(0, len(structure), step)[:_FEW]
        names = [f"{structure.names[row]} ({structure.dtype(row)} {shape(structure, row)})" for row in rows]
        more = len(structure) - len(names)
        yield f"the {who} has {', '.join(names)}{f' and {more} more' if more else ''}"


# --- problems --------------------------------------------------------------------------------------------------------


def _problems(plan: Plan, suggestion: Suggestion | None) -> Iterator[str]:
    groups: dict[str, list[Problem]] = defaultdict(list)
    effects: list[str] = []
    for problem in plan.problems:
        groups[problem.kind].append(problem)
    if not groups.keys().isdisjoint(_CAUSES):
        effects = [problem.kind for kind in groups.keys() - {*_CAUSES} for problem in groups.pop(kind)]
    for kind, problems in groups.items():
        if kind == "dtype" and len(problems) > _SHOWN:
            yield from _dtypes(plan)
            continue
        shown = problems if len(problems) <= _SHOWN else problems[:_FIRST]
        notes = _notes(plan, kind, shown, suggestion)
        for problem in shown:
            yield problem.text + notes.get(problem.tensor, "")
            yield from (f"  {note}" for note in problem.notes)
        rest = problems[len(shown) :]
        if rest:
            prefix = common_prefix([problem.tensor for problem in rest if problem.tensor])
            yield f"{kind}: and {len(rest)} more" + (f" under {prefix}*" if prefix else "")
    if effects:
        yield f"and {counted(effects)}, which may come of it"


def _dtypes(plan: Plan) -> Iterator[str]:
    """Dtypes that are wrong for many, by pairs of them."""
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for problem in plan.problems:
        if problem.kind == "dtype":
            pairs[_dtypes_of(plan, problem)].append(problem.tensor)
    for (given, wanted), names in pairs.items():
        are = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        yield f"dtype: {are} {given}, the resident model has {wanted}: {_few(names)}"


def _dtypes_of(plan: Plan, problem: Problem) -> tuple[str, str]:
    """The dtypes of a tensor in the checkpoint and in the model."""
    row = plan.structure.index[problem.tensor]
    return plan.offered.dtype(int(plan.rows[row])), plan.structure.dtype(row)


def _notes(plan: Plan, kind: str, shown: Sequence[Problem], suggestion: Suggestion | None) -> dict[str, str]:
    """What to add to the lines of these problems, by tensor."""
    names = [problem.tensor for problem in shown]
    if kind == "shape":
        at = {name: plan.structure.index[name] for name in names}
        return {
            name: f" ({_reason(plan.offered.shape(int(plan.rows[row])), plan.structure.shape(row))})"
            for name, row in at.items()
        }
    if kind != "unexpected":
        return {}
    if suggestion is not None:
        target = dict(suggestion.plan.renamed)
        return {name: f", {target[name]} by the rule below" for name in names if name in target}
    same: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for row in plan.lacking.tolist():
        same[plan.resident.shape(row)].append(plan.resident.names[row])
    notes = {}
    for name in names:
        candidates = same.get(plan.offered.shape(plan.offered.index[name]), [])
        if len(candidates) <= _COMPARED and (likely := closest(name, candidates)):
            notes[name] = f", perhaps the model's {likely}, of the same shape"
    return notes


def _reason(given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """How a shape is not the other one."""
    if len(given) == 2 and given == wanted[::-1]:
        return "transposed"
    if np.prod(given, dtype=object) == np.prod(wanted, dtype=object):
        return "as many elements, arranged otherwise"
    if len(given) != len(wanted):
        return f"{_count(len(given), 'dimension')} and not {len(wanted)}"
    other = [str(at) for at, (one, two) in enumerate(zip(given, wanted, strict=True)) if one != two]
    if len(other) == 1:
        return f"dimension {other[0]} differs"
    return f"dimensions {', '.join(other[:-1])} and {other[-1]} differ"


# --- what to do ------------------------------------------------------------------------------------------------------


def _help(plan: Plan, suggestion: Suggestion | None, model_class: str, *, foreign: bool) -> str:
    kinds = {problem.kind for problem in plan.problems}
    if "rename" in kinds:
        return _help_with_rules(plan)
    if "collision" in kinds:
        return "change what maps names so that every tensor keeps a name of its own, or push only one of the two"
    if "ambiguous" in kinds:
        return _help_to_choose(plan)
    if not len(plan.offered):
        return "push a checkpoint that has tensors, or choose the part that has them with --key"
    if foreign:
        right = f"one that was saved from a {model_class}" if model_class else "one that was saved from this model"
        return (
            f"this is probably a checkpoint of another architecture: push {right}; say which part it is in with --key, "
            "if the file holds several; or what the names are in the model with --map 'regex=replacement'"
        )
    return _help_to_fit(plan, suggestion)


def _help_with_rules(plan: Plan) -> str:
    for rename in plan.rules.renames:
        if isinstance(rename, Table):
            wrong = [name for name, _ in rename.entries if name not in plan.offered.index]
            known, side = plan.offered, "checkpoint"
            if not wrong:
                wrong = [target for _, target in rename.entries if target not in plan.resident.index]
                known, side = plan.resident, "model"
            if wrong:
                likely = _near(wrong[0], known.names)
                meant = f"; the {side} has {likely}, if {wrong[0]} should be that" if likely else ""
                return f"correct {rename.origin} or leave out what is not there{meant}"
    rules = tuple(rename for rename in plan.rules.renames if rename not in plan.unused)
    tried = make_plan(plan.offered, plan.resident, plan.transient, replace(plan.rules, renames=rules))
    if not tried.problems:
        return "leave the rule out: without it everything fits"
    left = [tried.called[row] for row in tried.left[:_FEW].tolist()] or plan.offered.names[:_FEW]
    lacking = [plan.resident.names[row] for row in tried.lacking[:_FEW].tolist()] or plan.resident.names[:_FEW]
    return f"correct the rule: names of the checkpoint are {_few(left)}, and of the model {_few(lacking)}"


def _near(name: str, names: Sequence[str]) -> str:
    """The name that is most like this one, of those that begin or end alike."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    alike = [other for other in names if other.partition(".")[0] == first or other.rpartition(".")[2] == last]
    return closest(name, alike[:_COMPARED])


def _help_to_choose(plan: Plan) -> str:
    ways = []
    for choice in plan.choices:
        rules = rules_for(plan, choice)
        name = f"adapter {choice.reading.adapter!r}" if choice.reading.adapter else ", ".join(choice.how)
        ways.append(f"{_options(rules)} for {name}" if rules else f"a mapping file for {name}")
    return f"say which one is meant: add {', or '.join(ways)}"


def _options(rules: Iterable[Rule]) -> str:
    return " ".join(rule.option for rule in rules)


def _help_to_fit(plan: Plan, suggestion: Suggestion | None) -> str:
    """The fewest options with which it can be pushed; they have been tried."""
    start = suggestion.plan if suggestion is not None else plan
    for policy in POLICIES[POLICIES.index(plan.rules.policy) :]:
        for cast in dict.fromkeys((plan.rules.cast, True)):
            rules = replace(start.rules, policy=policy, cast=cast)
            tried = start if rules == start.rules else make_plan(plan.offered, plan.resident, plan.transient, rules)
            if not tried.problems:
                return _said(plan, tried, suggestion)
            if all(problem.kind == "ambiguous" for problem in tried.problems):
                return f"add --policy {policy}; then {_help_to_choose(tried)}"
    return _helpless(plan, suggestion)


def _said(plan: Plan, tried: Plan, suggestion: Suggestion | None) -> str:
    options, what = [], []
    if suggestion is not None:
        options.append(_options(suggestion.rules))
        what.append(f"names {_count(suggestion.placed, 'tensor')} as the model does")
    if tried.rules.cast and not plan.rules.cast:
        options.append("--cast")
        # Where only tensors are cast that the model ties to others, none of them is sent.
        what.append(f"casts {_joined(list(_casts(tried)) or ['tied tensors'])}")
    if tried.rules.policy != plan.rules.policy:
        options.append(f"--policy {tried.rules.policy}")
        if tried.ignored:
            what.append(f"leaves {_count(len(tried.ignored), 'tensor')} of the checkpoint out")
        if tried.kept:
            what.append(f"keeps {_count(len(tried.kept), 'tensor')} of the model's as they are")
    return f"add {' '.join(options)}, which {_joined(what)}"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _helpless(plan: Plan, suggestion: Suggestion | None) -> str:
    """No options make it fit."""
    kinds = Counter(problem.kind for problem in (suggestion.plan if suggestion is not None else plan).problems)
    rules = f"add {_options(suggestion.rules)} for {_count(suggestion.placed, 'tensor')}; " if suggestion else ""
    if kinds["shape"]:
        return (
            f"{rules}shapes are never changed: push a checkpoint of this very model, or attach a model of the "
            "checkpoint's shapes, under a name of its own"
        )
    given = sorted(
        {problem.text.partition(" is ")[2].partition(",")[0] for problem in plan.problems if problem.kind == "dtype"}
    )
    if given:
        return (
            f"{rules}only floats become other floats and integers other integers (--cast): save {_joined(given)} "
            "tensors with the model's dtypes"
        )
    return f"{rules}say what the names are in the model with --map 'regex=replacement'"


# --- what it would do ------------------------------------------------------------------------------------------------


def summary(plan: Plan) -> list[str]:
    """What the plan does, a line for each thing: what is sent, how names were matched, casts, ties, and all that is not
    sent or not replaced."""
    lines = [f"{_count(len(plan.structure), 'tensor')} to send, {format_bytes(plan.nbytes)}"]
    if plan.identity:
        return [*lines, "names, dtypes and shapes are the model's"]
    lines += [f"names: {line}" for line in plan.how]
    if plan.renamed:
        pairs = (f"{name} -> {target}" for name, target in plan.renamed)
        lines.append(f"{_count(len(plan.renamed), 'tensor')} renamed: {_few(pairs)}")
    lines += [f"cast: {line}" for line in _casts(plan)]
    lines += _listing("tied, and sent once", (f"{name} = {other}" for name, other in plan.tied))
    twins = (f"{plan.structure.names[row]} = {plan.offered.names[twin]}" for row, twin in plan.equal_pairs)
    lines += _listing("tied in the model, must be equal in the checkpoint", twins)
    lines += _listing("skipped, non-persistent buffers of the model", plan.skipped)
    lines += _listing("skipped, tied to what is sent", plan.shared)
    lines += _listing("left out, the model has none", plan.ignored)
    lines += _listing("kept as they are in the model", plan.kept)
    if plan.ignored and plan.kept and (suggestion := suggest(plan)) is not None:
        count = _count(suggestion.placed, "tensor")
        lines.append(f"note: {_options(suggestion.rules)} would name {count} as the model does")
    lines += [f"note: {note}" for note in plan.notes]
    return [harmless(line) for line in lines]


def _listing(what: str, names: Iterable[str]) -> Iterator[str]:
    every = list(names)
    if every:
        yield f"{what} ({_count(len(every), 'tensor')}): {_few(every)}"


def _casts(plan: Plan) -> Iterator[str]:
    for (given, wanted), cast in plan.casts.items():
        yield f"{given} -> {wanted} ({_count(cast.tensors, 'tensor')}, {format_bytes(cast.nbytes)})"
