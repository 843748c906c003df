"""Lower linear layers to `micromix::quantize` + `micromix::linear`.

Layers that read one value under one plan share one quantise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

import micromix_compile.ops  # noqa: F401  (registers torch.ops.micromix)
from micromix_compile.packing import PlacedWeight
from micromix_compile.passes.find_linears import Linear, value_of
from micromix_compile.passes.shared_inputs import shared_inputs
from micromix_compile.plan import LayerPlan

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Lowering:
    """One layer to lower: what it is, how its channels are split, and its weight."""

    linear: Linear
    plan: LayerPlan
    weight: PlacedWeight


def unsupported(linear: Linear) -> str | None:
    """Why a layer cannot be lowered, or None."""
    if linear.reason is not None:
        return linear.reason
    weight, x, y = linear.parameter, value_of(linear.input), value_of(linear.node)
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    for what, tensor in (("weight", weight), ("input", x), ("output", y)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"its {what} is {dtype}; bfloat16, float16 and float32 are supported"
    if weight.device.type not in ("cpu", "cuda"):
        return f"no kernel runs on {weight.device.type}"
    if x is not None and x.device != weight.device:
        return f"its input is on {x.device} and its weight on {weight.device}"
    return None


def lower_linears(
    graph: fx.Graph,
    lowerings: Sequence[Lowering],
    add_constant: Callable[[str, torch.Tensor], fx.Node],
) -> int:
    """Rewrite `graph` in place; returns the number of quantises it now holds.

    `add_constant(name, tensor)` gives the node that stands for a packed tensor: a placeholder for Dynamo's
    graphs, an attribute for exported ones.
    """
    lowering_of = {lowering.linear: lowering for lowering in lowerings}
    constants: dict[object, fx.Node] = {}

    def constant(key: object, name: str, tensor: torch.Tensor) -> fx.Node:
        if key not in constants:
            constants[key] = add_constant(name, tensor)
        return constants[key]

    lowered: dict[fx.Node, fx.Node] = {}  # a layer may read what another layer gives
    quantises = 0
    for group in shared_inputs(graph, list(lowering_of)):
        quantised: dict[LayerPlan, tuple[fx.Node, fx.Node]] = {}
        for linear in group:
            lowering = lowering_of[linear]
            plan, node, device = lowering.plan, linear.node, linear.parameter.device
            tag = linear.name.replace(".", "_")
            order = plan.order
            if order is not None:
                order = constant((plan, device), f"{tag}_order", order.to(device))
            weight = constant(lowering.weight, f"{tag}_packed", lowering.weight.buffer)
            if plan not in quantised:
                # Before the group's first layer: what is written in place after it does not concern the group.
                with graph.inserting_before(node):
                    x = lowered.get(linear.input, linear.input)
                    quantised[plan] = _quantise(graph, linear, x, order, plan)
                quantises += 1
            with graph.inserting_before(node):
                product = _product(graph, linear, quantised[plan], weight, lowering)
            lowered[node] = product
            node.replace_all_uses_with(product)
            graph.erase_node(node)
    return quantises


def _quantise(
    graph: fx.Graph, linear: Linear, x: fx.Node, order: fx.Node | None, plan: LayerPlan
) -> tuple[fx.Node, fx.Node]:
    layout = plan.layout
    arguments = (x, order, layout.k4, layout.k6, layout.k8, layout.code)
    pair = graph.call_function(torch.ops.micromix.quantize.default, arguments)
    data, scales = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
    for new in (pair, data, scales):
        new.meta = {k: v for k, v in linear.node.meta.items() if k not in ("example_value", "val")}
    return data, scales


def _product(
    graph: fx.Graph, linear: Linear, operands, weight: fx.Node, lowering: Lowering
) -> fx.Node:
    layout = lowering.plan.layout
    counts = (layout.k4, layout.k6, layout.k8)
    n, dtype = lowering.weight.out_features, value_of(linear.node).dtype
    arguments = (*operands, weight, linear.bias, n, *counts, lowering.plan.format_code, dtype)
    product = graph.call_function(torch.ops.micromix.linear.default, arguments)
    # The value's meta stays: AOTAutograd's cache takes only graphs whose method calls are on known tensors.
    product.meta = dict(linear.node.meta)
    return product
