"""A model whose linear layers run the reference arithmetic of `mx/`, eagerly: what kernels are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from micromix_compile import mx
from micromix_compile.layers import linear_shape, linear_shapes
from micromix_compile.plan import LayerPlan, ModelPlan

__all__ = ["reference_model"]


def reference_model(model: nn.Module, plan: ModelPlan) -> nn.Module:
    """A copy of a float `model`, its parameters shared, in which every planned layer computes what docs/numerics.md says.

    Operands are quantised in pure torch (or taken from the plan where it holds a rounded weight), the product is summed in
    float64 and rounded once. Raises PlanMismatchError where a planned layer is no float linear module of that shape.
    """
    plan.check(linear_shapes(model))
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    result = copy.deepcopy(model, parameters)
    for name, layer in plan.items():
        module = result.get_submodule(name)
        rounded = plan.rounded.get(name)
        packed = _packed(module, layer) if rounded is None else (rounded.data, rounded.scales)
        module.forward = _forward(layer, [t.to(module.weight.device) for t in packed], module.bias)
    return result


def _packed(module: nn.Module, layer: LayerPlan) -> tuple[Tensor, Tensor]:
    weight = module.weight.detach()
    weight = weight.t() if linear_shape(module).transposed else weight
    return mx.quantize(weight, layer.weight_layout, layer.order_on(weight.device))


def _forward(
    layer: LayerPlan, packed: list[Tensor], bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    layouts = (layer.layout, layer.weight_layout)

    def weight_only(x: Tensor) -> Tensor:
        return mx.weight_only_linear(x, *packed, *layouts, layer.order_on(x.device), bias, x.dtype)

    def forward(x: Tensor) -> Tensor:
        operands = mx.quantize(x, layer.layout, layer.order_on(x.device))
        return mx.linear(*operands, *packed, *layouts, bias, x.dtype)

    return weight_only if layer.weight_only else forward
