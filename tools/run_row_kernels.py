"""Every CUDA quantise kernel on rows that fill it badly: for compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-name kns=rows_kernel python tools/run_row_kernels.py

``--tool racecheck`` wants a build with NVCC_APPEND_FLAGS=-DMICROMIX_RACECHECK (csrc/cuda/bulk_copies.cuh).
Nothing is compared here; tests/ops/test_quantize_cuda.py does that.
"""

from __future__ import annotations

import torch

from micromix_compile.mx import MixedLayout
from micromix_compile.ops.fused import Pointwise, RmsForm

EPS = 1e-6
micromix = torch.ops.micromix


def padded_order(k: int) -> tuple[torch.Tensor, MixedLayout]:
    """All channels and padding, shuffled, and a layout with as much of each format as there can be."""
    channels = -(-k // 128) * 128
    order = torch.cat([torch.arange(k), torch.full((channels - k,), -1)])
    eighth = channels // 128 * 32
    layout = MixedLayout(channels - 2 * eighth, eighth, eighth)
    return order[torch.randperm(channels)].int().cuda(), layout


def run(rows: int, k: int, dtype: torch.dtype) -> None:
    x, other = (torch.randn(rows, k, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(k, device="cuda").to(dtype)
    for order, layout in (padded_order(k), (None, MixedLayout(k // 32 * 32 - 64, 32, 32))):
        rest = (order, *layout.counts, layout.code)
        result = (dtype, False, *rest)
        micromix.quantize(x, *rest)
        for residual in (None, other):
            form = RmsForm.WEIGHT_AFTER_CAST
            micromix.rms_norm_quantize(x, residual, weight, EPS, form, *result)
            # Also where the variance is not the mean square less the square of the mean.
            for values in (x, x + 30):
                micromix.layer_norm_quantize(values, residual, weight, None, EPS, *result)
        micromix.pointwise_quantize(x, None, Pointwise.GELU, *result)
        micromix.pointwise_quantize(x, other, Pointwise.SILU, *result)


def main() -> None:
    torch.manual_seed(0)
    for rows, k in ((601, 4096), (601, 1536), (601, 4064), (601, 8192), (5, 576)):
        for dtype in (torch.bfloat16, torch.float16):
            run(rows, k, dtype)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
