"""What the rewrites of Dynamo's and of exported graphs ask of a node, and do with it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that Dynamo or export kept of a node's value."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's value; empty where that is not known."""
    value = value_of(node)
    return () if value is None else tuple(value.shape)


def is_size(size: Any, number: int) -> bool:
    """Whether a size is this number, and no symbol: never adds a guard on a dynamic size."""
    return isinstance(size, int) and size == number


def meta_without_value(node: fx.Node) -> dict[str, Any]:
    """What a graph keeps of a node, for another one in its place that has another value."""
    return {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}


def nodes_in(arguments: object) -> list[fx.Node]:
    """The nodes among arguments, however nested."""
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def graphs_inside(node: fx.Node) -> list[tuple[fx.GraphModule, dict[fx.Node, fx.Node]]]:
    """The graphs that a node runs, as torch.utils.checkpoint and torch.cond do, each with what its placeholders stand for."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    operands = nodes_in((node.args, node.kwargs))
    gm = node.graph.owning_module
    values = {n: operator.attrgetter(n.target)(gm) for n in operands if n.op == "get_attr"}
    parts = [value for value in values.values() if isinstance(value, fx.GraphModule)]
    given = [n for n in operands if not isinstance(values.get(n), fx.GraphModule)]
    # What they are called with comes last.
    return [
        (part, dict(zip(reversed(part.graph.find_nodes(op="placeholder")), reversed(given))))
        for part in parts
    ]


def call(graph: fx.Graph, target: Any, *arguments: Any, **named: Any) -> fx.Node:
    """A call with the value that Dynamo would have kept of it."""
    new = graph.call_function(target, arguments, named)
    values = (value_of(x) if isinstance(x, fx.Node) else x for x in arguments)
    new.meta = {"example_value": target(*values, **named)}
    return new


def become(node: fx.Node, target: Any, *arguments: Any) -> None:
    """Make a node another call of the same value. It stays in the graph: a layer may be known to read it."""
    node.target, node.args, node.kwargs = target, arguments, {}
