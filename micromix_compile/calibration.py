"""Calibration from traced runs: what the inputs of a model's linear layers look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import optree
import torch
from torch import fx
from tqdm import tqdm
from typing_extensions import Self

from micromix_compile import _torch_compat as compat
from micromix_compile.allocation import allocate
from micromix_compile.passes.find_linears import Linear, choose_name, find_linears, layer_names
from micromix_compile.passes.observe_linears import observe_linears
from micromix_compile.plan import LayerShape, ModelPlan
from micromix_compile.recipe import Recipe
from micromix_compile.statistics import ModelStatistics


def calibrate(model: torch.nn.Module) -> Calibration:
    """Collect statistics of the inputs of `model`'s linear layers, as a context or over batches.

    Either run the model yourself::

        with micromix.calibrate(model) as calibration:
            for batch in batches:
                model(**batch)

    or let it be run, with a progress bar: `calibration = micromix.calibrate(model).run(batches)`.
    """
    return Calibration(model)


class Calibration:
    """Statistics of a model's linear layers, gathered while the model runs under Dynamo.

    Inside the context every call of the model is traced, and the layers that `find_linears` finds in its graphs,
    the same that lowering finds, are observed. The model's results do not change. Statistics add up over
    several contexts; `statistics` holds them and can be saved, loaded and merged.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self.statistics = ModelStatistics()

    def __enter__(self) -> Self:
        self._names = layer_names(self.model)
        self._context = compat.compiled_call(self.model, self._observe)
        self._context.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)

    def run(self, batches: Iterable[Any], device: torch.device | str | None = None) -> Calibration:
        """Run the model on every batch, without gradients, showing progress; returns self.

        A batch that is a mapping is given as keyword arguments, a tuple or list as positional ones, anything else
        as the one argument; it may nest tensors in any structure. Tensors are moved to `device`, by default the
        device of the model's first parameter (where accelerate offloads it: the first that is on a device).
        """
        if device is None:
            devices = (p.device for p in self.model.parameters() if p.device.type != "meta")
            device = next(devices, torch.device("cpu"))
        total = len(batches) if isinstance(batches, Sized) else None
        with self, torch.no_grad():
            for batch in tqdm(batches, "calibrating", total=total, unit="batch", disable=None):
                batch = optree.tree_map(
                    lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, batch
                )
                if isinstance(batch, torch.Tensor) or not hasattr(batch, "__iter__"):
                    self.model(batch)
                elif hasattr(batch, "keys"):
                    self.model(**batch)
                else:
                    self.model(*batch)
        return self

    def plan(self, recipe: Recipe | None = None) -> ModelPlan:
        """Allocate formats to channels. Raises EmptyCalibrationError if nothing was observed."""
        return allocate(self.statistics, recipe or Recipe.default())

    def save(self, path: Any) -> None:
        """Save the statistics; `micromix_compile.load_statistics(path)` reads them."""
        self.statistics.save(path)

    def _observe(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The Dynamo backend of the context: the same graph, with observers."""
        gm = compat.copy_graph_module(gm)
        found = find_linears(gm, example_inputs)
        linears = [l for l in found if l.reason is None and l.quantised is None]
        observe_linears(gm.graph, linears, self._observer)
        gm.recompile()
        return gm.forward

    def _observer(self, group: list[Linear]) -> Callable[..., None]:
        def observe(x: torch.Tensor, *weights: torch.Tensor) -> None:
            shapes = {
                self._name(linear, weight): LayerShape(
                    linear.out_features, linear.in_features, linear.transposed
                )
                for linear, weight in zip(group, weights, strict=True)
            }
            self.statistics.add_group(shapes)
            self.statistics.update(next(iter(shapes)), x)

        return observe

    def _name(self, linear: Linear, weight: torch.Tensor) -> str:
        """The layer's name in the whole model, by the weight that it runs with.

        A graph knows only the part of the model that it was traced from, and may serve several equal layers.
        Where accelerate offloads a model, its parameters are new ones at every call.
        """
        if weight not in self._names:
            self._names = layer_names(self.model)
        return choose_name(linear.name, self._names.get(weight, ())) or linear.name
