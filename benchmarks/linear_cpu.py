"""The products of micromix on this CPU beside those of its peers, and beside the machine's limits.

    python benchmarks/linear_cpu.py                  # every shape, mix and row count; an hour
    python benchmarks/linear_cpu.py --shapes 4096x4096 --rows 1 512 --mixes 4.5
    python benchmarks/linear_cpu.py --quick          # the smallest shape: does it run?

All contenders run in one process, in turn; a figure is the median of its runs, a ratio is of medians
of the same rounds. With one thread the time is that thread's CPU time, so that other work on the
machine is not counted; with more it is the clock's. "rotated": a run is eight products, each with a
copy of the weight, and the figure is an eighth of it; before each round other memory is read, --rotate
MiB of it, which should be more than the caches hold. "hot": five runs of one product in a row, after
one that is not counted. micromix is the time of quantise and linear together, weight-only that of its one operator,
reading that of a loop that only reads as many bytes, at 1, 2 or 4 places at once. micromix and
weight-only are compiled by Inductor, with freezing, and so are its own products: both pay for Dynamo's
guards and Inductor's wrapper, once a run. "bare" (--bare) is micromix by two calls of operators from
Python, without them. Every result is compared with the float product before anything is timed, and
nothing may be compiled while it is. The memory of every contender is in huge pages where the system
gives them. Prints a table; writes it as JSON, after each group, with the number of runs and their
quartiles, and a roofline picture.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from checks import check_product, facts, nothing_compiles, write_json

from micromix_compile import ops
from micromix_compile.mx import MixedLayout

SHAPES = ("4096x4096", "4096x14336", "14336x4096", "576x1536", "1536x576")  # K x N
ROWS = (1, 4, 8, 16, 64, 512, 2048)
COPIES = 8  # of a rotated weight
OURS = ("micromix", "bare", "weight-only", "reading")  # their names begin so
READ_PLACES = (1, 2, 4)  # at once: memory gives more to who reads at several
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


def mix(name: str, k: int) -> MixedLayout:
    """The layout of a mix: "4.5" and "5.5" are element bits of a 4/6/8 split."""
    shares = {"mxfp4": (0, 0), "mxfp8": (0, 1), "4.5": (1 / 8, 1 / 16), "5.5": (1 / 4, 1 / 4)}
    k6, k8 = (int(k * share / 32 + 0.5) * 32 for share in shares[name])
    return MixedLayout(k - k6 - k8, k6, k8)


def built_probe(directory: Path) -> ctypes.CDLL | None:
    """machine_limits.cpp; None where g++ cannot build it."""
    library = directory / "machine_limits.so"
    code = Path(__file__).with_name("machine_limits.cpp")
    command = ["g++", "-O3", "-mavx2", "-shared", "-fPIC", "-std=c++17", code, "-o", library]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return None
    probe = ctypes.CDLL(str(library))
    for function in (probe.read_rate, probe.fma_rate, probe.amx_rate):
        function.restype = ctypes.c_double
    return probe


def read_rate(probe: ctypes.CDLL, memory: torch.Tensor, places: int) -> float:
    """Bytes a second of one pass over a tensor, at so many places at once."""
    words = ctypes.c_int64(memory.nbytes // 8)
    return probe.read_rate(ctypes.c_void_p(memory.data_ptr()), words, ctypes.c_int64(places))


def machine_limits(probe: ctypes.CDLL | None) -> dict[str, float]:
    """GB/s read by one thread, GB/s moved by torch's copy, TFLOP/s from registers of AVX2's float32 and AMX's bf16 products."""
    source = torch.ones(1 << 27, dtype=torch.int64)  # 1 GiB
    target = torch.empty_like(source)
    limits = {}
    target.copy_(source)
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        target.copy_(source)
        seconds.append(time.thread_time() - start)
    limits["copy GB/s"] = 2 * source.nbytes / min(seconds) / 1e9
    if probe is not None:
        rates = [read_rate(probe, source, places) for places in READ_PLACES for _ in range(5)]
        limits["read GB/s"] = max(rates) / 1e9
        limits["FMA TFLOP/s"] = max(probe.fma_rate() for _ in range(5)) / 1e12
        limits["AMX TFLOP/s"] = probe.amx_rate() / 1e12
    return limits


def placed_copies(weight: torch.Tensor, layout: MixedLayout, copies: int) -> list[torch.Tensor]:
    counts = (*layout.counts, layout.code)
    data, scales = torch.ops.micromix.quantize.default(weight, None, *counts)
    return [torch.ops.micromix.place_weight(data, scales, *counts) for _ in range(copies)]


def reading(probe: ctypes.CDLL, placed: list[torch.Tensor], places: int) -> list[peers.Product]:
    """Loops that only read placed weights: what the memory allows a product with one row."""
    return [
        peers.Product(lambda memory=memory: read_rate(probe, memory, places), None)
        for memory in placed
    ]


class Quantised(torch.nn.Module):
    """A product as compiled models run it: quantise and linear, or the weight-only operator."""

    def __init__(self, weight: torch.Tensor, n: int, layout: MixedLayout, weight_only: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.n, self.weight_only = n, weight_only
        self.counts = (*layout.counts, layout.code)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = (self.weight, None, self.n, *self.counts, torch.bfloat16)
        if self.weight_only:
            return torch.ops.micromix.weight_only_linear.default(x, None, *rest)
        rows = torch.ops.micromix.quantize.default(x, None, *self.counts)
        return torch.ops.micromix.linear.default(*rows, *rest)


def micromix(
    placed: list[torch.Tensor],
    n: int,
    x: torch.Tensor,
    layout: MixedLayout,
    weight_only: bool = False,
    bare: bool = False,
) -> list[peers.Product]:
    layers = [Quantised(weight, n, layout, weight_only) for weight in placed]
    if bare:
        return [peers.of_function(functools.partial(layer.forward, x)) for layer in layers]
    return [peers.compiled(layers, x)]


def check(
    contenders: dict[str, list[peers.Product]], x: torch.Tensor, weight: torch.Tensor
) -> None:
    """Every copy of every contender gives the float product, within what its format loses."""
    expected = torch.nn.functional.linear(x.float(), weight.float())
    with torch.inference_mode():
        for name, products in contenders.items():
            for product in products:
                if product.result is not None:
                    for rows in product.result().split(len(x)):
                        check_product(name, rows, expected)


def run_times(
    contenders: dict[str, list[peers.Product]],
    rounds: int,
    elsewhere: torch.Tensor | None,
    copies: int = 1,
) -> dict[str, list[float]]:
    """Seconds a product of each run; in every round each contender has its turn, on all its copies.

    A tensor from elsewhere is read before each round; without one the contenders are hot.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode(), nothing_compiles():
        for products in contenders.values():
            for product in products:
                product.run()
        gc.disable()
        for _ in range(rounds):
            if elsewhere is not None:
                elsewhere.sum()
            # In another order each time: whoever follows itself finds its code in the caches.
            for name in random.sample(list(contenders), len(contenders)):
                runs = [product.run for product in contenders[name]]
                if elsewhere is None:
                    runs[0]()
                for _ in range(5 if elsewhere is None else 1):
                    start = clock()
                    for run in runs:
                        run()
                    times[name].append((clock() - start) / copies)
        gc.enable()
    return times


def measure(
    arguments: argparse.Namespace, probe: ctypes.CDLL | None, save: Callable[[list[dict]], None]
) -> list[dict]:
    """Figures of every group; `save` gets those so far after each."""
    results = []
    one_thread = arguments.threads == 1
    for shape, rows, hot in itertools.product(
        arguments.shapes, arguments.rows, (False, True) if arguments.hot else (False,)
    ):
        torch.compiler.reset()  # before a group, so that it drops what no contender needs any more
        k, n = map(int, shape.split("x"))
        x = torch.randn(rows, k, dtype=torch.bfloat16)
        copies = 1 if hot else COPIES
        weight = (torch.randn(n, k) * 0.02).bfloat16()
        contenders: dict[str, list[peers.Product]] = {}
        for name in arguments.mixes:
            layout = mix(name, k)
            # Each has copies of its own: nobody finds in the caches what another has read.
            placed = functools.partial(placed_copies, weight, layout, copies)
            contenders[f"micromix {name}"] = micromix(placed(), n, x, layout)
            if arguments.bare:
                contenders[f"bare {name}"] = micromix(placed(), n, x, layout, bare=True)
            if arguments.weight_only:
                products = micromix(placed(), n, x, layout, weight_only=True)
                contenders[f"weight-only {name}"] = products
            if rows == 1 and probe is not None and one_thread:
                for places in READ_PLACES:
                    contenders[f"reading {name} at {places}"] = reading(probe, placed(), places)
        for name, make in arguments.peers.items():
            contenders[name] = make([weight.clone() for _ in range(copies)], x)
        check(contenders, x, weight)
        words = arguments.rotate * 2**20 // 8
        elsewhere = None if hot else torch.ones(words, dtype=torch.int64)
        rounds = min(arguments.rounds, max(7, int(arguments.rounds * 64 / (rows + 63))))
        for name, times in run_times(contenders, rounds, elsewhere, copies).items():
            lower, seconds, upper = statistics.quantiles(times, method="inclusive")
            reads_only = name.startswith("reading")
            if name.startswith(OURS):
                stored = n * k * mix(name.split()[1], k).total_bits / 8
            else:
                stored = n * k * peers.PEERS[name].bits / 8
            results.append(
                {
                    "shape": shape,
                    "rows": rows,
                    "hot": hot,
                    "name": name,
                    "microseconds": seconds * 1e6,
                    "quartiles": [lower * 1e6, upper * 1e6],
                    "runs": len(times),
                    "GB/s": stored / seconds / 1e9,
                    "GFLOP/s": 0 if reads_only else 2 * rows * n * k / seconds / 1e9,
                    "flop/byte": 2 * rows * n * k / stored,
                }
            )
        report([r for r in results if (r["shape"], r["rows"], r["hot"]) == (shape, rows, hot)])
        save(results)
    return results


def report(group: list[dict]) -> None:
    """A table of the contenders on one shape; ratios over each peer that is not quantised."""
    plain = {r["name"]: r["microseconds"] for r in group if r["name"].endswith(("bf16", "fp32"))}
    head = group[0]
    title = f"{head['shape']}  M={head['rows']}  {'hot' if head['hot'] else 'rotated'}"
    print(f"\n{title:<34}{'us':>10}{'GB/s':>8}{'GFLOP/s':>9}", *(f"{'x ' + p:>16}" for p in plain))
    for r in group:
        ratios = (f"{time / r['microseconds']:>16.2f}" for time in plain.values())
        numbers = f"{r['microseconds']:>10.1f}{r['GB/s']:>8.1f}{r['GFLOP/s']:>9.0f}"
        print(f"  {r['name']:<32}{numbers}", *ratios, flush=True)


def draw(results: list[dict], limits: dict[str, float], path: Path) -> None:
    """The roofline: speed over the operations done for each byte of the weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    results = [r for r in results if r["GFLOP/s"]]  # not those that only read
    names = sorted({r["name"] for r in results})
    for marker, name in zip(itertools.cycle("osv^D*PX"), names, strict=False):
        points = [r for r in results if r["name"] == name]
        xs, ys = [r["flop/byte"] for r in points], [r["GFLOP/s"] for r in points]
        axes.scatter(xs, ys, s=28, marker=marker, label=name, alpha=0.8)
    low, high = min(r["flop/byte"] for r in results), max(r["flop/byte"] for r in results)
    peak = "AMX TFLOP/s" if limits.get("AMX TFLOP/s") else "FMA TFLOP/s"
    roof = limits.get(peak, math.inf) * 1e3
    for limit, style in (("read GB/s", "-"), ("copy GB/s", ":")):
        if limit in limits:
            rate = limits[limit]
            xs = (low, min(max(roof / rate, low), high), high)  # memory, the bend, the tile unit
            ys = [min(x * rate, roof) for x in xs]
            axes.plot(xs, ys, "k" + style, lw=1, label=f"{limit}: {rate:.0f}")
    if peak in limits:
        kind = "AMX bf16" if peak.startswith("AMX") else "AVX2 float32"
        label = f"{kind} from registers: {limits[peak]:.2g} TFLOP/s"
        axes.axhline(roof, color="k", ls="--", lw=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weight", ylabel="GFLOP/s")
    threads = torch.get_num_threads()
    axes.set_title(f"linear layers, {threads} thread(s), {ops.kernel_name('cpu')}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--mixes", nargs="+", default=("4.5", "5.5", "mxfp4", "mxfp8"))
    parser.add_argument("--weight-only", action="store_true", help="also with bf16 activations")
    parser.add_argument("--bare", action="store_true", help="also the operators, not compiled")
    parser.add_argument("--peers", nargs="*", default=peers.PEERS, choices=peers.PEERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50, help="at most so many runs of each")
    parser.add_argument(
        "--rotate", type=int, default=1024, help="MiB read before each round that is not hot"
    )
    parser.add_argument("--hot", action="store_true", help="also without rotation")
    parser.add_argument(
        "--isa", help="portable, avx2, avx512, avx512_bf16 or amx; default: the best here"
    )
    parser.add_argument("--output", type=Path, default=Path("linear_cpu"), help="of .json and .png")
    parser.add_argument("--quick", action="store_true", help="the smallest shape, few runs")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.shapes, arguments.rows, arguments.peers = ("576x1536",), (1, 16), ("eager bf16",)
        arguments.rounds, arguments.rotate = 10, 8
    if arguments.isa:
        ops.set_cpu_isa(arguments.isa)
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as directory:
        probe = built_probe(Path(directory))
    limits = machine_limits(probe)
    print(f"{ops.kernel_name('cpu')}, {arguments.threads} thread(s), torch {torch.__version__}")
    print(
        "one thread's limits:", ", ".join(f"{name} {value:.3g}" for name, value in limits.items())
    )
    arguments.peers = peers.available(arguments.peers)
    document = facts() | {"kernel": ops.kernel_name("cpu"), "limits": limits}

    def save(results: list[dict]) -> None:
        write_json(arguments.output.with_suffix(".json"), document | {"results": results})

    results = measure(arguments, probe, save)
    draw(results, limits, arguments.output.with_suffix(".png"))
    print(f"\nwrote {arguments.output}.json and {arguments.output}.png")


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in HUGE_PAGES.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HUGE_PAGES})
    main()
