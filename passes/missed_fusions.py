"""Quantises that stand alone although a norm or an activation, of a form that no pattern knows, comes before."""

from __future__ import annotations

import operator

import torch
from torch import fx

from micromix_compile.ops import kernel_name
from micromix_compile.passes.fuse_quantize import QUANTIZE, quantised_value

aten = torch.ops.aten
prims = torch.ops.prims

_NORM, _ACTIVATION = "a norm", "an activation"
_SIGNS = {
    aten.rsqrt.default: lambda node: _NORM,
    aten.erf.default: lambda node: _ACTIVATION,
    aten.relu.default: lambda node: _ACTIVATION,
    # A sigmoid, an exp or a tanh alone is no activation that could have been fused; one that multiplies
    # or divides what it is computed from is SiLU or a GELU.
    aten.sigmoid.default: lambda node: _gates_its_input(node),
    aten.exp.default: lambda node: _gates_its_input(node),
    aten.tanh.default: lambda node: _gates_its_input(node),
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
    if kernel_name(_device(graph)) == "reference":
        return {}
    found = {}
    for node in graph.find_nodes(op="call_function", target=QUANTIZE):
        what = _elementwise_origin(quantised_value(node))
        if what is not None:
            found[node.meta["micromix"]] = what
    return found


def _gates_its_input(node: fx.Node) -> str | None:
    """Whether a product or quotient soon after `node` takes in what `node` is computed from."""
    after = _through_elementwise([node], lambda n: n.users, 4)  # 0.5 x (1 + tanh u), with casts
    products = [n for n in after if n.target in (aten.mul.Tensor, aten.div.Tensor)]
    others = [n for product in products for n in product.all_input_nodes if n not in {node, *after}]
    before = _through_elementwise([node], lambda n: n.all_input_nodes, _DEPTH)
    gates = _through_elementwise(others, lambda n: n.all_input_nodes, 4)
    return _ACTIVATION if before & (gates | set(others)) else None


def _through_elementwise(start, step, depth: int) -> set[fx.Node]:
    """The nodes up to `depth` steps from `start`, the last ones of any kind, those between elementwise."""
    reached: set[fx.Node] = set()
    front = start
    for _ in range(depth):
        front = [n for node in front for n in step(node) if n not in reached]
        reached.update(front)
        front = [n for n in front if n.target in _ELEMENTWISE]
    return reached


def _device(graph: fx.Graph) -> torch.device:
    for node in graph.find_nodes(op="call_function", target=QUANTIZE):
        return node.args[0].meta["val"].device
    return torch.device("meta")


def _elementwise_origin(value: fx.Node) -> str | None:
    """The first tell-tale operation before `value`, with only elementwise ones between."""
    front, seen = [value], {value}
    for _ in range(_DEPTH):
        for node in front:
            if node.target in _SIGNS and (what := _SIGNS[node.target](node)):
                return what
        front = [
            before
            for node in front
            if node.target in _ELEMENTWISE or node.target is operator.getitem
            for before in node.all_input_nodes
            if before not in seen
        ]
        seen.update(front)
    return None
