"""Let a decode step's attention read the keys and values of its cache where they are.

Where several query heads share a key head, models repeat keys and values for each query head: compiled, that writes a
larger copy of the whole cache for every token. The query of one token needs no copy. The heads that share a key head
become the rows of one attention, as transformers has it where it is not compiled (its `pack_gqa`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from micromix_compile._torch_compat import is_transformed
from micromix_compile.passes.find_linears import value_of
from micromix_compile.passes.shared_inputs import written_between

aten = torch.ops.aten
_ATTENTIONS = {
    F.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
}
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_RESHAPES = {"reshape", torch.reshape, aten.reshape.default, aten.view.default}
_RESHAPES |= {aten._unsafe_view.default}
_COPIES = {"contiguous", "clone", torch.clone, aten.clone.default}
_EXPANDS = {"expand", aten.expand.default}


def group_queries(graph: fx.Graph) -> int:
    """Rewrite a graph in place; returns the number of attentions whose keys and values are no longer repeated."""
    return sum(_group(graph, node) for node in list(graph.nodes) if is_attention(node))


def is_attention(node: fx.Node) -> bool:
    """Whether a node is a call of scaled_dot_product_attention that a pass may rewrite."""
    # Inside torch.vmap a value has one dimension less than its tensor, and no operator takes it outside of it.
    called = node.op == "call_function" and node.target in _ATTENTIONS
    return called and not is_transformed(value_of(node))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of such a call by name, those that are given."""
    return {**dict(zip(_ARGUMENTS, node.args)), **node.kwargs}


def _group(graph: fx.Graph, node: fx.Node) -> bool:
    given = arguments_of(node)
    if given.get("is_causal") or given.get("enable_gqa") or given.get("dropout_p"):
        return False
    query, mask = value_of(given["query"]), given.get("attn_mask")
    if query is None or query.dim() != 4 or not _is(query.shape[2], 1):
        return False
    if mask is not None and not all(_is(size, 1) for size in _shape(mask)[-3:-1]):
        return False
    key, value = (unrepeated(given[name], node) for name in ("key", "value"))
    if key is None or value is None:
        return False
    heads, groups = query.shape[1], _shape(key)[1]
    if groups != _shape(value)[1]:
        return False

    with graph.inserting_before(node):
        rows = (-1, groups, heads // groups, query.shape[3])
        given["query"] = call(graph, torch.reshape, given["query"], rows)
        given["key"] = call(graph, torch.squeeze, key, 2)
        given["value"] = call(graph, torch.squeeze, value, 2)
        operands = [given.pop(name) for name in _ARGUMENTS[:3]]
        attention = graph.call_function(node.target, tuple(operands), given)
    attention.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
    become(node, torch.reshape, attention, (-1, heads, 1, _shape(value)[-1]))
    return True


def unrepeated(node: fx.Node, reader: fx.Node) -> fx.Node | None:
    """`[B, groups, 1, S, D]` of which `node`, `[B, heads, S, D]`, is a repetition, if `reader` may read that instead."""
    copies: list[fx.Node] = []
    reshape = _before(node, copies)
    if reshape.target not in _RESHAPES or not reshape.args:
        return None
    copies.append(reshape)
    expand = _before(reshape.args[0], copies)
    if expand.target not in _EXPANDS or not expand.args:
        return None
    source = expand.args[0]
    before, expanded, after = _shape(source), _shape(expand), _shape(node)
    if len(before) != 5 or len(after) != 4 or not _is(before[2], 1):
        return None
    if not all(isinstance(size, int) for size in (before[1], *expanded[1:3], after[1])):
        return None
    if before[1] != expanded[1] or expanded[1] * expanded[2] != after[1]:
        return None
    if str(before[0]) != str(expanded[0]):  # repeated over the batch, too
        return None
    if str(expanded[3:]) != str(after[2:]) or str(before[3:]) != str(after[2:]):
        return None
    # A repetition is a copy: it does not see what is written to the cache after the first of them is made.
    if written_between(source, copies[-1], reader):
        return None
    # And what is written to a copy, the cache does not see.
    return None if any(written_between(copy, copy, reader) for copy in copies) else source


def _before(node: fx.Node, copies: list[fx.Node]) -> fx.Node:
    """What a node is a copy of, or itself; the copies are added, the last first."""
    while node.target in _COPIES and node.args:
        copies.append(node)
        node = node.args[0]
    return node


def _shape(node: Any) -> tuple[Any, ...]:
    value = value_of(node)
    return () if value is None else tuple(value.shape)


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


def call(graph: fx.Graph, target: Any, *arguments: Any, **named: Any) -> fx.Node:
    """A call with the value that Dynamo would have kept of it."""
    new = graph.call_function(target, arguments, named)
    values = (value_of(x) if isinstance(x, fx.Node) else x for x in arguments)
    new.meta = {"example_value": target(*values, **named)}
    return new


def become(node: fx.Node, target: Any, *arguments: Any) -> None:
    """Make a node another call of the same value. It stays in the graph: a layer may be known to read it."""
    node.target, node.args, node.kwargs = target, arguments, {}
