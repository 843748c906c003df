"""An activation, its product with another value, a cast or a sum, quantised -> `micromix::pointwise_quantize`."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from micromix_compile.ops.fused import Pointwise
from micromix_compile.passes.patterns import Call, Pattern, channels


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def _gelu_written_out(x):
    return (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    )


def _quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _replacement(function: Pointwise, inputs, dtype) -> Call:
    arguments = (inputs["x"], inputs.get("other"), int(function), dtype)
    return Call(torch.ops.micromix.pointwise_quantize.default, arguments)


def _one(dtype):
    return {"x": channels(dtype)}


def _two(dtype):
    return {"x": channels(dtype), "other": channels(dtype)}


def _from_float32(dtype):
    return {"x": channels(torch.float32)}


_ACTIVATIONS = (
    ("silu", F.silu, Pointwise.SILU),
    ("gelu", F.gelu, Pointwise.GELU),
    ("gelu_tanh", _gelu_tanh, Pointwise.GELU_TANH),
    ("gelu_tanh", _gelu_written_out, Pointwise.GELU_TANH),
    ("quick_gelu", _quick_gelu, Pointwise.QUICK_GELU),
    ("relu", F.relu, Pointwise.RELU),
)


def _product(activation, x, other):
    return activation(x) * other


def _activation(activation, x):
    return activation(x)


def _pattern(name, pattern, function, examples) -> Pattern:
    return Pattern(name, pattern, functools.partial(_replacement, function), examples)


PATTERNS = [
    *(
        _pattern(f"{name}_mul", functools.partial(_product, function), kind, _two)
        for name, function, kind in _ACTIVATIONS
    ),
    *(
        _pattern(name, functools.partial(_activation, function), kind, _one)
        for name, function, kind in _ACTIVATIONS
    ),
    _pattern("add", lambda x, other: x + other, Pointwise.ADD, _two),
    *(
        _pattern("cast", lambda x, to=dtype: x.to(to), Pointwise.CAST, _from_float32)
        for dtype in (torch.bfloat16, torch.float16)
    ),
]
