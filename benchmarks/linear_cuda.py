"""The products of micromix on this GPU beside torch's bf16 product.

    python benchmarks/linear_cuda.py
    python benchmarks/linear_cuda.py --rows 1 16 --shapes 4096x14336
    python benchmarks/linear_cuda.py --contenders micromix weight-only int4 --mixes mxfp4

    micromix     quantise and product, on the GPU's own kernel (`micromix env` names it)
    weight-only  the product of a plan with activations="bfloat16"
    int4         torch's product with a weight of int4 in groups of 128 (4.25 bits, as MXFP4 has), which
                 torchao's weight-only int4 runs (tinygemm)

Each contender is one CUDA graph of many calls, on weights that rotate through more memory than the
second-level cache holds; the results are compared with the float product before; contenders take
turns, a figure is the median of the rounds, a ratio that of the rounds' ratios to bf16.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from checks import check_product
from linear_cpu import mix
from quantize_cuda import copy_bandwidth, graph_of, in_turns
from torch import Tensor

from micromix_compile import ops
from micromix_compile.mx import WEIGHT_ONLY

GROUP = 128  # of int4


def quantised(name: str, x: Tensor, n: int) -> tuple[Callable, Callable]:
    """How a weight [n, k] is packed, and the product with what came out."""
    layout = mix(name, x.shape[1])
    counts = (*layout.counts, layout.code)
    quantize = torch.ops.micromix.quantize

    def pack(weight: Tensor) -> tuple[Tensor]:
        return (torch.ops.micromix.place_weight(*quantize(weight, None, *counts), *counts),)

    def product(weight: Tensor) -> Tensor:
        rows = quantize(x, None, *counts)
        return torch.ops.micromix.linear(*rows, weight, None, n, *counts, torch.bfloat16)

    return pack, product


def weight_only(name: str, x: Tensor, n: int) -> tuple[Callable, Callable]:
    layout = mix(name, x.shape[1])
    counts = (*layout.counts, layout.code | WEIGHT_ONLY)

    def pack(weight: Tensor) -> tuple[Tensor]:
        rows = torch.ops.micromix.quantize(weight, None, *counts)
        return (torch.ops.micromix.place_weight(*rows, *counts),)

    def product(weight: Tensor) -> Tensor:
        product = torch.ops.micromix.weight_only_linear
        return product(x, None, weight, None, n, *counts, torch.bfloat16)

    return pack, product


def int4(name: str, x: Tensor, n: int) -> tuple[Callable, Callable]:
    def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-6) / 15
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8).flatten(1)
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        facts = torch.cat((scale, low + 8 * scale), -1).bfloat16().transpose(0, 1).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack(pairs, 8), facts

    def product(weight: Tensor, facts: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, facts)

    return pack, product


def bf16(name: str, x: Tensor, n: int) -> tuple[Callable, Callable]:
    return lambda weight: (weight,), lambda weight: torch.nn.functional.linear(x, weight)


CONTENDERS = {"micromix": quantised, "weight-only": weight_only, "int4": int4, "bf16": bf16}


def measure(
    k: int, n: int, m: int, name: str, contenders: list[str], rounds: int
) -> dict[str, tuple[float, float]]:
    """Microseconds of each contender, and bf16's over them."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(4, -(-3 * cache // (n * k // 2)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    graphs, kept = {}, []  # a graph keeps no operand alive
    for contender in (*contenders, "bf16"):
        pack, product = CONTENDERS[contender](name, x, n)
        packed = [pack(weight) for weight in weights]
        kept.append(packed)
        kind = contender if contender in ("bf16", "int4") else f"{contender} {name}"
        for weight, own in zip(weights, packed, strict=True):
            expected = torch.nn.functional.linear(x.double(), weight.double())
            check_product(kind, product(*own), expected)
        graphs[contender] = graph_of(product, packed)
    times = in_turns(graphs, copies, rounds)
    return {
        contender: (
            statistics.median(own),
            statistics.median(b / a for a, b in zip(own, times["bf16"], strict=True)),
        )
        for contender, own in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336", "14336x4096"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 2048])
    parser.add_argument("--mixes", nargs="+", default=["4.5", "mxfp4", "mxfp8"])
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS)[:-1], default=["micromix"]
    )
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
                found = measure(k, n, m, name, arguments.contenders, arguments.rounds)
                speed = 2 * m * k * n / found[arguments.contenders[0]][0] / 1e6
                figures = (f"{c} {us:.1f} us, {ratio:.2f}x" for c, (us, ratio) in found.items())
                print(
                    f"{shape}  M={m}  {name}: {'; '.join(figures)} ({speed:.1f} TFLOP/s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
