"""A budget of bits or of time, spent where it lowers the loss most: statistics + Recipe(bits=...) -> LayerPlans.

For each input, several orders of its channels are tried: the channels as they are, with the most important ones
(or all) sorted behind them, rotated or not. The error that each format makes in each unit of channels is measured
on the rows that calibration kept, and one price of a bit for the whole model decides the format of every unit and
the order of every input. With Recipe(time=...) a unit costs its modelled time (targets.py) instead of its bits.

The error of a unit is the expected change of the loss, to second order and with the Hessian's diagonal in its
Fisher form, where calibration had gradients g: sum over channels of E[d² g²] for an error d of the activation.
With noise that is relative to the values it is E[x² g²] (exact, over all tokens) times the relative error of the
sampled rows; the rounding of the weights adds the relative error of a Gaussian weight in that format, for
E[g_n² x_c²] dw² is the same sum, and the only one where activations stay in bfloat16. Without gradients, the change of the layer's output, relative to its energy and
token by token, takes the place of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import SensitivityError
from .mx import BLOCK, MixedLayout, dequantize, hadamard, quantize
from .recipe import BITS, Recipe
from .targets import check_time, find_target

if TYPE_CHECKING:
    from .statistics import ChannelStatistics, ModelStatistics

__all__ = ["InputBudget", "spend"]

# Fractions of the channels, the most important ones, that are sorted.
_SORTED = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
_MEASURED_ROTATIONS = ((), (4, 6))


@dataclass(frozen=True)
class InputBudget:
    """What an input got: ``counts`` (k4, k6, k8), ``order`` int32 ``[Kp]`` with -1 for padding, ``hadamard``."""

    counts: tuple[int, int, int]
    order: Tensor
    hadamard: tuple[int, ...]


@dataclass(frozen=True)
class _Choices:
    """One input of K channels: its orders ``[Kp]``, their rotations, errors ``[O, U, F]``, and N of each of its layers."""

    channels: int
    orders: list[Tensor]
    rotations: list[tuple[int, ...]]
    errors: Tensor
    outputs: list[int]


def spend(
    statistics: ModelStatistics,
    groups: Sequence[tuple[Sequence[str], ChannelStatistics]],
    recipe: Recipe,
) -> list[InputBudget]:
    """Formats and order of each input, within the budget of the recipe, which is ``bits`` or ``time``.

    ``groups``: the layers that read each input, and its statistics. Raises SensitivityError if the statistics come
    from a version that kept none, RecipeError for a time that no choice of formats reaches.
    """
    if recipe.method == "time":
        check_time({n: statistics.layers[n] for names, _ in groups for n in names}, recipe)
    choices = [_choices(statistics, names, inputs, recipe) for names, inputs in groups]
    # Prices are searched around 1, and the errors are as small as the square of the loss.
    largest = max((float(choice.errors.max()) for choice in choices), default=0.0)
    scale = 2.0 ** min(1000, -math.frexp(largest)[1])  # a power of two: rounds nothing
    choices = [replace(choice, errors=choice.errors * scale) for choice in choices]
    unit_costs, budget = (_bit_costs if recipe.method == "bits" else _time_costs)(choices, recipe)

    def at(price: float) -> tuple[float, list[tuple[int, Tensor]]]:
        """What is bought at a price of the cost: its cost, and for each input the order and the units' formats."""
        cost, bought = 0.0, []
        for choice, costs in zip(choices, unit_costs, strict=True):
            least, formats = (choice.errors + price * costs).min(dim=2)
            best = int(least.sum(dim=1).argmin())
            bought.append((best, formats[best]))
            cost += float(costs[formats[best]].sum())
        return cost, bought

    budget *= 1 + 1e-12
    cheap, dear = (
        1e-30,
        1e30,
    )  # at the lower price too much is bought; prices are searched by their logarithm
    cost, bought = at(dear)
    for _ in range(120):
        price = (cheap * dear) ** 0.5
        trial = at(price)
        if trial[0] <= budget:
            dear, (cost, bought) = price, trial
        else:
            cheap = price
    _spend_rest(choices, unit_costs, bought, budget - cost)
    return [
        _result(choice, best, formats, recipe)
        for choice, (best, formats) in zip(choices, bought, strict=True)
    ]


def _bit_costs(choices: Sequence[_Choices], recipe: Recipe) -> tuple[list[Tensor], float]:
    """The bits of a unit in each format ``[F]``, for each input, and those that may be spent.

    Scales are not counted: they take 0.25 bit in every format. Padding is.
    """
    widths = [float(BITS[name]) for name in recipe.formats]
    widths = torch.tensor(widths, dtype=torch.float64, device="cpu")
    total = sum(sum(c.outputs) * len(c.orders[0]) for c in choices)
    return [widths * sum(c.outputs) * recipe.multiple for c in choices], recipe.bits * total


def _time_costs(choices: Sequence[_Choices], recipe: Recipe) -> tuple[list[Tensor], float]:
    """The same in modelled time, as fractions of the time of all channels in MXFP8."""
    target = find_target(recipe.target)

    def channel_time(choice: _Choices, name: str, *kind: str) -> float:
        return sum(target.channel_time(BITS[name], n, recipe.rows, *kind) for n in choice.outputs)

    whole = sum(len(c.orders[0]) * channel_time(c, "mxfp8") for c in choices)
    costs = [
        [channel_time(c, name, recipe.weights, recipe.activations) for name in recipe.formats]
        for c in choices
    ]
    unit = recipe.multiple / whole
    costs = [torch.tensor(own, dtype=torch.float64, device="cpu") * unit for own in costs]
    return costs, recipe.time


def _spend_rest(choices, unit_costs, bought, left: float) -> None:
    """Widens single units, the best gain for its cost first, as far as what is left goes; orders stay."""
    moves = []
    for i, ((best, formats), choice, costs) in enumerate(
        zip(bought, choices, unit_costs, strict=True)
    ):
        errors = choice.errors[best]
        gain = errors.gather(1, formats.unsqueeze(1)) - errors
        price = costs - costs[formats].unsqueeze(1)
        for unit, to in ((gain > 0) & (price > 0)).nonzero().tolist():
            rate = float(gain[unit, to] / price[unit, to])
            moves.append((-rate, i, unit, to, float(price[unit, to])))
    widened = set()
    for _, i, unit, to, price in sorted(moves):
        if price <= left and (i, unit) not in widened:
            widened.add((i, unit))
            bought[i][1][unit] = to
            left -= price


def _choices(
    statistics: ModelStatistics, names: Sequence[str], inputs: ChannelStatistics, recipe: Recipe
) -> _Choices:
    # A gradient of zero gives no row a weight: then no format is in error.
    if not len(inputs.sample.rows) and bool(inputs.peak.any()) and not inputs.graded:
        raise SensitivityError(reason=f"the statistics of {names[0]} are of an older version")
    importance, slopes = _sensitivity(statistics, names, inputs)
    padded = -(-inputs.channels // recipe.multiple) * recipe.multiple
    rotations = _MEASURED_ROTATIONS if recipe.hadamard == "measured" else (recipe.hadamard,)
    orders, turned, errors = [], [], []
    for order in _orders(importance, padded, recipe.multiple):
        for rotation in rotations:
            orders.append(order)
            turned.append(rotation)
            errors.append(_errors(inputs.sample.rows, importance, slopes, order, rotation, recipe))
    outputs = [statistics.layers[name].out_features for name in names]
    return _Choices(inputs.channels, orders, turned, torch.stack(errors), outputs)


def _sensitivity(
    statistics: ModelStatistics, names: Sequence[str], inputs: ChannelStatistics
) -> tuple[Tensor, Tensor]:
    """Importance and squared slope of each channel, float64 ``[K]``."""
    if inputs.graded:
        return inputs.importance, inputs.gradient
    if missing := [name for name in names if name not in statistics.columns]:
        raise SensitivityError(reason=f"the weight of {missing[0]} was not seen in calibration")
    columns = torch.stack([statistics.columns[name] for name in names]).sum(dim=0)
    importance = inputs.importance * columns
    return importance / importance.sum().clamp(min=torch.finfo(torch.float64).tiny), columns


def _orders(importance: Tensor, padded: int, multiple: int) -> list[Tensor]:
    """Channel orders ``[Kp]``, int64, K standing for padding; each once."""
    channels = len(importance)
    by_importance = importance.argsort(stable=True)
    padding = torch.full((padded - channels,), channels, device="cpu")
    orders: dict[int, Tensor] = {}
    for fraction in _SORTED:
        last = min(channels, round(fraction * padded / multiple) * multiple)
        first = channels - last
        natural = by_importance[:first].sort().values
        head = [natural, padding] if first else [padding]
        orders.setdefault(last, torch.cat([*head, by_importance[first:]]))
    return list(orders.values())


def _errors(
    rows: Tensor,
    importance: Tensor,
    slopes: Tensor,
    order: Tensor,
    rotation: Sequence[int],
    recipe: Recipe,
) -> Tensor:
    """The error of each unit in each format, float64 ``[U, F]``."""
    units = (len(order) // recipe.multiple, recipe.multiple)
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    importance = torch.cat([importance, zero])[order].view(units).sum(dim=1)
    slopes = torch.cat([slopes, zero])[order]
    x = torch.nn.functional.pad(rows.float(), (0, 1))[:, order]
    energy = x.double().square().sum(dim=1, keepdim=True)

    def unit_sums(squares: Tensor) -> Tensor:
        return (squares / energy).sum(dim=0).mul(slopes).view(units).sum(dim=1)

    if recipe.activations == "bfloat16":
        noise = [_weight_noise(name, recipe) for name in recipe.formats]
        return importance.unsqueeze(1) * torch.tensor(noise, dtype=torch.float64, device="cpu")
    whole = unit_sums(x.double().square()).clamp(min=torch.finfo(torch.float64).tiny)
    turned = hadamard(x) if rotation else x
    errors = []
    for name in recipe.formats:
        layout = MixedLayout.uniform(
            len(order), BITS[name], format6=recipe.format6, rules=recipe.rules
        )
        rotated = BITS[name] in rotation
        values = turned if rotated else x
        difference = dequantize(*quantize(values, layout), layout) - values
        if rotated:
            difference = hadamard(difference)
        weight = "mxfp4" if recipe.weights == "mxfp4" else name
        noise = unit_sums(difference.double().square()) / whole + _weight_noise(weight, recipe)
        errors.append(importance * noise)
    return torch.stack(errors, dim=1)


@lru_cache
def _weight_noise(name: str, recipe: Recipe) -> float:
    """The relative squared error of a Gaussian weight in a format."""
    generator = torch.Generator().manual_seed(0)
    shape = (256, 16 * BLOCK)
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    rules = recipe.weight_rules or recipe.rules
    layout = MixedLayout.uniform(shape[1], BITS[name], format6=recipe.format6, rules=rules)
    difference = dequantize(*quantize(weight, layout), layout) - weight
    return float(difference.double().square().sum() / weight.double().square().sum())


def _result(choice: _Choices, best: int, formats: Tensor, recipe: Recipe) -> InputBudget:
    units = choice.orders[best].view(-1, recipe.multiple)
    parts, counts = [], []
    for name in BITS:
        number = recipe.formats.index(name) if name in recipe.formats else -1
        parts.append(units[formats == number].flatten())
        counts.append(len(parts[-1]))
    order = torch.cat(parts)
    order = order.masked_fill(order == choice.channels, -1).to(torch.int32)
    return InputBudget(tuple(counts), order, choice.rotations[best])
