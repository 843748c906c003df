"""A budget of bits: held, spent where it matters, the same every time, and better than a split at equal bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import VOCABULARY, tiny_llama

from micromix_compile import Recipe, calibrate, load_statistics
from micromix_compile.allocation import allocate
from micromix_compile.errors import CalibrationGradientError, RecipeError, SensitivityError
from micromix_compile.layers import LayerShape
from micromix_compile.statistics import ModelStatistics


def batches(count: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (1, 48), generator=generator)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def calibrated():
    torch.compiler.reset()
    return calibrate(tiny_llama(torch.float32), gradients=True).run(batches())


def one_input(x: torch.Tensor, outputs: int = 64, gradient: torch.Tensor | None = None):
    statistics = ModelStatistics()
    statistics.add_group({"layer": LayerShape(outputs, x.shape[1])})
    statistics.update("layer", x, gradient)
    statistics.add_weight("layer", torch.randn(outputs, x.shape[1]))
    return statistics


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 300),
    bits=st.floats(4, 8),
    multiple=st.sampled_from([32, 64, 128]),
    hadamard=st.sampled_from([(), (4, 6), "measured"]),
)
def test_the_budget_is_held_for_every_width(k, bits, multiple, hadamard):
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(k))
    plan = allocate(one_input(x), Recipe(bits=bits, multiple=multiple, hadamard=hadamard))
    layout, order = plan["layer"].layout, plan["layer"].order
    assert plan.element_bits <= bits + 1e-9
    assert all(count % multiple == 0 for count in layout.counts)
    assert layout.channels == -(-k // multiple) * multiple
    if order is not None:
        assert torch.equal(order[order >= 0].long().sort().values, torch.arange(k))


@pytest.mark.parametrize("bits", [4.0, 4.7, 5.5, 6.0, 8.0])
def test_nearly_all_of_the_budget_is_spent(calibrated, bits):
    plan = calibrated.plan(Recipe(bits=bits, skip=("*.o_proj",)))
    widest = max(plan.shapes[name].out_features for name in plan) * 3 * 32 * 2  # a unit, by 2 bits
    total = sum(shape.out_features * shape.in_features for shape in plan.shapes.values())
    assert bits - widest / total <= plan.element_bits <= bits


@pytest.mark.parametrize("formats", list(itertools.combinations(("mxfp4", "mxfp6", "mxfp8"), 2)))
def test_only_the_formats_that_are_allowed(calibrated, formats):
    plan = calibrated.plan(Recipe(bits=6.0, formats=formats))
    for layer in plan.values():
        for name in {"mxfp4", "mxfp6", "mxfp8"} - set(formats):
            assert getattr(layer.layout, f"k{name[-1]}") == 0


def test_what_the_loss_does_not_see_gets_the_fewest_bits():
    """Equal activations and weights; the loss depends on the second half of the channels alone."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    gradient = torch.ones_like(x)
    gradient[:, :64] = 0
    plan = allocate(one_input(x, gradient=gradient), Recipe(bits=6.0, formats=("mxfp4", "mxfp8")))
    layer = plan["layer"]
    order = torch.arange(128) if layer.order is None else layer.order
    assert set(order[64:].tolist()) == set(range(64, 128))
    assert (layer.layout.k4, layout8 := layer.layout.k8) == (64, 64) and layout8


def test_a_massive_token_decides_nothing():
    """One row a thousand times as large, in other channels than those that matter for all other rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 128, generator=generator)
    x[:, 96:] *= 8
    massive = x.clone()
    massive[0, :32] *= 5000
    recipe = Recipe(bits=4.5)
    plans = [allocate(one_input(values), recipe)["layer"] for values in (x, massive)]
    orders = [torch.arange(128) if layer.order is None else layer.order for layer in plans]
    wide = [set(o[layer.layout.k4 :].tolist()) for o, layer in zip(orders, plans, strict=True)]
    assert wide[0] == wide[1]


def test_equal_statistics_give_equal_plans(calibrated, tmp_path):
    recipe = Recipe(bits=4.6, hadamard="measured")
    calibrated.save(tmp_path / "s")
    first = calibrated.plan(recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(2, threads))
    try:
        assert allocate(load_statistics(tmp_path / "s"), recipe) == first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("gradients", [False, True])
def test_merged_halves_are_one_pass(gradients):
    model, own = tiny_llama(torch.float32), batches()
    runs = [calibrate(model, gradients=gradients).run(part) for part in (own, own[:3], own[3:])]
    whole, merged, other = (run.statistics for run in runs)
    merged.merge(other)
    for (_, one), (_, two) in zip(whole.groups(), merged.groups(), strict=True):
        assert one.graded == two.graded == gradients
        for key in ("total", "square", "importance", "gradient"):
            torch.testing.assert_close(getattr(one, key), getattr(two, key), rtol=1e-6, atol=0)
        assert torch.equal(one.sample.rows, two.sample.rows)
    recipe = Recipe(bits=5.0)
    assert allocate(whole, recipe) == allocate(merged, recipe)


def test_statistics_with_and_without_gradients_do_not_mix():
    x = torch.randn(4, 32)
    graded, plain = one_input(x, gradient=x), one_input(x)
    with pytest.raises(Exception, match="with gradients here, without gradients there"):
        graded.merge(plain)


def test_gradients_are_those_of_autograd():
    """Importance and slopes against module hooks on the same model, eagerly."""
    model, own = tiny_llama(torch.float32), batches(2)
    found = calibrate(model, gradients=True).run(own).statistics
    name = "model.layers.1.mlp.down_proj"
    expected = torch.zeros(96, dtype=torch.float64)
    for batch in own:
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, seen=seen: (args[0].retain_grad(), seen.append(args[0]))[0]
        )
        logits = model(**batch).logits
        torch.nn.functional.cross_entropy(
            logits[0, :-1], batch["input_ids"][0, 1:], reduction="sum"
        ).backward()
        handle.remove()
        expected += (seen[0].double() * seen[0].grad.double()).square().sum((0, 1))
    torch.testing.assert_close(found[name].importance, expected, rtol=1e-4, atol=1e-12)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_better_than_the_thresholds_at_no_more_bits(calibrated):
    """The point of it all, on the weights of a random model: lower error of the logits."""
    model, unseen = calibrated.model, batches(6, seed=5)
    published = calibrated.plan(Recipe())
    bits = published.element_bits
    errors = []
    for plan in (published, calibrated.plan(Recipe(bits=bits))):
        options = {"plan": plan, "inductor": False}
        lowered = torch.compile(model, backend="micromix", options=options)
        with torch.no_grad():
            errors.append(
                sum(float((lowered(**b).logits - model(**b).logits).square().sum()) for b in unseen)
            )
        torch.compiler.reset()
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 3.9}, "from 4 to 8"),
        ({"bits": 7.0, "formats": ("mxfp4", "mxfp6")}, "from 4 to 6"),
        ({"bits": 5.0, "format": "mxfp4"}, "one of"),
        ({"formats": ("mxfp4",)}, "left out"),
        ({"bits": 5.0, "formats": ("mxfp5",)}, "some of"),
        ({"hadamard": "measured"}, "measured with bits"),
        ({"hadamard": (6, 4)}, "rising"),
        ({"hadamard": (4,), "weights": "mxfp4"}, "one segment"),
        ({"rounding": "stochastic"}, "nearest"),
    ],
)
def test_bad_recipes(options, said):
    with pytest.raises(RecipeError, match=said):
        Recipe(**options)


def test_recipes_there_and_back():
    for recipe in (Recipe(bits=5, hadamard="measured"), Recipe(format="mxfp4", hadamard=[4])):
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_what_is_missing_is_said(calibrated):
    with pytest.raises(RecipeError, match=r"calibration\.plan"):
        allocate(calibrated.statistics, Recipe(bits=5, rounding="gptq"))
    old = one_input(torch.randn(4, 32))
    old["layer"].sample = type(old["layer"].sample)(32)
    with pytest.raises(SensitivityError, match="older version"):
        allocate(old, Recipe(bits=5))
    with (
        pytest.raises(CalibrationGradientError, match="without gradients"),
        calibrate(tiny_llama(), gradients=True) as _,
        torch.no_grad(),
    ):
        _.model(**batches(1)[0])
    with pytest.raises(CalibrationGradientError, match="no loss"):
        calibrate(torch.nn.Linear(32, 8), gradients=True).run([torch.randn(2, 32)])


def test_an_input_without_a_gradient_gets_the_fewest_bits():
    """As of an adapter that begins with zeros."""
    statistics, x = ModelStatistics(), torch.randn(64, 64)
    for name in ("dead", "alive"):
        statistics.add_group({name: LayerShape(64, 64)})
    statistics.update("dead", x, torch.zeros_like(x))
    statistics.update("alive", x, torch.ones_like(x))
    plan = allocate(statistics, Recipe(bits=6.0, formats=("mxfp4", "mxfp8")))
    assert (plan["dead"].layout.k4, plan["alive"].layout.k8) == (64, 64)
    assert allocate(statistics, Recipe(bits=6.0, hadamard="measured")).element_bits <= 6


@pytest.mark.parametrize("scale", [1e-9, 1e-15, 1e-18])
def test_the_size_of_the_loss_changes_no_plan(scale):
    x = torch.randn(64, 256) * torch.logspace(-2, 2, 256)
    gradient = torch.randn(64, 256)
    plans = [
        allocate(one_input(x, gradient=gradient * factor), Recipe(bits=5)) for factor in (1, scale)
    ]
    assert plans[0].element_bits == plans[1].element_bits == pytest.approx(5, abs=0.25)
    assert plans[0]["layer"].layout == plans[1]["layer"].layout
