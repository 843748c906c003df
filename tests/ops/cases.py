"""Layouts and inputs that the tests of the operators share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from micromix_compile.mx import WEIGHT_IS_MXFP4, MixedLayout, quantize

RULES = ("floor", "ceil", "even")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Every mix of empty and filled segments, of both MXFP6 formats.
MIXES = [
    MixedLayout(k4, k6, k8, format6=format6)
    for k4, k6, k8 in itertools.product((0, 64), (0, 96), (0, 32))
    for format6 in ("e2m3", "e3m2")
    if k4 + k6 + k8 and (k6 or format6 == "e2m3")
]


def mix_name(layout: MixedLayout) -> str:
    return f"{layout.k4}-{layout.k6}-{layout.k8}-{layout.format6}"


def arguments(layout: MixedLayout, weights: str = "match") -> tuple[int, int, int, int]:
    """The operators' (k4, k6, k8, format)."""
    code = layout.code | (WEIGHT_IS_MXFP4 if weights == "mxfp4" else 0)
    return *layout.counts, code


def weight_layout(layout: MixedLayout, weights: str) -> MixedLayout:
    return layout.as_mxfp4() if weights == "mxfp4" else layout


def rows(count: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random rows as activations are: a spread of magnitudes, outlier channels, some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator)
    x *= torch.exp2(torch.randint(-6, 4, (channels,), generator=generator).float())
    x[torch.rand(count, channels, generator=generator) < 0.02] = 0.0
    return x.to(dtype)


# Views [..., K] of dense tensors, which `new(*sizes)` makes. A dimension of size 1 may have any stride.
VIEWS: dict[str, Callable[[Callable[..., torch.Tensor]], torch.Tensor]] = {
    "vector": lambda new: new(64),
    "part of a vector": lambda new: new(192)[64:128],
    "every second of a vector": lambda new: new(128)[::2],
    "every second row": lambda new: new(6, 64)[1::2],
    "rows that begin anywhere": lambda new: new(6, 128)[:, 3:50],
    "every second channel": lambda new: new(6, 128)[:, ::2],
    "transposed": lambda new: new(64, 6).mT,
    "one row, many times": lambda new: new(64).expand(6, 64),
    "one channel, many times": lambda new: new(6, 1).expand(6, 64),
    "one channel of three": lambda new: new(6, 3)[:, 1:2],
    "last position": lambda new: new(4, 6, 64)[:, -1:],
    "some positions": lambda new: new(4, 6, 64)[:, 1:4],
    "every second position": lambda new: new(4, 6, 64)[:, ::2],
    "every second batch": lambda new: new(4, 6, 64)[::2],
    "positions first": lambda new: new(4, 6, 64).transpose(0, 1),
    "half of each row of a batch": lambda new: new(4, 6, 128)[..., :64],
    "one batch, many times": lambda new: new(1, 6, 64).expand(4, 6, 64),
    "channels first": lambda new: new(4, 64, 6).mT,
    "last position, a 1 before": lambda new: new(4, 1, 6, 64)[:, :, -1:],
    "last position, a 1 after": lambda new: new(4, 6, 1, 64)[:, -1:],
    "half of the last position": lambda new: new(4, 1, 6, 128)[:, :, -1:, 64:],
    "last position, two 1s before": lambda new: new(4, 1, 1, 6, 64)[:, :, :, -1:],
    "one position, many times, a 1 before": lambda new: new(4, 1, 1, 64).expand(4, 1, 6, 64),
    "one row of a batch, many times": lambda new: new(64).expand(4, 1, 6, 64),
    "last positions, every second batch": lambda new: new(4, 1, 6, 64)[::2, :, -1:],
    "batch moved past a 1": lambda new: new(4, 3, 1, 64).permute(1, 2, 0, 3),
    "1 moved to the end": lambda new: new(4, 1, 3, 64).permute(0, 2, 1, 3),
    "1 moved to the front": lambda new: new(4, 1, 3, 64).permute(1, 2, 0, 3),
    "one of the heads": lambda new: new(2, 5, 3, 64)[:, :, 1:2],
    "heads first": lambda new: new(2, 5, 3, 64).transpose(1, 2),
    "a head first": lambda new: new(2, 5, 3, 64)[:, :, 1:2].transpose(1, 2),
    "1s between": lambda new: new(2, 1, 3, 1, 64),
    "1s between halves": lambda new: new(2, 1, 3, 1, 128)[..., 64:],
    "1s from slices": lambda new: new(2, 3, 4, 5, 64)[:, 1:2, 2:3, -1:],
    "1 from a slice, then two": lambda new: new(2, 3, 4, 2, 64)[:, :, -1:],
    "1s in another order": lambda new: new(3, 1, 4, 1, 64).permute(2, 3, 1, 0, 4),
    "1s, many times": lambda new: new(1, 2, 1, 3, 64).expand(4, 2, 1, 3, 64),
    "1s with strides of their own": lambda new: new(512).as_strided(
        (3, 1, 2, 1, 64), (128, 7, 64, 0, 1)
    ),
    "1s with wrong strides": lambda new: new(512).as_strided(
        (3, 1, 2, 1, 64), (100, 64, 64, 100, 1)
    ),
    "no rows": lambda new: new(4, 0, 1, 64)[:, :, -1:],
}


def new_rows(dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Callable[..., torch.Tensor]:
    """The maker of dense tensors that the VIEWS take."""

    def new(*sizes: int) -> torch.Tensor:
        return rows(math.prod(sizes[:-1]), sizes[-1], dtype, seed).view(sizes).to(device)

    return new


def without_and_with_order(k: int, device: str = "cpu") -> tuple[tuple, tuple]:
    """Two quantises of k channels as the operators take them: to MXFP4, and, the last first, to MXFP8."""
    blocks = -(-k // 32) * 32
    layout = MixedLayout(blocks, 32, blocks)
    order = torch.full((layout.channels,), -1, dtype=torch.int32)
    order[layout.channels - k :] = torch.arange(k).flip(0)
    return (None, *arguments(layout)), (order.to(device), *arguments(layout))


def packed(x: torch.Tensor, layout: MixedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(x, layout)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius, in float64."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
