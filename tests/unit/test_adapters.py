"""Adapters as peft saves them, into the model that peft made: what it would load where."""

import pytest
import torch
from torch import nn

from shipd.checkpoints.planned import planned
from shipd.checkpoints.source import open_source
from shipd.matching.adapters import adapters_in, saved_names
from shipd.matching.diagnosis import explain
from shipd.matching.plan import Plan, Rules, make_plan
from shipd.matching.renames import parse_rename
from shipproto.structure import Structure
from tests.support.plans import NOTHING, floats

SUBSET = Rules("subset")


class Net(nn.Module):
    """A model with something of everything that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "ff": nn.Linear(8, 8)}) for _ in range(2))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer["ff"](layer["q"](x))  # type: ignore[index]  # nn.ModuleList does not say of what
        return self.classifier(x)


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def configuration(peft, method: str):
    """Of one of the methods of peft, for the parts of ``Net`` that it adapts."""
    linear = ["q", "ff"]
    return {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=[*linear, "embed"], modules_to_save=["classifier"]),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=linear, use_dora=True, bias="lora_only"),
        "tokens": lambda: peft.LoraConfig(r=2, target_modules=linear, trainable_token_indices={"embed": [3, 5]}),
        "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=linear),
        "ia3": lambda: peft.IA3Config(target_modules=linear, feedforward_modules=["ff"]),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=linear),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=linear),
        "vera": lambda: peft.VeraConfig(r=2, target_modules=linear),
    }[method]()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def structure_of(state: dict[str, torch.Tensor] | nn.Module) -> Structure:
    return open_source(state).structure


def composed(state: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], plan: Plan) -> dict[str, bytes]:
    """The bytes of the model with what the plan sends over what it has."""
    content = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
    source = planned(open_source(saved), plan)
    for row, name in enumerate(source.structure.names):
        content[name] = bytes(source.read(row, 0, int(source.structure.nbytes[row])))
    return content


@pytest.mark.parametrize("method", ["lora", "dora", "tokens", "adalora", "ia3", "loha", "oft", "vera"])
@pytest.mark.parametrize("adapter", ["default", "q"])
def test_what_peft_saves_goes_where_peft_would_load_it(peft, method: str, adapter: str) -> None:
    model = peft.get_peft_model(Net(), configuration(peft, method), adapter_name=adapter)
    saved = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    saved = {name: torch.full_like(tensor, at + 1) for at, (name, tensor) in enumerate(saved.items())}
    before = state_of(model)
    plan = make_plan(structure_of(saved), structure_of(model), NOTHING, SUBSET)
    assert not plan.problems, explain(plan, model="m", origin="w")
    assert len(plan.structure) == len(saved) + len(plan.tied)
    assert plan.kept
    assert any(f"adapter {adapter!r}" in line for line in plan.how)
    peft.set_peft_model_state_dict(model, saved, adapter_name=adapter)
    assert composed(before, saved, plan) == {name: tensor.numpy().tobytes() for name, tensor in state_of(model).items()}


def test_an_adapter_that_was_added_to_a_model_without_peft_around_it(peft) -> None:
    wrapped = peft.get_peft_model(Net(), configuration(peft, "lora"))
    saved = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    inner = peft.inject_adapter_in_model(configuration(peft, "lora"), Net())
    plan = make_plan(structure_of(saved), structure_of(inner), NOTHING, SUBSET)
    assert not plan.problems
    assert plan.how == ("base_model.model.* -> * (12 tensors)", "adapter 'default' (12 tensors)")
    assert dict(plan.renamed)["base_model.model.classifier.weight"] == "classifier.modules_to_save.default.weight"
    assert dict(plan.renamed)["base_model.model.embed.lora_embedding_A"] == "embed.lora_embedding_A.default"


def test_the_rules_that_are_proposed_for_each_of_several_adapters_do_what_peft_would(peft) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q", "embed"], modules_to_save=["classifier"], use_dora=True)
    model = peft.get_peft_model(Net(), config)
    model.add_adapter("other", config)
    saved = peft.get_peft_model_state_dict(model, adapter_name="other", save_embedding_layers=False)
    saved = {name: torch.full_like(tensor, at + 1) for at, (name, tensor) in enumerate(saved.items())}
    before = state_of(model)
    plan = make_plan(structure_of(saved), structure_of(model), NOTHING, SUBSET)
    assert explain(plan, model="m", origin="adapter_model.safetensors", model_class="peft.PeftModel") == (
        "the tensors of 'adapter_model.safetensors' do not match model 'm' (peft.PeftModel): more than one way to "
        "match the names\n"
        "  ambiguous: the checkpoint fits 2 adapters of the model: 'default' and 'other'\n"
        r"help: say which one is meant: add --map '\b(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\b=\1.default' "
        "--map 'lora_magnitude_vector$=lora_magnitude_vector.default.weight' "
        r"--map '\b(classifier)\.=\1.modules_to_save.default.' for adapter 'default', "
        r"or --map '\b(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\b=\1.other' "
        "--map 'lora_magnitude_vector$=lora_magnitude_vector.other.weight' "
        r"--map '\b(classifier)\.=\1.modules_to_save.other.' for adapter 'other'"
    )
    renames = tuple(
        map(
            parse_rename,
            (
                r"\b(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\b=\1.other",
                "lora_magnitude_vector$=lora_magnitude_vector.other.weight",
                r"\b(classifier)\.=\1.modules_to_save.other.",
            ),
        )
    )
    plan = make_plan(plan.offered, plan.resident, NOTHING, Rules("subset", renames=renames))
    assert not plan.problems
    peft.set_peft_model_state_dict(model, saved, adapter_name="other")
    assert composed(before, saved, plan) == {name: tensor.numpy().tobytes() for name, tensor in state_of(model).items()}


# --- names alone -----------------------------------------------------------------------------------------------------


def test_adapters_are_told_by_what_stands_before_their_names() -> None:
    assert adapters_in(["h.0.q.lora_A.one.weight", "h.0.q.base_layer.weight", "head.modules_to_save.two.bias"]) == [
        "one",
        "two",
    ]
    assert adapters_in(["h.0.q.lora_A.weight", "lora.x.weight", "my_lora_A.x.weight", "h.loras_A.x"]) == []
    assert adapters_in(["prompt_encoder.p.embedding.weight", "ia3_l.i", "lora_embedding_A.e"]) == ["e", "i", "p"]
    assert len(adapters_in([f"lora_A.{at:02}.weight" for at in range(99)])) == 16


def test_only_the_last_components_of_a_name_are_an_adapters() -> None:
    assert saved_names(["q.q.lora_A.q.weight", "q.q.lora_embedding_A.q", "q.q.bias", "x.q.q"], "q") == [
        "q.q.lora_A.weight",
        "q.q.lora_embedding_A",
        "q.bias",
        "x.q",
    ]
    assert saved_names(["prompt_encoder.p.embedding.weight", "x.peanut_encoders.p.0.weight", "p"], "p") == [
        "prompt_embeddings",
        "x.peanut_encoders.0.weight",
        "p",
    ]
    assert saved_names([], "p") == []


def test_an_adapter_that_only_one_of_several_has_the_parts_of_is_that_ones() -> None:
    resident = floats("q.lora_A.a.weight", "q.lora_A.b.weight", "k.lora_A.b.weight", "q.base_layer.weight")
    plan = make_plan(floats("q.lora_A.weight", "k.lora_A.weight"), resident, NOTHING, SUBSET)
    assert dict(plan.renamed) == {"q.lora_A.weight": "q.lora_A.b.weight", "k.lora_A.weight": "k.lora_A.b.weight"}
    assert plan.kept == ("q.base_layer.weight", "q.lora_A.a.weight")


def test_an_adapter_alone_is_no_whole_version() -> None:
    resident = floats("q.lora_A.default.weight", "q.base_layer.weight")
    plan = make_plan(floats("q.lora_A.weight"), resident, NOTHING)
    assert explain(plan, model="m", origin="adapter.safetensors") == (
        "the tensors of 'adapter.safetensors' do not match model 'm': 1 missing\n"
        "  names were matched with adapter 'default' (1 tensor)\n"
        "  missing: q.base_layer.weight (float32 [2])\n"
        "help: add --policy subset, which keeps 1 tensor of the model's as they are"
    )
    several = floats("q.lora_A.a.weight", "q.lora_A.w.weight", "q.base_layer.weight")
    text = explain(make_plan(floats("q.lora_A.weight"), several, NOTHING), model="m", origin="w")
    assert text.endswith(
        r"help: add --policy subset; then say which one is meant: add --map '\b(lora_A)\b=\1.a' for adapter 'a', "
        r"or --map '\b(lora_A)\b=\1.w' for adapter 'w'"
    )
