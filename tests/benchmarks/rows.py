"""One line of the table: a figure, what it is compared with, its floor and its goal.

A benchmark is a module with ``measure(rounds) -> list`` of rows, or of dicts with the keys of one:

    {"name", "value", "unit", "reference", "ratio", "floor", "goal"}

and any of the other fields of Row.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Verdict = Literal["goal", "floor", "missed", ""]


@dataclass(kw_only=True)
class Row:
    """Medians over the rounds.

    name       what was measured
    value      the figure, in ``unit``; None where it could not be measured: ``skipped`` says why
    reference  what ``ratio`` compares it with: a name, or a figure in the same unit
    ratio      value to reference, taken in each round; None where nothing is compared
    floor      what must be met, and ``goal`` what should be: by the ratio where there is one, else by the value,
               unless ``bounds`` says which
    better     whether more is better or less; by default what floor and goal tell, else less
    elsewhere  value and ratio with the processes placed differently, by the name of the setting
    spread     the least and the greatest of what is bounded, over the rounds
    """

    name: str
    value: float | None = None
    unit: str = ""
    reference: str | float | None = None
    ratio: float | None = None
    floor: float | None = None
    goal: float | None = None
    better: Literal["higher", "lower", ""] = ""
    bounds: Literal["ratio", "value", ""] = ""
    elsewhere: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    spread: tuple[float, float] | None = None
    skipped: str | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.better:
            rising = self.floor is not None and self.goal is not None and self.goal > self.floor
            self.better = "higher" if rising else "lower"

    @property
    def bounded(self) -> float | None:
        """The figure that floor and goal are about."""
        if self.bounds:
            return self.value if self.bounds == "value" else self.ratio
        return self.value if self.ratio is None else self.ratio

    @property
    def verdict(self) -> Verdict:
        """What is met; nothing where nothing is asked, or nothing was measured."""
        if self.bounded is None or (self.floor is None and self.goal is None):
            return ""
        if self.goal is not None and self._meets(self.goal):
            return "goal"
        if self.floor is None:
            return "missed"
        return "floor" if self._meets(self.floor) else "missed"

    def _meets(self, bound: float) -> bool:
        assert self.bounded is not None
        return self.bounded >= bound if self.better == "higher" else self.bounded <= bound

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, "", {})}


_FIELDS: Final = frozenset(one.name for one in dataclasses.fields(Row))


def as_row(values: "Row | Mapping[str, Any]") -> Row:
    """A row from a dict; what a Row has no field for becomes ``details``. Raises KeyError without a name."""
    if isinstance(values, Row):
        return values
    known = {name: value for name, value in values.items() if name in _FIELDS}
    more = {name: value for name, value in values.items() if name not in _FIELDS}
    known["details"] = {**known.get("details", {}), **more}
    if isinstance(spread := known.get("spread"), list):
        known["spread"] = tuple(spread)
    known["elsewhere"] = {name: tuple(pair) for name, pair in known.get("elsewhere", {}).items()}
    if "name" not in known:
        raise KeyError(f"a row without a name: {dict(values)}")
    return Row(**known)


def median(values: Iterable[float]) -> float | None:
    """Of those there are."""
    found = list(values)
    return statistics.median(found) if found else None


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """The least and the greatest."""
    return (min(values), max(values)) if values else None
