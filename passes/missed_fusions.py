"""Quantises that stand alone although a norm or an activation, of a form that no pattern knows, comes before."""

from __future__ import annotations

import operator

import torch
from torch import fx

from micromix_compile import _torch_compat as compat
from micromix_compile.passes.fuse_quantize import QUANTIZE, quantised_value

aten = torch.ops.aten
prims = torch.ops.prims

_SIGNS = {
    aten.rsqrt.default: "a norm",
    aten.tanh.default: "an activation",
    aten.erf.default: "an activation",
    aten.exp.default: "an activation",
    aten.sigmoid.default: "an activation",
    aten.relu.default: "an activation",
}
_ELEMENTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.reshape.default,
    aten.view.default,
    prims.convert_element_type.default,
    *_SIGNS,
}
_DEPTH = 12  # longer than any norm or activation, shorter than a layer


def missed_fusions(graph: fx.Graph) -> dict[int, str]:
    """What a fused operator would have taken in, by the quantise's number; empty where all is well."""
    if not compat.has_kernel(torch.ops.micromix.pointwise_quantize.default, _device(graph)):
        return {}
    found = {}
    for node in graph.find_nodes(op="call_function", target=QUANTIZE):
        what = _elementwise_origin(quantised_value(node))
        if what is not None:
            found[node.meta["micromix"]] = what
    return found


def _device(graph: fx.Graph) -> torch.device:
    for node in graph.find_nodes(op="call_function", target=QUANTIZE):
        return node.args[0].meta["val"].device
    return torch.device("meta")


def _elementwise_origin(value: fx.Node) -> str | None:
    """The first tell-tale operation before `value`, with only elementwise ones between."""
    front, seen = [value], {value}
    for _ in range(_DEPTH):
        for node in front:
            if node.target in _SIGNS:
                return _SIGNS[node.target]
        front = [
            before
            for node in front
            if node.target in _ELEMENTWISE or node.target is operator.getitem
            for before in node.all_input_nodes
            if before not in seen
        ]
        seen.update(front)
    return None
