"""RMSNorm, or a sum and its RMSNorm, and the quantise that reads it -> `micromix::rms_norm_quantize`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from micromix_compile.ops.fused import RmsForm
from micromix_compile.passes.patterns import EPS, Call, Pattern, channels, vector


def _normalised(x, eps):
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _llama(x, weight, eps):
    return weight * _normalised(x, eps).to(x.dtype)


def _t5(x, weight, eps):
    return (weight * _normalised(x, eps)).to(x.dtype)


def _torch(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _gemma(x, weight, eps):
    return (_normalised(x, eps) * (1.0 + weight.to(torch.float32))).to(x.dtype)


def _replacement(form: RmsForm, inputs, dtype) -> Call:
    arguments = (inputs["x"], None, inputs["weight"], inputs["eps"], int(form), dtype)
    return Call(torch.ops.micromix.rms_norm_quantize.default, arguments, takes_residual=True)


def _examples(weight_dtype, dtype):
    return {"x": channels(dtype), "weight": vector(weight_dtype or dtype), "eps": EPS}


PATTERNS = [
    Pattern(
        "rms_norm",
        pattern,
        functools.partial(_replacement, form),
        functools.partial(_examples, weight_dtype),
    )
    for pattern, form in (
        (_gemma, RmsForm.ONE_PLUS_WEIGHT),  # before the others, which would take 1 + w for a weight
        (_llama, RmsForm.WEIGHT_AFTER_CAST),
        (_torch, RmsForm.WEIGHT_BEFORE_CAST),
        (_t5, RmsForm.WEIGHT_BEFORE_CAST),
    )
    for weight_dtype in (None, torch.float32)
]
