"""Budgets of modelled time: the model by hand, and plans that hold the budget and spend it where it matters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_budget import batches
from tiny_llama import tiny_llama

from micromix_compile import Recipe, calibrate, load_plan, load_statistics, modelled_time
from micromix_compile.allocation import allocate, uniform_plan
from micromix_compile.errors import OptionError, RecipeError
from micromix_compile.layers import LayerShape
from micromix_compile.statistics import ModelStatistics
from micromix_compile.targets import TARGETS

DECODE, PREFILL = 1, 2048


@pytest.fixture(scope="module")
def calibrated():
    torch.compiler.reset()
    return calibrate(tiny_llama(torch.float32), gradients=True).run(batches())


def wide_inputs(outputs: int = 1024) -> ModelStatistics:
    """Two layers of one shape, with inputs of their own, channels of many magnitudes."""
    statistics = ModelStatistics()
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(64, 512, generator=generator) * torch.rand(512, generator=generator) ** 4
        statistics.add_group({f"layer{i}": LayerShape(outputs, 512)})
        statistics.update(f"layer{i}", x)
        statistics.add_weight(f"layer{i}", torch.randn(outputs, 512, generator=generator))
    return statistics


def test_a_channel_takes_the_longer_of_bytes_and_operations():
    device = TARGETS["sm_120"]
    few = device.channel_time(6, outputs=64, rows=2)
    assert few == pytest.approx((64 + 2) * 6.25 / 8 / 1.792e12)
    many = device.channel_time(6, outputs=4096, rows=4096)
    assert many == pytest.approx(2 * 4096 * 4096 / 643e12)
    narrow = device.channel_time(8, outputs=64, rows=2, weights="mxfp4")
    assert narrow == pytest.approx((64 * 4.25 + 2 * 8.25) / 8 / 1.792e12)
    floats = TARGETS["amx"].channel_time(4, outputs=64, rows=2, activations="bfloat16")
    assert floats == pytest.approx((64 * 4.25 + 2 * 16) / 8 / 14e9)


@pytest.mark.parametrize(
    ("rows", "fractions"),
    [
        (DECODE, {"mxfp4": 4.25 / 8.25, "mxfp6": 6.25 / 8.25, "mxfp8": 1}),
        (PREFILL, {"mxfp4": 643 / 1343, "mxfp6": 1, "mxfp8": 1}),
    ],
)
def test_on_blackwell_bytes_rule_decode_and_rates_prefill(rows, fractions):
    shapes = {"a": LayerShape(4096, 4096), "b": LayerShape(1024, 4096)}
    for name, fraction in fractions.items():
        found = modelled_time(uniform_plan(shapes, Recipe(format=name)), "sm_120", rows)
        assert found.fraction == pytest.approx(fraction)
    assert "of MXFP8's" in str(found) and found.seconds > 0


@settings(max_examples=20, deadline=None)
@given(
    time=st.floats(0.53, 1),
    rows=st.sampled_from([1, 16, 2048]),
    target=st.sampled_from(sorted(TARGETS)),
    hadamard=st.sampled_from([(), (4, 6), "measured"]),
)
def test_the_budget_is_held(calibrated, time, rows, target, hadamard):
    recipe = Recipe(time=time, target=target, rows=rows, hadamard=hadamard)
    try:
        plan = allocate(calibrated.statistics, recipe)
    except RecipeError as error:  # compute bound: every format takes nearly the same time
        least = float(error.facts["expected"].split()[2].rstrip(","))
        assert least > time
        plan = allocate(calibrated.statistics, Recipe(**{**recipe.to_dict(), "time": least}))
        time = least
    assert modelled_time(plan, target, rows).fraction <= time + 1e-9


@pytest.mark.parametrize("time", [0.55, 0.7, 0.8, 1.0])
def test_nearly_all_of_the_budget_is_spent(time):
    plan = allocate(wide_inputs(), Recipe(time=time, target="sm_120"))
    unit = 32 / 1024 * (1 - 6.25 / 8.25)  # of 2 x 512 channels, a unit of 32 from MXFP6 to MXFP8
    assert time - unit <= modelled_time(plan, "sm_120").fraction <= time + 1e-9


def test_more_time_buys_wider_channels(calibrated):
    for rows in (DECODE, 64):
        recipes = (Recipe(time=t / 100, target="sm_120", rows=rows) for t in range(55, 101, 9))
        bits = [allocate(calibrated.statistics, recipe).element_bits for recipe in recipes]
        assert bits == sorted(bits) and bits[0] < bits[-1] - 2


@pytest.mark.parametrize("bits", [4.0, 4.5, 5.0, 6.3, 8.0])
def test_the_plan_of_a_budget_of_bits_where_time_is_bytes(bits):
    statistics = wide_inputs()
    timed = Recipe(time=(bits + 0.25) / 8.25, target="sm_120", rows=DECODE)
    assert allocate(statistics, timed) == allocate(statistics, Recipe(bits=bits))


def test_no_mxfp6_where_mxfp8_takes_the_same_time():
    plan = allocate(wide_inputs(), Recipe(time=0.7, target="sm_120", rows=PREFILL))
    assert all(layer.layout.k6 == 0 for layer in plan.values())
    assert all(layer.layout.k4 and layer.layout.k8 for layer in plan.values())


def test_equal_statistics_give_equal_plans_that_come_back_from_a_file(calibrated, tmp_path):
    recipe = Recipe(time=0.65, target="amx", hadamard="measured")
    calibrated.save(tmp_path / "s")
    first = calibrated.plan(recipe)
    assert allocate(load_statistics(tmp_path / "s"), recipe) == first
    first.save(tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert again == first and Recipe.from_dict(again.recipe) == recipe
    assert modelled_time(again, "amx") == modelled_time(first, "amx")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"time": 0.7}, "beside a target: one of amx, sm_120"),
        ({"time": 0.7, "target": "sm_130"}, "one of None, 'amx', 'sm_120'"),
        ({"time": 0.0, "target": "amx"}, "above 0"),
        ({"time": 1.1, "target": "amx"}, "at most 1"),
        ({"time": 0.7, "target": "amx", "rows": 0}, "from 1"),
        ({"time": 0.7, "target": "amx", "bits": 5.0}, "one of"),
        ({"target": "amx"}, "left out"),
        ({"rows": 8}, "left out"),
        ({"time": 0.7, "target": "sm_120", "activations": "bfloat16"}, "a CPU"),
    ],
)
def test_bad_recipes(options, said):
    with pytest.raises(RecipeError, match=said):
        Recipe(**options)


def test_a_time_that_no_format_reaches(calibrated):
    with pytest.raises(RecipeError, match="at least 0.51.*mxfp4 on sm_120 with rows=1"):
        allocate(calibrated.statistics, Recipe(time=0.4, target="sm_120"))
    with pytest.raises(RecipeError, match="at least 1.0"):  # AMX multiplies all formats alike
        allocate(wide_inputs(), Recipe(time=0.9, target="amx", rows=PREFILL))
    plan = allocate(wide_inputs(), Recipe(time=1, target="amx", rows=PREFILL))
    assert plan.element_bits > 7.9


def test_what_cannot_be_modelled(calibrated):
    plan = calibrated.plan(Recipe(format="mxfp8"))
    with pytest.raises(OptionError, match="sm_130.*amx, sm_120"):
        modelled_time(plan, "sm_130")
    with pytest.raises(OptionError, match="whole number"):
        modelled_time(plan, "amx", rows=0)
