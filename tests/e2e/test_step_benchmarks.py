"""The benchmarks of successive steps still measure: small runs of each.

What they ask of incremental transfer is judged in their tables, not here.
"""

import json
import shutil
import sys

import pytest

from tests.benchmarks import thin
from tests.benchmarks.rows import Row, as_row
from tests.support import thin_link
from tests.support.processes import Process

SECONDS = 100.0
"""For importing torch, and some twenty pushes of 45 MB."""

RUN = """
import json
from tests.benchmarks import loopback, steps, thin
from tests.benchmarks.workers import shut_down
from tests.support.thin_link import MBIT

found = {
    "steps": steps.measure(steps=2),
    "thin": thin.measure(1, thin=2000 * MBIT, less_thin=4000 * MBIT),
    "loopback": loopback.measure(1, 4_000_000),
}
shut_down()
print(json.dumps({name: [row.as_dict() for row in rows] for name, rows in found.items()}))
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Row]]:
    """The rows of each."""
    with Process([sys.executable, "-c", RUN]) as process:
        assert process.wait(SECONDS) == 0, process.describe()
        found = json.loads(process.out.splitlines()[-1])
    return {name: [as_row(row) for row in rows] for name, rows in found.items()}


def test_successive_steps_agree_by_digest(measured):
    rows = {row.name: row for row in measured["steps"]}
    agreed = rows["2 successive steps, both sides agree by digest"]
    assert (agreed.value, agreed.verdict) == (2, "floor")
    assert {"daemon's own memory", "sender's own memory"} < {name.partition(",")[0] for name in rows}


def test_a_step_and_a_whole_model_over_a_thin_link(measured):
    if why := thin_link.why_not():
        pytest.skip(f"no thin link here: {why}")
    step, whole = measured["thin"]
    assert step.name == "one step of MiniLM over 2000 Mbit/s, push to COMMITTED"
    assert step.note == "60 kB; against all of it, 45.4 MB"
    # What is compared with is not faster than its link.
    assert isinstance(step.reference, float)
    assert step.reference > 45.4e6 * 8 / 2000e6
    assert whole.value is not None
    assert whole.ratio is not None


def test_a_step_over_loopback_in_two_ways(measured):
    (row,) = measured["loopback"]
    assert (row.name, row.reference) == ("a step of 4 MB over loopback", "incremental transfer switched off")
    assert row.value is not None
    assert row.ratio is not None


def test_without_a_thin_link_the_reason_is_in_the_table(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (row,) = thin.measure(1)
    assert row.skipped == "there is no ip here"
