"""What a node of Dynamo's graph writes in place: such a graph is not functional yet."""

from __future__ import annotations

import operator

import torch
from torch import fx

from micromix_compile._torch_compat import same_storage
from micromix_compile.passes.nodes import graphs_inside, nodes_in, value_of

_FUNCTIONS = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
    operator.imatmul,
}
_METHODS = {"__setitem__", *(f"__{function.__name__}__" for function in _FUNCTIONS)}


def writes_to(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node may write to a value's memory."""
    return any(same_memory(operand, value) for operand in written(node))


def same_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values are one, or views of the same memory."""
    return a is b or (same_storage(value_of(a), value_of(b)) and _overlap(value_of(a), value_of(b)))


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one storage may have a byte in common: those of a flat buffer's parts do not."""
    (first, end), (other, other_end) = _bytes(a), _bytes(b)
    sizes = (first, end, other, other_end)
    return not all(isinstance(size, int) for size in sizes) or (first < other_end and other < end)


def _bytes(x: torch.Tensor) -> tuple[int, int]:
    """Where a view begins and ends in its storage."""
    first = x.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return first * x.itemsize, (first + last + 1) * x.itemsize


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node writes to."""
    if node.op == "call_method":
        return nodes_in(node.args[:1]) if _is_in_place_name(node.target) else []
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _written_inside(node)
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by(node, node.target)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        # Which of them it is, torch decides at the call.
        overloads = [getattr(node.target, name) for name in node.target.overloads()]
        return list({w: None for overload in overloads for w in _written_by(node, overload)})
    if node.target is torch.nn.functional.embedding:
        # With max_norm it scales rows of the weight.
        norm = node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")
        return [] if norm is None else nodes_in([node.args[1:2], node.kwargs.get("weight")])
    if node.kwargs.get("out") is not None:
        return nodes_in(node.kwargs["out"])
    if (
        node.target in _FUNCTIONS
        or _is_in_place_name(getattr(node.target, "__name__", ""))
        or node.kwargs.get("inplace")
        # The positional form, F.relu(x, True): a last True of any such function counts.
        or (
            getattr(node.target, "__module__", "") == "torch.nn.functional"
            and len(node.args) > 0
            and node.args[-1] is True
        )
    ):
        return nodes_in(node.args[:1]) or node.all_input_nodes
    return []


def _written_inside(node: fx.Node) -> list[fx.Node]:
    """The operands that the graphs inside a node write to."""
    graphs = graphs_inside(node)
    if not graphs:  # a Triton kernel of the user's may write to any
        return nodes_in((node.args, node.kwargs))
    found = []
    for part, given in graphs:
        writes = [operand for inner in part.graph.nodes for operand in written(inner)]
        found += [
            mine for p, mine in given.items() if any(same_memory(operand, p) for operand in writes)
        ]
    return found


def _written_by(node: fx.Node, overload: torch._ops.OpOverload) -> list[fx.Node]:
    arguments = overload._schema.arguments
    writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    by_name = [node.kwargs.get(a.name) for a, w in zip(arguments, writes) if w]
    return nodes_in([*(a for a, w in zip(node.args, writes) if w), *by_name])


def _is_in_place_name(name: str) -> bool:
    return name in _METHODS or (name.endswith("_") and not name.endswith("__"))
