"""Attention of one token whose keys and values the model repeats for each query head: stock Inductor and micromix.

    python benchmarks/grouped_queries_cpu.py [--rounds 100]

In turns; microseconds of CPU time (run it with one thread), and the median ratio of the rounds. Each round goes through eight caches, as
a step goes through those of its layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from turns import in_turns

CACHES = 8
SHAPES = ((9, 3, 64), (32, 8, 128))  # query heads, key heads, head size: SmolLM2-135M, an 8B model
LENGTHS = (256, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"{'heads':>12s} {'tokens':>6s} {'inductor':>9s} {'micromix':>9s}")
    for heads, groups, size in SHAPES:
        for length in LENGTHS:
            torch.compiler.reset()
            seconds = in_turns(
                ways(heads, groups, size, length), arguments.rounds, time.process_time
            )
            ratio = statistics.median(map(float.__truediv__, *seconds.values()))
            times = (1e6 * statistics.median(own) / CACHES for own in seconds.values())
            shown = " ".join(f"{us:6.0f} us" for us in times)
            print(f"{f'{heads}, {groups}, {size}':>12s} {length:6d} {shown} {ratio:6.2f}x")


def ways(heads: int, groups: int, size: int, length: int) -> dict[str, Callable[[], object]]:
    def repeated(x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, None].expand(1, groups, heads // groups, length, size)
        return x.reshape(1, heads, length, size)

    def attention(query, key, value, mask):
        key, value = repeated(key), repeated(value)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    mask = (torch.arange(length) < length * 3 // 4).view(1, 1, 1, length)
    shapes = ((1, heads, 1, size), *[(1, groups, length, size)] * 2)
    caches = [[torch.randn(s, dtype=torch.bfloat16) for s in shapes] for _ in range(CACHES)]

    def run(backend: str) -> Callable[[], object]:
        compiled = torch.compile(attention, backend=backend, dynamic=False)
        with torch.no_grad():
            compiled(*caches[0], mask)

        def once() -> None:
            with torch.no_grad():
                for operands in caches:
                    compiled(*operands, mask)

        return once

    return {backend: run(backend) for backend in ("inductor", "micromix")}


if __name__ == "__main__":
    main()
