"""Compute once what all layers read: the rotary embedding's cosines and sines, and the mask.

Inductor computes a pointwise value anew in each kernel that reads it, on the assumption that this costs less than
memory. Cosines that sixty kernels want for every head, and a mask that is sliced for every layer, cost more: a third
of what a prompt spends beside its products. `micromix::materialize` is opaque to it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from micromix_compile._torch_compat import is_wrapper
from micromix_compile.passes.in_place import same_memory
from micromix_compile.passes.nodes import value_of
from micromix_compile.passes.shared_inputs import written_between

FEWEST_READERS = 4


def materialize_shared(graph: fx.Graph, layers: Iterable[fx.Node]) -> int:
    """Rewrite a graph in place; returns the number of values that are computed once.

    `layers` are the nodes of its linear layers: what depends on one of them is a value of that layer, and left alone.
    """
    late = set(layers)
    nodes = list(graph.nodes)
    count = 0
    for node in nodes:
        if node in late or late.intersection(node.all_input_nodes):
            late.add(node)
        elif _is_shared(node) and not written_between(node, node, nodes[-1]):
            _materialize(graph, node)
            count += 1
    return count


def _is_shared(node: fx.Node) -> bool:
    value = value_of(node) if node.op in ("call_function", "call_method") else None
    return (
        isinstance(value, torch.Tensor)
        and not is_wrapper(value)
        and value.device.type == "cpu"
        and (value.dtype.is_floating_point or value.dtype == torch.bool)
        and value.dim() > 0
        and len(node.users) >= FEWEST_READERS
        # What the graph returns is the caller's to write to, through a view of it too.
        and not any(same_memory(result, node) for result in _results(node.graph))
    )


def _results(graph: fx.Graph) -> list[fx.Node]:
    return [node for output in graph.find_nodes(op="output") for node in output.all_input_nodes]


def _materialize(graph: fx.Graph, node: fx.Node) -> None:
    readers = list(node.users)
    with graph.inserting_after(node):
        once = graph.call_function(torch.ops.micromix.materialize.default, (node,))
    once.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, once)
