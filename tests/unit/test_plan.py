"""What becomes what: names as they are and as wrapping changes them, ties, transient buffers, policies, casts."""

import numpy as np
import pytest

from shipd.matching.plan import Plan, Rules, make_plan
from shipd.matching.renames import Rule, Table
from shipproto.structure import Structure, TensorSpec
from tests.support.plans import NOTHING, floats, of

SUBSET, PARTIAL = Rules("subset"), Rules("partial")


def pairs(plan: Plan) -> dict[str, str]:
    """The name in the checkpoint of each tensor that is sent."""
    assert not plan.problems, plan.problems
    return {name: plan.offered.names[int(row)] for name, row in zip(plan.structure.names, plan.rows, strict=True)}


def texts(plan: Plan) -> list[str]:
    return [problem.text for problem in plan.problems]


# --- as it is --------------------------------------------------------------------------------------------------------


def test_what_is_the_models_is_sent_as_it_is() -> None:
    resident = of({"a": ("float32", (2, 3)), "b": ("int64", ()), "c": ("float32", (0, 4)), "d": "a"})
    offered = Structure.decode(resident.encoded)
    plan = make_plan(offered, resident, NOTHING)
    assert plan.identity
    assert plan.structure is offered
    assert not plan.problems
    assert not plan.partial
    assert plan.nbytes == 24 + 8
    assert make_plan(NOTHING, NOTHING, NOTHING).identity, "a model may have no tensors"


def test_rules_that_rename_nothing_in_the_end_leave_it_as_it_is() -> None:
    plan = make_plan(floats("a", "b"), floats("a", "b"), NOTHING, Rules(renames=(Rule("a", "x"), Rule("x", "a"))))
    assert plan.identity
    assert plan.how == ("--map a=x (1 tensor)", "--map x=a (1 tensor)")


def test_a_policy_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="the policy is 'lax': it is one of strict, subset, partial"):
        Rules("lax")


# --- wrapped ---------------------------------------------------------------------------------------------------------

NAMES = ("conv.weight", "layers.0.norm.weight", "layers.1.norm.weight", "step")


@pytest.mark.parametrize(
    ("own", "its", "how"),
    [
        ("module.{}", "{}", ["module.* -> * (4 tensors)"]),
        ("{}", "module.{}", ["* -> module.* (4 tensors)"]),
        ("_orig_mod.module.{}", "{}", ["_orig_mod.module.* -> * (4 tensors)"]),
        ("module.{}", "_orig_mod.{}", ["module.* -> * (4 tensors)", "* -> _orig_mod.* (4 tensors)"]),
        ("_fsdp_wrapped_module.{}", "module._orig_mod.{}", None),
        ("model.{}", "{}", ["model.* -> * (4 tensors)"]),
        ("{}", "model.net.{}", ["* -> model.net.* (4 tensors)"]),
        ("model.{}", "net.backbone.{}", ["model.* -> net.backbone.* (4 tensors)"]),
        ("module.model.{}", "{}", ["module.model.* -> * (4 tensors)"]),
        ("module.model.{}", "_orig_mod.net.{}", None),
        ("model.module.{}", "{}", ["model.module.* -> * (4 tensors)"]),
    ],
)
def test_wrappers_and_prefixes_on_either_side(own: str, its: str, how: list[str] | None) -> None:
    offered = floats(*map(own.format, NAMES))
    resident = floats(*map(its.format, NAMES))
    plan = make_plan(offered, resident, NOTHING)
    assert pairs(plan) == {its.format(name): own.format(name) for name in NAMES}
    assert plan.structure is resident
    assert not plan.identity
    assert how is None or list(plan.how) == how
    assert plan.renamed == tuple((own.format(name), its.format(name)) for name in sorted(NAMES))


def test_wrappers_inside_names_and_only_in_some() -> None:
    offered = floats(
        "_fsdp_wrapped_module.a.0._checkpoint_wrapped_module.w", "_fsdp_wrapped_module.a.1.w", "b._orig_mod.w"
    )
    plan = make_plan(offered, floats("a.0.w", "a.1.w", "b.w"), NOTHING)
    assert pairs(plan)["a.0.w"] == "_fsdp_wrapped_module.a.0._checkpoint_wrapped_module.w"
    assert plan.how == (
        "_fsdp_wrapped_module.* -> * (2 tensors)",
        "*._checkpoint_wrapped_module.* -> *.* (1 tensor)",
        "*._orig_mod.* -> *.* (1 tensor)",
    )


@pytest.mark.parametrize("around", ["{}", "module.{}", "_orig_mod.{}", "_orig_mod.module.{}", "module.module.{}"])
@pytest.mark.parametrize("within", ["{}", "module.{}", "_orig_mod.{}"])
def test_a_model_that_has_a_part_called_module(around: str, within: str) -> None:
    parts = ("module.weight", "module.bias", "head.module.weight", "other.weight")
    plan = make_plan(floats(*map(around.format, parts)), floats(*map(within.format, parts)), NOTHING)
    assert pairs(plan) == {within.format(name): around.format(name) for name in parts}


def test_names_that_would_collide_without_wrappers_are_told_apart_by_their_prefix() -> None:
    parts = ("a.module.w", "a.w")
    plan = make_plan(floats(*map("module.{}".format, parts)), floats(*parts), NOTHING)
    assert pairs(plan) == {name: f"module.{name}" for name in parts}
    assert plan.notes == (
        "taking module. off names would make a.w of two names of the model, a.module.w and a.w: it was not done",
    )


def test_wrappers_are_left_where_two_names_would_be_one() -> None:
    plan = make_plan(floats("a.module.w", "a.w", "module.b"), floats("a.w", "b", "c"), NOTHING)
    assert plan.notes == (
        "taking module. off names would make a.w of two names of the checkpoint, a.module.w and a.w: it was not done",
    )
    assert texts(plan) == ["missing: c (float32 [2])", "unexpected: a.module.w (float32 [2])"]


def test_names_with_dots_at_odd_places() -> None:
    odd = (".", "..", ".a", "a.", "a..b", "module", "module.")
    for own, its in (("{}", "{}"), ("module.{}", "{}"), ("m.{}", "{}"), ("{}", "_orig_mod.{}"), (".{}", "..{}")):
        plan = make_plan(floats(*map(own.format, odd)), floats(*map(its.format, odd)), NOTHING)
        assert pairs(plan) == {its.format(name): own.format(name) for name in odd}


def test_a_prefix_that_only_a_part_of_the_model_has_is_found() -> None:
    # A base model's checkpoint for a model with a head that is tied to it, as transformers has them.
    resident = of({"transformer.wte.weight": ("float32", (9, 4)), "transformer.h.0.w": ("float32", (4,)),
                   "lm_head.weight": "transformer.wte.weight"})  # fmt: skip
    plan = make_plan(of({"wte.weight": ("float32", (9, 4)), "h.0.w": ("float32", (4,))}), resident, NOTHING)
    assert pairs(plan) == {
        "lm_head.weight": "wte.weight",
        "transformer.h.0.w": "h.0.w",
        "transformer.wte.weight": "wte.weight",
    }
    assert plan.tied == (("lm_head.weight", "transformer.wte.weight"),)


# --- ties and transient buffers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
@pytest.mark.parametrize("present", ["a", "b"])
def test_one_name_of_tied_tensors_is_enough(prefix: str, present: str) -> None:
    resident = of({"a": ("float32", (3,)), "b": "a", "c": ("float32", (4,))})
    offered = of({f"{prefix}{present}": ("float32", (3,)), f"{prefix}c": ("float32", (4,))})
    plan = make_plan(offered, resident, NOTHING)
    assert pairs(plan) == {"a": prefix + present, "b": prefix + present, "c": f"{prefix}c"}
    assert plan.tied == ({"a": ("b", "a"), "b": ("a", "b")}[present],)
    assert plan.equal_pairs == ()
    assert plan.nbytes == 28


def test_tensors_that_only_the_model_ties_must_be_equal() -> None:
    resident = of({"a": ("float32", (3,)), "b": "a", "c": "a"})
    plan = make_plan(of({"a": ("float32", (3,)), "b": ("float32", (3,)), "c": "b"}), resident, NOTHING)
    assert not plan.problems
    assert not plan.identity
    assert plan.equal_pairs == ((0, 1),)
    assert plan.rows.tolist() == [0, 1, 2]


def test_tensors_that_only_the_checkpoint_ties_are_sent_twice() -> None:
    plan = make_plan(of({"a": ("float32", (3,)), "b": "a"}), floats("a", "b", size=3), NOTHING)
    assert pairs(plan) == {"a": "a", "b": "b"}
    assert plan.structure.primary.tolist() == [0, 1]


def test_a_tensor_that_the_model_lacks_is_no_loss_where_its_bytes_are_sent() -> None:
    offered = of(
        {
            "module.head.weight": "module.wte.weight",
            "module.wte.weight": ("float32", (3,)),
            "module.x": ("float32", (3,)),
        }
    )
    plan = make_plan(offered, floats("wte.weight", "x", size=3), NOTHING)
    assert pairs(plan) == {"wte.weight": "module.wte.weight", "x": "module.x"}
    assert plan.shared == ("module.head.weight",)


@pytest.mark.parametrize(("own", "its"), [("", ""), ("module.", ""), ("", "_orig_mod."), ("bert.", ""), ("a.", "b.c.")])
def test_transient_buffers_are_skipped_under_any_prefix(own: str, its: str) -> None:
    resident = floats(f"{its}embed.w", f"{its}out.w")
    transient = of({f"{its}embed.ids": ("int64", (1, 5)), f"{its}out.mask": ("bool", (4,))})
    offered = of(
        {f"{own}embed.ids": ("int64", (1, 5)), f"{own}embed.w": ("float32", (2,)), f"{own}out.w": ("float32", (2,))}
    )
    plan = make_plan(offered, resident, transient)
    assert pairs(plan) == {f"{its}embed.w": f"{own}embed.w", f"{its}out.w": f"{own}out.w"}
    assert plan.skipped == (f"{own}embed.ids",)


def test_a_transient_buffer_must_be_alike() -> None:
    offered, transient = of({"w": ("float32", (2,)), "f": ("float16", (5,))}), of({"f": ("float32", (5,))})
    assert texts(make_plan(offered, floats("w"), transient)) == ["unexpected: f (float16 [5])"]
    assert make_plan(offered, floats("w"), transient, Rules(cast=True)).skipped == ("f",)
    other = of({"w": ("float32", (2,)), "f": ("float32", (6,))})
    assert texts(make_plan(other, floats("w"), transient, Rules(cast=True))) == ["unexpected: f (float32 [6])"]


# --- policies --------------------------------------------------------------------------------------------------------


def test_strict_lists_what_is_missing_and_what_is_unexpected() -> None:
    plan = make_plan(floats("a", "x"), floats("a", "b"), NOTHING)
    assert texts(plan) == ["missing: b (float32 [2])", "unexpected: x (float32 [2])"]
    assert [(problem.kind, problem.tensor) for problem in plan.problems] == [("missing", "b"), ("unexpected", "x")]


def test_a_subset_may_lack_tensors_and_have_no_others() -> None:
    resident = of(
        {"a": ("float32", (3,)), "b": ("float32", (5, 2)), "c": "b", "d": ("float32", ()), "e": ("int64", (0,))}
    )
    plan = make_plan(of({"module.c": ("float32", (5, 2)), "module.d": ("float32", ())}), resident, NOTHING, SUBSET)
    assert pairs(plan) == {"b": "module.c", "c": "module.c", "d": "module.d"}
    assert plan.partial
    assert plan.kept == ("a", "e")
    assert plan.structure.specs() == [
        TensorSpec("b", "float32", (5, 2)),
        TensorSpec("c", "float32", (5, 2), "b"),
        TensorSpec("d", "float32", ()),
    ]
    assert plan.nbytes == 44
    plan = make_plan(floats("a", "x"), floats("a", "b"), NOTHING, SUBSET)
    assert texts(plan) == ["unexpected: x (float32 [2])"]
    whole = make_plan(floats("a", "b"), floats("a", "b"), NOTHING, SUBSET)
    assert whole.identity
    assert not whole.partial


def test_a_part_of_a_model_with_its_own_names_is_found_where_there_is_one_place_for_it() -> None:
    resident = floats("encoder.w", "encoder.b", "decoder.w", "decoder.x")
    plan = make_plan(floats("w", "b"), resident, NOTHING, SUBSET)
    assert pairs(plan) == {"encoder.b": "b", "encoder.w": "w"}
    plan = make_plan(floats("w"), resident, NOTHING, SUBSET)
    assert [problem.text for problem in plan.problems] == ["ambiguous: the checkpoint's names fit the model in 2 ways"]
    assert {choice.how for choice in plan.choices} == {("* -> encoder.* (1 tensor)",), ("* -> decoder.* (1 tensor)",)}


def test_partial_takes_what_fits_and_tells_of_the_rest() -> None:
    resident = of({"a": ("float32", (3,)), "b": ("float32", (4,)), "c": ("float32", (5,))})
    offered = of({"module.a": ("float32", (3,)), "module.b": ("float32", (4,)), "module.z": ("float32", (9,))})
    plan = make_plan(offered, resident, NOTHING, PARTIAL)
    assert pairs(plan) == {"a": "module.a", "b": "module.b"}
    assert plan.kept == ("c",)
    assert plan.ignored == ("module.z",)
    assert plan.partial
    complete = make_plan(floats("a", "z"), floats("a"), NOTHING, PARTIAL)
    assert not complete.partial, "nothing keeps its values"
    assert complete.ignored == ("z",)


def test_a_few_names_that_agree_by_chance_are_no_match() -> None:
    resident = floats(*(f"layers.{at}.w" for at in range(10)))
    offered = floats("net.layers.1.w", *(f"block.{at}.v" for at in range(10)))
    plan = make_plan(offered, resident, NOTHING, PARTIAL)
    assert texts(plan) == ["nothing: none of the checkpoint's 11 tensors is one of the model's"]


@pytest.mark.parametrize("rules", [SUBSET, PARTIAL])
def test_nothing_is_no_part_of_a_model(rules: Rules) -> None:
    assert texts(make_plan(NOTHING, floats("a"), NOTHING, rules)) == ["nothing: the checkpoint has no tensors"]
    assert texts(make_plan(NOTHING, NOTHING, NOTHING, rules)) == ["nothing: the checkpoint has no tensors"]
    plan = make_plan(floats("ids"), floats("a"), floats("ids"), rules)
    assert texts(plan) == ["nothing: none of the checkpoint's 1 tensors is one of the model's"]


@pytest.mark.parametrize("policy", ["strict", "subset", "partial"])
def test_shapes_are_never_another(policy: str) -> None:
    offered = of({"module.a": ("float32", (3, 1)), "module.b": ("float32", ())})
    plan = make_plan(offered, of({"a": ("float32", (3,)), "b": ("float32", (1,))}), NOTHING, Rules(policy, cast=True))
    assert texts(plan) == [
        "shape: a (module.a in the checkpoint) is [3, 1], the resident model has [3]",
        "shape: b (module.b in the checkpoint) is [], the resident model has [1]",
    ]


# --- casts -----------------------------------------------------------------------------------------------------------


def test_dtypes_differ_only_where_casts_are_allowed() -> None:
    kinds = ["float32", "float32", "int64", "complex128", "bool", "float64", "uint8", "float8_e8m0fnu"]
    wanted = ["bfloat16", "float64", "int32", "complex64", "uint8", "int64", "bool", "float32"]
    offered = of({f"t{at}": (kind, (5,)) for at, kind in enumerate(kinds)})
    resident = of({f"t{at}": (kind, (5,)) for at, kind in enumerate(wanted)})
    strict = make_plan(offered, resident, NOTHING)
    assert len(strict.problems) == 8
    assert strict.problems[0].text == "dtype: t0 is float32, the resident model has bfloat16"
    plan = make_plan(offered, resident, NOTHING, Rules(cast=True))
    assert texts(plan) == [
        "dtype: t4 is bool, the resident model has uint8",
        "dtype: t5 is float64, the resident model has int64",
        "dtype: t6 is uint8, the resident model has bool",
    ]
    plan = make_plan(of({"a": ("float8_e4m3fn", (5,))}), of({"a": ("float8_e8m0fnu", (5,))}), NOTHING, Rules(cast=True))
    assert texts(plan) == ["dtype: a is float8_e4m3fn, the resident model has float8_e8m0fnu"]


def test_casts_are_counted_by_what_is_sent() -> None:
    offered = of({"a": ("float32", (4,)), "b": ("float32", (4,)), "c": ("float16", (3,)), "d": ("float32", (2,))})
    resident = of({"a": ("bfloat16", (4,)), "b": "a", "c": ("float32", (3,)), "d": ("float32", (2,))})
    plan = make_plan(offered, resident, NOTHING, Rules(cast=True))
    assert plan.casts == {("float32", "bfloat16"): (1, 8), ("float16", "float32"): (1, 12)}
    assert plan.equal_pairs == ((0, 1),)
    assert not plan.identity


# --- the user's rules ------------------------------------------------------------------------------------------------


def test_rules_and_what_is_found_by_itself_go_together() -> None:
    offered = floats("module.classifier.w", "module.body.w", "module.body.gamma")
    rules = Rules(renames=(Rule("classifier", "head"), Rule(r"\.gamma$", ".scale")))
    plan = make_plan(offered, floats("head.w", "body.w", "body.scale"), NOTHING, rules)
    assert pairs(plan) == {
        "head.w": "module.classifier.w",
        "body.w": "module.body.w",
        "body.scale": "module.body.gamma",
    }
    assert plan.how == (
        "--map classifier=head (1 tensor)",
        r"--map '\.gamma$=.scale' (1 tensor)",
        "module.* -> * (3 tensors)",
    )


def test_a_name_that_the_user_gives_is_the_models_whatever_else_is_read_into_it() -> None:
    rules = Rules(renames=(Table("names.json", (("first", "net.module.w"),)),))
    plan = make_plan(floats("first", "x.v", "x.u"), floats("net.module.w", "net.v", "net.u"), NOTHING, rules)
    assert pairs(plan) == {"net.module.w": "first", "net.u": "x.u", "net.v": "x.v"}
    assert plan.how == ("names.json (1 tensor)", "x.* -> net.* (2 tensors)")


def test_rules_may_exchange_names() -> None:
    rules = Rules(renames=(Table("t", (("a", "b"), ("b", "a"))),))
    assert pairs(make_plan(floats("a", "b"), floats("a", "b"), NOTHING, rules)) == {"a": "b", "b": "a"}


def test_names_that_rules_make_one_are_refused() -> None:
    plan = make_plan(floats("a.w", "b.w", "c.w"), floats("x.w"), NOTHING, Rules(renames=(Rule("^[abc]", "x"),)))
    assert [problem.text for problem in plan.problems if problem.kind == "collision"] == [
        "collision: a.w and b.w would both be called x.w",
        "collision: a.w and c.w would both be called x.w",
    ]


def test_rules_and_entries_that_are_of_no_use_are_refused() -> None:
    table = Table("names.toml", (("gone", "a"), ("b", "gone"), ("c", "c")))
    plan = make_plan(floats("a", "b", "c"), floats("a", "b", "c"), NOTHING, Rules(renames=(Rule("^x", "y"), table)))
    assert [problem.text for problem in plan.problems if problem.kind == "rename"] == [
        "rename: the rule '^x=y' matches none of the checkpoint's 3 names",
        "rename: names.toml maps gone, which the checkpoint does not have",
        "rename: names.toml maps b to gone, which the model does not have",
    ]


# --- columns ---------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_plan_are_read_only_or_copies() -> None:
    resident = floats("a", "b", "c")
    plan = make_plan(floats("module.b"), resident, NOTHING, SUBSET)
    with pytest.raises(ValueError, match="read-only"):
        plan.structure.dtypes[0] = 1
    assert np.array_equal(resident.primary, [0, 1, 2])
