"""Layers that share an input: what one launch with a result for each is worth against the other ways.

    python benchmarks/merged_cpu.py [--rounds 200]

    linears    micromix::linears, as compiled models run it: one launch, a contiguous result for each layer
    views      one weight for all and one launch; each layer's result is a view of rows that are longer than it
    copies     the same, with the views made contiguous
    apart      a launch for each layer

Times in turns, in an order that changes, CPU time where there is one thread; medians, and the ratio to `linears` of each round.
Each way has copies of the weights of its own, and gives the float products. Mixed weights, half MXFP4, a quarter MXFP6 and MXFP8.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from checks import check_product
from turns import in_turns

import micromix_compile.ops  # noqa: F401  (registers torch.ops.micromix)
from micromix_compile.mx import MixedLayout

SHAPES = {
    "q k v, 576": (576, (576, 192, 192)),
    "gate up, 576": (576, (1536, 1536)),
    "q k v, 4096": (4096, (4096, 1024, 1024)),
}
ROWS = (1, 16, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"{'':14s} {'rows':>5s} {'linears':>12s} {'views':>8s} {'copies':>8s} {'apart':>8s}")
    for name, (k, sizes) in SHAPES.items():
        for rows in ROWS:
            rounds = max(5, arguments.rounds // (1 + rows // 32))
            seconds = in_turns(ways(k, sizes, rows), rounds, clock)
            base = seconds["linears"]
            ratios = (
                statistics.median(a / b for a, b in zip(own, base)) for own in seconds.values()
            )
            shown = " ".join(f"{ratio:7.2f}x" for ratio in list(ratios)[1:])
            print(f"{name:14s} {rows:5d} {1e6 * statistics.median(base):9.1f} us {shown}")


def ways(k: int, sizes: tuple[int, ...], rows: int) -> dict[str, Callable[[], object]]:
    ops, dtype = torch.ops.micromix, torch.bfloat16
    k4, k6 = k // 64 * 32, k // 128 * 32
    layout = (k4, k6, k - k4 - k6, MixedLayout(k4, k6, k - k4 - k6).code)

    def quantised(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.quantize(values, None, *layout)

    def placed() -> list[torch.Tensor]:
        return [ops.place_weight(*quantised(weight), *layout) for weight in weights]

    weights = [torch.randn(n, k, dtype=dtype) for n in sizes]
    tokens, total = torch.randn(rows, k, dtype=dtype), sum(sizes)
    x, rest = quantised(tokens), (*layout, dtype)
    linears = {2: ops.linears.two, 3: ops.linears.three}[len(sizes)]
    layers = [argument for part, n in zip(placed(), sizes) for argument in (part, None, n)]
    parts = placed()
    of_views, of_copies = (
        ops.place_weight(*quantised(torch.cat(weights)), *layout) for _ in range(2)
    )

    def split(whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.linear.default(*x, whole, None, total, *rest).split(sizes, -1)

    found = {
        "linears": lambda: linears(*x, *layers, *rest),
        "views": lambda: split(of_views),
        "copies": lambda: [part.contiguous() for part in split(of_copies)],
        "apart": lambda: [
            ops.linear.default(*x, part, None, n, *rest) for part, n in zip(parts, sizes)
        ],
    }
    for name, way in found.items():
        for result, weight in zip(way(), weights, strict=True):
            check_product(f"{name} 5.5", result, tokens.float() @ weight.float().T)
    return found


if __name__ == "__main__":
    main()
