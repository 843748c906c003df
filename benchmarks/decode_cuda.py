"""A Llama as wide as an 8B one, end to end on a GPU through torch.compile and CUDA graphs: decode, prompts, where time goes.

    python benchmarks/decode_cuda.py [--layers 8] [--batches 1 16] [--prompts 512 2048] [--variants NAME ...]

Weights are random: speed does not depend on them. Variants run in turns, a ratio is the median of the
rounds' ratios to stock Inductor, which gets `mode="reduce-overhead"` as all do:

    inductor    bf16
    mix         13/16 MXFP4, 1/8 MXFP6, 1/16 MXFP8: 4.5 bits
    mxfp4       MXFP4 alone
    mxfp8       MXFP8 alone
    with head   the mix, and the output head quantised too
    weights     the mix, weights alone: activations stay in bfloat16

A decode step is one token for each row of a batch, over a static cache. A profile of more steps tells the milliseconds
on the GPU in quantised products, in quantises and what is fused with them, in attention and what Inductor prepares
for it, and in all else (with "inductor" all products, and the output head's where that is bf16).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from checks import check_close, facts, nothing_compiles, write_json
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from turns import in_turns

from micromix_compile import Recipe, calibrate, ops
from micromix_compile.reference import reference_model

MIX = {"split": (13 / 16, 1 / 8, 1 / 16)}
RECIPES = {
    "mix": MIX,
    "mxfp4": {"format": "mxfp4"},
    "mxfp8": {"format": "mxfp8"},
    "with head": MIX | {"include_lm_head": True},
    "weights": MIX | {"activations": "bfloat16"},
}
VARIANTS = ("inductor", *RECIPES)
# Of logits, against the uncompiled model and against the emulated kernel, or the reference. A step of batch 1 has that one's bits; in
# prompts roundings that fell otherwise grow from layer to layer.
BOUNDS = {True: 0.05, False: 0.4}
# Kernels by parts of their names; the first group that has one takes it.
GROUPS = {
    "products": (
        "few_rows",
        "many_rows",
        "decode_rows",
        "decode_tiles",
        "decode_weight",
        "float_rows",
        "float_tiles",
    ),
    "quantise": ("micromix",),
    "attention": ("sdpa", "flash", "fmha", "attention"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16], help="of decode steps")
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048], help="tokens")
    parser.add_argument("--cache", type=int, default=512, help="tokens the cache has room for")
    parser.add_argument("--steps", type=int, default=32, help="of a timing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    # All variants share one code object: beyond Dynamo's limit the last ones would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    model = random_llama(arguments.layers)
    ids = torch.randint(model.config.vocab_size, (1, 512), device="cuda")
    calibration = calibrate(model).run([ids])
    compiled, exact = {}, {}
    for name in arguments.variants:
        graphs = {"mode": "reduce-overhead"}
        if name == "inductor":
            compiled[name], exact[name] = torch.compile(model, **graphs), model
        else:
            options = {"plan": calibration.plan(Recipe(**RECIPES[name])), "strict": True}
            micromix = functools.partial(torch.compile, model, backend="micromix")
            compiled[name] = micromix(options=options | graphs)
            exact[name] = (
                reference_model(model, options["plan"])
                if name == "weights"
                else micromix(options=options | {"kernel": "mx_emulated"})
            )

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ops.kernel_name('cuda')}, "
        f"{arguments.layers} layers"
    )
    results = facts() | {"device": torch.cuda.get_device_name(), "layers": arguments.layers}
    results |= {"rounds": arguments.rounds, "runs": {}}

    def report(title: str, runs: dict[str, Callable], steps: int) -> None:
        results["runs"][title] = measure(title, runs, steps, arguments.rounds)
        if arguments.json:  # what is measured is not lost
            write_json(arguments.json, results)

    with torch.inference_mode():
        for batch in arguments.batches:
            sizes = batch, arguments.cache, arguments.steps
            ids = torch.randint(model.config.vocab_size, (batch, 1), device="cuda")
            check(model, compiled, exact, ids, arguments.cache)
            runs = {name: decode_of(model, step, *sizes) for name, step in compiled.items()}
            report(f"decode, batch {batch}", runs, arguments.steps)
        for tokens in arguments.prompts:
            ids = torch.randint(model.config.vocab_size, (1, tokens), device="cuda")
            check(model, compiled, exact, ids, tokens + 64, logits_to_keep=1)
            runs = {name: prompt_of(model, step, ids) for name, step in compiled.items()}
            report(f"a prompt of {tokens} tokens", runs, 1)


def random_llama(layers: int) -> LlamaForCausalLM:
    """Of Llama 3.1 8B's widths."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def cache_of(model: LlamaForCausalLM, batch: int, tokens: int) -> StaticCache:
    """It allocates itself outside of a graph."""
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    model(
        input_ids=torch.zeros(batch, 1, dtype=torch.long, device="cuda"),
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def decode_of(model, step, batch: int, room: int, steps: int) -> Callable[[], None]:
    """Steps from an empty cache on, each of the tokens that the one before found likeliest."""
    cache = cache_of(model, batch, room)
    first = torch.zeros(batch, 1, dtype=torch.long, device="cuda")

    def run() -> None:
        cache.reset()
        tokens = first
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            logits = step(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()

    return run


def check(
    model,
    compiled: dict[str, Callable],
    exact: dict[str, Callable],
    ids: torch.Tensor,
    room: int,
    **arguments: int,
) -> None:
    """The logits of each variant are those of the same arithmetic by another kernel; of bf16 by the uncompiled model.

    (How far the quantised ones are from bf16's says nothing: with random weights 4.5 bits are 0.66 to 0.84 off.)
    Called as the timed runs call it: Dynamo makes what differs between calls dynamic.
    """

    def logits(step) -> torch.Tensor:
        cache = cache_of(model, len(ids), room)
        cache.reset()
        torch.compiler.cudagraph_mark_step_begin()
        found = step(input_ids=ids, past_key_values=cache, use_cache=True, **arguments)
        return found.logits.clone()

    for name, step in compiled.items():
        check_close(name, logits(step), logits(exact[name]), BOUNDS[name == "inductor"])


def prompt_of(model, step, ids: torch.Tensor) -> Callable[[], None]:
    """A prompt written into an empty cache, and the logits of its last token."""
    cache = cache_of(model, 1, ids.shape[1] + 64)

    def run() -> None:
        cache.reset()
        torch.compiler.cudagraph_mark_step_begin()
        step(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()

    return run


def measure(title: str, runs: dict[str, Callable], steps: int, rounds: int) -> dict:
    """Prints and returns each one's milliseconds a step, its ratio, and where they go."""
    results = {}
    print(
        f"{title:28s} {'ms':>8s} {'ratio':>6s}  "
        + " ".join(f"{g:>9s}" for g in (*GROUPS, "else", "kernels"))
    )
    compile_seconds = {}
    for name, run in runs.items():
        began = time.perf_counter()
        for _ in range(3):  # compiles, records, replays
            run()
        compile_seconds[name] = time.perf_counter() - began
    with nothing_compiles():
        seconds = in_turns(runs, rounds)
    base = seconds[next(iter(runs))]
    for name, own in seconds.items():
        ms = 1e3 * statistics.median(own) / steps
        ratio = statistics.median(b / a for a, b in zip(own, base))
        parts, launches = kernels_of(runs[name], steps)
        print(
            f"{name:28s} {ms:8.3f} {ratio:5.2f}x  "
            + " ".join(f"{part:9.3f}" for part in parts.values())
            + f" {launches:9.0f}   first calls {compile_seconds[name]:.0f} s",
            flush=True,
        )
        results[name] = {"ms": ms, "ratio": ratio, "parts_ms": parts, "kernels": launches}
    return results


def kernels_of(run: Callable[[], None], steps: int) -> tuple[dict[str, float], float]:
    """Milliseconds a step of the kernels of each group, and kernels a step.

    A kernel may start before the one before it ends, and wait for it: its time begins where that one ends.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent, end = dict.fromkeys((*GROUPS, "else"), 0.0), 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.time_range.end):
        group = next(
            (g for g, names in GROUPS.items() if any(n in kernel.name for n in names)), "else"
        )
        began = max(kernel.time_range.start, end)
        end = kernel.time_range.end
        spent[group] += 1e-3 * (end - began) / steps
    return spent, len(kernels) / steps


if __name__ == "__main__":
    main()
