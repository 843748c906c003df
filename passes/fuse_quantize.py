"""Fuse a value and the `micromix::quantize` that reads it into one operator."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from micromix_compile import _torch_compat as compat
from micromix_compile.ops import kernel_name  # and registers torch.ops.micromix
from micromix_compile.passes.patterns import Call, Pattern, same_sizes

aten = torch.ops.aten
QUANTIZE = torch.ops.micromix.quantize.default
_PRODUCTS = (
    torch.ops.micromix.linear.default,
    torch.ops.micromix.linears.two,
    torch.ops.micromix.linears.three,
)
_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def fuse_quantize(graph: fx.Graph, patterns: Sequence[Pattern]) -> dict[int, str]:
    """Rewrite `graph` in place where the input of a quantise matches one of `patterns`, the first that does.

    Returns what was fused: the name of the pattern for each quantise's number (`number_quantises`). A value that others
    read too is returned by the operator beside its quantised form, and so is the sum that a norm normalises. Those
    others may be quantises of other plans: the first one is fused, the next read the value.
    """
    fused: dict[int, str] = {}
    for node in list(graph.find_nodes(op="call_function", target=QUANTIZE)):
        value = quantised_value(node)
        if not isinstance(value.meta.get("val"), torch.Tensor):
            continue
        for pattern in patterns:
            inputs = pattern.match(value)
            if inputs is None:
                continue
            call = pattern.replacement(inputs, value.meta["val"].dtype)
            if kernel_name(value.meta["val"].device) == "reference":  # it has nothing to gain
                continue
            x = call.arguments[0]
            call, total = _with_residual(call)
            name = pattern.name if total is None else f"add_{pattern.name}"
            fused[node.meta["micromix"]] = name
            _replace(graph, call, x, value, total, node)
            break
    graph.eliminate_dead_code()
    return fused


def number_quantises(graph: fx.Graph) -> None:
    """Give each quantise its number: that of the first packed weight, in the order of the graph's inputs, it meets.

    The order of inputs is the same in Dynamo's graph and in Inductor's; that of the operators is not.
    """
    weights: dict[fx.Node, set[fx.Node]] = {}
    for quantise in graph.find_nodes(op="call_function", target=QUANTIZE):
        products = {user for getitem in quantise.users for user in getitem.users}
        # Of each layer weight, bias and n; five arguments follow the last one's.
        weights[quantise] = {w for p in products if p.target in _PRODUCTS for w in p.args[2:-5:3]}
    ordered = sorted(set().union(*weights.values())) if weights else []
    number = {weight: i for i, weight in enumerate(ordered)}
    for quantise, own in weights.items():
        quantise.meta["micromix"] = min((number[weight] for weight in own), default=-1)


def quantised_value(quantise: fx.Node) -> fx.Node:
    """What a quantise reads, before a reshape that leaves the channels alone."""
    value = quantise.args[0]
    while value.op == "call_function" and value.target in _VIEWS and _keeps_channels(value):
        value = value.args[0]
    return value


def _keeps_channels(view: fx.Node) -> bool:
    before, after = view.args[0].meta["val"].shape, view.meta["val"].shape
    return len(before) > 0 and len(after) > 0 and same_sizes(before[-1:], after[-1:])


def _with_residual(call: Call) -> tuple[Call, fx.Node | None]:
    """The call with the sum that it normalises taken in, and the node of that sum; or as it is, and None."""
    x = call.arguments[0]
    total = x.args[0] if x.target in _VIEWS and _keeps_channels(x) else x
    if not call.takes_residual or total.target is not aten.add.Tensor or len(total.args) != 2:
        return call, None
    sizes, dtype = total.meta["val"].shape, total.meta["val"].dtype
    for operand in total.args:
        value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or total.kwargs:
            return call, None
        if not same_sizes(value.shape, sizes):
            return call, None
    others = [a for a in call.arguments[1:] if isinstance(a, fx.Node)]
    if any(
        total < other for other in others
    ):  # the sum's readers may come before the norm's weight
        return call, None
    return Call(call.op, (*total.args, *call.arguments[2:])), total


def _replace(
    graph: fx.Graph,
    call: Call,
    x: fx.Node,
    value: fx.Node,
    total: fx.Node | None,
    quantise: fx.Node,
) -> None:
    """Put `call` in the place of `value`, which is computed from `x`, of its quantise, and of the sum."""
    keep = not _read_by_alone(value, quantise)
    arguments = (*call.arguments, keep, *quantise.args[1:])
    operands = [a for a in arguments if isinstance(a, fx.Node)]
    with _inserting_after(graph, max(operands)):
        node = _call(graph, call.op, arguments)
        results = [_call(graph, operator.getitem, (node, i)) for i in range(len(node.meta["val"]))]
    *_, kept, data, scales = results
    if total is not None:
        total.replace_all_uses_with(results[0])
    if keep:
        with graph.inserting_before(value):
            kept = _in_rows_of(graph, kept, value, x)
        value.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not quantise)
    for getitem in list(quantise.users):
        with graph.inserting_before(getitem):
            result = (data, scales)[getitem.args[1]]
            result = _in_rows_of(graph, result, quantise.args[0], x)
        getitem.replace_all_uses_with(result)
        graph.erase_node(getitem)
    graph.erase_node(quantise)


def _in_rows_of(graph: fx.Graph, result: fx.Node, like: fx.Node, x: fx.Node) -> fx.Node:
    """`result` with the leading sizes of `like`, which it differs from where one of the two is a reshape."""
    if same_sizes(result.meta["val"].shape[:-1], like.meta["val"].shape[:-1]):
        return result
    view = like if like.target in _VIEWS else x
    last = result.meta["val"].shape[-1]
    return _call(graph, aten.reshape.default, (result, [*view.args[1][:-1], last]))


def _read_by_alone(value: fx.Node, quantise: fx.Node) -> bool:
    """Whether nothing but a quantise reads a value, directly or through reshapes."""
    return all(
        user is quantise or (user.target in _VIEWS and _read_by_alone(user, quantise))
        for user in value.users
    )


def _inserting_after(graph: fx.Graph, node: fx.Node):
    """After `node`, and after all placeholders."""
    while node.next.op == "placeholder":
        node = node.next
    return graph.inserting_before(node.next)


def _call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
    """A new node, with the fake value that Inductor wants on it."""
    node = graph.call_function(target, arguments)
    values = fx.node.map_arg(arguments, lambda n: n.meta["val"])
    with compat.fake_mode_of(values):
        node.meta["val"] = target(*values)
    return node
