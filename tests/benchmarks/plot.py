"""The pictures for the README, drawn from results.json: SVG, the same bytes for the same figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.report import HERE
from tests.benchmarks.rows import Row, as_row
from tests.benchmarks.side_by_side import RAW

SIDE_BY_SIDE: Final = HERE / "side-by-side.svg"
GROWTH: Final = HERE / "growth.svg"
PICTURES: Final = (
    (SIDE_BY_SIDE, "How fast one gigabyte travels, against a raw socket"),
    (GROWTH, "How time and memory grow with bytes, tensors and processes"),
)
_OURS: Final = "#1f6f8b"
_THEIRS: Final = "#b8b8b8"
_MEMORY: Final = "#c26a3d"
_LEGEND: Final[dict[str, Any]] = {
    "fontsize": 7,
    "frameon": False,
    "ncols": 4,
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
}


def draw(results: Mapping[str, Any]) -> list[Path]:
    """What can be drawn of what has been measured. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    # No random identifiers, text as text.
    mpl.rcParams.update({"svg.hashsalt": "shipd", "svg.fonttype": "none", "font.size": 9, "axes.spines.right": False})
    drawn = []
    rows = {name: [as_row(row) for row in entry["rows"]] for name, entry in results["sections"].items()}
    if "side-by-side" in rows:
        _side_by_side(rows["side-by-side"])
        drawn.append(SIDE_BY_SIDE)
    if "growth" in rows:
        _growth(rows["growth"])
        drawn.append(GROWTH)
    return drawn


def _side_by_side(rows: Sequence[Row]) -> None:
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.ratio is not None and row.reference == RAW]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1))
    positions = range(len(shown))[::-1]
    for at, row in zip(positions, shown, strict=True):
        assert row.ratio is not None
        low, high = row.spread or (row.ratio, row.ratio)
        error = [[max(0.0, row.ratio - low)], [max(0.0, high - row.ratio)]]
        colour = _OURS if row.name.startswith("shipd") else _THEIRS
        axes.barh(at, row.ratio, color=colour, xerr=error, error_kw={"linewidth": 0.8, "ecolor": "#555555"})
    axes.set_yticks(list(positions), [row.name for row in shown])
    axes.axvline(1.0, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xlabel("speed as a share of a raw socket's; median, least and greatest of the rounds")
    axes.spines["top"].set_visible(False)
    _write(figure, SIDE_BY_SIDE)


def _growth(rows: Sequence[Row]) -> None:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    labels = {"bytes": "bytes", "tensors": "tensors (200 MB in all)", "processes": "serving processes (200 MB)"}
    for axes, (axis, label) in zip(panels, labels.items(), strict=True):
        points = [row for row in rows if row.details.get("axis") == axis and row.value is not None]
        across = [row.details["x"] for row in points]
        for key, style, name in (("first", ":", "first push"), ("warm", "-", "push")):
            known = [(x, row.details[key]) for x, row in zip(across, points, strict=True) if row.details.get(key)]
            axes.plot(*zip(*known, strict=True) if known else ([], []), style, marker="o", color=_OURS, label=name)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds", color=_OURS)
        if axis == "processes":
            axes.set_xticks(across)
        else:
            axes.set_xscale("log")
        if axis == "bytes":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        memory = axes.twinx()
        for key, style in (("daemon", "-"), ("sender", "--")):
            memory.plot(across, [row.details[key] for row in points], style, marker=".", color=_MEMORY, label=key)
        memory.set_ylim(0, max(40.0, *(1.1 * row.details[key] for row in points for key in ("daemon", "sender")), 0.0))
        memory.set_ylabel("MiB beyond rest", color=_MEMORY)
        handles = [*axes.get_legend_handles_labels()[0], *memory.get_legend_handles_labels()[0]]
        axes.legend(handles, [one.get_label() for one in handles], **_LEGEND)
    figure.tight_layout()
    _write(figure, GROWTH)


def _write(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
