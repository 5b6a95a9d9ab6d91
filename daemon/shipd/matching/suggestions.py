"""Rules that would make names fit, found by comparing what is left over on both sides. Each is tried out before it is
proposed; which tensor a user means is still only a guess, so nothing is mapped by them unless the user says so.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import combinations, islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shipd.matching import views
from shipd.matching.names import unwrap
from shipd.matching.plan import Alternative, Plan, make_plan
from shipd.matching.renames import Rule, apply_renames

_Rows = npt.NDArray[np.int64]

_PAIRED: Final = 128
"""Tensors whose counterparts are looked for, spread over all that are left."""

_CANDIDATES: Final = 12
"""Tensors of the same shape that each is compared with."""

_TRIED_ON: Final = 2048
"""Names that rules are tried on before they are tried on all."""

_CHANGES: Final = 12
"""Changes, the most frequent ones, of which rules are made."""

_RULES: Final = 4
"""Rules of one suggestion: more than that nobody reads."""

_ALIKE: Final = 0.5
"""How alike names must be, from 0 to 1, to be taken for two names of one thing."""

_COMPARED: Final = 128
"""Characters, the last ones, of names that are compared: what that takes grows with their square."""


@dataclass(frozen=True)
class Suggestion:
    """Rules, how many tensors find a place by them that had none, and the plan with them."""

    rules: tuple[Rule, ...]
    placed: int
    plan: Plan


class _Change(NamedTuple):
    """Components of a name that are others in the model; whether the name begins and ends with them, and whether a
    number stands before them."""

    old: tuple[str, ...]
    new: tuple[str, ...]
    first: bool
    last: bool
    numbered: bool = False


def suggest(plan: Plan) -> Suggestion | None:
    """Rules to add that place tensors for which there was no place; None where none are found that do."""
    if not len(plan.left) or not len(plan.lacking):
        return None
    trial = _Trial(plan)
    likely = trial.changes()
    rules: tuple[Rule, ...] = ()
    gained = 0
    while len(rules) < _RULES and gained < trial.size:
        tried = [(trial.gain((*rules, rule)), rule) for change in likely for rule in _rules(change)]
        most = max((gain for gain, _ in tried), default=0)
        if most <= gained:
            break
        # Of those that gain as much the first: it is of the most frequent change, and the easiest to read.
        gained, rules = most, (*rules, next(rule for gain, rule in tried if gain == most))
    if not rules:
        # Names that differ in several places have nothing of one rule alone.
        options = [rule for change in likely[:_RULES] for rule in islice(_rules(change), 1)]
        sets = [tuple(chosen) for count in range(2, len(options) + 1) for chosen in combinations(options, count)]
        rules = max(sets, key=trial.gain, default=())
        if not rules or not trial.gain(rules):
            return None
    return _verified(plan, rules)


def _verified(plan: Plan, rules: tuple[Rule, ...]) -> Suggestion | None:
    """The suggestion, if it does what it should and nothing that it should not."""
    with_rules = replace(plan.rules, renames=(*plan.rules.renames, *rules))
    tried = make_plan(plan.offered, plan.resident, plan.transient, with_rules)
    placed = len(plan.left) - len(tried.left)
    worse = _wrong_shapes(tried) > _wrong_shapes(plan)
    if _is_broken(tried) or worse or placed <= 0 or len(tried.lacking) >= len(plan.lacking):
        return None
    return Suggestion(rules, placed, tried)


def _is_broken(tried: Plan) -> bool:
    """Whether rules make names that are no use."""
    return any(problem.kind in ("collision", "rename", "ambiguous") for problem in tried.problems)


def _wrong_shapes(plan: Plan) -> int:
    return sum(problem.kind == "shape" for problem in plan.problems)


class _Trial:
    """What is left over on both sides, to try rules on. ``size``: of how many tensors."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        left = _sample(plan.left, _TRIED_ON)
        self.size = len(left)
        self._left = [plan.called[row] for row in left.tolist()]
        self._shapes = [plan.offered.shape(row) for row in left.tolist()]
        _, its = views.keys(plan.reading, (), [plan.resident.names[row] for row in plan.lacking.tolist()])
        self._lacking = dict(zip(its, map(plan.resident.shape, plan.lacking.tolist()), strict=True))
        placed = np.setdiff1d(np.arange(len(plan.offered)), plan.left)
        self._placed = [plan.called[row] for row in _sample(placed, _TRIED_ON).tolist()]

    def gain(self, rules: Sequence[Rule]) -> int:
        """How many of the tensors left over have a name and shape that the model lacks, after these rules; none where
        the rules touch others that have a place."""
        if apply_renames(self._placed, rules).touched:
            return 0
        own, _ = views.keys(self._plan.reading, apply_renames(self._left, rules).names, ())
        pairs = {key for key, shape in zip(own, self._shapes, strict=True) if self._lacking.get(key) == shape}
        return len(pairs)

    def changes(self) -> list[_Change]:
        """What differs between the names of tensors and of their likeliest counterparts, the most frequent first."""
        own, _ = views.keys(self._plan.reading, self._left, ())
        found: Counter[_Change] = Counter()
        whole: Counter[_Change] = Counter()
        buckets = self._buckets()
        for row in _sample(np.arange(len(own)), _PAIRED).tolist():
            key, shape = own[row], self._shapes[row]
            candidates = buckets.get((shape, _numbers(key))) or buckets.get((shape, ()), [])
            if counterpart := closest(key, candidates[:_CANDIDATES]):
                found.update(_differences(key.split("."), counterpart.split(".")))
                if len(self._plan.left) <= _RULES:
                    # Of a few tensors each can have a rule to itself, where no part of their names can.
                    whole[_Change(tuple(key.split(".")), tuple(counterpart.split(".")), first=True, last=True)] += 1
        return [*(change for change, _ in found.most_common(_CHANGES)), *whole]

    def _buckets(self) -> dict[tuple[tuple[int, ...], tuple[str, ...]], list[str]]:
        """What the model lacks, by shape and numbers in the name, and by shape alone."""
        buckets = defaultdict(list)
        for key, shape in self._lacking.items():
            numbers = _numbers(key)
            buckets[shape, numbers].append(key)
            if numbers:
                buckets[shape, ()].append(key)
        return buckets


def _sample(rows: _Rows, most: int) -> _Rows:
    """At most that many of ``rows``, in their order and the same ones each time; not every other one, since names come
    in turns as well."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdecimal())


def closest(name: str, candidates: Sequence[str]) -> str:
    """The one that is most like ``name``; empty where none is alike, or two are equally."""
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(name[-_COMPARED:])
    ratios = []
    for candidate in candidates:
        matcher.set_seq1(candidate[-_COMPARED:])
        ratios.append((matcher.ratio(), candidate))
    ratios.sort(reverse=True)
    if not ratios or ratios[0][0] < _ALIKE or (len(ratios) > 1 and ratios[0][0] == ratios[1][0]):
        return ""
    return ratios[0][1]


def _differences(own: list[str], its: list[str]) -> Iterator[_Change]:
    for kind, start, stop, begin, end in SequenceMatcher(None, own, its, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        # What is inserted is told by what is beside it, where that is no number.
        before = start == stop and start > 0 and not own[start - 1].isdecimal()
        after = start == stop and not before and stop < len(own) and not own[stop].isdecimal()
        first = start - before
        old, new = own[first : stop + after], its[begin - before : end + after]
        numbered = first > 0 and own[first - 1].isdecimal()
        yield _Change(tuple(old), tuple(new), first == 0, stop + after == len(own), numbered)


def _rules(change: _Change) -> Iterator[Rule]:
    """Rules that make the change, the easiest to read first."""
    old, new = re.escape(".".join(change.old)), ".".join(change.new).replace("\\", "\\\\")
    if "=" in new:
        return
    before, after = "" if change.first else ".", "" if change.last else "."
    if not change.old:
        yield Rule("^" if change.first else "$", f"{new}." if change.first else f".{new}")
        return
    inner = f"{new}{after}" if new else ""
    tail = "$" if change.last else r"\."
    if change.first:
        yield Rule(f"^{old}{tail}", inner)
    elif new or not change.last:
        yield Rule(rf"\.{old}{tail}", f"{before}{inner}")
    else:
        yield Rule(rf"\.{old}$", "")
    yield Rule(rf"\b{old}{tail}", inner)
    if change.numbered:
        kept = r"\1." if inner else r"\1"
        yield Rule(rf"(\.\d+)\.{old}{tail}", f"{kept}{inner}")


# --- which of several ways -------------------------------------------------------------------------------------------


def rules_for(plan: Plan, choice: Alternative) -> tuple[Rule, ...]:
    """Rules by which this one of several ways to match names is taken; none where there are no simple ones."""
    reading = choice.reading
    rows = np.flatnonzero(choice.found >= 0)
    targets = [plan.resident.names[row] for row in choice.found[rows].tolist()]
    rules: list[Rule] = []
    if reading.adapter:
        rules += _adapter_rules(unwrap(targets, reading.wrappers), reading.adapter)
    if reading.own_prefix or reading.its_prefix:
        rules.append(Rule(f"^{re.escape(reading.own_prefix)}", reading.its_prefix))
    meant = {
        (plan.offered.names[row], target)
        for row, target in zip(rows.tolist(), targets, strict=True)
        if plan.offered.names[row] != target
    }
    # A prefix is found without a rule where the adapter was all that was in question.
    for chosen in (tuple(rules[:-1]), tuple(rules)):
        with_rules = replace(plan.rules, renames=(*plan.rules.renames, *chosen))
        tried = make_plan(plan.offered, plan.resident, plan.transient, with_rules)
        if chosen and not _is_broken(tried) and set(tried.renamed) == meant:
            return chosen
    return ()


def _adapter_rules(targets: Sequence[str], adapter: str) -> Iterator[Rule]:
    """What puts the adapter's name back into names from which peft has taken it, so that they are ``targets``."""
    markers: set[str] = set()
    modules: set[str] = set()
    magnitude = prompt = False
    for target in targets:
        parts = target.split(".")
        places = [at for at, part in enumerate(parts) if part == adapter and at]
        if not places:
            continue
        parent, tail = parts[places[-1] - 1], parts[places[-1] + 1 :]
        if parent == "modules_to_save" and places[-1] > 1:
            modules.add(parts[places[-1] - 2])
        elif parent == "prompt_encoder":
            prompt = True
        elif parent == "lora_magnitude_vector" and tail == ["weight"]:
            magnitude = True
        else:
            markers.add(parent)
    if markers:
        yield Rule(rf"\b({'|'.join(map(re.escape, sorted(markers)))})\b", rf"\1.{adapter}")
    if magnitude:
        yield Rule("lora_magnitude_vector$", f"lora_magnitude_vector.{adapter}.weight")
    if modules:
        yield Rule(rf"\b({'|'.join(map(re.escape, sorted(modules)))})\.", rf"\1.modules_to_save.{adapter}.")
    if prompt:
        yield Rule("prompt_embeddings$", f"prompt_encoder.{adapter}.embedding.weight")
