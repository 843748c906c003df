import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile.allocation import allocate, channel_order, split_counts, uniform_plan
from micromix_compile.errors import (
    EmptyCalibrationError,
    RecipeError,
    UnmatchedPatternWarning,
)
from micromix_compile.layers import LayerShape
from micromix_compile.mx.mixed import dequantize, quantize
from micromix_compile.recipe import Recipe
from micromix_compile.statistics import ModelStatistics

MULTIPLES = st.sampled_from([32, 64, 128])


@st.composite
def fractions(draw):
    weights = [draw(st.integers(0, 100)) for _ in range(3)]
    total = sum(weights)
    return tuple(w / total for w in weights) if total else (1.0, 0.0, 0.0)


@settings(max_examples=300)
@given(k=st.integers(1, 2000), p=fractions(), multiple=MULTIPLES)
def test_counts_are_multiples_that_cover_k(k, p, multiple):
    counts = _, k6, k8 = split_counts(k, p, multiple)
    assert sum(counts) == math.ceil(k / multiple) * multiple
    assert all(count >= 0 and count % multiple == 0 for count in counts)
    # No channel gets a narrower format than its fraction says, and at most a block too wide a one.
    assert k8 >= p[2] * k - 1e-6
    assert k6 + k8 >= (p[1] + p[2]) * k - 1e-6
    assert k8 < p[2] * k + multiple
    assert k6 + k8 < (p[1] + p[2]) * k + 2 * multiple
    if p[2] == 0:
        assert k8 == 0
    if p[1] == 0:
        assert k6 == 0


@pytest.mark.parametrize(
    ("k", "p", "multiple", "counts"),
    [
        (512, (0.5, 0.25, 0.25), 32, (256, 128, 128)),
        (640, (0.7, 0.2, 0.1), 32, (448, 128, 64)),  # 0.2 and 0.1 are not exact in binary
        (320, (0.7, 0.2, 0.1), 32, (224, 64, 32)),
        (576, (0.5, 0.25, 0.25), 32, (256, 160, 160)),  # 144 is rounded up
        (576, (0.5, 0.25, 0.25), 128, (128, 256, 256)),  # K is padded to 640
        (576, (0.99, 0.005, 0.005), 32, (512, 32, 32)),
        (64, (0.1, 0.3, 0.6), 32, (0, 0, 64)),
        (33, (0.0, 1.0, 0.0), 32, (0, 64, 0)),
        (1, (0.0, 0.0, 1.0), 32, (0, 0, 32)),
        (1, (1.0, 0.0, 0.0), 128, (128, 0, 0)),
    ],
)
def test_counts_by_hand(k, p, multiple, counts):
    assert split_counts(k, p, multiple) == counts


@settings(max_examples=200)
@given(k=st.integers(1, 500), p=fractions(), multiple=MULTIPLES, seed=st.integers(0, 99))
def test_order_is_a_sorted_permutation_with_padding(k, p, multiple, seed):
    metric = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = split_counts(k, p, multiple)
    order = channel_order(metric, counts)
    assert order.dtype == torch.int32
    assert len(order) == sum(counts)
    real = order[order >= 0].long()
    assert torch.equal(real.sort().values, torch.arange(k))
    assert torch.equal(metric[real], metric.sort().values)
    # All padding is at the end of the narrowest segment that has channels.
    first = next(count for count in counts if count)
    assert (order[first - (sum(counts) - k) : first] == -1).all()
    assert int((order == -1).sum()) == sum(counts) - k


def test_ties_keep_the_order_of_channels():
    order = channel_order(torch.zeros(32, dtype=torch.float64), (32, 0, 0))
    assert torch.equal(order, torch.arange(32, dtype=torch.int32))


def outlier_statistics(**shapes):
    """Layers whose input has channel c at a scale of (c + 1)^-1, so channel 0 is the largest."""
    statistics = ModelStatistics()
    generator = torch.Generator().manual_seed(0)
    for group, shape in shapes.items():
        names = [f"{group}.{name}" for name in ("a", "b")]
        shape = LayerShape(*shape)
        statistics.add_group(dict.fromkeys(names, shape))
        x = torch.randn(64, shape.in_features, generator=generator)
        statistics.update(names[0], x / torch.arange(1, shape.in_features + 1))
    return statistics


def test_thresholds_allocate_what_the_statistics_say():
    statistics = outlier_statistics(attn=(8, 640))
    plan = allocate(statistics, Recipe(thresholds="paper", lam=0.5))
    layout = plan["attn.a"].layout
    expected = split_counts(640, statistics["attn.a"].fractions("paper", 0.5), 32)
    assert layout.counts == expected
    assert all(expected)
    assert plan["attn.a"].order[-1] == 0  # the largest channel is in the widest segment
    assert plan.recipe == Recipe(thresholds="paper", lam=0.5).to_dict()


def test_a_smaller_lam_gives_more_bits():
    statistics = outlier_statistics(attn=(8, 640))
    plans = [allocate(statistics, Recipe(lam=lam))["attn.a"] for lam in (0.01, 0.1, 1, 20)]
    bits = [plan.layout.total_bits for plan in plans]
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) > 2
    assert bits[-1] == 4.25  # every threshold is above the largest element


def test_layers_that_share_an_input_share_a_plan():
    plan = allocate(outlier_statistics(attn=(8, 64), mlp=(16, 96)), Recipe())
    assert plan["attn.a"] is plan["attn.b"]
    assert plan["mlp.a"] is plan["mlp.b"]
    assert plan["attn.a"].group == "attn.a"
    assert list(plan) == ["attn.a", "attn.b", "mlp.a", "mlp.b"]


@pytest.mark.parametrize("sort", ["mean", "max", "hessian"])
def test_sort_metric(sort):
    statistics = ModelStatistics()
    statistics.add_group({"fc": (4, 33)})
    x = torch.tensor([0.5, 1.5] * 50).unsqueeze(1).repeat(1, 33)  # mean 1, mean square 1.25
    x[:, 5] = torch.tensor([0.1] * 70 + [2.5] * 30)  # the smallest mean
    x[:, 9] = 1.2  # the smallest peak
    x[:, 7] = torch.tensor([0.95] * 99 + [1.6])  # the smallest mean square
    statistics.update("fc", x)
    plan = allocate(statistics, Recipe(split=(1 / 33, 0, 32 / 33), sort=sort))["fc"]
    narrow = plan.order[: plan.layout.k4]
    assert narrow[narrow >= 0].tolist() == [{"mean": 5, "max": 9, "hessian": 7}[sort]]


def test_recipe_reaches_the_layers():
    recipe = Recipe(
        split=(0.5, 0.25, 0.25),
        format6="e3m2",
        rules=("floor", "even", "ceil"),
        weight_rules=("ceil", "ceil", "ceil"),
        weights="mxfp4",
        multiple=128,
    )
    layer = allocate(outlier_statistics(fc=(8, 512)), recipe)["fc.a"]
    assert layer.layout.counts == (256, 128, 128)
    assert layer.layout.format6 == "e3m2"
    assert layer.layout.rules == ("floor", "even", "ceil")
    assert layer.weight_layout.rules == ("ceil", "ceil", "ceil")
    assert layer.weight_layout.k4 == 512


def test_skipped_layers_are_left_out():
    statistics = outlier_statistics(attn=(8, 64))
    statistics.add_group({"lm_head": (100, 64), "attn.a": (8, 64)})
    assert list(allocate(statistics, Recipe(skip=("*.b",)))) == ["attn.a"]
    everything = allocate(statistics, Recipe(include_lm_head=True))
    assert set(everything) == {"attn.a", "attn.b", "lm_head"}
    assert everything["lm_head"] is everything["attn.a"]


def test_empty_calibration():
    statistics = outlier_statistics(attn=(8, 64))
    statistics.add_group({"expert.a": (8, 64), "expert.b": (8, 64)})
    with pytest.raises(EmptyCalibrationError, match=r"(?s)expert.a\n  expert.b"):
        allocate(statistics, Recipe())
    with pytest.raises(EmptyCalibrationError):
        allocate(ModelStatistics(), Recipe())
    assert set(allocate(statistics, Recipe(skip=("expert.*",)))) == {"attn.a", "attn.b"}
    # One format for all needs no calibration.
    assert len(allocate(statistics, Recipe(format="mxfp8"))) == 4


def test_given_counts():
    statistics = outlier_statistics(attn=(8, 96), mlp=(8, 50))
    recipe = Recipe(counts={"attn.*": (32, 0, 64), "mlp.a": (32, 32, 0)})
    plan = allocate(statistics, recipe)
    assert (plan["attn.b"].layout.k4, plan["attn.b"].layout.k8) == (32, 64)
    assert plan["mlp.b"] is plan["mlp.a"]  # they share an input, so they share the counts
    assert plan["mlp.b"].layout.k6 == 32
    assert (plan["mlp.b"].order[18:32] == -1).all()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"attn.*": (32, 0, 64)}, "a glob that matches mlp.a, mlp.b"),
        ({"*.a": (96, 0, 0), "*.b": (32, 0, 64)}, "the same for attn.a, attn.b"),
        ({"*": (32, 0, 32)}, r"sum to 96 for attn.a, attn.b \(K = 96\)"),
    ],
)
def test_given_counts_that_do_not_fit(counts, message):
    with pytest.raises(RecipeError, match=message):
        allocate(outlier_statistics(attn=(8, 96), mlp=(8, 50)), Recipe(counts=counts))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8"])
@pytest.mark.parametrize(("k", "multiple", "padded"), [(64, 32, 64), (33, 32, 64), (1, 128, 128)])
def test_uniform(name, k, multiple, padded):
    layers = {"fc": (8, k), "conv": LayerShape(4, k, True), "lm_head": (9, k)}
    plan = uniform_plan(layers, Recipe(format=name, multiple=multiple))
    assert list(plan) == ["fc", "conv"]
    assert plan["fc"] is plan["conv"]
    assert plan.shapes["conv"].transposed
    layout = plan["fc"].layout
    assert plan["fc"].order is None
    assert getattr(layout, f"k{name[-1]}") == layout.channels == padded


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (Recipe(), "thresholds = 'published' .* thresholds needs calibration"),
        (Recipe(bits=5), r"bits = 5\.0 .* bits needs calibration"),
        (Recipe(format="mxfp4", rounding="gptq"), "rounding = 'gptq' .* GPTQ needs calibration"),
    ],
)
def test_uniform_needs_no_calibration(recipe, named):
    with pytest.raises(RecipeError, match=named):
        uniform_plan({"fc": (8, 32)}, recipe)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(split=(0.3, 0.3, 0.4), multiple=128)])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 576])
def test_any_width(recipe, k):
    layer = allocate(outlier_statistics(fc=(4, k)), recipe)["fc.a"]
    assert layer.layout.channels == math.ceil(k / recipe.multiple) * recipe.multiple
    assert layer.in_features == k


def test_padding_changes_no_number():
    """Padding to 128 gives the values of padding to 32, where the counts of wide channels agree."""
    statistics = outlier_statistics(fc=(4, 576))
    by32 = Recipe(counts={"*": (320, 128, 128)}, multiple=32)
    by128 = Recipe(counts={"*": (384, 128, 128)}, multiple=128)
    x = torch.randn(5, 576, generator=torch.Generator().manual_seed(1))
    results = []
    for recipe in (by32, by128):
        layer = allocate(statistics, recipe)["fc.a"]
        packed = quantize(x, layer.layout, layer.order)
        values = dequantize(*packed, layer.layout)
        real = layer.order >= 0
        restored = torch.empty(5, 576)
        restored[:, layer.order[real].long()] = values[:, real]
        results.append(restored)
        assert not values[:, ~real].any()
    assert torch.equal(*results)


def test_plans_made_under_inference_mode_are_ordinary():
    statistics = ModelStatistics()
    with torch.inference_mode():
        statistics.add_group({"fc": (4, 64)})
        statistics.update("fc", torch.randn(5, 64))
    statistics.update("fc", torch.randn(5, 64))
    assert not allocate(statistics, Recipe())["fc"].order.is_inference()


def test_nothing_calibrated_is_no_plan_of_one_format_either():
    with pytest.raises(EmptyCalibrationError, match="any linear layer"):
        allocate(ModelStatistics(), Recipe(format="mxfp8"))


def test_patterns_that_match_nothing_are_said():
    statistics = outlier_statistics(attn=(8, 64))
    with pytest.warns(UnmatchedPatternWarning, match=r"\*\.donw_proj"):
        assert len(allocate(statistics, Recipe(skip=("*.donw_proj",)))) == 2
    counts = {"nothing*": (64, 0, 0), "*": (0, 64, 0)}
    with pytest.warns(UnmatchedPatternWarning, match=r"nothing\*"):
        allocate(statistics, Recipe(counts=counts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocate(statistics, Recipe(skip=("attn.a",), counts={"*": (0, 64, 0)}))
