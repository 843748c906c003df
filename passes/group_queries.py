"""Let a decode step's attention read the keys and values of its cache where they are.

Where several query heads share a key head, models repeat keys and values for each query head: compiled, that writes a
larger copy of the whole cache for every token. The query of one token needs no copy. The heads that share a key head
become the rows of one attention, as transformers has it where it is not compiled (its `pack_gqa`).
"""

from __future__ import annotations

import torch
from torch import fx

from micromix_compile.passes.attention_nodes import arguments_of, is_attention, unrepeated
from micromix_compile.passes.nodes import (
    become,
    call,
    is_size,
    meta_without_value,
    shape_of,
    value_of,
)


def group_queries(graph: fx.Graph) -> int:
    """Rewrite a graph in place; returns the number of attentions whose keys and values are no longer repeated."""
    return sum(_group(graph, node) for node in list(graph.nodes) if is_attention(node))


def _group(graph: fx.Graph, node: fx.Node) -> bool:
    given = arguments_of(node)
    if given.get("is_causal") or given.get("enable_gqa") or given.get("dropout_p"):
        return False
    query, mask = value_of(given["query"]), given.get("attn_mask")
    if query is None or query.dim() != 4 or not is_size(query.shape[2], 1):
        return False
    if mask is not None and not all(is_size(size, 1) for size in shape_of(mask)[-3:-1]):
        return False
    key, value = (unrepeated(given[name], node) for name in ("key", "value"))
    if key is None or value is None:
        return False
    heads, groups = query.shape[1], shape_of(key)[1]
    if groups != shape_of(value)[1]:
        return False

    with graph.inserting_before(node):
        rows = (-1, groups, heads // groups, query.shape[3])
        given["query"] = call(graph, torch.reshape, given["query"], rows)
        given["key"] = call(graph, torch.squeeze, key, 2)
        given["value"] = call(graph, torch.squeeze, value, 2)
        operands = [given.pop(name) for name in ("query", "key", "value")]
        attention = graph.call_function(node.target, tuple(operands), given)
    attention.meta = meta_without_value(node)
    become(node, torch.reshape, attention, (-1, heads, 1, shape_of(value)[-1]))
    return True
