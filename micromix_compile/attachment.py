"""Plans on a model's own parameters, where the backend finds them."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import _torch_compat as compat
from .errors import PlanMismatchError, RecipeError, TiedLayersWarning, UnplannedLayersWarning
from .layers import LayerShape, linear_shapes, named_weights
from .recipe import Recipe

if TYPE_CHECKING:
    from .plan import LayerPlan, ModelPlan

__all__ = [
    "DIGEST",
    "STRUCTURE",
    "attach",
    "attach_rest",
    "attached",
    "changes",
    "check",
    "detach",
    "differences",
    "skips_of",
    "warn_of_unplanned",
]

_PLAN = "_micromix_plan"
# Beside it what Dynamo can guard: all of the plan that is constant in a graph, and the whole plan.
STRUCTURE = "_micromix_structure"
DIGEST = "_micromix_digest"


def attach(plan: ModelPlan, model: nn.Module) -> None:
    """See :meth:`ModelPlan.attach`."""
    found = check(plan, model)
    detach(model)
    structures = _structures(plan)
    for name, weight in found.items():
        if attached(weight) is None:
            _mark(weight, plan, name, structures[name])
    attach_rest(plan, model)


def check(plan: ModelPlan, model: nn.Module) -> dict[str, Tensor]:
    """The weights of the planned layers, by name. Raises and warns as :meth:`ModelPlan.attach`, and changes nothing."""
    if found := differences(plan.shapes, model):
        raise PlanMismatchError(differences=found)
    parameters = dict(named_weights(model))
    weights = {name: _weight_of(name, parameters) for name in plan}
    warn_of_unplanned(plan, model, stacklevel=4)
    _warn_of_tied(plan, weights)
    return weights


def differences(
    shapes: Mapping[str, LayerShape], model: nn.Module, whose: str = "the plan"
) -> list[str]:
    """What keeps these from being layers of a model, one a line; none where they are."""
    parameters, result = dict(named_weights(model)), []
    for name, shape in shapes.items():
        weight = _weight_of(name, parameters)
        if weight is None:
            result.append(f"{name}: the model has no such layer")
        elif tuple(weight.shape) != shape.weight_shape:
            expected = f"{whose} has a weight {list(shape.weight_shape)}"
            result.append(f"{name}: {expected}, the model {list(weight.shape)}")
    return result


def _weight_of(name: str, parameters: Mapping[str, Tensor]) -> Tensor | None:
    return parameters.get(f"{name}.weight", parameters.get(name))


def warn_of_unplanned(plan: ModelPlan, model: nn.Module, *, stacklevel: int) -> None:
    """Names the linear modules that a plan neither has nor skips, in an UnplannedLayersWarning."""
    parameters = dict(named_weights(model))
    planned = {id(weight) for n in plan if (weight := _weight_of(n, parameters)) is not None}
    unplanned = [
        name
        for name in linear_shapes(model)
        if name not in plan and id(parameters.get(f"{name}.weight")) not in planned
    ]
    skips = skips_of(plan)
    if unplanned := [name for name in unplanned if not skips(name)]:
        warnings.warn(UnplannedLayersWarning(layers=unplanned), stacklevel=stacklevel + 1)


def skips_of(plan: ModelPlan) -> Callable[[str], bool]:
    """Whether a plan leaves a layer out by choice. A plan of one's own tells nothing of those that it leaves out."""
    with contextlib.suppress(RecipeError):
        if plan.recipe:
            return Recipe.from_dict(plan.recipe).skips
    return lambda _: True


def _warn_of_tied(plan: ModelPlan, found: Mapping[str, Tensor]) -> None:
    """Names layers that will not run by their own plan."""
    sharing: dict[int, list[str]] = {}
    for name, weight in found.items():
        sharing.setdefault(id(weight), []).append(name)
    tied = [names for names in sharing.values() if len({plan[name] for name in names}) > 1]
    if tied:
        warnings.warn(TiedLayersWarning(layers=[", ".join(names) for names in tied]), stacklevel=5)


def attach_rest(plan: ModelPlan, model: nn.Module) -> None:
    """See :meth:`ModelPlan.attach_rest`."""
    _count_change(model)
    for _, parameter in named_weights(model):
        if attached(parameter) is None:
            _mark(parameter, plan, None, "left alone")


def attached(parameter: Tensor) -> tuple[ModelPlan, str | None] | None:
    """The plan attached to a parameter's model; None if there is none.

    With it the name of the planned layer that the parameter is the weight of, or None.
    """
    return getattr(parameter, _PLAN, None)


def detach(model: nn.Module) -> None:
    """Takes off whatever plan is attached to the weights of a model."""
    _count_change(model)
    for _, parameter in named_weights(model):
        if attached(parameter) is not None:
            for mark in (_PLAN, STRUCTURE, DIGEST):
                delattr(parameter, mark)


_changes = 0


def changes() -> int:
    """How often a plan was attached or detached in this process: cheap to ask before looking closer."""
    return _changes


def _count_change(model: nn.Module) -> None:
    global _changes
    _changes += 1
    for module in model.modules():
        compat.look_again(module)


def _mark(parameter: Tensor, plan: ModelPlan, layer: str | None, structure: str) -> None:
    setattr(parameter, _PLAN, (plan, layer))
    setattr(parameter, STRUCTURE, structure)
    setattr(parameter, DIGEST, plan.digest)


def _structures(plan: Mapping[str, LayerPlan]) -> dict[str, str]:
    """Of each layer all that a compiled graph has as constants; equal parts of a model have equal ones.

    The layout, the kind of channel order, and which layers have the same plan, by the ends of their names.
    """
    sharing: dict[LayerPlan, list[str]] = {}
    for name, layer in plan.items():
        sharing.setdefault(layer, []).append(name)
    structures = {}
    for layer, names in sharing.items():
        start = os.path.commonprefix([name.rpartition(".")[0] + "." for name in names])
        ends = [name[start.rindex(".") + 1 :] for name in names] if "." in start else names
        order = "none"
        if layer.order is not None:
            order = "padded" if (layer.order[: layer.in_features] < 0).any() else "plain"
        facts = [*layer.layout.counts, layer.format_code, layer.in_features, order]
        facts += [layer.activations] if layer.weight_only else []
        structures |= dict.fromkeys(names, json.dumps([*facts, sorted(ends)]))
    return structures
