"""Layouts and inputs that the tests of the operators share."""

from __future__ import annotations

import itertools

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
    return layout.k4, layout.k6, layout.k8, code


def weight_layout(layout: MixedLayout, weights: str) -> MixedLayout:
    return layout.as_mxfp4() if weights == "mxfp4" else layout


def rows(count: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random rows as activations are: a spread of magnitudes, outlier channels, some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator)
    x *= torch.exp2(torch.randint(-6, 4, (channels,), generator=generator).float())
    x[torch.rand(count, channels, generator=generator) < 0.02] = 0.0
    return x.to(dtype)


def packed(x: torch.Tensor, layout: MixedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(x, layout)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius, in float64."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
