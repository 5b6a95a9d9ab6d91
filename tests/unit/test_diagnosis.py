"""What is said of plans: every kind of problem, word by word, and that what is proposed does what it says."""

import re
import shlex

import pytest

from shipd.errors import TensorMismatch
from shipd.matching.diagnosis import explain, refusal, summary
from shipd.matching.plan import Plan, Rules, make_plan
from shipd.matching.renames import Rule, Table, parse_rename
from shipproto.structure import Structure
from tests.support.plans import NOTHING, floats, of

NET = {
    "body.conv.weight": ("float32", (8, 3, 3, 3)),
    "body.norm.bias": ("float32", (8,)),
    "body.norm.weight": ("float32", (8,)),
    "head.bias": ("float32", (10,)),
    "head.weight": ("float32", (10, 64)),
}
BLOCKS = {
    f"encoder.layer.{at}.{part}.weight": ("float32", (4, 4))
    for at in range(12)
    for part in ("attention.query", "attention.key", "norm")
}


def net(rename=lambda name: name, **others) -> Structure:
    """NET with other names, and other tensors where they are given, by their names with _ for each dot."""
    changed = {name.replace("_", "."): what for name, what in others.items()}
    return of({rename(name): changed.get(name, what) for name, what in NET.items()})


def said(plan: Plan, model_class: str = "") -> str:
    return explain(plan, model="m", origin="/data/w.pt", model_class=model_class)


def followed(plan: Plan) -> Plan:
    """The plan with what its explanation says to add."""
    words = shlex.split(said(plan).splitlines()[-1].partition(", which")[0].removeprefix("help: add "))
    policy, cast, renames = plan.rules.policy, plan.rules.cast, list(plan.rules.renames)
    while words:
        option = words.pop(0)
        if option == "--map":
            renames.append(parse_rename(words.pop(0)))
        elif option == "--policy":
            policy = words.pop(0)
        else:
            assert option == "--cast"
            cast = True
    return make_plan(plan.offered, plan.resident, plan.transient, Rules(policy, cast, tuple(renames)))


# --- names -----------------------------------------------------------------------------------------------------------


def test_one_rule_that_names_all_that_is_left_over() -> None:
    plan = make_plan(net(lambda name: "module." + name.replace("head", "classifier")), net(), NOTHING)
    assert said(plan, "zoo.Net") == (
        "the tensors of '/data/w.pt' do not match model 'm' (zoo.Net): 2 missing, 2 unexpected\n"
        "  names were matched with module.* -> * (3 tensors)\n"
        "  missing: head.bias (float32 [10])\n"
        "  missing: head.weight (float32 [10, 64])\n"
        "  unexpected: module.classifier.bias (float32 [10]), head.bias by the rule below\n"
        "  unexpected: module.classifier.weight (float32 [10, 64]), head.weight by the rule below\n"
        r"help: add --map '\bclassifier\.=head.', which names 2 tensors as the model does"
    )
    assert not followed(plan).problems


def test_many_of_a_kind_are_folded() -> None:
    plan = make_plan(
        of({name.replace("norm.weight", "norm.gamma"): what for name, what in BLOCKS.items()}), of(BLOCKS), NOTHING
    )
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 12 missing, 12 unexpected\n"
        "  missing: encoder.layer.0.norm.weight (float32 [4, 4])\n"
        "  missing: encoder.layer.1.norm.weight (float32 [4, 4])\n"
        "  missing: encoder.layer.10.norm.weight (float32 [4, 4])\n"
        "  missing: encoder.layer.11.norm.weight (float32 [4, 4])\n"
        "  missing: encoder.layer.2.norm.weight (float32 [4, 4])\n"
        "  missing: and 7 more under encoder.layer.*\n"
        "  unexpected: encoder.layer.0.norm.gamma (float32 [4, 4]), encoder.layer.0.norm.weight by the rule below\n"
        "  unexpected: encoder.layer.1.norm.gamma (float32 [4, 4]), encoder.layer.1.norm.weight by the rule below\n"
        "  unexpected: encoder.layer.10.norm.gamma (float32 [4, 4]), encoder.layer.10.norm.weight by the rule below\n"
        "  unexpected: encoder.layer.11.norm.gamma (float32 [4, 4]), encoder.layer.11.norm.weight by the rule below\n"
        "  unexpected: encoder.layer.2.norm.gamma (float32 [4, 4]), encoder.layer.2.norm.weight by the rule below\n"
        "  unexpected: and 7 more under encoder.layer.*\n"
        r"help: add --map '\.gamma$=.weight', which names 12 tensors as the model does"
    )
    assert not followed(plan).problems


@pytest.mark.parametrize(
    ("replaced", "options"),
    [
        ({"attention": "attn"}, r"--map '\.attn\.=.attention.'"),
        ({".norm.": "."}, r"--map '(\.\d+)\.weight$=\1.norm.weight'"),
        ({"attention.": ""}, None),
        ({"attention.": "attention.self."}, r"--map '\.self\.=.'"),
        ({".weight": ""}, None),
        ({"encoder.layer": "transformer.h", "attention.": "attn."}, None),
        ({"encoder.layer": "transformer.h", "attention.query": "attn.q", "attention.key": "attn.k"}, None),
        ({"encoder": "x", "attention": "y", "weight": "w"}, None),
        ({"norm": "no-rm+"}, r"--map '\.no\-rm\+\.=.norm.'"),
    ],
)
def test_rules_are_found_for_names_that_differ_in_parts(replaced: dict[str, str], options: str | None) -> None:
    def rename(name: str) -> str:
        for old, new in replaced.items():
            name = name.replace(old, new)
        return name

    plan = make_plan(of({rename(name): what for name, what in BLOCKS.items()}), of(BLOCKS), NOTHING)
    then = followed(plan)
    assert not then.problems
    assert {new: old for old, new in then.renamed} == {name: rename(name) for name in BLOCKS if rename(name) != name}
    assert options is None or said(plan).splitlines()[-1].startswith(f"help: add {options}, which")


def test_rules_that_place_only_some_are_proposed_with_what_leaves_the_rest_out() -> None:
    offered = of({**{name.replace("head", "fc"): what for name, what in NET.items()}, "ema.step": ("int64", ())})
    plan = make_plan(offered, net(), NOTHING)
    assert said(plan).splitlines()[-1] == (
        r"help: add --map '^fc\.=head.' --policy partial, which names 2 tensors as the model does and leaves 1 "
        r"tensor of "
        "the checkpoint out"
    )
    assert not followed(plan).problems


def test_a_counterpart_is_named_where_no_rule_is_found() -> None:
    plan = make_plan(floats("body.weight", "neck2"), floats("body.weight", "neck"), NOTHING)
    assert said(plan).splitlines()[-1].startswith("help: add --map '^neck2$=neck'")
    # Of two that are as likely neither is.
    plan = make_plan(floats("a.w", "b.x1"), floats("a.w", "b.x2", "b.x3"), NOTHING)
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 2 missing, 1 unexpected\n"
        "  missing: b.x2 (float32 [2])\n"
        "  missing: b.x3 (float32 [2])\n"
        "  unexpected: b.x1 (float32 [2])\n"
        "help: add --policy partial, which leaves 1 tensor of the checkpoint out and keeps 2 tensors of the model's as "
        "they are"
    )


def test_a_rule_that_would_take_the_name_of_another_is_not_proposed() -> None:
    # "b" is left over and "a" missing, but the rule would rename c.b as well.
    plan = make_plan(floats("x.b", "c.b"), floats("x.a", "c.b"), NOTHING)
    then = followed(plan)
    assert not then.problems
    assert dict(then.renamed) == {"x.b": "x.a"}


def test_another_architecture() -> None:
    offered = of({f"features.{at}.w": ("float32", (3, at + 1)) for at in range(100)})
    plan = make_plan(offered, net(), NOTHING)
    assert said(plan, "zoo.Net") == (
        "the tensors of '/data/w.pt' do not match model 'm' (zoo.Net): not a single name fits, of 100 there and 5 in "
        "the "
        "model\n"
        "  the checkpoint has features.0.w (float32 [3, 1]), features.39.w (float32 [3, 40]), features.69.w (float32 "
        "[3, "
        "70]) and 97 more\n"
        "  the model has body.conv.weight (float32 [8, 3, 3, 3]), body.norm.bias (float32 [8]), body.norm.weight "
        "(float32 "
        "[8]) and 2 more\n"
        "help: this is probably a checkpoint of another architecture: push one that was saved from a zoo.Net; say "
        "which "
        "part it is in with --key, if the file holds several; or what the names are in the model with --map "
        "'regex=replacement'"
    )
    assert "push one that was saved from this model;" in said(make_plan(offered, net(), NOTHING, Rules("partial")))


def test_what_is_missing_or_too_much_with_the_policy_that_allows_it() -> None:
    fewer = of({name: what for name, what in NET.items() if name != "head.bias"})
    plan = make_plan(fewer, net(), NOTHING)
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 1 missing\n"
        "  missing: head.bias (float32 [10])\n"
        "help: add --policy subset, which keeps 1 tensor of the model's as they are"
    )
    assert followed(plan).kept == ("head.bias",)
    plan = make_plan(net(), fewer, NOTHING)
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 1 unexpected\n"
        "  unexpected: head.bias (float32 [10])\n"
        "help: add --policy partial, which leaves 1 tensor of the checkpoint out"
    )
    assert followed(plan).ignored == ("head.bias",)


def test_nothing_to_send() -> None:
    assert said(make_plan(NOTHING, floats("a"), NOTHING, Rules("subset"))) == (
        "the tensors of '/data/w.pt' do not match model 'm': nothing to send\n"
        "  nothing: the checkpoint has no tensors\n"
        "help: push a checkpoint that has tensors, or choose the part that has them with --key"
    )


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


def test_shapes_and_how_they_differ() -> None:
    offered = net(
        head_weight=("float32", (64, 10)),
        head_bias=("float32", (11,)),
        body_conv_weight=("float32", (8, 27)),
        body_norm_bias=("float32", (2, 3)),
    )
    assert said(make_plan(offered, net(), NOTHING)) == (
        "the tensors of '/data/w.pt' do not match model 'm': 4 of another shape\n"
        "  shape: body.conv.weight is [8, 27], the resident model has [8, 3, 3, 3] (as many elements, arranged "
        "otherwise)\n"
        "  shape: body.norm.bias is [2, 3], the resident model has [8] (2 dimensions and not 1)\n"
        "  shape: head.bias is [11], the resident model has [10] (dimension 0 differs)\n"
        "  shape: head.weight is [64, 10], the resident model has [10, 64] (transposed)\n"
        "help: shapes are never changed: push a checkpoint of this very model, or attach a model of the checkpoint's "
        "shapes, under a name of its own"
    )
    wide = of({"w": ("float32", (2, 5, 3))})
    assert "(dimensions 0 and 2 differ)" in said(make_plan(wide, of({"w": ("float32", (1, 5, 4))}), NOTHING))


def test_dtypes_that_a_cast_would_change() -> None:
    plan = make_plan(net(), net(head_bias=("bfloat16", (10,)), head_weight=("bfloat16", (10, 64))), NOTHING)
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 2 of another dtype\n"
        "  dtype: head.bias is float32, the resident model has bfloat16\n"
        "  dtype: head.weight is float32, the resident model has bfloat16\n"
        "help: add --cast, which casts float32 -> bfloat16 (2 tensors, 1.3 kB)"
    )
    assert not followed(plan).problems


def test_mixed_dtypes_are_told_by_pairs() -> None:
    offered = of({name: ("float32" if "query" in name else "float64", shape) for name, (_, shape) in BLOCKS.items()})
    plan = make_plan(offered, of({name: ("float16", shape) for name, (_, shape) in BLOCKS.items()}), NOTHING)
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 36 of another dtype\n"
        "  dtype: 24 tensors are float64, the resident model has float16: encoder.layer.0.attention.key.weight, "
        "encoder.layer.0.norm.weight, encoder.layer.1.attention.key.weight and 21 more\n"
        "  dtype: 12 tensors are float32, the resident model has float16: encoder.layer.0.attention.query.weight, "
        "encoder.layer.1.attention.query.weight, encoder.layer.10.attention.query.weight and 9 more\n"
        "help: add --cast, which casts float64 -> float16 (24 tensors, 768 B) and float32 -> float16 (12 tensors, "
        "384 B)"
    )


def test_dtypes_that_nothing_changes() -> None:
    plan = make_plan(net(head_bias=("int64", (10,))), net(), NOTHING)
    assert said(plan).splitlines()[-1] == (
        "help: only floats become other floats and integers other integers (--cast): save int64 tensors with the "
        "model's "
        "dtypes"
    )


def test_everything_at_once() -> None:
    offered = of(
        {
            "module.body.conv.weight": ("float32", (8, 3, 3, 3)),
            "module.body.norm.bias": ("float32", (9,)),
            "module.body.norm.weight": ("float64", (8,)),
            "module.fc.bias": ("float32", (10,)),
            "module.fc.weight": ("float32", (10, 64)),
            "module.extra": ("float32", (77,)),
        }
    )
    text = said(make_plan(offered, net(), NOTHING))
    assert text.startswith(
        "the tensors of '/data/w.pt' do not match model 'm': 2 missing, 3 unexpected, 1 of another shape, 1 of another "
        "dtype\n"
    )
    assert text.endswith(
        "  unexpected: module.extra (float32 [77])\n"
        "  unexpected: module.fc.bias (float32 [10]), head.bias by the rule below\n"
        "  unexpected: module.fc.weight (float32 [10, 64]), head.weight by the rule below\n"
        "  shape: body.norm.bias (module.body.norm.bias in the checkpoint) is [9], the resident model has [8] "
        "(dimension "
        "0 differs)\n"
        "  dtype: body.norm.weight (module.body.norm.weight in the checkpoint) is float64, the resident model has "
        "float32\n"
        r"help: add --map '\bfc\.=head.' for 2 tensors; shapes are never changed: push a checkpoint of this very "
        r"model, "
        "or attach a model of the checkpoint's shapes, under a name of its own"
    )


# --- the user's rules ------------------------------------------------------------------------------------------------


def test_a_rule_that_matches_nothing() -> None:
    plan = make_plan(net(), net(), NOTHING, Rules(renames=(Rule("^model", ""),)))
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 1 wrong in the rules for names\n"
        "  rename: the rule '^model=' matches none of the checkpoint's 5 names\n"
        "help: leave the rule out: without it everything fits"
    )
    plan = make_plan(
        net(lambda name: name.replace("head", "fc")), net(), NOTHING, Rules(renames=(Rule("^h$", "head"),))
    )
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 2 missing, 2 unexpected, 1 wrong in the rules for names\n"
        "  rename: the rule '^h$=head' matches none of the checkpoint's 5 names\n"
        "  and 2 missing, 2 unexpected, which may come of it\n"
        "help: correct the rule: names of the checkpoint are fc.bias, fc.weight, and of the model head.bias, "
        "head.weight"
    )


def test_entries_of_a_mapping_file_that_do_not_exist() -> None:
    table = Table("names.toml", (("head.weigth", "head.weight"),))
    assert said(make_plan(net(), net(), NOTHING, Rules(renames=(table,)))) == (
        "the tensors of '/data/w.pt' do not match model 'm': 1 wrong in the rules for names\n"
        "  rename: names.toml maps head.weigth, which the checkpoint does not have\n"
        "help: correct names.toml or leave out what is not there; the checkpoint has head.weight, if head.weigth "
        "should "
        "be that"
    )
    table = Table("names.toml", (("fc.weight", "had.weight"), ("fc.bias", "head.bias")))
    offered = net(lambda name: name.replace("head", "fc"))
    assert said(make_plan(offered, net(), NOTHING, Rules(renames=(table,)))) == (
        "the tensors of '/data/w.pt' do not match model 'm': 1 missing, 1 unexpected, 1 wrong in the rules for names\n"
        "  names were matched with names.toml (2 tensors)\n"
        "  rename: names.toml maps fc.weight to had.weight, which the model does not have\n"
        "  and 1 missing, 1 unexpected, which may come of it\n"
        "help: correct names.toml or leave out what is not there; the model has head.weight, if had.weight should be "
        "that"
    )


def test_names_that_collide_after_mapping() -> None:
    plan = make_plan(net(), net(), NOTHING, Rules(renames=(Rule("^body.norm|^head", "x"),)))
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': 4 missing, 2 unexpected, 2 of a name that others have as "
        "well\n"
        "  names were matched with --map '^body.norm|^head=x' (4 tensors)\n"
        "  collision: body.norm.bias and head.bias would both be called x.bias\n"
        "  collision: body.norm.weight and head.weight would both be called x.weight\n"
        "  and 4 missing, 2 unexpected, which may come of it\n"
        "help: change what maps names so that every tensor keeps a name of its own, or push only one of the two"
    )


def test_more_than_one_place() -> None:
    resident = floats("encoder.w", "encoder.b", "decoder.w", "decoder.b", "decoder.c")
    plan = make_plan(floats("module.w", "module.b"), resident, NOTHING, Rules("subset"))
    assert said(plan) == (
        "the tensors of '/data/w.pt' do not match model 'm': more than one way to match the names\n"
        "  ambiguous: the checkpoint's names fit the model in 2 ways\n"
        "    module.* -> * (2 tensors), * -> decoder.* (2 tensors)\n"
        "    module.* -> * (2 tensors), * -> encoder.* (2 tensors)\n"
        "help: say which one is meant: add --map '^=decoder.' for module.* -> * (2 tensors), * -> decoder.* "
        "(2 tensors), or --map '^=encoder.' for module.* -> * (2 tensors), * -> encoder.* (2 tensors)"
    )


def test_what_can_be_pushed_needs_no_explanation() -> None:
    with pytest.raises(ValueError, match="nothing stands in the way"):
        said(make_plan(net(), net(), NOTHING))


# --- the error, and what is harmless ---------------------------------------------------------------------------------


def test_the_error_has_every_problem_and_the_explanation() -> None:
    plan = make_plan(floats("a", "x"), floats("a", "b"), NOTHING)
    error = refusal(plan, model="m", origin="state dict", model_class="Net")
    assert isinstance(error, TensorMismatch)
    assert error.problems == ("missing: b (float32 [2])", "unexpected: x (float32 [2])")
    assert str(error) == explain(plan, model="m", origin="state dict", model_class="Net")
    assert str(error).startswith("the tensors of the state dict do not match model 'm' (Net): ")
    assert error.model == "m"


def test_nothing_that_is_shown_takes_over_a_terminal() -> None:
    evil = "\x1b]0;x\x07\n"
    rules = Rules(renames=(Rule("^a", evil), Rule("zz" + evil, ""), Table(evil, (("b" + evil, "c" + evil),))))
    plan = make_plan(floats("a", "b"), floats("a", "b"), NOTHING, rules)
    error = refusal(plan, model="m", origin=evil, model_class=evil)
    for text in (str(error), *error.problems, *summary(plan)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert str(error).count("\n") == 6


# --- what a dry run says ---------------------------------------------------------------------------------------------


def test_a_summary_of_what_changes_nothing() -> None:
    assert summary(make_plan(net(), net(), NOTHING)) == [
        "5 tensors to send, 3.5 kB",
        "names, dtypes and shapes are the model's",
    ]


def test_a_summary_of_everything_that_a_plan_does() -> None:
    resident = of(
        {
            "embed.weight": ("bfloat16", (9, 4)),
            "out.weight": "embed.weight",
            "q.weight": ("bfloat16", (4, 4)),
            "twin.a": ("float32", (3,)),
            "twin.b": "twin.a",
            "step": ("int64", ()),
        }
    )
    offered = of(
        {
            "module.embed.weight": ("float32", (9, 4)),
            "module.attn.weight": ("float32", (4, 4)),
            "module.twin.a": ("float32", (3,)),
            "module.twin.b": ("float32", (3,)),
            "module.ids": ("int64", (7,)),
            "module.alias": "module.twin.b",
            "module.extra": ("float32", (5,)),
        }
    )
    rules = Rules("partial", cast=True, renames=(Rule("attn", "q"),))
    assert summary(make_plan(offered, resident, of({"ids": ("int64", (7,))}), rules)) == [
        "5 tensors to send, 116 B",
        "names: --map attn=q (1 tensor)",
        "names: module.* -> * (4 tensors)",
        (
            "4 tensors renamed: module.embed.weight -> embed.weight, module.attn.weight -> q.weight, module.twin.a "
            "-> twin.a, "
            "module.twin.b -> twin.b"
        ),
        "cast: float32 -> bfloat16 (2 tensors, 104 B)",
        "tied, and sent once (1 tensor): out.weight = embed.weight",
        "tied in the model, must be equal in the checkpoint (1 tensor): twin.a = module.twin.b",
        "skipped, non-persistent buffers of the model (1 tensor): module.ids",
        "skipped, tied to what is sent (1 tensor): module.alias",
        "left out, the model has none (1 tensor): module.extra",
        "kept as they are in the model (1 tensor): step",
    ]


def test_a_summary_proposes_rules_for_what_would_be_left_out() -> None:
    offered = net(lambda name: name.replace("head", "fc"))
    assert summary(make_plan(offered, net(), NOTHING, Rules("partial")))[-1] == (
        r"note: --map '^fc\.=head.' would name 2 tensors as the model does"
    )
