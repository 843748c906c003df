"""Shapes and dtypes of the operators' results, for tracing, dynamic sizes welcome; and what they do in torch.vmap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from micromix_compile.mx import WEIGHT_ONLY, MixedLayout
from micromix_compile.mx.scales import BLOCK

from ._extension import blackwell_kernel, decodes_operands, loaded
from ._schemas import EMULATED, NAMESPACE

# The placed layout of the CPU kernels: csrc/cpu/placed.h.
_LINE = 64
_TILE_ROWS = 16

# That of the kernels that decode their operands: csrc/cuda/decoded_weight.h.
_DECODED_ROWS = 16
_STEP_BLOCKS = 4

# That of the Blackwell kernel: csrc/cutlass/placed.h.
_PANEL_ROWS = 8
_SCALE_WORD = 4

# The operators on rows with any leading dimensions, and how many of their first arguments have these.
_ON_ROWS = {
    "quantize": 1,
    "linear": 2,
    "linears.two": 2,
    "linears.three": 2,
    "weight_only_linear": 1,
    "weight_only_linears.two": 1,
    "weight_only_linears.three": 1,
    "materialize": 1,
}


def register() -> None:
    for name, function in (
        ("quantize", _quantize),
        ("linear", _linear),
        ("linears.two", _linears),
        ("linears.three", _linears),
        ("weight_only_linear", _linear),
        ("weight_only_linears.two", _linears),
        ("weight_only_linears.three", _linears),
        ("attention", _attention),
        ("materialize", torch.empty_like),
        ("place_weight", _place_weight),
        ("unplace_weight", _unplace_weight),
    ):
        torch.library.register_fake(f"{NAMESPACE}::{name}", function)
    for name, count in _ON_ROWS.items():
        torch.library.register_vmap(f"{NAMESPACE}::{name}", _batched(name, count))


def placed_bytes(
    n: int, k4: int, k6: int, k8: int, format: int, device: torch.device | str = "cpu"
) -> int:
    """The bytes of the buffer that ``place_weight`` of a device makes for a weight with ``n`` rows."""
    emulated, format = format & EMULATED, format & ~EMULATED
    layout = MixedLayout.weight_from_code(k4, k6, k8, format)
    if blackwell_kernel(device, emulated) and not format & WEIGHT_ONLY:
        return _blackwell_bytes(n, (k4, k6, k8), layout)
    if decodes_operands(device, format):
        return _decoded_bytes(n, layout)
    if torch.device(device).type != "cpu" or not loaded():
        return n * (layout.row_bytes + layout.blocks)
    panels = (n + _TILE_ROWS - 1) // _TILE_ROWS
    scale_bytes = (layout.blocks * _TILE_ROWS + _LINE - 1) // _LINE * _LINE
    return _LINE + panels * (scale_bytes + _TILE_ROWS * layout.row_bytes)


def _decoded_bytes(n: int, weight: MixedLayout) -> int:
    chunks = sum(
        -(-(segment.stop - segment.start) // (BLOCK * _STEP_BLOCKS)) * (4 * segment.fmt.bits + 1)
        for segment in weight.segments()
    )
    panels = -(-n // _DECODED_ROWS)
    return panels * _DECODED_ROWS * (_STEP_BLOCKS * chunks + 1)


def _blackwell_bytes(n: int, counts: tuple[int, int, int], weight: MixedLayout) -> int:
    words = sum(-(-k // (BLOCK * _SCALE_WORD)) for k in counts)
    return -(-n // _PANEL_ROWS) * _PANEL_ROWS * (weight.row_bytes + words * _SCALE_WORD)


def _quantize(x: Tensor, order: Tensor | None, *layout: int) -> tuple[Tensor, Tensor]:
    row = MixedLayout.from_code(*layout)
    sizes = (row.row_bytes, row.blocks)
    data, scales = (x.new_empty((*x.shape[:-1], size), dtype=torch.uint8) for size in sizes)
    return data, scales


def _linear(
    x: Tensor,
    scales_or_order: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    *layout_and_dtype: int | torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n), dtype=layout_and_dtype[-1])


def _linears(
    x: Tensor,
    scales_or_order: Tensor | None,
    *layers_and_rest: Tensor | int | torch.dtype | None,
) -> tuple[Tensor, ...]:
    n, dtype = layers_and_rest[2:-5:3], layers_and_rest[-1]
    return tuple(x.new_empty((*x.shape[:-1], size), dtype=dtype) for size in n)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3])


def _place_weight(data: Tensor, scales: Tensor, *layout: int) -> Tensor:
    return data.new_empty(placed_bytes(data.shape[0], *layout, data.device))


def _unplace_weight(weight: Tensor, n: int, *layout: int) -> tuple[Tensor, Tensor]:
    row = MixedLayout.weight_from_code(*layout)
    return weight.new_empty((n, row.row_bytes)), weight.new_empty((n, row.blocks))


def _batched(name: str, count: int) -> Callable:
    """An operator in torch.vmap: its dimension is one more before the rows. (Without a rule torch calls row by row.)"""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.micromix, packet), overload or "default")

    def rule(info, dimensions, *arguments):
        given = list(zip(arguments, dimensions))
        if any(d is not None for _, d in given[count:]):  # a weight for each: one after the other
            calls = (
                [x if d is None else x.select(d, i) for x, d in given]
                for i in range(info.batch_size)
            )
            result = _stacked([operator(*call) for call in calls])
        else:
            rows = (
                x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
                for x, d in given[:count]
            )
            result = operator(*rows, *arguments[count:])
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    return rule


def _stacked(results: list) -> Tensor | tuple[Tensor, ...]:
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results)))
    return torch.stack(results)
