"""Operators that quantise what they compute, and what they mean in plain torch.

Each computes a value y ``[..., K]`` and quantises it. The results:

    sum             of a norm: x + residual, in x's type; empty, ``[0]``, without a ``residual``
    y               in ``dtype``; empty unless ``keep``
    data, scales    as of ``micromix::quantize``

A device without a kernel runs the steps one by one, with its own ``micromix::quantize``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
        Pointwise.CAST: torch.clone,  # a result of an operator is no view of an argument
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


def _rms_norm_quantize(x, residual, weight, eps, form, dtype, keep, order, *layout):
    total, x = _sum(x, residual)
    return total, *_quantised(rms_norm(x, weight, eps, form, dtype), keep, order, layout)


def _layer_norm_quantize(x, residual, weight, bias, eps, dtype, keep, order, *layout):
    total, x = _sum(x, residual)
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)
    return total, *_quantised(y, keep, order, layout)


def _pointwise_quantize(x, other, function, dtype, keep, order, *layout):
    return _quantised(pointwise(x, other, function, dtype), keep, order, layout)


def _sum(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first result of a norm, and what is normalised."""
    if residual is None:
        return x.new_empty(0), x
    total = (x + residual).contiguous()
    return total, total


def _quantised(y: Tensor, keep: bool, order: Tensor | None, layout) -> tuple[Tensor, ...]:
    return y.contiguous() if keep else y.new_empty(0), *torch.ops.micromix.quantize(
        y, order, *layout
    )


def _fake(x: Tensor, dtype, keep: bool, order: Tensor | None, *layout: int) -> tuple[Tensor, ...]:
    y = x.new_empty(x.shape if keep else 0, dtype=dtype)
    return y, *torch.ops.micromix.quantize(x, order, *layout)


def _fake_norm(x: Tensor, residual: Tensor | None, *rest) -> tuple[Tensor, ...]:
    return x.new_empty(0 if residual is None else x.shape), *_fake(x, *rest)


def _fake_rms_norm(x, residual, weight, eps, form, *rest):
    return _fake_norm(x, residual, *rest)


def _fake_layer_norm(x, residual, weight, bias, eps, *rest):
    return _fake_norm(x, residual, *rest)


def _fake_pointwise(x, other, function, *rest):
    return _fake(x, *rest)


_library = torch.library.Library(NAMESPACE, "IMPL")


def register() -> None:
    for name, function, fake in (
        ("rms_norm_quantize", _rms_norm_quantize, _fake_rms_norm),
        ("layer_norm_quantize", _layer_norm_quantize, _fake_layer_norm),
        ("pointwise_quantize", _pointwise_quantize, _fake_pointwise),
    ):
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
