"""The products of micromix on this GPU beside torch's bf16 product.

    python benchmarks/linear_cuda.py
    python benchmarks/linear_cuda.py --rows 1 16 --shapes 4096x14336

Quantise and product together, on the GPU's own kernel (`micromix env` names it). Each contender is one
CUDA graph of many calls, on weights that rotate through more memory than the second-level cache
holds; the results are compared with the float product before; contenders take turns, a figure is the median of the rounds, a ratio that of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from checks import check_product
from linear_cpu import mix
from quantize_cuda import copy_bandwidth, graph_of, in_turns

from micromix_compile import ops


def measure(k: int, n: int, m: int, name: str, rounds: int) -> tuple[float, float, float]:
    """Microseconds of micromix, of torch's bf16, and the second over the first."""
    layout = mix(name, k)
    counts = (*layout.counts, layout.code)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(4, -(-3 * cache // (n * k // 2)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    quantize, linear = torch.ops.micromix.quantize, torch.ops.micromix.linear
    placed = [
        torch.ops.micromix.place_weight(*quantize(weight, None, *counts), *counts)
        for weight in weights
    ]

    def micromix(weight: torch.Tensor) -> list[torch.Tensor]:
        rows = quantize(x, None, *counts)
        return [linear(*rows, weight, None, n, *counts, torch.bfloat16)]

    def bf16(weight: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.linear(x, weight)]

    for weight, own in zip(weights, placed, strict=True):
        expected = torch.nn.functional.linear(x.double(), weight.double())
        check_product(f"micromix {name}", *micromix(own), expected)
        check_product("bf16", *bf16(weight), expected)
    graphs = {
        "micromix": graph_of(micromix, [(weight,) for weight in placed]),
        "bf16": graph_of(bf16, [(weight,) for weight in weights]),
    }
    times = in_turns(graphs, copies, rounds)
    ratios = [b / a for a, b in zip(times["micromix"], times["bf16"], strict=True)]
    ours, theirs = (statistics.median(times[contender]) for contender in graphs)
    return ours, theirs, statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336", "14336x4096"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 2048])
    parser.add_argument("--mixes", nargs="+", default=["4.5", "mxfp4", "mxfp8"])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ops.kernel_name('cuda')}: "
        f"copy {copy_bandwidth():.0f} GB/s"
    )
    for shape in arguments.shapes:
        k, n = map(int, shape.split("x"))
        for m in arguments.rows:
            for name in arguments.mixes:
                ours, theirs, ratio = measure(k, n, m, name, arguments.rounds)
                speed = 2 * m * k * n / ours / 1e6
                print(
                    f"{shape}  M={m}  {name}: {ours:.1f} us, {speed:.1f} TFLOP/s; "
                    f"bf16 {theirs:.1f} us, {ratio:.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
