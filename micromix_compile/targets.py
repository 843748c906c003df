"""The modelled time of a plan's products on a named device, for budgets of time (`Recipe(target=..., time=...)`).

A channel of a layer takes the longer of two times: reading it (its weights and its activations, scales counted) at the
memory's bandwidth, and multiplying it at the rate of its format. Channels, formats and layers add up. What no format
changes (results, norms, attention, launches) is left out, and so is the quantisation of activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from .errors import OptionError, RecipeError
from .mx.scales import BLOCK

if TYPE_CHECKING:
    from .layers import LayerShape
    from .plan import ModelPlan
    from .recipe import Recipe

__all__ = ["TARGETS", "ModelledTime", "Target", "check_time", "find_target", "modelled_time"]

_SCALE_BITS = 8 / BLOCK
_WIDEST = 8


@dataclass(frozen=True)
class Target:
    """A device: ``bandwidth`` of its memory in bytes per second, ``rates`` of products in operations (two a
    multiply-add) per second by the width of the wider operand, and whether it is a ``cpu``."""

    bandwidth: float
    rates: Mapping[int, float]
    cpu: bool

    def channel_time(
        self,
        width: int,
        outputs: int,
        rows: int,
        weights: str = "match",
        activations: str = "match",
    ) -> float:
        """Seconds for one channel, of 4, 6 or 8 bits, of a layer with ``outputs`` rows of the weight and ``rows`` of
        activations. ``weights`` and ``activations`` are those of a plan."""
        weight_bits = 4 if weights == "mxfp4" else width
        row_bits = 16 if activations == "bfloat16" else width + _SCALE_BITS
        bits = outputs * (weight_bits + _SCALE_BITS) + rows * row_bits
        return max(bits / 8 / self.bandwidth, 2 * rows * outputs / self.rates[width])


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        # One core, with every format decoded to the same bf16 tiles. MXFP4 of many rows is multiplied as integers
        # since, and faster (docs/kernels-cpu.md), so this holds for few rows only.
        "amx": Target(bandwidth=14e9, rates={4: 1.6e12, 6: 1.6e12, 8: 1.6e12}, cpu=True),
        # GeForce RTX 5090: NVIDIA's 1792 GB/s; MXFP8 and NVFP4 at 8192 x 8192 x 8192 through torch._scaled_mm, as
        # measured in Dao-AILab/quack#153. MXFP6 is the same instruction as MXFP8; no kernel that was measured reaches
        # its rate (CUTLASS's: about half, NVIDIA/cutlass#2186).
        "sm_120": Target(bandwidth=1.792e12, rates={4: 1343e12, 6: 643e12, 8: 643e12}, cpu=False),
    }
)


def find_target(name: str) -> Target:
    """The target of a name. Raises OptionError, which lists the known ones."""
    if name not in TARGETS:
        raise OptionError(
            option="target", reason=f"is {name!r}, which is not known", valid=", ".join(TARGETS)
        )
    return TARGETS[name]


@dataclass(frozen=True)
class ModelledTime:
    """``seconds`` of a plan's products in one forward of ``rows`` rows on ``target``, and their ``fraction`` of what
    the same layers take in MXFP8."""

    target: str
    rows: int
    seconds: float
    fraction: float

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"modelled for {self.target}, {rows}: {self.seconds * 1e6:,.1f} µs of products, {self.fraction:.3f} of MXFP8's"


def modelled_time(plan: ModelPlan, target: str, rows: int = 1) -> ModelledTime:
    """What a plan's products take in one forward of ``rows`` rows (1: decode at batch 1). Raises OptionError."""
    device = find_target(target)
    if type(rows) is not int or rows < 1:
        raise OptionError(option="rows", reason=f"is {rows!r}", valid="a whole number from 1")
    seconds = widest = 0.0
    for name, layer in plan.items():
        outputs, layout = plan.shapes[name].out_features, layer.layout
        kind = (layer.weights, layer.activations)
        for width, channels in zip((4, 6, 8), layout.counts):
            seconds += channels * device.channel_time(width, outputs, rows, *kind)
        widest += layout.channels * device.channel_time(_WIDEST, outputs, rows)
    return ModelledTime(target, rows, seconds, seconds / widest if widest else 1.0)


def check_time(shapes: Mapping[str, LayerShape], recipe: Recipe) -> None:
    """Raises RecipeError, with the least that is possible, if no choice of the recipe's formats reaches its ``time``."""
    device = find_target(recipe.target)
    least = widest = 0.0
    for shape in shapes.values():
        channels = -(-shape.in_features // recipe.multiple) * recipe.multiple
        sizes = (shape.out_features, recipe.rows)
        widest += channels * device.channel_time(_WIDEST, *sizes)
        least += channels * min(
            device.channel_time(int(name[-1]), *sizes, recipe.weights, recipe.activations)
            for name in recipe.formats
        )
    if recipe.time * widest * (1 + 1e-9) < least:
        expected = (
            f"at least {math.ceil(1e4 * least / widest) / 1e4}, what these layers take in {recipe.formats[0]} "
            f"on {recipe.target} with rows={recipe.rows}"
        )
        raise RecipeError(option="time", value=recipe.time, expected=expected)
