"""A model whose linear layers run the reference arithmetic of `micromix_compile.mx`, eagerly."""

from __future__ import annotations

import copy

import torch
from transformers.pytorch_utils import Conv1D

from micromix_compile import mx
from micromix_compile.plan import ModelPlan


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def reference_model(model: torch.nn.Module, plan: ModelPlan) -> torch.nn.Module:
    """A copy of `model` in which every planned layer quantises its weight, and its input if the plan says so."""
    model = copy.deepcopy(model)
    for name, layer in plan.items():
        module = model.get_submodule(name)
        assert is_linear(module), name
        weight = module.weight.detach()
        weight = weight.t() if isinstance(module, Conv1D) else weight
        order = None if layer.order is None else layer.order.to(weight.device)
        packed = mx.quantize(weight, layer.weight_layout, order)
        module.forward = _forward(layer, order, packed, module.bias)
    return model


def _forward(layer, order, packed, bias):
    layouts = (layer.layout, layer.weight_layout)

    def weight_only(x: torch.Tensor) -> torch.Tensor:
        return mx.weight_only_linear(x, *packed, *layouts, order, bias, x.dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        operands = mx.quantize(x, layer.layout, order)
        return mx.linear(*operands, *packed, *layouts, bias, x.dtype)

    return weight_only if layer.weight_only else forward


def linears_that_run(model: torch.nn.Module, **kwargs) -> list[str]:
    """The names of the linear modules that one forward runs, found by hooks: independent of any graph."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    with torch.no_grad():
        model(**kwargs)
    for handle in handles:
        handle.remove()
    return sorted(set(ran))
