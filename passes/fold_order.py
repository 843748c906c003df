"""Fold the channel order of a layer into the rows of the layers that compute its input.

Where only elementwise operations stand between, as between gate, up and down of a gated MLP, the producers can
give their channels in the order that the consumer wants, and the gather before its quantise is gone. A row of a
product does not depend on the rows beside it, so no number changes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx

from micromix_compile._torch_compat import is_static_input
from micromix_compile.passes.find_linears import Linear
from micromix_compile.passes.nodes import value_of
from micromix_compile.passes.shared_inputs import shared_inputs
from micromix_compile.plan import LayerPlan

_ELEMENTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.square),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.erf, torch.exp, torch.clamp),
    *(F.relu, F.relu6, F.silu, F.gelu, F.sigmoid, F.tanh, F.leaky_relu, F.elu, F.mish),
    *(F.hardswish, F.softplus, F.dropout, torch.dropout, torch._C._nn.gelu),
    *("add", "sub", "mul", "div", "neg", "pow", "square", "relu", "sigmoid", "tanh", "clamp"),
    *("to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"),
}
_RESHAPES = {"view", "reshape", torch.reshape}
_PARTS = {"chunk": 0, torch.chunk: 0, "split": 1, torch.split: 1, torch.functional.split: 1}
_SHAPE_READS = {"size", "dim", "numel"}


@dataclass
class Folds:
    """What can be folded: row orders (int64) of producers, and the consumers whose order is gone.

    `into` names, for each consumer, the layers that took its order; `consumers` the consumer (the first of those
    that share an input) of each producer; `unfolded` why a layer keeps its order.
    """

    rows: dict[Linear, torch.Tensor] = field(default_factory=dict)
    consumers: dict[Linear, Linear] = field(default_factory=dict)
    unfolded: dict[Linear, str] = field(default_factory=dict)
    into: dict[Linear, list[Linear]] = field(default_factory=dict)


def fold_orders(plans: Mapping[Linear, LayerPlan]) -> Folds:
    """Which orders of the layers of `plans`, all of them to be lowered, fold into which layers.

    Nothing is changed. An order with padding between its channels stays: the producers have no row for it.
    """
    folds = Folds()
    of_node = {linear.node: linear for linear in plans}
    uses = Counter(linear.weight for linear in plans)
    for group in shared_inputs(list(plans)):
        plan = plans[group[0]]
        if plan.order is None:
            continue
        producers = _producers(group, of_node)
        reason = _unfoldable(group, plans, producers, uses)
        if reason is not None:
            folds.unfolded |= dict.fromkeys(group, reason)
            continue
        for producer in producers:
            folds.rows[producer] = plan.row_order(producer.out_features)
            folds.consumers[producer] = group[0]
        folds.into |= {linear: list(producers) for linear in group}
    return folds


def _unfoldable(
    group: list[Linear],
    plans: Mapping[Linear, LayerPlan],
    producers: list[Linear] | None,
    uses: Mapping[fx.Node, int],
) -> str | None:
    plan = plans[group[0]]
    # A model that is quantised already keeps its weights as they are: in another order they would be there twice.
    if any(linear.quantised is not None for linear in [group[0], *(producers or ())]):
        return "the model is quantised already"
    if producers is None:
        return "no layers alone compute its input elementwise"
    if (plan.order[: plan.in_features] < 0).any():
        return "its channel order has padding inside"
    if any(plans[linear] != plan for linear in group):
        return "layers that share its input have other plans"
    for producer in producers:
        # A weight that serves several layers would have to be packed in several orders.
        if uses[producer.weight] != 1:
            return f"the weight of {producer.name} serves several layers"
        if not _has_constant_bias(producer):
            return f"the bias of {producer.name} is computed"
    return None


def _producers(group: list[Linear], of_node: Mapping[fx.Node, Linear]) -> list[Linear] | None:
    """The layers that alone decide the input of a group, elementwise; None where something else has a part."""
    k = group[0].in_features
    inside: set[fx.Node] = set()
    producers: list[Linear] = []
    front = [group[0].input]
    while front:
        node = front.pop()
        if node in inside:
            continue
        inside.add(node)
        if node in of_node:
            if of_node[node].out_features != k:
                return None
            producers.append(of_node[node])
        elif _is_part(node, k):
            parts, whole = node.args[0], node.args[0].args[0]
            if whole not in of_node or of_node[whole].out_features % k:
                return None
            if whole not in inside:
                producers.append(of_node[whole])
            inside |= {parts, whole}
        elif _is_elementwise(node, k):
            front += [n for n in node.all_input_nodes if _has_channels(n)]
        else:
            return None
    readers = {linear.node for linear in group}
    alone = all(
        user in inside or user in readers or _reads_shape(user)
        for node in inside
        for user in node.users
    )
    return producers if alone and producers else None


def _has_constant_bias(linear: Linear) -> bool:
    """Whether there is no bias, or one that can be ordered ahead."""
    bias = linear.bias
    return bias is None or (bias.op == "placeholder" and is_static_input(bias))


def _has_channels(node: fx.Node) -> bool:
    """Whether a node's value varies along the channels."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] != 1


def _is_elementwise(node: fx.Node, k: int) -> bool:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[-1] != k:
        return False
    if node.target in _RESHAPES:
        before = value_of(node.args[0])
        return before.dim() > 0 and before.shape[-1] == k
    return node.op in ("call_function", "call_method") and node.target in _ELEMENTWISE


def _is_part(node: fx.Node, k: int) -> bool:
    """One of the parts, k channels wide each, that a value was cut into along its channels."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return False
    cut = node.args[0]
    if cut.target not in _PARTS or len(cut.args) < 2 or not isinstance(cut.args[1], int):
        return False
    whole, value = value_of(cut.args[0]), value_of(node)
    dim = cut.kwargs.get("dim", cut.args[2] if len(cut.args) > 2 else 0)
    if whole is None or value is None or dim % whole.dim() != whole.dim() - 1:
        return False
    width = cut.args[1] if _PARTS[cut.target] else whole.shape[-1] // cut.args[1]
    return width == k and whole.shape[-1] % k == 0


def _reads_shape(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in _SHAPE_READS) or (
        node.target is getattr and node.args[1] in ("shape", "dtype", "device")
    )
