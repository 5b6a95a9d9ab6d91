"""From measured rows to the table in the README: verdicts, rounding, and what is left of the file around it."""

import json

import pytest

from tests.benchmarks import loading, payload, report
from tests.benchmarks.daemon_memory import p99
from tests.benchmarks.machine import Setting
from tests.benchmarks.rows import Row, as_row
from tests.benchmarks.side_by_side import (
    CONTENDERS,
    GLOO_BOTH,
    GLOO_COPY,
    HTTP,
    MOONCAKE,
    PUSH,
    RAW,
    WIRE,
    Sample,
    table,
)

MACHINE = {
    "cpu": "A CPU",
    "cores": 2,
    "memory": 24 << 30,
    "kernel": "Linux 6.1",
    "python": "3.11.7",
    "torch": "2.13.0",
    "date": "2026-11-27",
    "commit": "0123456789",
}


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row(name="r", value=2.0, ratio=0.9, floor=0.85, goal=1.05), "floor"),
        (Row(name="r", value=2.0, ratio=1.1, floor=0.85, goal=1.05), "goal"),
        (Row(name="r", value=2.0, ratio=0.8, floor=0.85, goal=1.05), "missed"),
        (Row(name="r", value=2.0, ratio=1.2, floor=1.4, goal=1.15), "floor"),
        (Row(name="r", value=2.0, ratio=1.5, floor=1.4, goal=1.15), "missed"),
        (Row(name="r", value=46.0, unit="MiB", floor=80), "floor"),
        (Row(name="r", value=81.0, unit="MiB", floor=80), "missed"),
        (Row(name="r", value=4.0, ratio=99.0, floor=5, goal=2, bounds="value"), "floor"),
        (Row(name="r", ratio=0.9, goal=1.0, better="higher"), "missed"),
        (Row(name="r", ratio=1.1, goal=1.0, better="higher"), "goal"),
        (Row(name="r", ratio=1.1, floor=1.0, better="higher"), "floor"),
        (Row(name="r", value=2.0), ""),
        (Row(name="r", floor=1.0, skipped="no such library"), ""),
    ],
)
def test_floor_and_goal_are_judged_in_the_right_direction(row, verdict):
    assert row.verdict == verdict


def test_rows_of_other_benchmarks_are_dicts_whose_further_keys_are_kept():
    row = as_row(
        {"name": "flip", "value": 1.5, "unit": "ms", "reference": None, "ratio": None, "floor": 5, "goal": 2, "n": 3}
    )
    assert (row.verdict, row.details) == ("goal", {"n": 3})
    assert as_row(json.loads(json.dumps(row.as_dict()))) == row
    with pytest.raises(KeyError, match="without a name"):
        as_row({"value": 1.0})


def results(*rows):
    return {"sections": {"one": report.section("One", MACHINE, 5, rows)}}


ROWS = (
    Row(name="raw", value=3.326, unit="GB/s", reference="raw", ratio=1.0, elsewhere={"unpinned": (2.0, 0.987)}),
    Row(name="wire", value=3.0, unit="GB/s", reference="raw", ratio=0.904, floor=0.85, goal=1.05),
    Row(name="a | b", skipped="ImportError: lib | x"),
    Row(name="memory", value=46.76, unit="MiB", floor=80.0),
    Row(name="copy", value=130.0, unit="ms", reference=120.0, ratio=1.08, floor=1.3, goal=1.1, note="1 GB"),
)


def test_the_table():
    taken, title, shown = report.markdown(results(*ROWS)).split("\n\n")
    assert taken == (
        "Taken on: A CPU, 2 cores, 24 GiB of memory, Linux 6.1, Python 3.11.7, torch 2.13.0, 2026-11-27, "
        "commit 0123456789, medians of 5 rounds."
    )
    assert title == "**One**"
    assert shown.splitlines() == [
        "|  | figure | against | ratio | floor | goal |  | unpinned |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- | ---: |",
        "| raw | 3.33 GB/s |  | 1.00 |  |  |  | 2.00 GB/s (0.99) |",
        "| wire | 3.00 GB/s | raw | 0.90 | ≥ 0.85 | ≥ 1.05 | floor met |  |",
        "| a \\| b (skipped: ImportError: lib \\| x) |  |  |  |  |  |  |  |",
        "| memory | 46.8 MiB |  |  | ≤ 80 MiB |  | floor met |  |",
        "| copy (1 GB) | 130 ms | 120 ms | 1.08 | ≤ 1.3 | ≤ 1.1 | goal met |  |",
    ]


def test_the_machine_is_named_again_only_where_it_is_another_one():
    found = results(*ROWS)
    found["sections"]["two"] = report.section("Two", MACHINE, 5, ROWS[3:4])
    found["sections"]["three"] = report.section("Three", {**MACHINE, "commit": "fedcba9876"}, 5, ROWS[3:4])
    text = report.markdown(found)
    assert text.count("Taken on:") == 2
    assert text.index("**Two**") < text.index("fedcba9876") < text.index("**Three**")


def test_results_survive_their_file(tmp_path):
    path = tmp_path / "results.json"
    assert report.load(path) == {"sections": {}}
    report.save(results(*ROWS), path)
    assert report.markdown(report.load(path)) == report.markdown(results(*ROWS))


def test_long_tables_are_folded_on_a_page_only():
    rows = [Row(name=f"row {number}", value=float(number), unit="s") for number in range(30)]
    rows.append(Row(name="bounded", value=1.0, unit="s", floor=2.0))
    page = report.markdown(results(*rows), fold=True)
    first, _, rest = page.partition("<details><summary>and 30 rows more</summary>")
    assert "| bounded |" in first
    assert "| row 7 |" not in first
    assert "| row 7 |" in rest
    assert rest.count("bounded") == 0
    assert "details" not in report.markdown(results(*rows))
    assert "details" not in report.markdown(results(*rows[-5:]), fold=True)


def test_the_readme_is_rewritten_between_its_two_comments_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Above\n\n{report.BEGIN}\nold\n{report.END}\n\nbelow\n")
    for _ in range(2):
        report.rewrite(readme, results(*ROWS), [("a picture", "tests/benchmarks/growth.svg")])
    text = readme.read_text()
    assert text.startswith(f"# Above\n\n{report.BEGIN}\n\nTaken on: ")
    assert text.endswith(f"![a picture](tests/benchmarks/growth.svg)\n\n{report.END}\n\nbelow\n")
    assert "old" not in text
    assert text.count("| memory |") == 1


@pytest.mark.parametrize(
    "text",
    ["nothing", report.BEGIN, f"{report.END}\n{report.BEGIN}", f"{report.BEGIN}\n{report.BEGIN}\n{report.END}"],
)
def test_a_readme_without_the_comments_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="needs these two lines"):
        report.rewrite(readme, results(*ROWS))
    assert readme.read_text() == text


def test_ratios_are_taken_in_each_round_against_the_raw_transfer_beside_it():
    # The machine is twice as slow in the second round, and the peer's visits come at other times than shipd's.
    samples = [
        *(Sample(RAW, "pinned", number, 0.25, 0.25) for number in range(3)),
        *(
            Sample(WIRE, "pinned", number, seconds, raw)
            for number, (seconds, raw) in enumerate(((0.3, 0.3), (0.8, 0.6), (0.3, 0.24)))
        ),
        *(
            Sample(PUSH, "pinned", number, seconds, raw)
            for number, (seconds, raw) in enumerate(((0.4, 0.2), (0.8, 0.4), (0.5, 0.2)))
        ),
        *(
            Sample(GLOO_BOTH, "pinned", number, seconds, raw)
            for number, (seconds, raw) in enumerate(((0.6, 0.2), (2.4, 0.8), (0.6, 0.2)))
        ),
        *(Sample(GLOO_BOTH, "unpinned", number, 0.9, 0.2) for number in range(3)),
    ]
    chosen = [one for one in CONTENDERS if one.name in ("raw", "shipd", "gloo", "mooncake")]
    settings = [Setting("pinned", (0,), (1,)), Setting("unpinned", (0, 1), (0, 1))]
    rows = {(row.name, row.reference): row for row in table(samples, chosen, {"mooncake": "no lib"}, settings, 10**9)}

    wire = rows[WIRE, RAW]
    assert wire.ratio == pytest.approx(0.8)
    assert wire.spread == pytest.approx((0.75, 1.0))
    assert wire.verdict == "missed"
    assert rows[RAW, RAW].value == pytest.approx(4.0)
    # 3 / 2, 3 / 2 and 3 / 2.5
    against = rows[PUSH, GLOO_BOTH]
    assert against.ratio == pytest.approx(1.5)
    assert against.spread == pytest.approx((1.2, 1.5))
    assert against.verdict == "floor"
    assert rows[GLOO_BOTH, RAW].elsewhere["unpinned"] == pytest.approx((1 / 0.9, 0.2 / 0.9))
    assert rows[MOONCAKE, RAW].skipped == "no lib"
    # What was not measured is compared with nothing.
    assert (PUSH, GLOO_COPY) not in rows
    assert (WIRE, HTTP) not in rows


def test_a_push_is_compared_with_the_fastest_way_of_loading_in_its_round():
    push = loading.pushed("flip", "safetensors")
    taken = {
        ("torch.load", "warm"): (9.0, 9.0, 9.0),
        ("safetensors load_file", "warm"): (1.0, 2.0, 4.0),
        ("torch.load(mmap=True)", "warm"): (3.0, 1.0, 3.0),
        (push, "warm"): (1.1, 1.5, 4.5),
        ("torch.load", "cold"): (2.0,),
        (push, "cold"): (3.0,),
    }
    samples = [
        loading.Sample(way, cache, number, seconds)
        for (way, cache), of_rounds in taken.items()
        for number, seconds in enumerate(of_rounds)
    ]
    growth = {"torch.load": (1000 << 20, 1010 << 20), push: (1 << 20, 20 << 20)}
    rows = {
        row.name.partition(": ")[2]: row
        for row in loading.table(samples, growth, {"fastsafetensors": "no such module"}, 10**9, 64, bounded=True)
        if "cold" not in row.name
    }
    assert rows["fastsafetensors"].skipped == "no such module"
    assert (rows[push].value, rows[push].ratio, rows[push].floor) == (1.5, 1.5, 1.2)
    assert rows[push].verdict == "missed"
    grown = rows[f"how much memory grew, {push}"]
    assert (grown.value, grown.ratio, grown.verdict) == (20, 20 / 1000, "floor")
    assert rows["torch.load"].verdict == ""


def test_the_lag_that_99_of_100_stayed_below():
    before = {0.001: 5.0, 0.02: 10.0, 0.05: 10.0, float("inf"): 10.0}
    after = {0.001: 95.0, 0.02: 109.0, 0.05: 110.0, float("inf"): 110.0}
    assert p99(before, after) == 0.02
    assert p99(before, {**after, 0.02: 108.0}) == 0.05
    assert p99(before, before) is None
    assert p99(None, after) is None


@pytest.mark.parametrize("total", [2, 10**6, 10**8, 10**9])
def test_the_model_has_exactly_the_bytes_that_were_asked_for(total):
    # Uninitialised: no page of it is touched.
    state = payload.model(total)
    assert payload.size(state) == total
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


def test_every_byte_of_the_next_version_is_another_one():
    state = payload.even(3, 3 * 1002)
    payload.randomise(state)
    before = {name: payload.bits(tensor).copy() for name, tensor in state.items()}
    assert len({bytes(part) for part in before.values()}) == 3
    first = payload.digest(state)
    payload.renew(state)
    assert payload.digest(state) != first
    assert all((payload.bits(tensor) != before[name]).all() for name, tensor in state.items())
