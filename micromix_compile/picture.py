"""What the pictures of the demo, `micromix report` and `micromix sweep` are drawn with: maps of which channels got which format, and PNG files.

The demo's own picture, maps beside perplexity against bits, is `draw`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from micromix_compile.files import atomically
from micromix_compile.plan import LayerPlan, ModelPlan

COLOURS = {4: "#dbe7f3", 6: "#4f94cd", 8: "#c23b22"}


def draw(
    plan: ModelPlan, points: Sequence[tuple[str, float, float, float]], path: str | os.PathLike
) -> None:
    """Write a PNG: a map for each kind of layer of `plan`, rows layers and columns channels, and one plot of `points`.

    `points` are (name, bits per weight, perplexity, its standard error); the first is the baseline, drawn as a line.
    """
    maps = format_maps(plan)
    figure = Figure(figsize=(16, max(4.0, 2.2 * len(maps))), layout="constrained")
    grid = figure.add_gridspec(max(1, len(maps)), 2, width_ratios=(2.4, 1))
    for row, (kind, bits) in enumerate(maps.items()):
        draw_map(figure.add_subplot(grid[row, 0]), kind, bits)
    _draw_points(figure.add_subplot(grid[:, 1]), points)
    legend = [Patch(color=colour, label=f"MXFP{bits}") for bits, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside upper left", ncols=3, frameon=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a PNG so that `path` holds what it held before or the whole picture."""
    atomically(Path(path), lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def kind_of(name: str) -> str:
    """A layer's name without its first number: the same for the layers of one kind."""
    return re.sub(r"\d+", "*", name, count=1)


def channel_bits(layer: LayerPlan) -> torch.Tensor:
    """int64 `[K]`: 4, 6 or 8 for each channel of the layer's input, in the channels' own order."""
    layout = layer.layout
    counts = torch.tensor(layout.counts, device="cpu")
    sorted_bits = torch.tensor([4, 6, 8], device="cpu").repeat_interleave(counts)
    order = layer.order
    order = torch.arange(layout.channels, device="cpu") if order is None else order.long()
    real = (order >= 0) & (order < layer.in_features)
    bits = torch.empty(layer.in_features, dtype=torch.int64, device="cpu")
    return bits.scatter_(0, order[real], sorted_bits[real])


def format_maps(plan: ModelPlan) -> dict[str, torch.Tensor]:
    """Kind of layer -> int64 `[layers, K]` of `channel_bits`; layers of one kind differ only in a number in their name.

    Layers that share an input share a map: its key names them all, as in "q_proj, k_proj, v_proj", and K where one kind
    has several.
    """
    inputs: dict[tuple[str, int], list[str]] = {}
    for name, layer in plan.items():
        number = re.search(r"\d+", name)
        inputs.setdefault((number[0] if number else "", id(layer)), []).append(name)
    rows: dict[tuple[str, int], list[torch.Tensor]] = {}
    for names in inputs.values():
        kind = ", ".join(name.rsplit(".", 1)[-1] for name in names)
        layer = plan[names[0]]
        rows.setdefault((kind, layer.in_features), []).append(channel_bits(layer))
    widths = Counter(kind for kind, _ in rows)
    return {
        kind if widths[kind] == 1 else f"{kind} (K = {channels})": torch.stack(same)
        for (kind, channels), same in rows.items()
    }


def draw_map(axes: Axes, kind: str, bits: torch.Tensor) -> None:
    shares = ", ".join(f"{(bits == b).float().mean():.0%} MXFP{b}" for b in COLOURS)
    axes.set_title(f"input of {kind}: {shares}", loc="left", fontsize=10)
    axes.imshow(
        bits.numpy(), cmap=ListedColormap(list(COLOURS.values())), vmin=4, vmax=8, aspect="auto",
        interpolation="nearest", origin="lower",
    )  # fmt: skip
    axes.set_xlabel("channel")
    axes.set_ylabel("layer")


def _draw_points(axes: Axes, points: Sequence[tuple[str, float, float, float]]) -> None:
    (base, _, level, _), *others = points
    axes.axhline(level, color="0.5", linestyle="--")
    label = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
    axes.annotate(
        f"{base} {level:.2f}",
        (0.5, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, -14),
        **label,
    )
    for name, bits, value, error in others:
        axes.errorbar(bits, value, yerr=error, fmt="o", color=COLOURS[8], capsize=3)
        axes.annotate(f"{name} {value:.2f}", (bits, value), xytext=(0, 12), **label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("perplexity on unseen text", fontsize=10)
    axes.set_xlabel("bits per weight, scales counted")
    axes.set_ylabel("perplexity")
    axes.margins(x=0.2, y=0.12)
    axes.grid(alpha=0.3)
