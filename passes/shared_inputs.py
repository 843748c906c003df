"""Group linear layers by the value they read.

Layers of a group read the same tensor with the same contents, so one quantise, and one set of statistics,
serves them all. Dynamo's graph may still write in place; a write to the tensor's memory between two readers
puts them in different groups.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from micromix_compile._torch_compat import same_storage
from micromix_compile.passes.find_linears import Linear, value_of

_IN_PLACE_FUNCTIONS = {
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
}


def shared_inputs(linears: Sequence[Linear]) -> list[list[Linear]]:
    """The layers in groups that read one value, each in graph order, groups in order of their first layer."""
    groups: list[list[Linear]] = []
    open_group: dict[fx.Node, list[Linear]] = {}
    for linear in sorted(linears, key=lambda linear: linear.node):
        group = open_group.get(linear.input)
        if group is not None and written_between(linear.input, group[0].node, linear.node):
            group = None
        if group is None:
            group = open_group[linear.input] = []
            groups.append(group)
        group.append(linear)
    return groups


def written_between(value: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether something between two nodes may write to a value's memory."""
    node = first.next
    while node is not last:
        if _writes_in_place(node) and _may_write(node, value):
            return True
        node = node.next
    return False


def _writes_in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return _is_in_place_name(node.target) or node.target == "__setitem__"
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return (
        node.target in _IN_PLACE_FUNCTIONS
        or _is_in_place_name(getattr(node.target, "__name__", ""))
        or "out" in node.kwargs
        or bool(node.kwargs.get("inplace"))
        # The positional form, F.relu(x, True): a last True of any such function counts.
        or (
            getattr(node.target, "__module__", "") == "torch.nn.functional"
            and node.args[-1:] == (True,)
        )
    )


def _is_in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _may_write(write: fx.Node, x: fx.Node) -> bool:
    return any(same_storage(value_of(operand), value_of(x)) for operand in write.all_input_nodes)
