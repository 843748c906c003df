"""Calls of scaled_dot_product_attention, and the repeated keys and values that models give to them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from micromix_compile._torch_compat import is_transformed
from micromix_compile.passes.nodes import is_size, shape_of, value_of
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


def is_attention(node: fx.Node) -> bool:
    """Whether a node is a call of scaled_dot_product_attention that a pass may rewrite."""
    # Inside torch.vmap a value has one dimension less than its tensor, and no operator takes it outside of it.
    called = node.op == "call_function" and node.target in _ATTENTIONS
    return called and not is_transformed(value_of(node))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of such a call by name, those that are given."""
    return {**dict(zip(_ARGUMENTS, node.args)), **node.kwargs}


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
    before, expanded, after = shape_of(source), shape_of(expand), shape_of(node)
    if len(before) != 5 or len(after) != 4 or not is_size(before[2], 1):
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
