"""Statistics and a recipe -> which channel of which layer gets which format (arXiv 2508.02343)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .banks import spread_over_banks
from .budget import InputBudget, spend
from .errors import RecipeError, UnmatchedPatternWarning
from .layers import LayerShape
from .mx.layout import MixedLayout
from .plan import LayerPlan, ModelPlan
from .recipe import BITS, OUTPUT_HEADS, Recipe

if TYPE_CHECKING:
    from .statistics import ChannelStatistics, ModelStatistics

__all__ = ["allocate", "channel_order", "split_counts", "uniform_plan"]


def allocate(statistics: ModelStatistics, recipe: Recipe, others: Iterable[str] = ()) -> ModelPlan:
    """The plan of all layers that were calibrated and that the recipe does not skip.

    Channels are sorted by the recipe's metric, the smallest first, so that the largest get the
    widest format; inside a block they are spread over a GPU's memory banks (banks.py). Layers that
    share an input share one LayerPlan. Raises EmptyCalibrationError if
    a layer saw no token, and RecipeError if the recipe's counts do not fit a layer, or its rounding
    needs the model. An UnmatchedPatternWarning names patterns of the recipe that match no layer, neither these nor
    ``others``, which the model has.
    """
    if recipe.rounding != "nearest":
        expected = "'nearest' where there is no model; calibration.plan(recipe) rounds by GPTQ"
        raise RecipeError(option="rounding", value=recipe.rounding, expected=expected)
    if not statistics.layers:
        statistics.require_tokens()
    patterns = (*recipe.skip, *(pattern for pattern, _ in recipe.counts or ()))
    names = (*statistics.layers, *others, *OUTPUT_HEADS)
    if unmatched := [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]:
        warnings.warn(UnmatchedPatternWarning(patterns=unmatched), stacklevel=3)
    kept = {name: shape for name, shape in statistics.layers.items() if not recipe.skips(name)}
    if recipe.method == "format":
        return uniform_plan(kept, recipe)
    statistics.require_tokens(kept)
    groups = [([n for n in names if n in kept], inputs) for names, inputs in statistics.groups()]
    groups = [(names, inputs) for names, inputs in groups if names]
    if recipe.has_budget:
        budgets = spend(statistics, groups, recipe)
        plans = [
            _budget_plan(*group, own, recipe) for group, own in zip(groups, budgets, strict=True)
        ]
    else:
        plans = [_plan_group(names, inputs, recipe) for names, inputs in groups]
    layers = {}
    for (names, _), plan in zip(groups, plans, strict=True):
        layers.update(dict.fromkeys(names, plan))
    return ModelPlan({name: layers[name] for name in kept}, kept, recipe.to_dict())


def uniform_plan(layers: Mapping[str, LayerShape], recipe: Recipe) -> ModelPlan:
    """A plan with one format for all channels, in their own order; it needs no calibration.

    ``layers``: name -> LayerShape, or a tuple (N, K) or (N, K, transposed). Layers that the
    recipe skips are left out. Raises RecipeError for a recipe that needs calibration: any without a ``format``, and
    GPTQ.
    """
    calibrated = "needs calibration, as in calibrate(model).run(batches).plan(recipe)"
    if (method := recipe.method) != "format":
        expected = (
            "format='mxfp8', 'mxfp6' or 'mxfp4' where there is no calibration: "
            f"{method} {calibrated}"
        )
        raise RecipeError(option=method, value=getattr(recipe, method), expected=expected)
    if recipe.rounding != "nearest":
        expected = f"'nearest' where there is no calibration: GPTQ {calibrated}"
        raise RecipeError(option="rounding", value=recipe.rounding, expected=expected)
    shapes = {n: LayerShape(*shape) for n, shape in layers.items() if not recipe.skips(n)}
    by_width = {k: _uniform_layer(k, recipe) for k in {s.in_features for s in shapes.values()}}
    plans = {name: by_width[shape.in_features] for name, shape in shapes.items()}
    return ModelPlan(plans, shapes, recipe.to_dict())


def split_counts(channels: int, fractions: Sequence[float], multiple: int) -> tuple[int, int, int]:
    """Fractions (p4, p6, p8) of K channels -> (k4, k6, k8), summing to K rounded up to one.

    The wide segments are rounded up, 8-bit before 6-bit, and 4-bit takes what is left (padding
    included), so that no channel gets a narrower format than its fraction says.
    """
    padded = _round_up(channels, multiple)
    _, p6, p8 = fractions
    k8 = min(padded, _round_up(p8 * channels, multiple))
    k6 = min(padded - k8, _round_up(p6 * channels, multiple))
    return padded - k6 - k8, k6, k8


def channel_order(
    metric: Tensor, counts: tuple[int, int, int], hadamard: Sequence[int] = ()
) -> Tensor:
    """The order int32 ``[Kp]`` that sorts channels by ``metric`` ``[K]``, the smallest first.

    Inside a segment that is rotated (``hadamard``) the channels keep their own order: a rotation wants
    blocks of mixed magnitudes.

    Padding (-1) stands at the end of the narrowest segment that has channels: there it changes
    neither which blocks the other channels form, nor their scales.
    """
    order = metric.argsort(stable=True).to(torch.int32).cpu()
    padding = sum(counts) - len(order)
    stop = 0
    for width, count in zip((4, 6, 8), counts, strict=True):
        start, stop = stop, stop + max(0, count - (padding if stop == 0 else 0))
        if width in hadamard:
            order[start:stop] = order[start:stop].sort().values
    first = next(count for count in counts if count) - padding
    pads = torch.full((padding,), -1, dtype=torch.int32, device="cpu")
    return torch.cat([order[:first], pads, order[first:]])


def _plan_group(names: list[str], inputs: ChannelStatistics, recipe: Recipe) -> LayerPlan:
    if recipe.method == "counts":
        counts = _given_counts(names, inputs.channels, recipe)
    else:
        if recipe.method == "split":
            fractions = recipe.split
        else:
            fractions = inputs.fractions(recipe.thresholds, recipe.lam)
        counts = split_counts(inputs.channels, fractions, recipe.multiple)
    return LayerPlan(
        in_features=inputs.channels,
        layout=MixedLayout(*counts, recipe.format6, recipe.rules, recipe.hadamard),
        order=spread_over_banks(channel_order(inputs.metric(recipe.sort), counts, recipe.hadamard)),
        weights=recipe.weights,
        weight_rules=recipe.weight_rules,
        activations=recipe.activations,
        group=names[0],
    )


def _budget_plan(
    names: list[str], inputs: ChannelStatistics, budget: InputBudget, recipe: Recipe
) -> LayerPlan:
    identity = torch.arange(len(budget.order), dtype=torch.int32, device="cpu")
    identity[inputs.channels :] = -1
    return LayerPlan(
        in_features=inputs.channels,
        layout=MixedLayout(*budget.counts, recipe.format6, recipe.rules, budget.hadamard),
        order=None if torch.equal(budget.order, identity) else spread_over_banks(budget.order),
        weights=recipe.weights,
        weight_rules=recipe.weight_rules,
        activations=recipe.activations,
        group=names[0],
    )


def _given_counts(names: list[str], channels: int, recipe: Recipe) -> tuple[int, int, int]:
    together = ", ".join(names)
    found = {counts for name in names if (counts := recipe.counts_for(name)) is not None}
    if not found:
        expected = f"a mapping with a glob that matches {together} (or name it in skip)"
        raise RecipeError(option="counts", value=dict(recipe.counts), expected=expected)
    if len(found) > 1:
        expected = f"the same for {together}, which share an input"
        raise RecipeError(option="counts", value=sorted(found), expected=expected)
    counts = found.pop()
    padded = _round_up(channels, recipe.multiple)
    if sum(counts) != padded:
        expected = f"three numbers that sum to {padded} for {together} (K = {channels})"
        raise RecipeError(option="counts", value=counts, expected=expected)
    return counts


def _uniform_layer(channels: int, recipe: Recipe) -> LayerPlan:
    layout = MixedLayout.uniform(
        _round_up(channels, recipe.multiple),
        BITS[recipe.format],
        format6=recipe.format6,
        rules=recipe.rules,
        hadamard=recipe.hadamard,
    )
    return LayerPlan(
        in_features=channels,
        layout=layout,
        weights=recipe.weights,
        weight_rules=recipe.weight_rules,
        activations=recipe.activations,
        group=f"{recipe.format} K={channels}",
    )


def _round_up(count: float, multiple: int) -> int:
    # A fraction of K carries rounding errors: 0.7 of 10 blocks is not 8 blocks.
    return math.ceil(count / multiple - 1e-9) * multiple
