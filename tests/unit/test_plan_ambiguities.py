"""Names that could be matched in more than one way: a tensor never becomes another than the user means."""

import re

import pytest

from shipd.matching.diagnosis import explain
from shipd.matching.plan import Plan, Rules, make_plan
from shipd.matching.renames import Rule, parse_rename
from shipproto.structure import Structure, TensorSpec

NOTHING = Structure.build(())
LAYERS = tuple(f"layers.{at}.{what}" for at in range(2) for what in ("weight", "bias"))


def of(*names: str, tied: dict[str, str] | None = None) -> Structure:
    """Tensors that are all alike, of which some are tied to others."""
    ties = tied or {}
    return Structure.build([TensorSpec(name, "float32", (2,), ties.get(name)) for name in sorted({*names, *ties})])


def under(prefix: str, names: tuple[str, ...] = LAYERS) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


def plan_of(offered: Structure, resident: Structure, policy: str) -> Plan:
    return make_plan(offered, resident, NOTHING, Rules(policy))


def assert_ambiguous(plan: Plan, *ways: str) -> None:
    """These ways are told, and the rules that are proposed for them do as they say."""
    (problem,) = plan.problems
    assert problem.kind == "ambiguous"
    assert {line.partition(" (")[0] for line in problem.notes} == {*ways}
    proposed = re.findall(r"--map '([^']*)' for (.*?) \(", explain(plan, model="m", origin="file"))
    assert proposed
    for rule, how in proposed:
        choice = next(choice for choice in plan.choices if choice.how[0].startswith(f"{how} ("))
        meant = Rules(plan.rules.policy, renames=(parse_rename(rule),))
        chosen = make_plan(plan.offered, plan.resident, NOTHING, meant)
        assert not chosen.problems
        rows = {plan.offered.names[row]: int(at) for row, at in enumerate(choice.found) if at >= 0}
        taken = {plan.offered.names[row] for row in chosen.rows.tolist()}
        assert taken == set(rows)


# --- twins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("decoder.norm",)], ids=["alike", "one with more"])
def test_two_parts_of_a_checkpoint_that_both_are_most_of_the_model(more: tuple[str, ...]) -> None:
    offered = of(*under("encoder."), *under("decoder."), *more)
    plan = plan_of(offered, of(*LAYERS, "norm", "head"), "partial")
    assert_ambiguous(plan, "encoder.* -> *", "decoder.* -> *")


def test_two_parts_of_the_model_that_both_are_most_of_a_checkpoint() -> None:
    plan = plan_of(of(*LAYERS, "junk"), of(*under("encoder."), *under("decoder."), "head"), "partial")
    assert_ambiguous(plan, "* -> encoder.*", "* -> decoder.*")


def test_two_names_of_the_same_bytes_are_one_way() -> None:
    ties = dict(zip(under("ema."), under("model."), strict=True))
    plan = plan_of(of(*under("model."), "junk", tied=ties), of(*LAYERS, "head"), "partial")
    assert not plan.problems
    assert plan.structure.names == tuple(sorted(LAYERS))


def test_names_that_only_shared_tensors_make_fit_in_two_ways() -> None:
    crossed = of("x.a", "x.b", tied={"y.a": "x.b", "y.b": "x.a"})
    assert_ambiguous(plan_of(crossed, of("a", "b"), "strict"), "x.* -> *", "y.* -> *")
    alike = plan_of(of("x.a", "x.b", tied={"y.a": "x.a", "y.b": "x.b"}), of("a", "b"), "strict")
    assert not alike.problems


# --- a way that collides is a way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("w",), ("w", "x")])
def test_a_module_whose_names_the_model_has_elsewhere_is_still_one_that_may_be_meant(names: tuple[str, ...]) -> None:
    plan = plan_of(of(*names), of("a.w", "b.w", "b.x", "x"), "subset")
    assert_ambiguous(plan, "* -> a.*", "* -> b.*")


def test_a_block_is_not_put_where_the_only_room_without_collisions_is() -> None:
    resident = of(*(f"blocks.{at}.{name}" for at in range(2) for name in ("qkv", "norm")), "norm", "head.qkv")
    assert_ambiguous(plan_of(of("qkv"), resident, "subset"), "* -> head.*", "* -> blocks.0.*", "* -> blocks.1.*")


def test_a_part_of_the_checkpoint_whose_names_it_has_elsewhere_is_still_one_that_may_be_meant() -> None:
    plan = plan_of(of("a.w", "b.w", "b.x", "x"), of("w", "x"), "partial")
    assert_ambiguous(plan, "a.* -> *", "b.* -> *")
    assert "or a mapping file for b.* -> *" in explain(plan, model="m", origin="file")


# --- one prefix for another ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["subset", "partial"])
def test_one_module_is_another_only_where_that_is_the_whole_model(policy: str) -> None:
    some = of("decoder.layers.3.w", "decoder.layers.4.w")
    every = of(*(f"encoder.layers.{at}.w" for at in range(6)))
    plan = plan_of(some, every, policy)
    assert plan.problems
    assert "add --map '^decoder\\.=encoder.', which names 2 tensors" in explain(plan, model="m", origin="file")
    whole = plan_of(of(*under("model.")), of(*under("net.")), policy)
    assert not whole.problems
    assert whole.how == ("model.layers.* -> net.layers.* (4 tensors)",)


# --- all of it is told -----------------------------------------------------------------------------------------------


def test_what_is_taken_off_one_name_and_put_before_another_is_told_of_both() -> None:
    plan = plan_of(of("w", "module.v"), of("module.w", "v"), "strict")
    assert not plan.problems
    assert plan.renamed == (("w", "module.w"), ("module.v", "v"))
    assert plan.how == ("module.* -> * (1 tensor)", "* -> module.* (1 tensor)")


def test_a_rule_is_told_as_it_would_be_typed() -> None:
    rule = Rule(r"^net\.(\d+)\.", r"layers.\1.")
    plan = make_plan(of("net.0.w"), of("layers.0.w"), NOTHING, Rules(renames=(rule,)))
    assert plan.how == (r"--map '^net\.(\d+)\.=layers.\1.' (1 tensor)",)
    useless = make_plan(of("w"), of("w"), NOTHING, Rules(renames=(rule,)))
    assert (
        useless.problems[0].text
        == r"rename: the rule '^net\.(\d+)\.=layers.\1.' matches none of the checkpoint's 1 names"
    )
