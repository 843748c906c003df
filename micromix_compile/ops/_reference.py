"""The operators in pure torch, for devices that have no kernel."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from micromix_compile import mx
from micromix_compile.errors import ReferenceKernelWarning

from ._extension import why_reference
from ._schemas import NAMESPACE, SCHEMAS

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_warned: set[str] = set()


def register() -> None:
    """The fallback of every device: a kernel of a device's own comes before it."""
    for name, function in (
        ("quantize", quantize),
        ("linear", linear),
        ("linears.two", linears),
        ("linears.three", linears),
        ("weight_only_linear", weight_only_linear),
        ("weight_only_linears.two", weight_only_linears),
        ("weight_only_linears.three", weight_only_linears),
        ("attention", attention),
        ("materialize", torch.clone),
        ("place_weight", place_weight),
        ("unplace_weight", unplace_weight),
    ):
        _library.impl(name, function, "CompositeExplicitAutograd")
    # The reference by names of its own: a device's kernels call it for what they do not do.
    for name, function in (
        ("quantize", quantize),
        ("linear", linear),
        ("weight_only_linear", weight_only_linear),
        ("place_weight", place_weight),
    ):
        _library.define(f"{name}_reference{SCHEMAS[name]}")
        _library.impl(f"{name}_reference", function, "CompositeExplicitAutograd")


def quantize(x: Tensor, order: Tensor | None, *layout: int) -> tuple[Tensor, Tensor]:
    _warn(x.device)
    return mx.quantize(x, mx.MixedLayout.from_code(*layout), order)


def place_weight(data: Tensor, scales: Tensor, *layout: int) -> Tensor:
    row = mx.MixedLayout.weight_from_code(*layout)
    if data.dim() != 2 or data.shape[1] != row.row_bytes:
        raise ValueError(f"data must be [N, {row.row_bytes}], got {tuple(data.shape)}")
    if scales.shape != (len(data), row.blocks):
        expected = (len(data), row.blocks)
        raise ValueError(f"scales must be {expected}, got {tuple(scales.shape)}")
    return torch.cat((data.flatten(), scales.flatten()))


def unplace_weight(weight: Tensor, n: int, *layout: int) -> tuple[Tensor, Tensor]:
    data, scales = _rows(weight, n, mx.MixedLayout.weight_from_code(*layout))
    return data.clone(), scales.clone()


def _rows(weight: Tensor, n: int, layout: mx.MixedLayout) -> tuple[Tensor, Tensor]:
    """The data and scales, views, of a placed weight."""
    sizes = (n * layout.row_bytes, n * layout.blocks)
    if weight.shape != (sum(sizes),):
        raise ValueError(
            f"weight must be the flat buffer of {sum(sizes)} bytes that micromix::place_weight makes "
            f"on {weight.device} for these arguments, got {tuple(weight.shape)}"
        )
    data, scales = weight.split(sizes)
    return data.view(n, layout.row_bytes), scales.view(n, layout.blocks)


def linear(
    data: Tensor,
    scales: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    *layout_and_dtype: int | torch.dtype,
) -> Tensor:
    _warn(data.device)
    *arguments, dtype = layout_and_dtype
    layout = mx.MixedLayout.from_code(*arguments)
    weight_layout = mx.MixedLayout.weight_from_code(*arguments)
    rows = _rows(weight, n, weight_layout)
    return mx.linear(data, scales, *rows, layout, weight_layout, bias, dtype)


def linears(
    data: Tensor, scales: Tensor, *layers_and_rest: Tensor | int | torch.dtype | None
) -> tuple[Tensor, ...]:
    """One product after the other, each with the device's own ``linear``."""
    return _one_by_one(torch.ops.micromix.linear, data, scales, *layers_and_rest)


def weight_only_linear(
    x: Tensor,
    order: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    *layout_and_dtype: int | torch.dtype,
) -> Tensor:
    _warn(x.device)
    *arguments, dtype = layout_and_dtype
    layout = mx.MixedLayout.from_code(*arguments)
    weight_layout = mx.MixedLayout.weight_from_code(*arguments)
    rows = _rows(weight, n, weight_layout)
    return mx.weight_only_linear(x, *rows, layout, weight_layout, order, bias, dtype)


def weight_only_linears(
    x: Tensor, order: Tensor | None, *layers_and_rest: Tensor | int | torch.dtype | None
) -> tuple[Tensor, ...]:
    """One product after the other, each with the device's own ``weight_only_linear``."""
    return _one_by_one(torch.ops.micromix.weight_only_linear, x, order, *layers_and_rest)


def _one_by_one(product, x, scales_or_order, *layers_and_rest) -> tuple[Tensor, ...]:
    layers, rest = layers_and_rest[:-5], layers_and_rest[-5:]
    each = (layers[i : i + 3] for i in range(0, len(layers), 3))
    return tuple(product(x, scales_or_order, *layer, *rest) for layer in each)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """torch's own; nothing lowers to it but where there is a kernel."""
    result = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return result.transpose(1, 2).contiguous()


def _warn(device: torch.device) -> None:
    """Says once per kind of device that the slow reference runs, and what to do."""
    if device.type in _warned:
        return
    _warned.add(device.type)
    warning = ReferenceKernelWarning(device=device.type, reason=why_reference(device))
    warnings.warn(warning, stacklevel=2)
