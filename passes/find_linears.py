"""Find the linear layers of an FX graph: y = x Wᵀ + b with a constant W.

The one definition of "a layer". Calibration observes what this finds, lowering replaces what this finds, so
the two cannot disagree. It reads graphs from Dynamo (parameters are placeholders) and from an unlifted
`torch.export.ExportedProgram.module()` (parameters are attributes), with torch functions or ATen operators.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

import micromix_compile.ops  # noqa: F401  (registers torch.ops.micromix)
from micromix_compile._torch_compat import FUSED_LAYERS, is_static_input, source_name
from micromix_compile.mx import MixedLayout
from micromix_compile.mx.layout import WEIGHT_IS_MXFP4
from micromix_compile.passes.in_place import same_memory, written
from micromix_compile.passes.nodes import graphs_inside, nodes_in, value_of
from micromix_compile.plan import LayerPlan

aten = torch.ops.aten

_LINEAR = {torch.nn.functional.linear, torch._C._nn.linear, aten.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm, aten.addmm.default, "addmm"}
_MATMUL = {
    torch.mm,
    torch.matmul,
    torch.linalg.matmul,
    operator.matmul,
    aten.mm,
    aten.mm.default,
    aten.matmul,
    aten.matmul.default,
    "mm",
    "matmul",
    "__matmul__",
}
# The transpose of a real matrix; Dynamo writes `w.T` as a getattr up to torch 2.13, and as numpy_T since.
_TRANSPOSE = {torch.t, torch.adjoint, "t", "adjoint", aten.t.default}
_TRANSPOSE |= {aten.numpy_T, aten.mT, aten.matrix_H, aten.adjoint, aten.numpy_T.default}
_TRANSPOSE |= {aten.mT.default, aten.matrix_H.default, aten.adjoint.default}
_TRANSPOSE_ATTRIBUTES = (["T"], ["mT"], ["H"], ["mH"])
_SWAP = {torch.transpose, torch.swapaxes, aten.transpose.int, "transpose"}
_PERMUTE = {torch.permute, aten.permute.default, "permute"}
# By name, as they are functions, methods and operators of several namespaces.
_OTHERS = {"einsum", "bmm", "matmul", "mm", "mv", "inner"}
_OTHERS |= {"tensordot", "multi_dot", "linalg_multi_dot", "chain_matmul", "bilinear"}
_OTHERS |= {"__matmul__", "__rmatmul__", "imatmul", "__imatmul__", "linalg_matmul"}
_OTHERS |= {"linalg_vecdot", "_sparse_mm"}
_ADDING = {"addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "addmv", "addmv_"}
_OTHERS |= _ADDING  # to their first operand
_QUANTIZE = torch.ops.micromix.quantize.default
_QUANTISED = torch.ops.micromix.linear.default
_WEIGHT_ONLY = torch.ops.micromix.weight_only_linear.default


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer of a graph.

    `parameter` is the real tensor behind `weight`: `[N, K]`, or `[K, N]` where `transposed`. `reason` says why
    the layer can never be lowered; then `parameter` may be None and the sizes 0. A layer that is `quantised`
    already (a QuantizedLinear of the model) has a placed weight as its `parameter`. A `twin` has the name of another
    layer of the graph, and is told from it by this.
    """

    name: str
    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    parameter: torch.Tensor | None
    reason: str | None = None
    quantised: Quantised | None = None
    twin: str = ""

    @property
    def in_features(self) -> int:
        if self.quantised is not None:
            return self.quantised.plan.in_features
        return 0 if self.parameter is None else self.parameter.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        if self.quantised is not None:
            return self.quantised.out_features
        return 0 if self.parameter is None else self.parameter.shape[1 if self.transposed else 0]


@dataclass(frozen=True, eq=False)
class Quantised:
    """What a graph says of a layer that is quantised already: its plan, N, and the node of its channel order."""

    plan: LayerPlan
    out_features: int
    order: fx.Node | None


def find_linears(gm: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> list[Linear]:
    """The linear layers of `gm`, in graph order.

    `example_inputs` are what the placeholders stand for; those of a Dynamo graph include the parameters
    themselves. Products of two activations are no layers and are not returned. A layer whose weight is not a
    constant of the graph, whose product has another form, or which is in a graph inside the graph, is returned with
    a `reason`; those of a graph inside come last.
    """
    constants = _constants(gm, example_inputs)
    found = itertools.chain.from_iterable(_matches(node, constants) for node in gm.graph.nodes)
    writes = [operand for node in gm.graph.nodes for operand in written(node)]
    found = [_unless_written(linear, writes) for linear in found]
    found += [linear for node in gm.graph.nodes for linear in _inside(node, constants)]
    return _told_apart(found)


def _constants(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """Nodes whose value is the same tensor at every call: parameters and buffers."""
    constants = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs):
        if isinstance(value, torch.nn.Parameter) or (
            isinstance(value, torch.Tensor) and is_static_input(node)
        ):
            constants[node] = value
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(node.target)(gm)
        if isinstance(value, torch.Tensor):
            constants[node] = value
    return constants


def _matches(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> list[Linear]:
    """The layers that a node is: one, none, or those of a whole module of torch."""
    if node.op not in ("call_function", "call_method"):
        return []
    if node.target in FUSED_LAYERS:
        reason = f"torch computes it inside {node.target.__name__}"
        if "multi_head" not in node.target.__name__:
            reason += "; torch.backends.mha.set_fastpath_enabled(False) takes that apart"
        given = dict(enumerate(node.args))
        return [
            _linear(node, given[0], given[w], given.get(b), False, constants, reason)
            for w, b in FUSED_LAYERS[node.target]
            # It is None where q, k and v have weights of their own.
            if isinstance(given.get(w), fx.Node)
        ]
    linear = _match(node, constants) or _match_other(node, constants)
    if linear is not None and linear.reason is None:
        linear = replace(linear, reason=_reason(node, linear))
    return [] if linear is None else [linear]


def _reason(node: fx.Node, linear: Linear) -> str | None:
    """Why a layer of a known form is not lowered all the same."""
    if node.kwargs.get("out") is not None:
        return "it writes its result into out="
    bias = None if linear.bias is None else value_of(linear.bias)
    if bias is not None and tuple(bias.shape) != (linear.out_features,):
        return f"its bias has the shape {list(bias.shape)}, not [{linear.out_features}]"
    return None


def _match_other(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> Linear | None:
    """A product of an activation and a parameter in a form that is not lowered: said to be there, or it would be float in silence."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    name = name.partition(".")[0]
    if name not in _OTHERS and "grouped_mm" not in name:  # torch's and transformers'
        return None
    operands = nodes_in((node.args, node.kwargs))[name in _ADDING :]
    parameters = [x for x in operands if _is_of_parameter(x, constants)]
    weights = [x for x in parameters if _rank(x) > 1]
    if not weights:
        return None
    others = [x for x in operands if x not in parameters and not _sources(x, constants)]
    if not others:
        return None
    weight, reason = weights[0], f"products by {name} of such operands are not lowered"
    parameter = constants.get(weight)
    if parameter is not None and parameter.dim() != 2:
        parameter = None
    return Linear(_name(node, weight), node, others[0], weight, None, False, parameter, reason)


def _inside(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> list[Linear]:
    """The layers in a graph that a node runs: torch.utils.checkpoint's, a branch of torch.cond. None of them is lowered."""
    found = []
    for part, known in graphs_inside(node):
        own = {p: constants[n] for p, n in known.items() if n in constants}
        reason = f"it is inside {node.target.name()}, which runs a graph of its own"
        for inner in part.graph.nodes:
            for linear in _matches(inner, own):
                weight, name = known.get(linear.weight, linear.weight), linear.name
                # Parts that are traced once have the modules of the first.
                if weight.op == "placeholder":
                    name = source_path(weight).removesuffix(".weight") or name
                found.append(replace(linear, name=name, reason=linear.reason or reason))
            found += [replace(linear, reason=reason) for linear in _inside(inner, own)]
    return found


def _match(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> Linear | None:
    if node.target in _LINEAR:
        x, weight = _arguments(node, "input", "weight")
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return _linear(node, x, weight, bias, False, constants)
    if node.target is _QUANTISED:
        return _quantised(node, constants)
    if node.target is _WEIGHT_ONLY:
        x, order, weight, bias, n, *layout, _ = node.args
        return _known(node, x, order, weight, bias, n, layout, "bfloat16", constants)
    if node.target in _ADDMM:
        bias, x, weight = _arguments(node, "input", "mat1", "mat2")
        weight, transposed = _untransposed(weight, constants)
        if weight not in constants and not _computed_from_parameters(weight, constants):
            return None
        if _sources(x, constants):  # a part of a weight, as LoRA's two matrices give it
            return None
        reason = None
        if {"beta", "alpha"} & node.kwargs.keys() or len(node.args) > 3:
            reason = "addmm scales its operands"
        elif _rank(bias) != 1:
            reason = "addmm adds no bias vector"
        return _linear(node, x, weight, bias, transposed, constants, reason)
    if node.target in _MATMUL:
        x, weight = _arguments(node, "input", "mat2" if "mat2" in node.kwargs else "other")
        if not isinstance(weight, fx.Node):
            return None
        weight, transposed = _untransposed(weight, constants)
        if not isinstance(x, fx.Node) or _rank(weight) != 2:
            return None
        if weight not in constants and not _computed_from_parameters(weight, constants):
            return None
        if _sources(x, constants):
            return None
        return _linear(node, x, weight, None, transposed, constants)
    return None


def _unless_written(linear: Linear, writes: list[fx.Node]) -> Linear:
    """The layer, refused where the graph itself writes to its weight or bias: they may be read before the graph runs."""
    for what, value in (("weight", linear.weight), ("bias", linear.bias)):
        written_to = value is not None and any(same_memory(operand, value) for operand in writes)
        if linear.reason is None and written_to:
            reason = f"the graph writes to its {what}, so it cannot be packed ahead"
            return replace(linear, reason=reason)
    return linear


def _computed_from_parameters(weight: Any, constants: dict[fx.Node, torch.Tensor]) -> bool:
    """Whether a product's right operand is a layer's weight in a form that is not known here, and no activation."""
    return any(isinstance(x, torch.nn.Parameter) for x in _sources(weight, constants))


def _sources(operand: Any, constants: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
    """The constants that an operand is computed from; none where it is an activation."""
    found, waiting, seen = [], [operand] if isinstance(operand, fx.Node) else [], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in constants:
            found.append(constants[node])
        elif node.op in ("placeholder", "get_attr"):
            return []
        else:
            waiting += node.all_input_nodes
    return found


def _is_of_parameter(operand: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> bool:
    """Whether a product's operand is a parameter, or a view or a part of one; no projected query, which is a linear layer's."""
    while operand not in constants and len(operand.all_input_nodes) == 1:
        if "linear" in str(operand.target):
            return False
        operand = operand.all_input_nodes[0]
    return isinstance(constants.get(operand), torch.nn.Parameter)


def _told_apart(found: list[Linear]) -> list[Linear]:
    """The same; of those that are not lowered the twins of another weight's layer, or of a lowered one."""
    first = {linear.name: linear for linear in reversed(found) if linear.reason is None}
    result = []
    for linear in found:
        named = first.setdefault(linear.name, linear)
        same = named is linear or (named.weight is linear.weight and named.reason is not None)
        if linear.reason is not None and not same:
            linear = replace(linear, twin=linear.node.name)
        result.append(linear)
    return result


def _linear(node, x, weight, bias, transposed, constants, reason=None) -> Linear:
    parameter = constants.get(weight)
    if parameter is None:
        kind = (
            "is computed in the graph"
            if weight.op != "placeholder"
            else "is an argument of the call"
        )
        reason = f"its weight {kind}, so it cannot be packed ahead"
    elif parameter.dim() != 2:
        reason = f"its weight has {parameter.dim()} dimensions"
        parameter = None
    return Linear(_name(node, weight), node, x, weight, bias, transposed, parameter, reason)


def _quantised(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> Linear | None:
    """A QuantizedLinear's quantise and product; None where they are not as that module makes them."""
    data, _, weight, bias, n, k4, k6, k8, code, _ = node.args
    quantize = data.args[0] if data.target is operator.getitem else None
    if quantize is None or quantize.target is not _QUANTIZE:
        return None
    x, order, *layout = quantize.args
    if tuple(layout) != (k4, k6, k8, code & ~WEIGHT_IS_MXFP4):
        return None
    return _known(node, x, order, weight, bias, n, (k4, k6, k8, code), "match", constants)


def _known(node, x, order, weight, bias, n, layout, activations, constants) -> Linear | None:
    """The layer of a QuantizedLinear, its plan read from the arguments of its operators."""
    if value_of(x) is None or weight not in constants:
        return None
    if order is not None and order not in constants:
        return None
    plan = LayerPlan(
        in_features=int(value_of(x).shape[-1]),
        layout=MixedLayout.from_code(*layout),
        order=None if order is None else constants[order].detach().cpu(),
        weights="mxfp4" if layout[-1] & WEIGHT_IS_MXFP4 else "match",
        activations=activations,
    )
    name = _name(node, weight).removesuffix(".placed")
    quantised = Quantised(plan, n, order)
    return Linear(name, node, x, weight, bias, False, constants[weight], None, quantised)


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    return [
        node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for i, name in enumerate(names)
    ]


def _rank(node: Any) -> int:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _untransposed(weight: Any, constants) -> tuple[Any, bool]:
    """The right operand [K, N] of a product as (parameter, stored as [K, N])."""
    if not isinstance(weight, fx.Node) or weight in constants or not weight.args:
        return weight, True
    source, *rest = weight.args
    if source not in constants or constants[source].dim() != 2:
        return weight, True
    swapped = (
        weight.target in _TRANSPOSE
        or (weight.target in _SWAP and {d % 2 for d in rest} == {0, 1})
        or (weight.target in _PERMUTE and tuple(d % 2 for d in _flat(rest)) == (1, 0))
        or (weight.target is getattr and rest in _TRANSPOSE_ATTRIBUTES)
    )
    return (source, False) if swapped else (weight, True)


def _flat(arguments: Sequence[Any]) -> Sequence[Any]:
    return (
        arguments[0]
        if len(arguments) == 1 and isinstance(arguments[0], (tuple, list))
        else arguments
    )


def _name(node: fx.Node, weight: fx.Node) -> str:
    """The layer's name in the module that the graph was traced from.

    It is its weight's name where that lies inside the module that runs the product, and that module's
    otherwise: a tied `lm_head` is `lm_head`, not the embedding whose weight it borrows.
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    module = _relative(stack[-1][0]) if stack else ""
    if weight.op == "placeholder":
        path = source_path(weight)
    elif weight.op == "get_attr":
        path = weight.target
    else:  # it is computed
        path = module or node.name
    path = path.removesuffix(".weight")
    inside = not module or path == module or path.startswith(module + ".")
    return (path if inside else module) or str(weight.name)


def source_path(node: fx.Node) -> str:
    """Where a placeholder stands in the module that the graph was traced from; empty for the argument itself."""
    return _relative(source_name(node))


def _relative(path: str) -> str:
    """`L['self']._modules['a']._parameters['weight']` or `L['self'].a.weight` as `a.weight`."""
    path = re.sub(r"^L\['[^']*'\]", "", path)
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    return path.lstrip(".")
