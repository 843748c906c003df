"""Which layers of a graph are lowered, and by which plan; the others' reasons."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

import torch

from micromix_compile import _torch_compat as compat
from micromix_compile.allocation import uniform_plan
from micromix_compile.attachment import attached
from micromix_compile.errors import (
    NoPlanWarning,
    OptionError,
    PlanMismatchError,
    StrictError,
    UnplannedLayersWarning,
)
from micromix_compile.explain import GraphReport, LayerReport
from micromix_compile.layers import LayerShape
from micromix_compile.live_modules import Places
from micromix_compile.options import Options
from micromix_compile.passes.find_linears import Linear, source_path
from micromix_compile.passes.lower_linears import unsupported
from micromix_compile.plan import LayerPlan, ModelPlan, RoundedWeight
from micromix_compile.recipe import Recipe

_NAMELESS = "a graph break hides its name, and its weight is not in one place of the model"


@dataclass(frozen=True, eq=False)
class Choice:
    """A layer that is lowered: its name for the user, its plan, its rounded weight if there is one, its row of the report."""

    linear: Linear
    name: str
    plan: LayerPlan
    rounded: RoundedWeight | None
    row: LayerReport


def choose(linears: list[Linear], options: Options, report: GraphReport) -> list[Choice]:
    """Decide for each layer whether and how it is lowered, and write that down."""
    chosen: list[Choice] = []
    refused: list[str] = []
    missing: list[str] = []  # those of them that a given plan does not have
    planless = 0
    places = Places()
    names = {linear.name for linear in linears}
    marks = (attached(x.parameter) for x in linears if x.parameter is not None)
    any_plan, _ = next(filter(None, marks), (None, None))
    for linear in linears:
        plan, rounded, name, by_choice = None, None, linear.name, False
        reason = unsupported(linear)
        if linear.quantised is not None:
            plan = _own_plan(linear, options)
        else:
            model_plan, name = _plan_of(linear, options, places)
            if name is None:
                name, reason = linear.name, reason or _NAMELESS
            candidates = _candidates(linear, name, options, names, places)
            if len(candidates) == 1:
                name = candidates[0]
            if linear.parameter is None and options.plan is None and options.recipe is None:
                model_plan = any_plan  # a computed weight has no mark of its own
            recipe = options.recipe or Recipe(format="mxfp8")
            if model_plan is not None:
                recipe = Recipe.from_dict(model_plan.recipe)  # an empty one skips the output head
            shape = LayerShape(linear.out_features, linear.in_features, linear.transposed)
            by_choice = recipe.skips(name)
            if reason is not None:
                pass  # whatever the plan says
            elif len(candidates) > 1:
                ends = f"{len(candidates)} layers of the plan end in {name}"
                reason, by_choice = f"{ends}; plan.attach(model) tells them apart", False
                missing.append(f"{name}: {reason}")
            elif model_plan is not None and name in model_plan:
                plan, rounded = _checked(model_plan, name, shape), model_plan.rounded.get(name)
            elif by_choice:
                reason = "the recipe skips it"
            elif model_plan is None:
                plan = uniform_plan({name: shape}, recipe)[name]
                planless += 1
            else:
                reason = f"the plan has no layer {name}"
                missing.append(f"{name}: {reason}")
        if linear.twin:
            name = f"{name}.{linear.twin}"
        row = LayerReport(name, linear.in_features, linear.out_features, reason=reason or "")
        if linear.parameter is not None:
            row.bytes_before, row.weight = linear.parameter.nbytes, weakref.ref(linear.parameter)
        report.layers.append(row)
        if plan is not None:
            chosen.append(Choice(linear, name, plan, rounded, row))
        elif not by_choice:
            refused.append(f"{name}: {reason}")
    if options.plan is not None and missing and not chosen:
        raise PlanMismatchError(differences=missing)
    if options.strict and refused:
        raise StrictError(layers=refused)
    if options.plan is not None and options.plan.recipe and missing:
        warnings.warn(UnplannedLayersWarning(layers=missing), stacklevel=2)
    if planless and options.recipe is None:
        warnings.warn(NoPlanWarning(layers=planless), stacklevel=2)
    return chosen


def _own_plan(linear: Linear, options: Options) -> LayerPlan:
    """The plan that a layer was quantised by before, which no option can change."""
    plan, name = linear.quantised.plan, linear.name
    if options.recipe is not None:
        reason = f"cannot be given: {name} is quantised already"
        raise OptionError(
            option="recipe",
            reason=reason,
            valid="those of a quantised model: strict, mode, inductor, and settings of Inductor",
        )
    if options.plan is not None and name in options.plan:
        other = options.plan[name]
        same = all(
            getattr(other, what) == getattr(plan, what)
            for what in ("layout", "weights", "activations")
        )
        if not same or not _same_order(other.order, plan.order):
            raise PlanMismatchError(
                differences=[f"{name}: the model is quantised already, by another plan"]
            )
    return plan


def _same_order(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _plan_of(
    linear: Linear, options: Options, places: Places
) -> tuple[ModelPlan | None, str | None]:
    """The plan a layer belongs to, and its name there; no name where it cannot be known.

    A plan attached to the model knows the layer by its parameter. A plan given as an option knows names only.
    """
    plan = options.plan
    if plan is None and options.recipe is None:
        plan, marked = attached(linear.parameter) or (None, None)
        if marked:
            return plan, marked
    if plan is not None and linear.name == "weight" and "weight" in plan:  # that of a layer alone
        return plan, "weight"
    return plan, _full_name(linear, places)


def _candidates(
    linear: Linear, name: str, options: Options, names: set[str], places: Places
) -> list[str]:
    """The layers of a plan given as an option that a graph's name may mean: those that end in it, as in a part of the model.

    `names` are those of the whole graph.
    """
    end = f".{name}"
    found = [known for known in options.plan or () if known == name or known.endswith(end)]
    if len(found) < 2 or linear.parameter is None:
        return found
    if name in found and names.issuperset(found):  # the graph is that of the whole model
        return [name]
    place = places.of(linear.parameter, compat.module_of(linear.node))
    # Of a part that was compiled by itself the whole name may be that in another model.
    meant = [] if place is None else [_end(place.name, found), _end(place.whole, found)]
    return meant[:1] if len(set(meant)) == 1 and meant[0] else found


def _end(place: str, names: list[str]) -> str:
    """The longest of the names that a tensor's place in a model ends in; empty for none."""
    place = f".{place.removesuffix('.weight')}"
    return max((name for name in names if place.endswith(f".{name}")), key=len, default="")


def _full_name(linear: Linear, places: Places) -> str | None:
    """A layer's name; where the graph knows only that of the weight in its own module, by the module that has it."""
    on_stack = compat.is_on_stack(linear.weight)
    bare = linear.weight.op == "placeholder" and source_path(linear.weight) in ("", "weight")
    if linear.parameter is None or not (bare or on_stack):
        return linear.name
    place = places.of(linear.parameter, compat.module_of(linear.node))
    if place is None:
        return None if on_stack else linear.name
    name = place.name.removesuffix(".weight")
    if name != linear.name:  # Dynamo would run the graph for any equal module
        compat.guard_identity(linear.weight)
    return name


def _checked(plan: ModelPlan, name: str, shape: LayerShape) -> LayerPlan:
    if plan.shapes[name] != shape:
        difference = f"{name}: the plan has {plan.shapes[name]}, the model {shape}"
        raise PlanMismatchError(differences=[difference])
    return plan[name]
