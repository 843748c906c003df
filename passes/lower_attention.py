"""Lower attention on the CPU to `micromix::attention`, where this machine's kernel for it is faster than torch's.

Query heads that share a key head read it where it is: no copy of keys and values is made. Keys that a mask hides from
all queries, such as the empty part of a static cache, cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from micromix_compile._torch_compat import is_wrapper
from micromix_compile.ops import cpu_isa
from micromix_compile.passes.attention_nodes import arguments_of, is_attention, unrepeated
from micromix_compile.passes.nodes import become, call, value_of

aten = torch.ops.aten

# The types that are lowered on an instruction set. On an Intel CPU with AVX-512 torch's prompts in bfloat16 were faster;
# on AMD's with AVX512-BF16 they are not (docs/kernels-cpu.md).
_TYPES = {
    "amx": (torch.bfloat16, torch.float32),
    "avx512_bf16": (torch.bfloat16, torch.float32),
    "avx512": (torch.float32,),
    "avx2": (torch.bfloat16, torch.float32),
}
_TRANSPOSES = {"transpose", torch.transpose, aten.transpose.int}
_RESHAPES = {"reshape", torch.reshape, aten.reshape.default}
_COPIES = _RESHAPES | {"contiguous", "flatten", torch.flatten, aten.contiguous.default}
_OURS = (0, 2, 1, 3)  # the dimensions of a result as the operator's lie in memory
_MASKS = (torch.bool, torch.bfloat16, torch.float32)


def lower_attention(graph: fx.Graph) -> int:
    """Rewrite a graph of inference in place; returns the number of attentions that were lowered."""
    return sum(_lower(graph, node) for node in list(graph.nodes) if is_attention(node))


def _lower(graph: fx.Graph, node: fx.Node) -> bool:
    given = arguments_of(node)
    operands = [given[name] for name in ("query", "key", "value")]
    if not all(_is_operand(operand) for operand in operands):
        return False
    query, key, value = operands
    # Under autocast the result has another type.
    if len({value_of(operand).dtype for operand in (*operands, node)}) > 1:
        return False
    if len({str(value_of(operand).shape[0]) for operand in operands}) > 1:
        return False
    mask, causal, scale = given.get("attn_mask"), given.get("is_causal"), given.get("scale")
    head_size = value_of(query).shape[3]
    if given.get("dropout_p") or (mask is not None and causal) or not isinstance(head_size, int):
        return False
    if mask is not None and not _fits(mask, value_of(key)):
        return False
    if not isinstance(scale, (int, float, type(None))) or not isinstance(
        causal, (bool, type(None))
    ):
        return False
    sources = [unrepeated(operand, node) for operand in (key, value)]
    shared = None not in sources and _groups(sources[0]) == _groups(sources[1])
    if not shared and _heads_and_length(key) != _heads_and_length(value):
        return False
    heads, groups = value_of(query).shape[1], _groups(sources[0] if shared else key)
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        return False
    if heads != groups and not shared and not given.get("enable_gqa"):
        return False

    with graph.inserting_before(node):
        if shared:
            key, value = (call(graph, torch.squeeze, source, 2) for source in sources)
        while mask is not None and value_of(mask).dim() < 4:
            mask = call(graph, torch.unsqueeze, mask, 0)
        arguments = (
            query,
            key,
            value,
            mask,
            bool(causal),
            float(head_size**-0.5 if scale is None else scale),
        )
        attention = call(graph, torch.ops.micromix.attention.default, *arguments)
        order = _layout(value_of(node))
        if order == _OURS or _is_copied(node):
            become(node, torch.permute, attention, _OURS)
            return True
        # Eager PyTorch lays out its result as the query is, and the model may view it so.
        result = call(graph, torch.permute, attention, [_OURS[d] for d in order])
        result = call(graph, torch.clone, result, memory_format=torch.contiguous_format)
        become(node, torch.permute, result, [order.index(d) for d in range(4)])
    return True


def _layout(result: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of a result as they lie in memory; `_OURS` where it lies so but for dimensions of size 1."""
    order = result.dim_order()
    long, ours = ([d for d in dims if str(result.shape[d]) != "1"] for dims in (order, _OURS))
    return _OURS if long == ours else order


def _is_copied(node: fx.Node) -> bool:
    """Whether a result is transposed and copied, as most models do it, and read by nothing else: ours is good for that."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in _RESHAPES:  # to its own shape: transformers does
        if str(value_of(readers[0]).shape) != str(value_of(node).shape):
            return False
        readers = list(readers[0].users)
    if len(readers) != 1 or readers[0].target not in _TRANSPOSES:
        return False
    copies = list(readers[0].users)
    transposed = {d % 4 for d in readers[0].args[1:]} == {1, 2}
    return transposed and len(copies) == 1 and copies[0].target in _COPIES


def _is_operand(node: Any) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return (
        value is not None
        and value.device.type == "cpu"
        and value.dtype in _TYPES.get(cpu_isa(), ())
        and value.dim() == 4
        and not is_wrapper(value)
    )


def _fits(mask: Any, key: torch.Tensor) -> bool:
    """Whether the kernel reads such a mask: one that is not broadcast over the keys."""
    value = value_of(mask) if isinstance(mask, fx.Node) else None
    if value is None or value.dtype not in _MASKS or not 2 <= value.dim() <= 4:
        return False
    return str(value.shape[-1]) == str(key.shape[2])


def _groups(node: fx.Node) -> Any:
    return value_of(node).shape[1]


def _heads_and_length(node: fx.Node) -> str:
    return str(value_of(node).shape[1:3])
