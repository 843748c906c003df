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
    """One layer, and three that share a launch."""
    counts = (*layout.counts, layout.code)

    def quantized(n: int) -> tuple[torch.Tensor, ...]:
        values = torch.randn(n, layout.channels, device="cuda", dtype=torch.bfloat16)
        return micromix.quantize(values, None, *counts)

    layers = []
    for n in (columns, columns // 2, 40):
        layers += micromix.place_weight(*quantized(n), *counts), torch.randn(n, device="cuda"), n
    packed = quantized(rows)
    micromix.linear(*packed, *layers[:3], *counts, torch.bfloat16)
    micromix.linears.three(*packed, *layers, *counts, torch.bfloat16)


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
