"""Operators that quantise what they compute, and what they mean in plain torch.

Each computes a value y ``[..., K]`` and quantises it once for every layout: ``orders[i]`` is the channel order
of the i-th (or None), ``layouts[4 i : 4 i + 4]`` its ``k4, k6, k8, format``. The result is a list:

    sum             of a norm with a ``residual``: x + residual, in x's type
    y               where ``keep``, in ``dtype``
    data, scales    as of ``micromix::quantize``, for each layout

A device without a kernel runs the steps one by one, with its own ``micromix::quantize``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from micromix_compile.mx import MixedLayout

from ._schemas import NAMESPACE


class RmsForm(enum.IntEnum):
    """Where an RMSNorm multiplies its weight w, n being x / rms(x) in float32."""

    WEIGHT_AFTER_CAST = 0  # n.to(x.dtype) * w: Hugging Face's Llama
    WEIGHT_BEFORE_CAST = 1  # (n * w).to(dtype): torch.nn.RMSNorm
    ONE_PLUS_WEIGHT = 2  # (n * (1 + w)).to(dtype): Gemma


class Pointwise(enum.IntEnum):
    """The functions of ``pointwise_quantize``; all but ADD multiply by ``other`` where there is one."""

    CAST = 0
    RELU = 1
    SILU = 2
    GELU = 3
    GELU_TANH = 4
    ADD = 5
    QUICK_GELU = 6  # x times the logistic function of 1.702 x: CLIP


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, form: int, dtype: torch.dtype) -> Tensor:
    """RMSNorm over the last dimension in one of its forms; ``weight`` [K] of any float type."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == RmsForm.WEIGHT_AFTER_CAST:
        y = y.to(x.dtype).float()
    if weight is not None:
        y = y * (weight.float() + 1 if form == RmsForm.ONE_PLUS_WEIGHT else weight.float())
    return y.to(dtype)


def pointwise(x: Tensor, other: Tensor | None, function: int, dtype: torch.dtype) -> Tensor:
    """``function`` of x, in float32, rounded to x's type before a product with ``other``."""
    if function == Pointwise.ADD:
        return (x.float() + other.float()).to(dtype)
    activations: dict[int, Callable[[Tensor], Tensor]] = {
        Pointwise.CAST: lambda v: v,
        Pointwise.RELU: F.relu,
        Pointwise.SILU: F.silu,
        Pointwise.GELU: F.gelu,
        Pointwise.GELU_TANH: lambda v: F.gelu(v, approximate="tanh"),
        Pointwise.QUICK_GELU: lambda v: v * torch.sigmoid(1.702 * v),
    }
    y = activations[function](x.float())
    if other is not None:
        y = y.to(x.dtype).float() * other.float()
    return y.to(dtype)


def _rms_norm_quantize(x, residual, weight, eps, form, dtype, keep, orders, layouts):
    first, x = _sum(x, residual)
    return first + _quantised(rms_norm(x, weight, eps, form, dtype), keep, orders, layouts)


def _layer_norm_quantize(x, residual, weight, bias, eps, dtype, keep, orders, layouts):
    first, x = _sum(x, residual)
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)
    return first + _quantised(y, keep, orders, layouts)


def _pointwise_quantize(x, other, function, dtype, keep, orders, layouts):
    return _quantised(pointwise(x, other, function, dtype), keep, orders, layouts)


def _sum(x: Tensor, residual: Tensor | None) -> tuple[list[Tensor], Tensor]:
    if residual is None:
        return [], x
    total = x + residual
    return [total], total


def _quantised(y: Tensor, keep: bool, orders, layouts) -> list[Tensor]:
    results = [y] if keep else []
    for i, order in enumerate(orders):
        results += torch.ops.micromix.quantize(y, order, *layouts[4 * i : 4 * i + 4])
    return results


def _fake(x: Tensor, has_sum: bool, dtype, keep: bool, layouts: list[int]) -> list[Tensor]:
    results = [x.new_empty(x.shape)] if has_sum else []
    if keep:
        results.append(x.new_empty(x.shape, dtype=dtype))
    for i in range(0, len(layouts), 4):
        layout = MixedLayout.from_code(*layouts[i : i + 4])
        for size in (layout.row_bytes, layout.blocks):
            results.append(x.new_empty((*x.shape[:-1], size), dtype=torch.uint8))
    return results


def _fake_rms_norm(x, residual, weight, eps, form, dtype, keep, orders, layouts):
    return _fake(x, residual is not None, dtype, keep, layouts)


def _fake_layer_norm(x, residual, weight, bias, eps, dtype, keep, orders, layouts):
    return _fake(x, residual is not None, dtype, keep, layouts)


def _fake_pointwise(x, other, function, dtype, keep, orders, layouts):
    return _fake(x, False, dtype, keep, layouts)


_library = torch.library.Library(NAMESPACE, "IMPL")


def register() -> None:
    for name, function, fake in (
        ("rms_norm_quantize", _rms_norm_quantize, _fake_rms_norm),
        ("layer_norm_quantize", _layer_norm_quantize, _fake_layer_norm),
        ("pointwise_quantize", _pointwise_quantize, _fake_pointwise),
    ):
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
