"""Every product of decoded operands, on shapes that fill its kernels badly: for compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-name kns=rows_kernel python tools/run_products.py

``--tool racecheck`` wants a build with NVCC_APPEND_FLAGS=-DMICROMIX_RACECHECK (csrc/cuda/bulk_copies.cuh).
Nothing is compared here; tests/cuda/test_decoded.py does that.
"""

from __future__ import annotations

import torch

from micromix_compile import ops
from micromix_compile.mx import MixedLayout

micromix = torch.ops.micromix


def run(rows: int, columns: int, layout: MixedLayout) -> None:
    counts = (layout.k4, layout.k6, layout.k8, layout.code)
    x, weight = (
        torch.randn(n, layout.channels, device="cuda", dtype=torch.bfloat16)
        for n in (rows, columns)
    )
    placed = micromix.place_weight(*micromix.quantize(weight, None, *counts), *counts)
    bias = torch.randn(columns, device="cuda")
    packed = micromix.quantize(x, None, *counts)
    micromix.linear(*packed, placed, bias, columns, *counts, torch.bfloat16)


def main() -> None:
    torch.manual_seed(0)
    kernel = ops.kernel_name("cuda")
    assert kernel == "cuda_decoded", kernel
    # Each tile, with K in parts and not, tokens shared and not, and more tiles than run at once.
    for rows in (1, 9, 20, 40, 100, 300, 520):
        run(rows, 300, MixedLayout(672, 160, 96))
    for rows in (20, 40, 100, 512):
        run(rows, 17000, MixedLayout(288, 32, 64))
        run(rows, 100, MixedLayout(2048, 544, 32))
    torch.cuda.synchronize()
    print("every product ran")


if __name__ == "__main__":
    main()
