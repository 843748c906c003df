"""A model and its plan: which one it is saved or exported with, and its layers packed by it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from micromix_compile import _torch_compat as compat
from micromix_compile.allocation import uniform_plan
from micromix_compile.attachment import attached, skips_of, warn_of_unplanned
from micromix_compile.errors import (
    HookedLayerError,
    LeftAloneWarning,
    NoPlanWarning,
    OptionError,
    QuantizedAlreadyError,
    ReleasedWeightError,
    UnsavableLayerError,
)
from micromix_compile.layers import linear_shapes, other_products
from micromix_compile.packing import PackedWeight, is_released, pack_weight, refuse
from micromix_compile.plan import ModelPlan, RoundedWeight, load_plan
from micromix_compile.quantized_linear import QuantizedLinear
from micromix_compile.recipe import Recipe

__all__ = [
    "AnyPlan",
    "as_plan",
    "loaded",
    "pack_layer",
    "plan_to_use",
    "quantised",
    "warn_of_others",
]

_OTHER = "and not by the {} that was given: give none to keep what is there"

AnyPlan = ModelPlan | Recipe | str | os.PathLike
"""What the calls that quantise a model take as its plan."""


def as_plan(plan: AnyPlan | None) -> ModelPlan | Recipe | None:
    """A plan, read where its path is given; a Recipe, and None, as they are.

    Raises PlanFileError and FileVersionError for a file, and OptionError for anything else.
    """
    if isinstance(plan, (str, os.PathLike)):
        return load_plan(plan)
    if plan is not None and not isinstance(plan, (ModelPlan, Recipe)):
        raise OptionError(
            option="plan",
            reason=f"cannot be a {type(plan).__name__}",
            valid="a ModelPlan, the path of a saved one, or a Recipe that needs no calibration",
        )
    return plan


def plan_to_use(model: nn.Module, plan: AnyPlan | None) -> ModelPlan:
    """The plan that a model is to be saved or exported with; its own where it is quantised already.

    Without one, that attached to the model, or MXFP8 with a NoPlanWarning. Raises PlanMismatchError,
    QuantizedAlreadyError, UnsavableLayerError, HookedLayerError, ReleasedWeightError, RecipeError for a recipe that
    needs calibration, and what as_plan raises.
    """
    plan = as_plan(plan)
    for name, parameter in model.named_parameters():
        if is_released(parameter):
            raise ReleasedWeightError(layer=name.removesuffix(".weight"))
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if quantised:
        own = next((a for p in model.parameters() if (a := attached(p))), None)
        recipe = own[0].recipe if own else {}
        result = ModelPlan(
            {name: module.plan for name, module in quantised.items()},
            {name: module.shape for name, module in quantised.items()},
            recipe,
        )
        if isinstance(plan, Recipe) and plan.to_dict() != recipe:
            # A copy of a model has lost what was attached; a recipe for one format tells its plan by itself.
            known = plan.method == "format" and plan.rounding == "nearest"
            uniform = known and uniform_plan(result.shapes, plan)
            if not uniform or uniform.layers_digest != result.layers_digest:
                raise QuantizedAlreadyError(reason=_OTHER.format("recipe"))
        if isinstance(plan, ModelPlan) and not _is_plan_of(plan, result, quantised):
            raise QuantizedAlreadyError(reason=_OTHER.format("plan"))
        return plan if isinstance(plan, ModelPlan) else result
    plan = _plan_of_floats(model, plan)
    hooked = [name for name in plan if _runs_more(model.get_submodule(name))]
    if hooked:
        raise HookedLayerError(layers=hooked)
    return plan


def _is_plan_of(plan: ModelPlan, own: ModelPlan, layers: Mapping[str, QuantizedLinear]) -> bool:
    """Whether quantised layers, whose own plan is without rounded weights, were made by `plan`."""

    def holds(layer: QuantizedLinear, rounded: RoundedWeight) -> bool:
        with loaded(layer):
            packed = layer.packed().to("cpu")
        return torch.equal(packed.data, rounded.data) and torch.equal(packed.scales, rounded.scales)

    return plan.layers_digest == own.layers_digest and all(
        holds(layers[name], rounded) for name, rounded in plan.rounded.items()
    )


def _runs_more(module: nn.Module) -> bool:
    """Whether a call of a module runs more than its class's forward, accelerate's hook and our own apart."""
    own_forward = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    return own_forward or any(hook is not refuse for hook in compat.hooks(module))


def _plan_of_floats(model: nn.Module, plan: ModelPlan | Recipe | None) -> ModelPlan:
    shapes = linear_shapes(model)
    given = plan is not None
    if not given:
        found = next((a for p in model.parameters() if (a := attached(p))), None)
        plan = found[0] if found else Recipe(format="mxfp8")
        if not found:
            planless = sum(not plan.skips(name) for name in shapes)
            warnings.warn(NoPlanWarning(layers=planless), stacklevel=4)
    if isinstance(plan, Recipe):
        warn_of_others(model, plan.skips)
        return uniform_plan(shapes, plan)
    unsavable = [name for name in plan if name not in shapes and _has_weight(model, name)]
    if unsavable:
        raise UnsavableLayerError(layers=unsavable)
    plan.check(shapes)
    if given:  # else it was said when the plan was attached
        warn_of_unplanned(plan, model, stacklevel=4)
    warn_of_others(model, skips_of(plan))
    return plan


def warn_of_others(model: nn.Module, skips: Callable[[str], bool]) -> None:
    """Name the modules whose weights stay float in a checkpoint or package, but for those that a recipe skips."""
    others = [
        module
        for module, weights in other_products(model).items()
        if not skips(module) and not all(skips(f"{module}.{weight}") for weight in weights)
    ]
    if others:
        warnings.warn(LeftAloneWarning(layers=others), stacklevel=5)


def _has_weight(model: nn.Module, name: str) -> bool:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return name in parameters or f"{name}.weight" in parameters


@contextlib.contextmanager
def quantised(model: nn.Module, plan: AnyPlan | None) -> Iterator[ModelPlan]:
    """The model with its planned layers packed; they are float again afterwards. Gives the plan.

    Raises what plan_to_use raises.
    """
    plan = plan_to_use(model, plan)
    floats = {}
    try:
        for name in plan:
            module = model.get_submodule(name)
            if isinstance(module, QuantizedLinear):
                continue
            with loaded(module):
                packed = pack_layer(plan, name, module.weight)
                layer = QuantizedLinear.from_packed(
                    packed, module.bias, plan.shapes[name].transposed
                )
            floats[name] = module
            model.set_submodule(name, layer)
        yield plan
    finally:
        for name, module in floats.items():
            model.set_submodule(name, module)


def pack_layer(plan: ModelPlan, name: str, weight: Tensor) -> PackedWeight:
    """The packed form of a planned layer's float weight."""
    shape, rounded = plan.shapes[name], plan.rounded.get(name)
    return pack_weight(weight, plan[name], shape.transposed, rounded=rounded, name=name)


def loaded(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The module's own tensors are there within it, if accelerate offloaded them."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
