"""The `torch.compile` backend: lower the linear layers of Dynamo's graph, then Inductor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from micromix_compile import _torch_compat as compat
from micromix_compile.attachment import STRUCTURE
from micromix_compile.choice import Choice, choose
from micromix_compile.errors import (
    GradientError,
    MicroMixError,
    OptionError,
    RecompileLimitError,
)
from micromix_compile.explain import GraphReport, record
from micromix_compile.ops import EMULATED, blackwell_kernel, kernel_name
from micromix_compile.options import VALID, Options
from micromix_compile.packing import (
    AUTO,
    OrderedBias,
    format_code,
    one_packs,
    owners,
    placed_weight,
    refuse_released,
)
from micromix_compile.passes.between_layers import rewrite_between_layers
from micromix_compile.passes.contiguous_cats import contiguous_cats
from micromix_compile.passes.find_linears import Linear, find_linears, source_path
from micromix_compile.passes.fold_order import Folds, fold_orders
from micromix_compile.passes.lower_linears import Lowering
from micromix_compile.passes.nodes import nodes_in, value_of
from micromix_compile.plan import LayerPlan
from micromix_compile.runner import Runner

_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
_DROPOUTS |= {"alpha_dropout", "feature_alpha_dropout"}
_DIFFERENTIATING = {"_grad_increment_nesting": 1, "_grad_decrement_nesting": -1}
_DIFFERENTIATING |= {"_jvp_increment_nesting": 1, "_jvp_decrement_nesting": -1}
_DIFFERENTIATING |= {"_enter_dual_level": 1, "_exit_dual_level": -1}


def micromix(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind `torch.compile(model, backend="micromix")`; see Options for what it takes."""
    try:
        given = {"mode": mode} if mode else {}
        given |= {"options": options} if options else {}
        report = GraphReport(given=given)
        return _compile(gm, example_inputs, Options.parse(options, mode), report)
    except MicroMixError as error:
        raise compat.raised_through_dynamo(error) from error.__cause__


compat.never_uncompiled(micromix, lambda function: RecompileLimitError(function=function))


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: GraphReport
) -> Callable[..., Any]:
    gm = compat.copy_graph_module(gm)
    contiguous_cats(gm.graph)
    linears = find_linears(gm, example_inputs)
    if any(linear.reason is None for linear in linears):
        _check_inference(gm, example_inputs, linears)
        nodes = [linear.node for linear in linears]
        report.passes |= rewrite_between_layers(gm.graph, nodes, options.inductor)
    gm.recompile()
    chosen = choose(linears, options, report)
    folds = fold_orders({choice.linear: choice.plan for choice in chosen})
    with one_packs:
        lowerings = _pack(gm, example_inputs, chosen, folds, options)
    runner = Runner(gm, list(example_inputs), report)
    _guard_plans(linears, options)
    if lowerings:
        runner.lower(lowerings, folds, options)
    runner.compile(options)
    parameters = [linear.parameter for linear in linears if linear.parameter is not None]
    if len(parameters) < len(linears):  # a weight that is computed: by what it may be computed from
        parameters += [value for value in example_inputs if isinstance(value, torch.nn.Parameter)]
    record(report, parameters)
    return runner


def _pack(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: list[Choice],
    folds: Folds,
    options: Options,
) -> list[Lowering]:
    """Pack the weights, each once; with `release_weights`, free each float weight as soon as it is packed."""
    lowerings = []
    value = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs))
    layers = Counter(choice.linear.weight for choice in chosen)
    unpacked = layers.copy()
    names = {choice.linear: choice.name for choice in chosen}
    owned = owners() if options.release_weights else Counter()
    for choice in tqdm(chosen, "packing weights", delay=2, leave=False, disable=None):
        linear, plan, row = choice.linear, choice.plan, choice.row
        device, rows = linear.parameter.device, folds.rows.get(linear)
        _check_kernel(options.kernel, linear, plan)
        weight = None
        if linear.quantised is None:
            weight = placed_weight(
                choice.name,
                linear.parameter,
                plan,
                linear.transposed,
                rows,
                options.kernel,
                choice.rounded,
            )
        bias = None
        if rows is not None and linear.bias is not None:
            bias = OrderedBias(value[linear.bias], rows)
        order = None if linear in folds.into else plan.order_on(device)
        lowerings.append(Lowering(choice.name, linear, plan, weight, order, bias))
        row.gathered = folds.unfolded.get(linear, "")
        row.folded_into = [names[producer] for producer in folds.into.get(linear, ())]
        unpacked[linear.weight] -= 1
        if options.release_weights and weight is not None and not unpacked[linear.weight]:
            readers = layers[linear.weight]
            if len(linear.weight.users) == readers:  # nothing else in the graph reads it
                weight.release(linear.parameter, readers, owned[id(linear.parameter)])
            row.released = weight.released
        placed = linear.parameter if weight is None else weight.buffer
        row.lowered(plan, placed, kernel_name(device, format_code(plan, options.kernel)))
    refuse_released()
    return lowerings


def _check_kernel(kernel: str, linear: Linear, plan: LayerPlan) -> None:
    """Refuse a kernel that was asked for by name where it cannot run."""
    device = linear.parameter.device
    if kernel == AUTO:
        return
    if linear.quantised is not None:
        reason = f"{linear.name} is quantised already, and placed for the device's own kernel"
    elif plan.weight_only:
        reason = f"the plan leaves the activations of {linear.name} in bfloat16, and that kernel wants them quantised"
    elif not blackwell_kernel(device, EMULATED):
        reason = (
            f"{linear.name} is on {device}, and that kernel needs a CUDA device of compute capability 8.0 or newer, "
            "and the CUDA kernels (`make cuda` builds them)"
        )
    else:
        return
    raise OptionError(option="kernel", reason=f"cannot be {kernel!r}: {reason}", valid=VALID)


def _check_inference(
    gm: fx.GraphModule, example_inputs: Sequence[Any], linears: Sequence[Linear]
) -> None:
    """Raise GradientError where a layer would have to be differentiated, or the model is in training mode."""
    placeholders = zip(gm.graph.find_nodes(op="placeholder"), example_inputs)
    wanting = [
        f"the parameter {source_path(node)}" if isinstance(value, torch.nn.Parameter) else node.name
        for node, value in placeholders
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    products = {linear.node for linear in linears if linear.reason is None}
    late = set(products)  # and what is computed from them
    enabled, differentiated = torch.is_grad_enabled(), 0
    before = enabled
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.target is torch._C._set_grad_enabled:
            enabled = node.args[0]
        elif name == "_enter_inference_mode":
            before, enabled = enabled, enabled and not node.args[0]
        elif name == "_exit_inference_mode":
            enabled = before
        elif name in _DIFFERENTIATING:
            differentiated += _DIFFERENTIATING[name]
        elif node in products and differentiated:
            raise GradientError(reason="forward_ad or torch.func differentiates it")
        elif node in products and enabled and wanting:
            raise GradientError(reason=f"gradients are enabled and {wanting[0]} requires them")
        elif name in _DROPOUTS:
            given = dict(zip(("input", "p", "training"), node.args)) | node.kwargs
            training = given.get("training", given.get("train", True))
            if training is True and given.get("p", 0.5) != 0:
                raise GradientError(reason="the model is in training mode (its dropout is on)")
        elif node.op == "output" and any(
            # Not of others: a view of a parameter requires them even where they are disabled.
            getattr(value_of(result), "requires_grad", False)
            for result in nodes_in(node.args)
            if result in late
        ):
            raise GradientError(reason="gradients are enabled and a result requires them")
        if node.op != "output" and late.intersection(node.all_input_nodes):
            late.add(node)


def _guard_plans(linears: list[Linear], options: Options) -> None:
    """Another plan attached to the layers, or none any more, is another compilation where it is another structure."""
    if options.plan is None and options.recipe is None:
        for linear in linears:
            if linear.parameter is not None and linear.quantised is None:
                compat.guard_attribute(linear.weight, linear.parameter, STRUCTURE)
