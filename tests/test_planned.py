"""What does not fit together is refused or named: a quantised layer and its input, a plan and its model."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_llama import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate, explain
from micromix_compile.allocation import uniform_plan
from micromix_compile.errors import (
    CheckpointError,
    LeftAloneWarning,
    NoPlanWarning,
    OptionError,
    QuantizedAlreadyError,
    StrictError,
    UnplannedLayersWarning,
)
from micromix_compile.integrations.transformers import MicroMixConfig
from micromix_compile.layers import linear_shapes, other_products
from micromix_compile.plan import ModelPlan
from micromix_compile.planned import plan_to_use, quantised


@pytest.mark.parametrize("activations", ["match", "bfloat16"])
@pytest.mark.parametrize("sort", [True, False])
@torch.no_grad()
def test_an_input_of_another_width_is_refused_as_by_a_float_layer(activations, sort):
    """K is 48, padded to 64: 64 channels would fit the operators, and so would 40 where there is no order."""
    model = nn.Sequential(nn.Linear(48, 32)).eval()
    recipe = Recipe(format="mxfp8", activations=activations)
    if sort:
        recipe = Recipe(split=(0.5, 0.0, 0.5), activations=activations)
        recipe = calibrate(model).run([torch.randn(8, 48)]).plan(recipe)
    with quantised(model, recipe):
        for size in ((2, 64), (2, 40), (64,), (2, 3, 1), ()):
            x = torch.randn(size)
            with pytest.raises(RuntimeError) as refused:
                nn.Linear(48, 32)(x)
            with pytest.raises(RuntimeError) as error:
                model(x)
            assert str(error.value) == str(refused.value)
            with pytest.raises(RuntimeError):
                torch.export.export(model, (x,), strict=False)
        compiled = torch.compile(model, backend="micromix", options={"inductor": False})
        for x in (torch.randn(2, 48), torch.randn(2, 64), torch.randn(3, 5, 48)):
            if x.shape[-1] == 48:
                assert torch.equal(compiled(x), model(x))
            else:
                with pytest.raises(RuntimeError, match="48"):
                    compiled(x)
        assert explain(compiled).passes["lowered"] == 2  # the last call's graph too: it is compiled
        dynamic = ({1: torch.export.Dim.AUTO},)
        for strict in (True, False):
            program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=dynamic)
            assert torch.equal(program.module()(x), model(x))


def test_a_package_of_another_width_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96)).eval()
    with pytest.raises(RuntimeError, match="6, 3"):
        micromix.export(
            model, tmp_path / "model.pt2", (torch.randn(6, 3),), plan=Recipe(format="mxfp8")
        )


def part_of(plan: ModelPlan, recipe: dict) -> ModelPlan:
    kept = [name for name in plan if ".mlp." in name]
    return ModelPlan({n: plan[n] for n in kept}, {n: plan.shapes[n] for n in kept}, recipe)


@pytest.mark.parametrize("use", ["plan_to_use", "MicroMixConfig", "compile", "attach"])
def test_layers_that_a_plan_lacks_are_named_wherever_it_is_given(use, tmp_path):
    model = tiny_llama()
    whole = uniform_plan(linear_shapes(model), Recipe(format="mxfp8"))
    part_of(whole, whole.recipe).save(tmp_path / "plan")

    def run(plan, **options):
        torch.compiler.reset()
        options |= {"plan": plan, "inductor": False}
        compiled = torch.compile(model, backend="micromix", options=options)
        with torch.no_grad():
            compiled(torch.arange(8)[None])

    calls = {
        "plan_to_use": lambda plan: plan_to_use(model, plan),
        "MicroMixConfig": lambda plan: MicroMixConfig(plan).plan_for(model),
        "compile": run,
        "attach": lambda plan: micromix.load_plan(plan).attach(model),
    }
    with pytest.warns(UnplannedLayersWarning, match=r"layers\.0\.self_attn\.q_proj") as seen:
        calls[use](tmp_path / "plan")
    assert sum(w.category is UnplannedLayersWarning for w in seen) == 1
    skips = Recipe(format="mxfp8", skip=("*.self_attn.*",)).to_dict()
    for plan in (whole, part_of(whole, skips), part_of(whole, {})):
        plan.save(tmp_path / "plan")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnplannedLayersWarning)
            calls[use](tmp_path / "plan")
            if use == "plan_to_use":
                plan.attach(model)
                assert plan_to_use(model, None) is plan
    if use == "compile":
        with pytest.raises(StrictError, match="q_proj"):
            run(part_of(whole, whole.recipe), strict=True)


def test_a_plan_may_have_more_than_the_part_that_is_compiled(recwarn):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    plan = uniform_plan(linear_shapes(nn.ModuleDict({"a": model})), Recipe(format="mxfp8"))
    compiled = torch.compile(model, backend="micromix", options={"plan": plan, "inductor": False})
    with torch.no_grad():
        compiled(torch.randn(4, 32))
    assert not [w for w in recwarn if w.category is UnplannedLayersWarning]


@pytest.mark.parametrize("calibrated", [False, True])
def test_fused_experts_stay_float_and_are_named(calibrated):
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).eval()
    recipe = Recipe(format="mxfp8", skip=("*.mlp.gate",))

    def plan_of(recipe: Recipe) -> ModelPlan | Recipe:
        return uniform_plan(linear_shapes(model), recipe) if calibrated else recipe

    for call in (lambda p: plan_to_use(model, p), lambda p: MicroMixConfig(p).plan_for(model)):
        with pytest.warns(LeftAloneWarning, match=r"float:\n  model.layers.0.mlp.experts\n"):
            assert len(call(plan_of(recipe))) == 4
        for skipped in ("*.mlp.*", "*.experts.*"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", LeftAloneWarning)
                call(plan_of(Recipe(format="mxfp8", skip=("*.mlp.gate", skipped))))


def test_what_is_no_product_is_not_named():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 8),
            "conv": torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
            "norm": nn.LayerNorm((4, 8)),
            "linear": nn.Linear(4, 4),
            "token": nn.ParameterList([torch.randn(1, 1, 4)]),
        }
    )
    assert not other_products(model)
    model["linear"] = quantised_layer = nn.Sequential(nn.Linear(4, 4))
    with quantised(quantised_layer, Recipe(format="mxfp8")):
        assert not other_products(model)
    model["recurrent"] = nn.LSTM(4, 4)
    assert list(other_products(model)) == ["recurrent"]


def test_a_model_whose_layers_are_all_quantised_is_not_calibrated():
    """The head, which is float, is left alone by default."""
    model = tiny_llama()
    with quantised(model, Recipe(format="mxfp8")):
        for given in (model, torch.compile(model)):
            with pytest.raises(QuantizedAlreadyError, match="no float layer to calibrate"):
                calibrate(given)
    with quantised(model, Recipe(format="mxfp8", skip=("*.down_proj",))):
        plan = calibrate(model).run([torch.arange(8)[None]]).plan(Recipe(split=(0.5, 0.0, 0.5)))
        assert list(plan) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    with pytest.warns(UnplannedLayersWarning):  # sequential, behind a part of the layers
        calibration = calibrate(model, plan=plan).run([torch.arange(8)[None]])
    assert len(calibration.plan(Recipe(split=(0.5, 0.0, 0.5)))) == 14


def test_only_models_of_transformers_are_saved(tmp_path):
    with pytest.raises(OptionError, match="'model' is a Sequential"):
        micromix.save_pretrained(nn.Sequential(nn.Linear(32, 32)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"format": "mxfp4"}, {"recipe": Recipe()}])
def test_options_that_a_config_does_not_have(options):
    with pytest.raises(OptionError, match=f"{next(iter(options))}' is not known. Valid: plan"):
        MicroMixConfig(**options)


def test_weights_are_not_restored_from_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nope cannot be used: it is no folder"):
        micromix.restore(nn.Linear(32, 32), tmp_path / "nope")


def test_the_head_that_is_left_alone_is_no_layer_without_a_plan():
    with pytest.warns(NoPlanWarning, match=r"\(14\)"):
        assert len(plan_to_use(tiny_llama(), None)) == 14
