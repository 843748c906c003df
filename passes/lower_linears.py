"""Lower linear layers to `micromix::quantize` + `micromix::linear`, or to `micromix::weight_only_linear(s)`.

Layers that read one value under one plan share one quantise, and are one product, `micromix::linears`, three at a
time; where activations stay in bfloat16, `micromix::weight_only_linears`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

import micromix_compile.ops  # noqa: F401  (registers torch.ops.micromix)
from micromix_compile._torch_compat import is_wrapper
from micromix_compile.packing import OrderedBias, PlacedWeight
from micromix_compile.passes.find_linears import Linear
from micromix_compile.passes.nodes import meta_without_value, value_of
from micromix_compile.passes.shared_inputs import shared_inputs
from micromix_compile.plan import LayerPlan

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_PRODUCTS = {
    1: torch.ops.micromix.linear.default,
    2: torch.ops.micromix.linears.two,
    3: torch.ops.micromix.linears.three,
}
_WEIGHT_ONLY = {
    1: torch.ops.micromix.weight_only_linear.default,
    2: torch.ops.micromix.weight_only_linears.two,
    3: torch.ops.micromix.weight_only_linears.three,
}


@dataclass(frozen=True, eq=False)
class Lowering:
    """One layer to lower: its name for the user, what it is, how its channels are split, and its weight.

    `weight` is None for a layer that is quantised already: the graph holds its packed weight.
    `order` is what its quantise gathers by: the plan's, or None where it was folded into the layers before
    (fold_order.py). `bias` takes the place of the layer's own where the order of a later layer was folded into
    this one.
    """

    name: str
    linear: Linear
    plan: LayerPlan
    weight: PlacedWeight | None
    order: torch.Tensor | None
    bias: OrderedBias | None = None


def unsupported(linear: Linear) -> str | None:
    """Why a layer cannot be lowered, or None."""
    if linear.reason is not None:
        return linear.reason
    weight, x, y = linear.parameter, value_of(linear.input), value_of(linear.node)
    if linear.quantised is not None:
        return None
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    if x is not None and (x.is_nested or x.layout is not torch.strided):
        return f"its input is {'a nested tensor' if x.is_nested else x.layout}"
    for what, node in (("input", linear.input), ("bias", linear.bias)):
        tensor = None if node is None else value_of(node)
        if is_wrapper(tensor):
            return f"its {what} is a {type(tensor).__name__}, not a plain tensor"
    for what, tensor in (("weight", weight), ("input", x), ("output", y)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"its {what} is {dtype}; bfloat16, float16 and float32 are supported"
    if weight.device.type not in ("cpu", "cuda"):
        return f"no kernel runs on {weight.device.type}"
    if x is not None and x.device != weight.device:
        return f"its input is on {x.device} and its weight on {weight.device}"
    return None


@dataclass(frozen=True, eq=False)
class Quantised:
    """One quantise of the lowered graph: the layers that read it, those of one product together.

    `number` is that of `fuse_quantize.number_quantises`, which knows the quantise again in Inductor's graph; None
    for weight-only products, which read no quantise.
    """

    number: int | None
    products: list[list[Lowering]]


def lower_linears(
    graph: fx.Graph,
    lowerings: Sequence[Lowering],
    add_constant: Callable[[str, torch.Tensor], fx.Node],
) -> list[Quantised]:
    """Rewrite `graph` in place; returns the quantises that it now holds.

    `add_constant(name, tensor)` gives the node that stands for a packed tensor: a placeholder for Dynamo's
    graphs, an attribute for exported ones. Layers that read one value under one plan share its quantise, and
    are one product where their results have one type.
    """
    lowering_of = {lowering.linear: lowering for lowering in lowerings}
    constants: dict[object, fx.Node] = {}

    def constant(key: object, name: str, tensor: torch.Tensor) -> fx.Node:
        if key not in constants:
            constants[key] = add_constant(name, tensor)
        return constants[key]

    lowered: dict[fx.Node, fx.Node] = {}  # a layer may read what another layer gives
    found: list[tuple[set[fx.Node], list[list[Lowering]]]] = []
    for group in shared_inputs(list(lowering_of)):
        for plan, of_plan in _grouped(group, lambda linear: lowering_of[linear].plan).items():
            device = of_plan[0].parameter.device
            order, known = lowering_of[of_plan[0]].order, of_plan[0].quantised
            if known is not None:
                order = known.order
            elif order is not None:
                order = constant((plan, device), f"{_tag(of_plan[0])}_order", order.to(device))
            x = lowered.get(of_plan[0].input, of_plan[0].input)
            operands = (x, order)
            if not plan.weight_only:
                # Before the group's first layer: what is written in place after it does not concern the group.
                with graph.inserting_before(of_plan[0].node):
                    operands = _quantise(graph, of_plan[0], x, order, plan)
            used, products = set(), []
            for layers in _of_at_most(max(_PRODUCTS), _grouped(of_plan, _product_key).values()):
                product = [lowering_of[linear] for linear in layers]
                weights = [
                    p.linear.weight
                    if p.weight is None
                    else constant(p.weight, f"{_tag(p.linear)}_packed", p.weight.buffer)
                    for p in product
                ]
                biases = [
                    p.linear.bias
                    if p.bias is None
                    else constant(p.bias, f"{_tag(p.linear)}_bias", p.bias.buffer)
                    for p in product
                ]
                used.update(weights)
                with graph.inserting_before(layers[0].node):
                    results = _products(graph, product, operands, weights, biases)
                for linear, result in zip(layers, results):
                    lowered[linear.node] = result
                    linear.node.replace_all_uses_with(result)
                    operands_before = linear.node.args[:2]
                    graph.erase_node(linear.node)
                    if linear.quantised is not None and not plan.weight_only:
                        _erase_unread(graph, operands_before)
                products.append(product)
            found.append((set() if plan.weight_only else used, products))
    ordered = sorted(set().union(*(used for used, _ in found)))
    number = {weight: i for i, weight in enumerate(ordered)}
    return [
        Quantised(min((number[weight] for weight in used), default=None), parts)
        for used, parts in found
    ]


def _grouped(layers: Sequence[Linear], key: Callable[[Linear], object]) -> dict:
    groups: dict = {}
    for linear in layers:
        groups.setdefault(key(linear), []).append(linear)
    return groups


def _of_at_most(count: int, groups: Iterable[list[Linear]]) -> Iterator[list[Linear]]:
    """The groups, the longer ones in parts."""
    for group in groups:
        for i in range(0, len(group), count):
            yield group[i : i + count]


def _product_key(linear: Linear) -> object:
    """Layers with one key can be computed where the first of them is."""
    if linear.bias is not None and linear.bias.op not in ("placeholder", "get_attr"):
        return linear
    return value_of(linear.node).dtype


def _tag(linear: Linear) -> str:
    return re.sub(r"\W", "_", linear.name)


def _quantise(
    graph: fx.Graph, linear: Linear, x: fx.Node, order: fx.Node | None, plan: LayerPlan
) -> tuple[fx.Node, fx.Node]:
    layout = plan.layout
    arguments = (x, order, *layout.counts, layout.code)
    pair = graph.call_function(torch.ops.micromix.quantize.default, arguments)
    data, scales = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
    for new in (pair, data, scales):
        new.meta = meta_without_value(linear.node)
    return data, scales


def _products(
    graph: fx.Graph,
    product: Sequence[Lowering],
    operands: tuple[fx.Node, fx.Node],
    weights: list[fx.Node],
    biases: list[fx.Node | None],
) -> list[fx.Node]:
    """The results of one product, a node for each layer."""
    first = product[0]
    code = first.plan.format_code if first.weight is None else first.weight.format_code
    rest = (*first.plan.layout.counts, code, value_of(first.linear.node).dtype)
    n = [lowering.linear.out_features for lowering in product]
    layers = [argument for layer in zip(weights, biases, n) for argument in layer]
    op = (_WEIGHT_ONLY if first.plan.weight_only else _PRODUCTS)[len(product)]
    both = graph.call_function(op, (*operands, *layers, *rest))
    results = [both]
    if len(product) > 1:
        both.meta = meta_without_value(first.linear.node)
        results = [graph.call_function(operator.getitem, (both, i)) for i in range(len(product))]
    for lowering, result in zip(product, results):
        # The value's meta stays: AOTAutograd's cache takes only graphs whose method calls are on known tensors.
        result.meta = dict(lowering.linear.node.meta)
    return results


def _erase_unread(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """The parts of a quantise that nothing reads any more, and the quantise."""
    quantize = nodes[0].args[0]
    for node in (*nodes, quantize):
        if not node.users:
            graph.erase_node(node)
