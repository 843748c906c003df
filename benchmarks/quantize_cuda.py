"""The CUDA quantise kernels beside the card's copy bandwidth, and beside Inductor's own kernels for the same.

    python benchmarks/quantize_cuda.py                      # 2048 rows of 4096 and of 16384 channels
    python benchmarks/quantize_cuda.py --rows 1 64 --columns 4096 --inductor

Bytes are those that must move: every operand read once, every result written once. Each contender is
one CUDA graph of many calls, each call on operands of its own and more of them than the second-level
cache holds, so a figure is of memory, with the gaps between launches. Contenders take turns; a figure
is the median of the rounds, a ratio the median of the rounds' ratios. "copy" is the bandwidth, bytes
read and written, of torch's copy of a large tensor in the same run; "as large a copy" one of as many
bytes as the form moves, launched and timed like the form itself. Inductor compiles the reference
arithmetic (micromix_compile.mx) with the row function before it. An order is random, and spread over
memory banks as a plan's is (micromix_compile/banks.py); --unspread leaves it. Prints a table and
writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from micromix_compile.banks import spread_over_banks
from micromix_compile.mx import MixedLayout
from micromix_compile.mx.mixed import _quantize_rows
from micromix_compile.ops.fused import Pointwise, RmsForm

EPS = 1e-6
BF16 = torch.bfloat16
micromix = torch.ops.micromix


def layout_of(k: int) -> MixedLayout:
    """3/4 MXFP4, 1/8 of each other format: 4.75 bits, 5 with scales."""
    return MixedLayout(k - 2 * (k // 8), k // 8, k // 8)


class Form:
    """One thing to measure: a row function of `inputs` tensors [rows, k], and whether a channel order follows."""

    def __init__(self, name: str, inputs: int, ours, plain, *, ordered=False, stores_sum=False):
        self.name, self.inputs, self.ours, self.plain = name, inputs, ours, plain
        self.ordered, self.stores_sum = ordered, stores_sum

    def bytes(self, rows: int, k: int) -> int:
        layout = layout_of(k)
        wide = 2 * rows * k * (self.inputs + self.stores_sum)
        return wide + rows * (layout.row_bytes + layout.blocks) + 4 * k * self.ordered


def rms_norm(x, weight):
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return [weight * normalised.to(x.dtype)]


def add_rms_norm(x, residual, weight):
    total = x + residual
    return [total, *rms_norm(total, weight)]


def layer_norm(x, weight):
    return [F.layer_norm(x, x.shape[-1:], weight, weight, EPS)]


def _rms(x, weight, *rest, residual=None):
    form = RmsForm.WEIGHT_AFTER_CAST
    return micromix.rms_norm_quantize(x, residual, weight, EPS, form, BF16, False, *rest)


def _layer(x, weight, *rest):
    return micromix.layer_norm_quantize(x, None, weight, weight, EPS, BF16, False, *rest)


def _pointwise(function, x, other, *rest):
    return micromix.pointwise_quantize(x, other, function, BF16, False, *rest)


def _quantize(x, weight, *rest):
    return micromix.quantize(x, *rest)


FORMS = [
    Form("quantize", 1, _quantize, lambda x, w: [x]),
    Form("order, quantize", 1, _quantize, lambda x, w: [x], ordered=True),
    Form("rms_norm", 1, _rms, rms_norm),
    Form("rms_norm, order", 1, _rms, rms_norm, ordered=True),
    Form(
        "add, rms_norm, order",
        2,
        lambda x, r, w, *rest: _rms(x, w, *rest, residual=r),
        add_rms_norm,
        ordered=True,
        stores_sum=True,
    ),
    Form("layer_norm, order", 1, _layer, layer_norm, ordered=True),
    Form(
        "silu, mul",
        2,
        lambda x, o, w, *rest: _pointwise(Pointwise.SILU, x, o, *rest),
        lambda x, o, w: [F.silu(x) * o],
    ),
    Form(
        "silu, mul, order",
        2,
        lambda x, o, w, *rest: _pointwise(Pointwise.SILU, x, o, *rest),
        lambda x, o, w: [F.silu(x) * o],
        ordered=True,
    ),
    Form(
        "gelu",
        1,
        lambda x, w, *rest: _pointwise(Pointwise.GELU, x, None, *rest),
        lambda x, w: [F.gelu(x)],
    ),
    Form(
        "gelu_tanh, mul",
        2,
        lambda x, o, w, *rest: _pointwise(Pointwise.GELU_TANH, x, o, *rest),
        lambda x, o, w: [F.gelu(x, approximate="tanh") * o],
    ),
]


class Segments:
    """The segments of a layout, made beforehand: Dynamo does not trace how they are made."""

    def __init__(self, layout: MixedLayout) -> None:
        self.made = list(layout.segments())

    def segments(self):
        return self.made


def inductor(form: Form, order: torch.Tensor | None, layout: MixedLayout) -> Callable:
    """Inductor's compile, in one graph, of the row function, the gather and the reference's cast."""
    segments, row_bytes, blocks = Segments(layout), layout.row_bytes, layout.blocks

    def reference(*operands):
        *first, y = form.plain(*operands)
        rows = y.shape[0]
        y = y if order is None else y.index_select(1, order)
        data = torch.empty(rows, row_bytes, dtype=torch.uint8, device=y.device)
        scales = torch.empty(rows, blocks, dtype=torch.uint8, device=y.device)
        _quantize_rows(y.float(), segments, data, scales)
        return [*first, data, scales]

    return torch.compile(reference, dynamic=False, fullgraph=True)


def graph_of(function: Callable, operands: Sequence[tuple]) -> torch.cuda.CUDAGraph:
    """One call for each of `operands`, with results of its own."""
    results = [function(*operands[0]) for _ in range(2)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function(*arguments) for arguments in operands]
    graph.results = results
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / calls


def in_turns(
    graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int
) -> dict[str, list[float]]:
    """Microseconds a call of each, round by round, in an order that changes."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name in random.sample(list(graphs), len(graphs)):
            times[name].append(microseconds(graphs[name], calls))
    return times


def copy_bandwidth() -> float:
    """GB/s, bytes read and written, of the faster of torch's copy and of an elementwise kernel, on 2 GiB."""
    source = torch.ones(1 << 28, dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    medians = []
    for way in ways:
        times = []
        for _ in range(20):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        medians.append(statistics.median(times[2:]))
    return 2 * source.nbytes / min(medians) / 1e6


def measure(
    form: Form, rows: int, k: int, rounds: int, peer: bool, bandwidth: float, spread: bool
) -> dict[str, object]:
    layout = layout_of(k)
    total = form.bytes(rows, k)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(4, min(200, -(-3 * cache // total)))
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(k, generator=generator, device="cuda").to(BF16)
    order = None
    if form.ordered:
        order = torch.randperm(k, generator=torch.Generator().manual_seed(0)).int()
        order = (spread_over_banks(order) if spread else order).cuda()
    operands = [
        (
            *(
                torch.randn(rows, k, generator=generator, device="cuda").to(BF16)
                for _ in range(form.inputs)
            ),
            weight,
        )
        for _ in range(copies)
    ]
    quantise = (order, *layout.counts, layout.code)
    contenders = {"micromix": lambda *a: form.ours(*a, *quantise)}
    halves = [torch.empty(total // 16, dtype=torch.int64, device="cuda") for _ in range(copies)]
    if peer:
        torch._dynamo.reset()
        contenders["inductor"] = inductor(form, order, layout)
        ours, theirs = (contenders[name](*operands[0]) for name in contenders)
        # Inductor keeps float32 where the model rounds, so some codes differ after a row function.
        allowed = 0.05 if form.plain(*operands[0])[-1] is not operands[0][0] else 0.0
        for what, mine, other in zip(("codes", "scales"), ours[-2:], theirs[-2:], strict=True):
            changed = (mine != other).float().mean().item()
            if not changed <= allowed:
                raise RuntimeError(f"{form.name}: {changed:.3%} of the {what} are not Inductor's")
    graphs = {name: graph_of(function, operands) for name, function in contenders.items()}
    graphs["copy"] = graph_of(torch.neg, [(half,) for half in halves])
    times = in_turns(graphs, copies, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    row: dict[str, object] = {
        "form": form.name,
        "rows": rows,
        "columns": k,
        "bytes": total,
        "us": round(median["micromix"], 2),
        "GB/s": round(total / median["micromix"] / 1e3),
        "of copy": round(total / median["micromix"] / 1e3 / bandwidth, 3),
        "of as large a copy": round(median["copy"] / median["micromix"], 3),
    }
    if peer:
        ratios = [b / a for a, b in zip(times["micromix"], times["inductor"], strict=True)]
        row["inductor us"] = round(median["inductor"], 2)
        row["faster than inductor"] = round(statistics.median(ratios), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2048])
    parser.add_argument("--columns", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--forms", nargs="+", default=[form.name for form in FORMS])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--inductor",
        nargs="*",
        metavar="FORM",
        default=["quantize", "rms_norm", "silu, mul"],
        help="the forms to compile with Inductor too (default: %(default)s)",
    )
    parser.add_argument("--unspread", action="store_true", help="orders as they come")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()

    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: copy {bandwidth:.0f} GB/s", flush=True)
    table = []
    for rows in arguments.rows:
        for k in arguments.columns:
            for form in FORMS:
                if form.name not in arguments.forms:
                    continue
                peer = form.name in arguments.inductor
                row = measure(
                    form, rows, k, arguments.rounds, peer, bandwidth, not arguments.unspread
                )
                table.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.json:
        facts = {"device": name, "torch": torch.__version__, "copy GB/s": round(bandwidth)}
        arguments.json.write_text(json.dumps({**facts, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
