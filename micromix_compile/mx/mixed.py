"""Quantisation, dequantisation and the matrix product of mixed rows: the reference for kernels.

The packed form is the device-neutral one: ``data`` uint8 ``[..., layout.row_bytes]``, the segments
side by side; ``scales`` uint8 ``[..., layout.blocks]``, one byte per 32 channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bits import pack_codes, unpack_codes
from .elements import decode, encode
from .hadamard import hadamard
from .layout import MixedLayout
from .scales import BLOCK, NAN_SCALE, inverse_scale_values, scale_bytes, scale_values

_CHUNK_ELEMENTS = 1 << 18  # temporaries of a chunk of rows stay in the cache: 1 MiB of float32 each
_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize(x: Tensor, layout: MixedLayout, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Reorders the channels of ``x``, pads them with zeros, rotates blocks, and casts them to ``layout``.

    ``x`` is bf16, f16 or f32 ``[..., K]``, any strides. ``order`` int32 ``[layout.channels]`` gives
    for each position the channel of ``x``, or -1 for a padding channel; None means the channels as
    they are, then padding. Returns ``data`` uint8 ``[..., layout.row_bytes]`` and ``scales`` uint8
    ``[..., layout.blocks]``.

    A block is divided by its scale as :func:`~micromix_compile.mx.scales.inverse_scale_values` says.
    A block with a NaN or an Inf, padding included, gets scale 0xFF and elements 0: it decodes to NaN.

    Raises TypeError for another dtype, ValueError for a shape or an order that does not fit.
    """
    order = _checked_order(x, layout, order)
    *shape, channels = x.shape
    rows = x.reshape(math.prod(shape), channels)
    data = torch.empty(len(rows), layout.row_bytes, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(rows), layout.blocks, dtype=torch.uint8, device=x.device)
    for chunk in _chunks(len(rows), layout.channels):
        values = _ordered(rows[chunk], layout, order)
        _quantize_rows(values, layout, data[chunk], scales[chunk])
    return data.view(*shape, layout.row_bytes), scales.view(*shape, layout.blocks)


def rearrange(x: Tensor, layout: MixedLayout, order: Tensor | None = None) -> Tensor:
    """The values float32 ``[..., layout.channels]`` that :func:`quantize` casts: reordered, padded, rotated.

    Arguments and errors are those of :func:`quantize`.
    """
    order = _checked_order(x, layout, order)
    *shape, channels = x.shape
    values = _ordered(x.reshape(math.prod(shape), channels), layout, order)
    return values.view(*shape, layout.channels)


def dequantize(
    data: Tensor, scales: Tensor, layout: MixedLayout, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values ``[..., layout.channels]`` of packed rows, in the order and the rotation of the layout.

    Exact in float64. float32 is exact too, but for Inf where a block's scale is so large that the
    value passes the float32 range; bf16 and f16 are one rounding of float32.
    Raises TypeError or ValueError if ``data`` and ``scales`` do not fit the layout.
    """
    _check_packed(data, scales, layout)
    *shape, _ = data.shape
    rows = math.prod(shape)
    data, scales = data.reshape(rows, layout.row_bytes), scales.reshape(rows, layout.blocks)
    result = torch.empty(rows, layout.channels, dtype=dtype, device=data.device)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for chunk in _chunks(rows, layout.channels):
        factors = scale_values(scales[chunk]).to(exact)
        for segment in layout.segments():
            packed = data[chunk, segment.byte_start : segment.byte_stop]
            codes = unpack_codes(packed, segment.fmt.bits).unflatten(1, (-1, BLOCK))
            factor = factors[:, segment.start // BLOCK : segment.stop // BLOCK].unsqueeze(-1)
            values = decode(codes, segment.fmt).to(exact).mul_(factor)
            result[chunk, segment.start : segment.stop] = values.flatten(1)
    return result.view(*shape, layout.channels)


def linear(
    data: Tensor,
    scales: Tensor,
    weight_data: Tensor,
    weight_scales: Tensor,
    layout: MixedLayout,
    weight_layout: MixedLayout,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product ``[..., N]`` in ``dtype`` of packed rows ``[..., K]`` and a packed weight ``[N, K]``.

    ``bias`` is ``[N]``, any float dtype. The operands are exact and the sums, bias included, are
    float64; the result is rounded to float32, then to ``dtype``. This is the value that a kernel, which
    sums in float32, is compared with. A NaN block makes every result that reads it NaN.
    Raises TypeError or ValueError if tensors and layouts do not fit.
    """
    _check_weight(weight_data, weight_scales, layout, weight_layout, bias)
    x = dequantize(data, scales, layout, torch.float64)
    return _product(x, weight_data, weight_scales, weight_layout, bias, dtype)


def weight_only_linear(
    x: Tensor,
    weight_data: Tensor,
    weight_scales: Tensor,
    layout: MixedLayout,
    weight_layout: MixedLayout,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product ``[..., N]`` of float rows ``x`` ``[..., K]``, bf16, f16 or f32, and a packed weight ``[N, Kp]``.

    ``x`` is rearranged (:func:`rearrange`) and rounded to bfloat16; a block with a NaN or an Inf is NaN, as
    :func:`quantize` makes it. All else is as in :func:`linear`.
    """
    _check_weight(weight_data, weight_scales, layout, weight_layout, bias)
    values = rearrange(x, layout, order).to(torch.bfloat16).double()
    finite = values.unflatten(-1, (-1, BLOCK)).isfinite().all(dim=-1)
    values[~finite.repeat_interleave(BLOCK, dim=-1)] = torch.nan
    return _product(values, weight_data, weight_scales, weight_layout, bias, dtype)


def _product(
    x: Tensor,
    weight_data: Tensor,
    weight_scales: Tensor,
    weight_layout: MixedLayout,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``x`` float64 ``[..., Kp]`` times a packed weight."""
    outputs = len(weight_data)
    result = torch.empty(*x.shape[:-1], outputs, dtype=dtype, device=x.device)
    # A chunk of the weight at a time: a vocabulary-sized weight in float64 would be gigabytes.
    for chunk in _chunks(outputs, weight_layout.channels, elements=1 << 22):
        w = dequantize(weight_data[chunk], weight_scales[chunk], weight_layout, torch.float64)
        y = x @ w.T
        if bias is not None:
            y += bias[chunk].double()
        result[..., chunk] = y.float()
    return result


def _ordered(rows: Tensor, layout: MixedLayout, order: Tensor | None) -> Tensor:
    """``rows`` ``[M, K]`` as float32 ``[M, layout.channels]``; ``order`` as `_checked_order` gives it."""
    if order is None:
        values = pad(rows, (0, layout.channels - rows.shape[1])).float()
    else:
        values = pad(rows, (0, 1)).index_select(1, order).float()
    if not layout.rotates_any:
        return values
    parts = [
        hadamard(part) if segment.hadamard else part
        for segment in layout.segments()
        for part in (values[:, segment.start : segment.stop],)
    ]
    return torch.cat(parts, dim=1)


def _quantize_rows(values: Tensor, layout: MixedLayout, data: Tensor, scales: Tensor) -> None:
    """Casts float32 ``values`` ``[rows, layout.channels]`` into ``data`` and ``scales``."""
    for segment in layout.segments():
        blocks = values[:, segment.start : segment.stop].unflatten(1, (-1, BLOCK))
        scale = scale_bytes(blocks.abs().amax(-1), segment.fmt, segment.rule)
        codes = encode(blocks * inverse_scale_values(scale).unsqueeze(-1), segment.fmt)
        codes.masked_fill_((scale == NAN_SCALE).unsqueeze(-1), 0)
        packed = pack_codes(codes.flatten(1), segment.fmt.bits)
        data[:, segment.byte_start : segment.byte_stop] = packed
        scales[:, segment.start // BLOCK : segment.stop // BLOCK] = scale


def _chunks(rows: int, channels: int, elements: int = _CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of rows, each of about ``elements`` elements, at least one row."""
    step = max(1, elements // max(1, channels))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _checked_order(x: Tensor, layout: MixedLayout, order: Tensor | None) -> Tensor | None:
    """``order`` with padding reading the zero that is put after the channels; checks all arguments."""
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"quantize needs bfloat16, float16 or float32, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("quantize needs at least one dimension, the channels")
    channels = x.shape[-1]
    if order is None:
        if layout.channels < channels:
            raise ValueError(f"the layout has {layout.channels} channels, x has {channels}")
        return None
    _check_order(order, layout.channels, channels)
    return torch.where(order < 0, channels, order)


def _check_weight(
    data: Tensor,
    scales: Tensor,
    layout: MixedLayout,
    weight_layout: MixedLayout,
    bias: Tensor | None,
) -> None:
    if layout.channels != weight_layout.channels:
        raise ValueError(
            f"the rows have {layout.channels} channels, the weight has {weight_layout.channels}"
        )
    if data.dim() != 2:
        raise ValueError(f"the weight must be [N, row bytes], got {tuple(data.shape)}")
    _check_packed(data, scales, weight_layout)
    if bias is not None and bias.shape != data.shape[:1]:
        raise ValueError(f"bias must be [{len(data)}], got {tuple(bias.shape)}")


def _check_order(order: Tensor, positions: int, channels: int) -> None:
    if order.dtype != torch.int32:
        raise TypeError(f"order must be int32, got {order.dtype}")
    if order.shape != (positions,):
        raise ValueError(f"order must be [{positions}], got {tuple(order.shape)}")
    if positions and not -1 <= int(order.min()) <= int(order.max()) < channels:
        raise ValueError(f"order must hold channels below {channels}, or -1 for padding")


def _check_packed(data: Tensor, scales: Tensor, layout: MixedLayout) -> None:
    if data.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise TypeError(f"data and scales must be uint8, got {data.dtype} and {scales.dtype}")
    if data.dim() == 0 or data.shape[-1] != layout.row_bytes:
        raise ValueError(f"data must be [..., {layout.row_bytes}], got {tuple(data.shape)}")
    if scales.shape != (*data.shape[:-1], layout.blocks):
        expected = (*data.shape[:-1], layout.blocks)
        raise ValueError(f"scales must be {expected}, got {tuple(scales.shape)}")
