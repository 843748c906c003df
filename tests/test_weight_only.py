"""Recipe(activations="bfloat16"): weights quantised alone, from the recipe to packages and checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import build, inputs
from test_backend import Block, Writes, planned, run
from test_plan import model_plan, rewrite
from tiny_llama import save_tiny, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile import LayerPlan, Recipe, calibrate, explain, load_plan
from micromix_compile import _torch_compat as compat
from micromix_compile.budget import _errors
from micromix_compile.cli import main
from micromix_compile.errors import (
    FileVersionError,
    InvalidPlanError,
    PlanMismatchError,
    RecipeError,
)
from micromix_compile.mx import MixedLayout
from micromix_compile.passes.find_linears import find_linears
from micromix_compile.plan import ModelPlan
from micromix_compile.quantized_linear import QuantizedLinear
from micromix_compile.reference import reference_model

SPLIT = (0.5, 0.25, 0.25)
MIX = Recipe(split=SPLIT, hadamard=(4, 6), activations="bfloat16")


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan(ids):
    return calibrate(tiny_llama()).run([ids]).plan(MIX)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def distance(a, b) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("option", "value", "mend"),
    [
        ("activations", "float", "'match', 'bfloat16'"),
        ("activations", None, "'match', 'bfloat16'"),
        ("weights", "mxfp4", "format='mxfp4'"),
        ("weight_rules", ("ceil", "ceil", "ceil"), "rules are those of the weights"),
        ("hadamard", "measured", "segments, as in"),
    ],
)
def test_recipes_that_make_no_sense(option, value, mend):
    with pytest.raises(RecipeError, match=mend) as caught:
        Recipe(**{"activations": "bfloat16", "bits": 5.0, option: value})
    assert caught.value.facts["option"] == option


def test_plans_differ_by_their_activations(tmp_path):
    layout, shapes = MixedLayout(32, 0, 32), {"layer": (8, 64)}
    layers = [LayerPlan(64, layout, activations=a) for a in ("match", "bfloat16")]
    one, other = (ModelPlan({"layer": layer}, shapes) for layer in layers)
    assert one != other and layers[0].digest != layers[1].digest
    assert (one.activation_element_bits, other.activation_element_bits) == (6, 16)
    assert one.element_bits == other.element_bits == 6
    with pytest.raises(InvalidPlanError, match="activations are 'float16'"):
        LayerPlan(64, layout, activations="float16")
    for plan in (one, other):
        plan.save(tmp_path / "plan")
        assert load_plan(tmp_path / "plan") == plan
    model = nn.ModuleDict({"layer": nn.Linear(64, 8)})
    structures = {
        plan.attach(model)["layer"].activations: model["layer"].weight._micromix_structure
        for plan in (one, other)
    }
    assert len(set(structures.values())) == 2  # what is compiled for one does not run the other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inductor", [False, True])
def test_numbers_are_those_of_the_reference(block, dtype, inductor):
    block.to(dtype)
    x = torch.randn(2, 5, 96, dtype=dtype)
    plan = planned(block, x, recipe=MIX)
    y, compiled = run(block, x, plan=plan, strict=True, inductor=inductor)
    with torch.no_grad():
        reference = reference_model(block, plan)(x).float()
        change = (reference - block(x).float()).norm()
    assert y.dtype == dtype
    assert (y.float() - reference).norm() <= 0.1 * change
    assert explain(compiled).passes == {"lowered": 3, "micromix::weight_only_linear": 2}
    assert str(explain(compiled)).count("activations bfloat16") == 3


def test_closer_to_the_model_than_quantised_activations(block):
    x = torch.randn(64, 96)
    errors = []
    for activations in ("match", "bfloat16"):
        torch.compiler.reset()
        y, _ = run(block, x, recipe=Recipe(format="mxfp4", activations=activations))
        errors.append(distance(y, block(x)))
    assert errors[1] < 0.8 * errors[0]


def test_a_whole_model(plan, ids):
    model = tiny_llama()
    compiled = torch.compile(
        model, backend="micromix", options={"plan": plan, "strict": True, "inductor": False}
    )
    y, reference = logits(compiled, ids), logits(reference_model(model, plan), ids)
    assert distance(y, reference) <= 0.02 < distance(logits(model, ids), reference)
    rows = explain(compiled).layers
    assert {row.activations for row in rows.values() if not row.reason} == {"bfloat16"}
    for i in range(2):  # the order of down_proj lies in the rows before it
        folded = rows[f"model.layers.{i}.mlp.down_proj"].folded_into
        assert sorted(name.rpartition(".")[2] for name in folded) == ["gate_proj", "up_proj"]


@pytest.mark.parametrize("name", ["gpt2", "phi3", "t5"])
def test_other_architectures(name):
    """Transposed weights and biases, merged weights, and an input that comes from elsewhere."""
    model, arguments = build(name), inputs(name)
    plan = calibrate(model).run([arguments]).plan(MIX).attach(model)
    options = {"strict": True, "inductor": False}
    compiled = torch.compile(model, backend="micromix", options=options)
    with torch.no_grad():
        exact, lowered, reference = (
            run(**arguments).logits for run in (model, compiled, reference_model(model, plan))
        )
    assert explain(compiled).passes["lowered"] == len(plan)
    assert distance(lowered, reference) <= 0.1 * distance(exact, reference)


def test_quantised_and_float_activations_in_one_graph(block):
    """The quantises of a graph keep their numbers beside layers that have none, so fusions are known."""
    x = torch.randn(4, 96)
    quantised = planned(block, x, recipe=Recipe(split=SPLIT))
    mixed = ModelPlan(
        dict(quantised) | {"up": planned(block, x, recipe=MIX)["up"]}, quantised.shapes
    )
    y, compiled = run(block, x, plan=mixed, strict=True, inductor=True)
    with torch.no_grad():
        assert distance(y, reference_model(block, mixed)(x)) <= 1e-2
    explanation = explain(compiled)
    assert explanation.passes["micromix::weight_only_linear"] == 1
    assert explanation.passes["micromix::quantize"] == 2
    assert explanation.layers["down"].fused_with and not explanation.layers["up"].fused_with


def test_a_write_between_two_readers_is_seen():
    model, x = Writes(lambda x: x.mul_(3.0)).eval(), torch.randn(4, 64)
    results, _ = run(model, x, recipe=Recipe(format="mxfp8", activations="bfloat16"))
    for result, exact in zip(results, model(x)):
        assert distance(result, exact) < 0.1


def test_another_plan_is_followed(block):
    """Attached plans that differ in nothing but the activations are two compilations."""
    x = torch.randn(4, 96)
    compiled = torch.compile(block, backend="micromix", options={"inductor": False})
    results = []
    for recipe in (Recipe(split=SPLIT), Recipe(split=SPLIT, activations="bfloat16")):
        plan = planned(block, x, recipe=recipe).attach(block)
        with torch.no_grad():
            results.append(compiled(x))
            assert distance(results[-1], reference_model(block, plan)(x)) < 1e-3
    assert not torch.equal(*results)


def test_only_the_weights_count_in_a_budget(ids):
    """Rows that a format holds badly make no difference where activations are not cast to it."""
    importance, order = torch.rand(64, dtype=torch.float64), torch.arange(64)
    flat = torch.ones(8, 64)
    spread = flat * torch.logspace(-3, 3, 64)
    for activations, same in (("match", False), ("bfloat16", True)):
        recipe = Recipe(bits=5.0, activations=activations)
        errors = [_errors(x, importance, importance, order, (), recipe) for x in (flat, spread)]
        assert torch.equal(*errors) == same
        assert (errors[1].diff(dim=1) < 0).all()  # a wider format is better
    calibration = calibrate(tiny_llama(torch.float32), gradients=True).run([{"input_ids": ids}])
    plan = calibration.plan(Recipe(bits=5.0, hadamard=(4, 6), activations="bfloat16"))
    assert 4.9 < plan.element_bits <= 5
    assert all(layer.weight_only for layer in plan.values())


def test_sequential_calibration(block):
    """Layers that run quantised, so that those behind them see it, run with float activations."""
    x = torch.randn(16, 96)
    plan = planned(block, x, recipe=MIX)
    statistics = calibrate(block, plan=plan).run([x]).statistics
    with torch.no_grad():
        reference = reference_model(block, plan)
        given = torch.nn.functional.silu(reference.gate(x)) * reference.up(x)
    mean = given.abs().double().mean(dim=0)
    assert distance(statistics["down"].metric("mean"), mean) < 1e-4
    assert distance(calibrate(block).run([x]).statistics["down"].metric("mean"), mean) > 1e-3


def test_gptq_rounds_for_float_activations(ids):
    model = tiny_llama(torch.float32)
    batches = [torch.randint(3, 250, (4, 32)) for _ in range(4)]
    calibration = calibrate(model).run(batches)
    recipe = Recipe(format="mxfp4", hadamard=(4,), activations="bfloat16")
    rounded = calibration.plan(Recipe(**recipe.to_dict() | {"rounding": "gptq"}))
    assert len(rounded.rounded) == 14 and all(layer.weight_only for layer in rounded.values())
    exact, errors = logits(model, batches[0]), []
    for plan in (calibration.plan(recipe), rounded):
        torch.compiler.reset()
        options = {"plan": plan, "inductor": False}
        compiled = torch.compile(model, backend="micromix", options=options)
        errors.append(distance(logits(compiled, batches[0]), exact))
    assert errors[1] < 0.9 * errors[0]


def test_a_quantised_layer(block):
    """It runs eagerly and compiled with the same numbers, and is known again in a graph with its plan."""
    x = torch.randn(4, 96, dtype=torch.bfloat16)
    block.to(torch.bfloat16)
    plan = planned(block, x, recipe=MIX)
    expected, _ = run(block, x, plan=plan)
    for name in plan:
        module = block.get_submodule(name)
        packed = micromix.checkpoint.pack_layer(plan, name, module.weight)
        block.set_submodule(name, QuantizedLinear.from_packed(packed, module.bias))
    assert "activations=bfloat16" in repr(block.up)
    with torch.no_grad():
        assert torch.equal(block(x), expected)
        program = torch.export.export(block, (x,)).module(check_guards=False)
    found = find_linears(program)
    assert [linear.quantised.plan for linear in found] == [plan[linear.name] for linear in found]
    y, compiled = run(block, x, strict=True)
    assert torch.equal(y, expected)
    assert explain(compiled).passes["micromix::weight_only_linear"] == 2
    torch.compiler.reset()
    with pytest.raises(PlanMismatchError, match="quantised already"):
        run(
            block,
            x,
            plan=planned(Block().eval(), x.float(), recipe=Recipe(split=SPLIT, hadamard=(4, 6))),
        )


def test_checkpoint_round_trip(plan, ids, tmp_path):
    source = save_tiny(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = logits(
        torch.compile(model, backend="micromix", options={"plan": plan, "inductor": False}), ids
    )
    micromix.save_pretrained(model, tmp_path / "saved", plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(m.plan.weight_only for m in loaded.modules() if isinstance(m, QuantizedLinear))
    assert torch.equal(logits(loaded, ids), expected)
    assert "Activations stay in bfloat16" in (tmp_path / "saved" / "README.md").read_text()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["version"] == 2
    micromix.save_pretrained(loaded, tmp_path / "again")
    names = ("model.safetensors", "config.json")
    saved = [[(tmp_path / d / n).read_bytes() for n in names] for d in ("saved", "again")]
    assert saved[0][0] == saved[1][0]


def test_an_older_library_refuses_the_files(plan, ids, tmp_path, monkeypatch):
    """Both kinds of file say a version that those who would quantise the activations do not read."""
    plan.save(tmp_path / "plan")
    monkeypatch.setattr(micromix.plan, "_VERSION", 2)
    with pytest.raises(FileVersionError, match="Upgrade"):
        load_plan(tmp_path / "plan")
    source = save_tiny(tmp_path / "source")
    micromix.save_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "saved", plan)
    monkeypatch.setattr(micromix.checkpoint, "VERSION", 1)
    with pytest.raises(FileVersionError, match="Upgrade"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_files_of_older_versions_are_read(ids, tmp_path):
    """They say nothing of activations, which were always quantised."""
    plan = model_plan()
    plan.save(tmp_path / "plan")

    def older(metadata, content, tensors):
        metadata.update(micromix_plan="2")
        for group in content["groups"]:
            del group["activations"]

    rewrite(tmp_path / "plan", older)
    assert load_plan(tmp_path / "plan") == plan

    source, saved = save_tiny(tmp_path / "source"), tmp_path / "saved"
    model = AutoModelForCausalLM.from_pretrained(source)
    micromix.save_pretrained(model, saved, Recipe(format="mxfp6"))
    expected = logits(AutoModelForCausalLM.from_pretrained(saved), ids)
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["version"] = 1
    for group in config["quantization_config"]["groups"]:
        del group["activations"]
    (saved / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved), ids), expected)


@pytest.mark.skipif(not compat.runs_packages(), reason="torch 2.11 runs none")
def test_a_package(block, tmp_path):
    x = torch.randn(4, 96, dtype=torch.bfloat16)
    block.to(torch.bfloat16)
    plan = planned(block, x, recipe=MIX)
    micromix.export(block, tmp_path / "block.pt2", (x,), plan=plan)
    with torch.no_grad():
        expected = reference_model(block, plan)(x)
    assert distance(micromix.load_package(tmp_path / "block.pt2")(x), expected) <= 0.01


def test_the_command_line(tmp_path, capsys):
    directory, path = str(save_tiny(tmp_path / "model")), str(tmp_path / "plan.safetensors")
    small = ["--model", directory, "--samples", "2", "--seqlen", "64"]
    flags = ["--activations", "bfloat16", "--split", "0.5", "0.5", "0"]
    assert main(["calibrate", *small, *flags, "--output", path]) == 0
    assert "16.00 bits per activation" in capsys.readouterr().out
    assert all(layer.weight_only for layer in load_plan(path).values())
    flags = ["--format", "mxfp4", "--activations", "bfloat16", "--plan", path]
    assert main(["eval", *small, *flags]) == 0
    assert "mxfp4 weights: " in capsys.readouterr().out
