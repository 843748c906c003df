"""Calibration from traced runs: what the inputs of a model's linear layers look like."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from tqdm import tqdm
from typing_extensions import Self

from micromix_compile import _torch_compat as compat
from micromix_compile.allocation import allocate
from micromix_compile.batches import (
    call_batch,
    evaluating,
    first_device,
    next_token_loss,
    on_device,
)
from micromix_compile.errors import (
    CalibrationGradientError,
    OptionError,
    QuantizedAlreadyError,
    RecipeError,
)
from micromix_compile.layers import (
    LayerShape,
    choose_name,
    layer_names,
    linear_shapes,
    other_products,
)
from micromix_compile.passes.find_linears import Linear, find_linears
from micromix_compile.passes.observe_linears import observe_linears
from micromix_compile.plan import ModelPlan
from micromix_compile.quantized_linear import QuantizedLinear
from micromix_compile.recipe import Recipe
from micromix_compile.rounding import round_weights
from micromix_compile.statistics import ModelStatistics


def calibrate(
    model: torch.nn.Module, *, gradients: bool = False, plan: ModelPlan | None = None
) -> Calibration:
    """Collect statistics of the inputs of `model`'s linear layers, as a context or over batches.

    Either run the model yourself::

        with micromix.calibrate(model) as calibration:
            for batch in batches:
                model(**batch)

    or let it be run, with a progress bar: `calibration = micromix.calibrate(model).run(batches)`. The model is in
    evaluation mode meanwhile.

    With `gradients`, the gradient of a loss by each input is observed too, which tells a budget of bits
    (`Recipe(bits=...)`) what matters to the result; it takes a backward pass of each batch. In a context of your
    own, call `loss.backward()`.

    With `plan`, the layers that it names run quantised, so that each layer's statistics are those of what the layers
    before it leave (sequential calibration): calibrate as usual, plan, and calibrate again with that plan. Its layers
    must be modules with a weight of their own: raises PlanMismatchError where they are not the model's, and
    QuantizedAlreadyError for a model whose layers are all quantised already. There is no
    backward pass through quantised layers: raises CalibrationGradientError where `gradients` is asked for too.
    """
    return Calibration(model, gradients=gradients, plan=plan)


class Calibration:
    """Statistics of a model's linear layers, gathered while the model runs under Dynamo.

    Inside the context every call of the model is traced, and the layers that `find_linears` finds in its graphs,
    the same that lowering finds, are observed. The model's results do not change. Statistics add up over
    several contexts; `statistics` holds them and can be saved, loaded and merged.
    """

    def __init__(
        self, model: torch.nn.Module, *, gradients: bool = False, plan: ModelPlan | None = None
    ) -> None:
        if gradients and plan is not None:
            raise CalibrationGradientError(reason="layers that a plan quantises have none")
        self.model = compat.original_module(model)
        _refuse_quantised(self.model)
        if plan is not None:
            plan.check(linear_shapes(self.model))
        self.gradients = gradients
        self.upstream = plan
        self.statistics = ModelStatistics()
        self.batches: Sequence[Any] | None = None
        self._entered = 0
        # Dynamo keeps backends, and their graphs, for longer than a context; one backend for several shares its graphs.
        calibration = weakref.ref(self)
        self._backend = lambda gm, inputs: calibration()._observe(gm, inputs)

    def __enter__(self) -> Self:
        if self._entered:  # `run` inside of the context observes already
            self._entered += 1
            return self
        with contextlib.ExitStack() as stack:
            self._floats: dict[str, torch.Tensor] = {}  # of the layers that run quantised
            if self.upstream is not None:
                from micromix_compile.planned import quantised

                self._floats = {n: self.model.get_submodule(n).weight for n in self.upstream}
                stack.enter_context(quantised(self.model, self.upstream))
            stack.enter_context(evaluating(self.model))
            # In evaluation mode it runs a whole layer of nn.TransformerEncoder as one operator.
            fastpath = torch.backends.mha.get_fastpath_enabled()
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            torch.backends.mha.set_fastpath_enabled(False)
            self._names = layer_names(self.model)
            if self.gradients:
                stack.enter_context(_frozen(self.model))
            stack.enter_context(compat.compiled_call(self.model, self._backend))
            self._context = stack.pop_all()
        self._entered = 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._context.__exit__(*exception)

    def run(
        self,
        batches: Iterable[Any],
        device: torch.device | str | None = None,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
    ) -> Calibration:
        """Run the model on every batch, showing progress; returns self.

        A batch that is a mapping is given as keyword arguments, a tuple or list as positional ones, anything else
        as the one argument; it may nest tensors in any structure. Tensors are moved to `device`, by default the
        device of the model's first parameter (where accelerate offloads it: the first that is on a device).

        Under `calibrate(gradients=True)`, `loss(output, batch)` is differentiated, by default the cross-entropy of
        the next token (`output.loss`, times the number of `labels`, where the model gives one). Raises
        CalibrationGradientError if there is none, and OptionError for one batch in the place of a list, for what is
        no list, and where the model fails with a batch that has no tensors.
        """
        valid = "a list of batches, as in run([batch])"
        if hasattr(batches, "keys"):
            raise OptionError(option="batches", reason="is one batch", valid=valid)
        listed = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        if isinstance(batches, (str, bytes)) or not listed:
            reason = f"cannot be {batches!r:.80}"
            raise OptionError(option="batches", reason=reason, valid=valid)
        self.batches = batches if isinstance(batches, (Sequence, torch.Tensor)) else None
        if device is None:
            device = first_device(self.model)
        total = len(batches) if isinstance(batches, Sized) else None
        with self, torch.set_grad_enabled(self.gradients):
            for batch in tqdm(batches, "calibrating", total=total, unit="batch", disable=None):
                batch = on_device(batch, device)
                output = call_batch(self.model, batch)
                if self.gradients:
                    (loss or next_token_loss)(output, batch).backward()
        return self

    def plan(self, recipe: Recipe | None = None) -> ModelPlan:
        """Allocate formats to channels, and round the weights if the recipe says "gptq".

        GPTQ runs the model on the batches of the last `run` again, which must have been a list or a tensor. Raises
        EmptyCalibrationError if nothing was observed (with gradients CalibrationGradientError, if no loss was
        differentiated), and RecipeError if there are no batches.
        """
        recipe = recipe or Recipe()
        unfinished = self.gradients and self.statistics.layers and not self.statistics.tokens
        if unfinished and recipe.method != "format":
            raise CalibrationGradientError(reason="no loss was differentiated")
        plan = allocate(
            self.statistics, replace(recipe, rounding="nearest"), linear_shapes(self.model)
        )
        if recipe.rounding == "nearest":
            return plan
        if self.batches is None:
            expected = "'nearest', unless run() was given a list or a tensor of batches before"
            raise RecipeError(option="rounding", value=recipe.rounding, expected=expected)
        plan = ModelPlan(dict(plan), plan.shapes, recipe.to_dict())
        return round_weights(self.model, plan, self.batches)

    def save(self, path: Any) -> None:
        """Save the statistics; `micromix_compile.load_statistics(path)` reads them, and `.plan(recipe)` plans by them."""
        self.statistics.save(path)

    def _observe(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The Dynamo backend of the context: the same graph, with observers."""
        gm = compat.copy_graph_module(gm)
        found = find_linears(gm, example_inputs)
        linears = [l for l in found if l.reason is None and (l.quantised is None or self._floats)]
        observe_linears(gm.graph, linears, self._observer)
        gm.recompile()
        return gm.forward

    def _observer(self, group: list[Linear]) -> Callable[..., torch.Tensor]:
        """What the layers that read one value read instead; it holds no parameter, and not the calibration."""
        calibration = weakref.ref(self)
        layers = [(l.name, LayerShape(l.out_features, l.in_features, l.transposed)) for l in group]

        def observe(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            return calibration()._record(layers, x, weights)

        return observe

    def _record(
        self,
        layers: Sequence[tuple[str, LayerShape]],
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Add x to the statistics of the layers that read it, given by their names in the graph; returns an equal x."""
        named = zip(layers, weights, strict=True)
        # By name: a layer may read one value twice.
        found = {self._name(name, w): (shape, w) for (name, shape), w in named}
        shapes = {name: shape for name, (shape, _) in found.items()}
        shapes |= {n: self.upstream.shapes[n] for n in shapes.keys() & self._floats.keys()}
        self.statistics.add_group(shapes)
        for name, (_, weight) in found.items():
            self.statistics.add_weight(name, self._floats.get(name, weight))
        first = next(iter(shapes))
        if not self.gradients:
            self.statistics.update(first, x)
            return x
        if not torch.is_grad_enabled():
            raise CalibrationGradientError(reason="the model ran without gradients")
        kept = x.detach().clone()  # the model may write to x before its gradient is there
        # A tensor of the layers' own: what else reads x, a residual, is not quantised with their input. Nothing
        # before the first layers has a gradient.
        x = x.view_as(x) if x.requires_grad else kept.detach().requires_grad_()
        x.register_hook(lambda gradient: self.statistics.update(first, kept, gradient))
        return x

    def _name(self, name: str, weight: torch.Tensor) -> str:
        """The name in the whole model of a layer that a graph calls `name`, by the weight that it runs with.

        A graph knows only the part of the model that it was traced from, and may serve several equal layers.
        Where accelerate offloads a model, its parameters are new ones at every call.
        """
        if weight not in self._names:
            self._names = layer_names(self.model)
        return choose_name(name, self._names.get(weight, ())) or name


def _refuse_quantised(model: torch.nn.Module) -> None:
    """Raises QuantizedAlreadyError where nothing is left for a plan, the output head apart."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        floats = (*linear_shapes(model), *other_products(model))
        if all(map(Recipe().skips, floats)):
            raise QuantizedAlreadyError(reason="and has no float layer to calibrate")


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter has a gradient: those of the layers' inputs are wanted, the weights' would take a third of the time."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
