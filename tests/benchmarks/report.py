"""From results.json to the tables: on the terminal, and in README.md between two comments.

results.json    {"sections": {NAME: {"title", "machine", "rounds", "rows": [...]}}}
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.rows import Row, as_row

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results.json"
BEGIN: Final = "<!-- benchmarks: written by python -m tests.benchmarks --table -->"
END: Final = "<!-- benchmarks end -->"

_LONG: Final = 25
"""Rows above which a table is folded."""

_VERDICTS: Final = {"goal": "goal met", "floor": "floor met", "missed": "**missed**", "": ""}
_HEAD: Final = ("", "figure", "against", "ratio", "floor", "goal", "", "")


def load(path: Path = RESULTS) -> dict[str, Any]:
    """What has been measured, or nothing yet."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"sections": {}}
    return found


def save(results: Mapping[str, Any], path: Path = RESULTS) -> None:
    """As stable as the figures: rounded to four digits, so that a diff can be read."""
    path.write_text(json.dumps(_rounded(results), indent=1, ensure_ascii=False) + "\n")


def section(title: str, machine: Mapping[str, Any], rounds: int, rows: Sequence[Row]) -> dict[str, Any]:
    """An entry of ``sections``."""
    return {"title": title, "machine": dict(machine), "rounds": rounds, "rows": [row.as_dict() for row in rows]}


def markdown(results: Mapping[str, Any], *, fold: bool = False) -> str:
    """All sections, each as a table, with the machine above those that were measured on the same one at once.

    ``fold`` shows of long tables the rows that have a floor or a goal, and has the others unfolded by whoever wants
    them: for a page, not for a terminal.
    """
    parts: list[str] = []
    before = None
    for entry in results["sections"].values():
        taken = _machine(entry["machine"], entry["rounds"])
        if taken != before:
            parts.append(taken)
            before = taken
        parts.append(f"**{entry['title']}**")
        rows = [as_row(row) for row in entry["rows"]]
        first = [row for row in rows if row.verdict] if fold and len(rows) > _LONG else []
        rest = [row for row in rows if row not in first]
        if first:
            parts += [
                _table(first),
                f"<details><summary>and {len(rest)} rows more</summary>",
                _table(rest),
                "</details>",
            ]
        else:
            parts.append(_table(rows))
    return "\n\n".join(parts)


def rewrite(readme: Path, results: Mapping[str, Any], pictures: Sequence[tuple[str, str]] = ()) -> None:
    """Put the tables, and pictures (text and path), between the two comments. Raises ValueError without these."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme.name} needs these two lines, once each and in this order:\n{BEGIN}\n{END}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    shown = [markdown(results, fold=True), *(f"![{what}]({path})" for what, path in pictures)]
    readme.write_text(before + BEGIN + "\n\n" + "\n\n".join(shown) + "\n\n" + END + after)


def _machine(machine: Mapping[str, Any], rounds: int) -> str:
    memory = machine.get("memory")
    parts = [
        f"{machine['cpu']}",
        f"{machine['cores']} cores",
        f"{memory / (1 << 30):.0f} GiB of memory" if memory else "",
        machine["kernel"],
        f"Python {machine['python']}",
        f"torch {machine['torch']}",
        machine["date"],
        f"commit {machine['commit']}",
        f"medians of {rounds} rounds",
    ]
    return "Taken on: " + ", ".join(part for part in parts if part) + "."


def _table(rows: Sequence[Row]) -> str:
    settings = list(dict.fromkeys(name for row in rows for name in row.elsewhere))
    lines = [[*_HEAD[:-1], *settings]]
    lines += [_line(row, settings) for row in rows]
    # Columns in which nobody has anything say nothing.
    kept = [at for at in range(len(lines[0])) if at == 0 or any(line[at] for line in lines[1:])]
    lines = [[line[at] for at in kept] for line in lines]
    lines.insert(1, ["---", *["---:" if head not in ("against", "") else "---" for head in lines[0][1:]]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _line(row: Row, settings: Sequence[str]) -> list[str]:
    name = row.name.replace("|", "\\|")
    if row.skipped:
        return [f"{name} (skipped: {row.skipped.replace('|', chr(92) + '|')})", *[""] * (6 + len(settings))]
    against = row.reference if isinstance(row.reference, str) else _figure(row.reference, row.unit)
    return [
        name + (f" ({row.note})" if row.note else ""),
        _figure(row.value, row.unit),
        "" if against == row.name else against,
        _ratio(row),
        _bound(row.floor, row),
        _bound(row.goal, row),
        _VERDICTS[row.verdict],
        *(_elsewhere(row, setting) for setting in settings),
    ]


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    return _number(row.ratio)


def _bound(bound: float | None, row: Row) -> str:
    if bound is None:
        return ""
    sign = "≥" if row.better == "higher" else "≤"
    by_value = row.bounds == "value" or row.ratio is None
    return f"{sign} {bound:g}" + (f" {row.unit}" if by_value and row.unit else "")


def _elsewhere(row: Row, setting: str) -> str:
    value, ratio = row.elsewhere.get(setting, (None, None))
    if value is None:
        return ""
    return _figure(value, row.unit) + (f" ({_number(ratio)})" if ratio is not None else "")


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)} {unit}".rstrip()


def _number(value: float) -> str:
    """Three significant digits are more than any of these repeat to."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
