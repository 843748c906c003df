"""`micromix report`: one picture of a plan, what each kind of layer got and where the outliers are."""

from __future__ import annotations

import os

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from micromix_compile.picture import COLOURS, draw_map, format_maps, kind_of, save_figure
from micromix_compile.plan import ModelPlan
from micromix_compile.statistics import ModelStatistics
from micromix_compile.targets import ModelledTime

__all__ = ["draw_report"]


def draw_report(
    plan: ModelPlan,
    path: str | os.PathLike,
    statistics: ModelStatistics | None = None,
    time: ModelledTime | None = None,
) -> None:
    """Writes a PNG: element bits of every layer, a map of the channels for each kind of layer, and the outliers.

    An outlier is the largest |x| of an input over its mean |x|; it takes the statistics that the plan was made from.
    The modelled time is written where it is given.
    """
    maps = format_maps(plan)
    upper = 1 if statistics is None else 2
    figure = Figure(figsize=(14, 3 * upper + max(2.0, 1.8 * len(maps))), layout="constrained")
    grid = figure.add_gridspec(upper + max(1, len(maps)), 1)
    bits = {name: layer.weight_layout.element_bits for name, layer in plan.items()}
    _draw_lines(figure.add_subplot(grid[0]), bits, "element bits of the weight")
    if statistics is not None:
        outliers = {n: _outlier(statistics, n) for n in plan if n in statistics.layers}
        axes = figure.add_subplot(grid[1])
        _draw_lines(axes, outliers, "largest |x| / mean |x| of the input")
        axes.set_yscale("log")
    for row, (kind, channels) in enumerate(maps.items()):
        draw_map(figure.add_subplot(grid[upper + row]), kind, channels)
    rotated = sum(layer.layout.rotates_any for layer in plan.values())
    figure.suptitle(
        f"{len(plan)} layers; weights {plan.element_bits:.2f} bits, {plan.weight_bits:.2f} with scales and padding; "
        f"activations {plan.activation_element_bits:.2f} bits; rotated {rotated}; rounded ahead {len(plan.rounded)}"
        + (f"\n{time}" if time else "")
    )
    legend = [Patch(color=colour, label=f"MXFP{width}") for width, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower left", ncols=3, frameon=False)
    save_figure(figure, path)


def _draw_lines(axes, values: dict[str, float], label: str) -> None:
    """One line for each kind of layer, over the number of the layer."""
    lines: dict[str, list[float]] = {}
    for name, value in values.items():
        lines.setdefault(kind_of(name), []).append(value)
    for kind, own in lines.items():
        axes.plot(own, marker=".", label=kind.split(".")[-1])
    axes.set_ylabel(label, wrap=True)
    axes.set_xlabel("layer")
    axes.legend(frameon=False, ncols=7, fontsize="small")


def _outlier(statistics: ModelStatistics, name: str) -> float:
    own = statistics[name]
    return float(own.peak.max() / own.metric("mean").mean().clamp(min=1e-30))
