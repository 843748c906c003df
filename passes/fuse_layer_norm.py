"""LayerNorm, or a sum and its LayerNorm, and the quantise that reads it -> `micromix::layer_norm_quantize`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from micromix_compile.passes.patterns import EPS, Call, Pattern, channels, vector


def _layer_norm(x, eps, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _replacement(inputs, dtype) -> Call:
    arguments = (
        inputs["x"],
        None,
        inputs.get("weight"),
        inputs.get("bias"),
        inputs["eps"],
        dtype,
    )
    return Call(torch.ops.micromix.layer_norm_quantize.default, arguments, takes_residual=True)


def _examples(vectors, weight_dtype, dtype):
    inputs = {"x": channels(dtype), "eps": EPS}
    return inputs | {name: vector(weight_dtype or dtype) for name in vectors}


PATTERNS = [
    Pattern(
        "layer_norm",
        _layer_norm,
        _replacement,
        functools.partial(_examples, vectors, weight_dtype),
    )
    for vectors in (("weight", "bias"), ("weight",), ())
    for weight_dtype in (None, torch.float32)
]
