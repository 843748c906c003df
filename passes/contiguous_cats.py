"""Keep the strides that eager PyTorch gives to a concatenation with an empty tensor.

A Hugging Face cache begins as an empty tensor, to which the keys of the prompt are concatenated. Eager PyTorch gives
a contiguous result; Inductor's decomposition (torch 2.11 to 2.13) clones the one operand that is left, with the
strides of a transposed view. Dynamo guards strides, so the steps after the prompt and after a token would need a graph each.
"""

from __future__ import annotations

import torch
from torch import fx

from micromix_compile.passes.nodes import is_size, value_of


def contiguous_cats(graph: fx.Graph) -> int:
    """Rewrite Dynamo's graph in place; returns the number of concatenations that are made contiguous."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=torch.cat):
        operands = node.args[0] if node.args else node.kwargs["tensors"]
        if not isinstance(operands, (list, tuple)) or not any(map(_is_empty_vector, operands)):
            continue
        value = value_of(node)
        if value is None or not value.is_contiguous():
            continue
        readers = list(node.users)
        with graph.inserting_after(node):
            contiguous = graph.call_method("contiguous", (node,))
        contiguous.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, contiguous)
        count += 1
    return count


def _is_empty_vector(node: object) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value is not None and value.dim() == 1 and is_size(value.shape[0], 0)
