"""Attention on a CPU: `micromix::attention`, and torch's under stock Inductor, as models write it.

    python benchmarks/attention_cpu.py [--dtype float32] [--rounds 30]

Both are compiled functions, so both pay for Dynamo's guards and Inductor's wrapper. One token after others in a static cache of which three quarters are filled, and prompts. Models repeat keys and values
for the query heads that share them. In turns; microseconds of CPU time (run it with one thread), and the median ratio
of the rounds. Each round goes through several caches, as a step goes through those of its layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checks import nothing_compiles
from turns import in_turns

import micromix_compile.ops

CACHES = 8
SHAPES = ((9, 3, 64), (32, 8, 128))  # query heads, key heads, head size: SmolLM2-135M, an 8B model
LENGTHS = ((1, 256), (1, 2048), (512, 576), (2048, 2048))  # queries, keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{torch.get_num_threads()} thread(s), {micromix_compile.ops.cpu_isa()}, {arguments.dtype}, torch {torch.__version__}"
    )
    print(f"{'heads':>12s} {'queries':>7s} {'keys':>5s} {'inductor':>12s} {'micromix':>12s}")
    for heads, groups, size in SHAPES:
        for queries, keys in LENGTHS:
            torch.compiler.reset()
            runs = ways(heads, groups, size, queries, keys, getattr(torch, arguments.dtype))
            rounds = arguments.rounds if queries == 1 else max(arguments.rounds // 10, 3)
            for run in runs.values():
                run()
            with nothing_compiles():
                seconds = in_turns(runs, rounds, time.process_time)
            ratio = statistics.median(map(float.__truediv__, *seconds.values()))
            times = (1e6 * statistics.median(own) / CACHES for own in seconds.values())
            shown = " ".join(f"{us:9.0f} us" for us in times)
            print(
                f"{f'{heads}, {groups}, {size}':>12s} {queries:7d} {keys:5d} {shown} {ratio:6.2f}x"
            )


def ways(
    heads: int, groups: int, size: int, queries: int, keys: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    def repeated(x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, None].expand(1, groups, heads // groups, keys, size)
        return x.reshape(1, heads, keys, size)

    @torch.compile(dynamic=False, fullgraph=True)
    def inductor(query, key, value, mask):
        key, value = repeated(key), repeated(value)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    @torch.compile(dynamic=False, fullgraph=True)
    def micromix(query, key, value, mask):
        return torch.ops.micromix.attention(query, key, value, mask, False, size**-0.5)

    filled = keys * 3 // 4 if queries == 1 else 0
    mask = (torch.arange(keys) <= torch.arange(queries)[:, None] + filled)[None, None]
    shapes = ((1, queries, heads, size), *[(1, groups, keys, size)] * 2)
    caches = [[torch.randn(s, dtype=dtype) for s in shapes] for _ in range(CACHES)]
    for cache in caches:
        cache[0] = cache[0].transpose(1, 2)
    with torch.no_grad():
        for operands in caches:
            torch.testing.assert_close(
                micromix(*operands, mask), inductor(*operands, mask), atol=0.02, rtol=0.02
            )

    def through_all(function: Callable[..., object]) -> Callable[[], object]:
        def once() -> None:
            with torch.no_grad():
                for operands in caches:
                    function(*operands, mask)

        return once

    return {function.__name__: through_all(function) for function in (inductor, micromix)}


if __name__ == "__main__":
    main()
