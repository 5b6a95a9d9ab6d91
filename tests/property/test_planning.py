"""Checkpoints of any names, wrapped in any way on either side, become the model that they were made of; and whatever
the two sides are, a plan without problems sends what it says."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shipd.checkpoints.planned import planned
from shipd.checkpoints.source import open_source
from shipd.matching.diagnosis import explain, summary
from shipd.matching.plan import Plan, Rules, make_plan
from shipd.matching.renames import Rule
from shipproto.description import POLICIES
from shipproto.structure import Structure
from tests.property.strategies import examples, models
from tests.property.test_columns import variants
from tests.support import naive
from tests.support.models import build
from tests.support.naive import Tensor

NOTHING = Structure.build(())
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@st.composite
def wrappings(draw: st.DrawFn) -> str:
    """What stands before every name of a side: wrappers, then names of modules."""
    outer = draw(st.lists(st.sampled_from(WRAPPERS), max_size=2))
    inner = draw(st.lists(st.sampled_from(("model", "net", "a", "0")), max_size=2))
    return "".join(f"{part}." for part in outer + inner)


def renamed(rows: list[Tensor], rename: Callable[[str], str]) -> list[Tensor]:
    return [Tensor(rename(row.name), row.dtype, row.shape, row.tied_to and rename(row.tied_to)) for row in rows]


def filled(row: Tensor, seed: int) -> torch.Tensor:
    """A tensor like ``row``, of bytes that are told by ``seed``."""
    data = bytes((seed * 37 + at) % 251 for at in range(row.nbytes))
    whole = torch.frombuffer(bytearray(data) + bytes(16), dtype=torch.uint8)[: row.nbytes]
    return whole.view(getattr(torch, row.dtype)).view(row.shape)


def wrapped_inside(name: str, wrapper: str, at: int) -> str:
    """``name`` with a wrapper before one of its components."""
    parts = name.split(".")
    at %= len(parts)
    return ".".join([*parts[:at], wrapper, *parts[at:]])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@examples(100)
@given(models(), wrappings(), wrappings(), st.booleans(), st.data())
def test_a_wrapped_model_is_found_again(
    rows: list[Tensor], outside: str, around: str, tied: bool, data: st.DataObject
) -> None:
    inside = {
        row.name: data.draw(st.none() | st.tuples(st.sampled_from(WRAPPERS[1:]), st.integers(0, 3))) for row in rows
    }

    def own(name: str) -> str:
        found = inside[name]
        return outside + (wrapped_inside(name, *found) if found else name)

    first = naive.roots(rows)
    seeds = {row.name: seed for seed, row in enumerate(rows)}
    tensors = {row.name: filled(row, seeds[first[row.name]]) for row in rows}
    source = open_source({own(name): tensors[first[name] if tied else name] for name in tensors})
    resident = build(renamed(rows, lambda name: around + name))
    plan = make_plan(source.structure, resident, NOTHING, Rules())
    assert not plan.problems, explain(plan, model="m", origin="w")
    assert plan.structure is resident or plan.identity
    sent = planned(source, plan)
    for row, name in enumerate(sent.structure.names):
        expected = tensors[name.removeprefix(around)].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert sent.read(row, 0, int(sent.structure.nbytes[row])) == expected


def check(plan: Plan, transient: Structure) -> None:
    """What a plan without problems says is what it does, and nothing is forgotten."""
    offered, resident, sent = plan.offered, plan.resident, plan.structure
    taken = {offered.names[row] for row in plan.rows.tolist()}
    twins = {offered.names[twin] for _, twin in plan.equal_pairs}
    for row, name in enumerate(sent.names):
        at = resident.index[name]
        of = int(plan.rows[row])
        assert sent.shape(row) == resident.shape(at) == offered.shape(of)
        assert sent.dtype(row) == resident.dtype(at)
        assert plan.rules.cast or sent.dtype(row) == offered.dtype(of)
        assert sent.names[int(sent.primary[row])] == resident.names[int(resident.primary[at])]
    assert {*sent.names, *plan.kept} == {*resident.names}
    assert not {*sent.names} & {*plan.kept}
    apart = [*plan.skipped, *plan.shared, *plan.ignored]
    assert len(apart) == len({*apart})
    assert not {*apart} & taken
    # What is neither sent nor said to be left out has the bytes of what is sent.
    bytes_sent = {int(offered.primary[offered.index[name]]) for name in taken | twins}
    rest = [row for row, name in enumerate(offered.names) if name not in taken | twins and name not in apart]
    assert {int(offered.primary[row]) for row in rest} <= bytes_sent
    if plan.rules.policy == "strict":
        assert not plan.kept
    if plan.rules.policy != "partial":
        assert not plan.ignored
    for name in plan.skipped:
        assert any(offered.shape(offered.index[name]) == transient.shape(row) for row in range(len(transient)))


rules = st.lists(
    st.tuples(st.sampled_from(("a", "^b", r"\.", "(x|y)", "$", r"0\.")), st.sampled_from(("", "z", ".w", r"\g<0>q"))),
    max_size=2,
).map(lambda pairs: tuple(Rule(*pair) for pair in pairs))


@examples(100)
@given(variants(), st.sampled_from(POLICIES), st.booleans(), rules)
def test_a_plan_does_what_it_says(drawn, policy: str, cast: bool, renames: tuple[Rule, ...]) -> None:
    resident, offered, transient = (build(rows) for rows in drawn)
    plan = make_plan(offered, resident, transient, Rules(policy, cast, renames))
    if not plan.problems:
        check(plan, transient)
    text = explain(plan, model="m", origin="w") if plan.problems else "\n".join(summary(plan))
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) is None
    assert plan.problems or len(plan.structure) or policy == "strict"
