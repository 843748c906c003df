"""Group linear layers by the value they read.

Layers of a group read the same tensor with the same contents, so one quantise, and one set of statistics,
serves them all. Dynamo's graph may still write in place; a write to the tensor's memory between two readers
puts them in different groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from micromix_compile.passes.find_linears import Linear
from micromix_compile.passes.in_place import writes_to


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
        if writes_to(node, value):
            return True
        node = node.next
    return False
