"""SmolLM2 end to end through torch.compile: decode and prefill, and where the time of a decode step goes.

    python benchmarks/decode_cpu.py [--layers 30] [--tokens 16] [--rounds 7] [--prefill 512] [--dtype bfloat16] [--variants NAME ...]

Variants, timed in turns, ratios by round:

    inductor       the model as it is (--dtype), stock Inductor
    frozen         the same with freezing: Inductor packs the weights for oneDNN
    passes off     micromix without its passes: a quantise and a product for each layer
    micromix       the plan of the published thresholds, E2M3
    with head      the same, and the output head quantised too, so that all products are ours
    head, off      that without the passes
    weight-only    the same formats, of the weights alone: activations in bf16

and each of them with "+ cpp": Inductor's C++ wrapper (`options={"cpp_wrapper": True}`) around the kernels in place of
its Python one.

Before anything is timed the logits of every variant are compared with those of the model, uncompiled, and the tokens of
a variant with C++ wrapper with those of the one without. Nothing may be compiled in the timed runs, and micromix is strict: a
layer that is left alone or a fusion that is not made is an error ("passes off" excepted, where fusions are not).

More runs of each, under the profiler, tell the milliseconds a token in quantised products (`micromix::linear`,
`linears`, `weight_only_linear(s)`) and in other matrix products (the head's). "Else" is what is left of the time without
the profiler. The C++ wrapper calls the head's product without the dispatcher: its time is in "else" there.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from checks import check_close, facts, nothing_compiles, write_json
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache
from turns import in_turns

from micromix_compile import Recipe, calibrate, ops
from micromix_compile.evaluate import Decoder, decode_speed
from micromix_compile.models import builtin_text, load_smollm2
from micromix_compile.passes.fold_order import Folds

VARIANTS = ("inductor", "frozen", "passes off", "micromix", "head, off", "with head", "weight-only")
PLAIN = ("inductor", "frozen")
OFF = ("passes off", "head, off")
CPP = " + cpp"
BOUNDS = {True: 0.03, False: 0.6}  # of logits: plain, quantised
ALL = [*VARIANTS, *(name + CPP for name in VARIANTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=16, help="decode steps of each timing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt; 0: none")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model"
    )
    parser.add_argument("--variants", nargs="+", choices=ALL, default=ALL, metavar="NAME")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    # All variants share one code object: beyond Dynamo's limit the last ones would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    model, tokenizer = load_smollm2(getattr(torch, arguments.dtype))
    del model.model.layers[arguments.layers :]
    model.config.num_hidden_layers = arguments.layers
    ids = tokenizer(builtin_text()[:8000], return_tensors="pt").input_ids
    calibration = calibrate(model).run([ids[:, :512]])
    plans = {
        "micromix": calibration.plan(Recipe()),
        "with head": calibration.plan(Recipe(thresholds="published", include_lm_head=True)),
        "weight-only": calibration.plan(Recipe(thresholds="published", activations="bfloat16")),
    }
    plans |= dict(zip(OFF, (plans["micromix"], plans["with head"])))

    decoders, prefills, compile_seconds = {}, {}, {}
    for name in arguments.variants:
        compiled = torch.compile(model, **how(name, plans))
        decoders[name] = Decoder(model, compiled)
        with passes_of(name):
            began = time.perf_counter()
            decoders[name].feed(0)
            compile_seconds[name] = time.perf_counter() - began
    check(model, decoders, ids[0, :16].tolist())
    # Prompts after all decode steps: having seen another length of the cache, Dynamo would make theirs dynamic.
    if arguments.prefill:
        with torch.no_grad():
            prompt = ids[:, : arguments.prefill]
            expected_of_prompt = model(input_ids=prompt, logits_to_keep=1).logits
    for name in arguments.variants if arguments.prefill else ():
        prefills[name] = prefill(model, decoders[name].step, ids[:, : arguments.prefill])
        with passes_of(name):
            check_close(name, prefills[name](), expected_of_prompt, bound_of(name))

    threads = torch.get_num_threads()
    print(
        f"{arguments.layers} layers, {arguments.dtype}, {ops.kernel_name('cpu')}, "
        f"{threads} thread(s), torch {torch.__version__}"
    )
    results = {}
    print(
        f"{'decode':17s} {'tok/s':>7s} {'ratio':>6s} {'products':>9s} {'head':>7s} {'else':>7s}  (ms)"
    )
    with nothing_compiles():
        speeds = decode_speed(decoders, arguments.tokens, arguments.rounds, label=None)
    products = decode_parts(decoders, arguments.tokens, min(arguments.rounds, 5))
    for name, speed in speeds.items():
        parts = *products[name], 1e3 / speed.tokens_per_second - sum(products[name])
        times = " ".join(f"{t:{w}.2f}" for t, w in zip(parts, (9, 7, 7)))
        print(f"{name:17s} {speed.tokens_per_second:7.1f} {speed.ratio:5.2f}x {times}")
        results[name] = {"tokens_per_second": speed.tokens_per_second, "ratio": speed.ratio}
        results[name] |= dict(zip(("products_ms", "head_ms", "else_ms"), parts))
        results[name]["first_call_s"] = compile_seconds[name]
    if prefills:
        print(f"prefill of {arguments.prefill} tokens")
        with nothing_compiles():
            times = in_turns(prefills, arguments.rounds)
        for name, (seconds, ratio) in medians(times).items():
            print(f"{name:17s} {1e3 * seconds:7.1f} ms {ratio:5.2f}x")
            results[name] |= {"prefill_s": seconds, "prefill_ratio": ratio}
    if arguments.json:
        document = facts() | {"layers": arguments.layers, "prefill": arguments.prefill}
        document |= {"dtype": arguments.dtype, "kernel": ops.kernel_name("cpu")}
        write_json(arguments.json, document | {"rounds": arguments.rounds, "variants": results})


def how(name: str, plans: dict) -> dict:
    """The arguments of torch.compile for a variant."""
    options = {"cpp_wrapper": True} if name.endswith(CPP) else {}
    name = name.removesuffix(CPP)
    if name in PLAIN:
        return {"backend": "inductor", "options": options | {"freezing": name == "frozen"}}
    options["plan"] = plans[name]
    if name in OFF:
        options["post_grad_custom_pre_pass"] = None
    else:
        options["strict"] = True
    return {"backend": "micromix", "options": options}


def bound_of(name: str) -> float:
    """How far a variant's logits may be from the model's, relatively."""
    return BOUNDS[name.removesuffix(CPP) in PLAIN]


def check(model, decoders: dict[str, Decoder], tokens: list[int]) -> None:
    """Each variant's logits are the model's within its bound; the C++ wrapper changes no token."""

    def logits(decoder: Decoder) -> torch.Tensor:
        decoder.restart()
        arguments = {"past_key_values": decoder.cache, "use_cache": True}
        with torch.no_grad():
            steps = [
                decoder.step(input_ids=torch.tensor([[t]]), **arguments).logits for t in tokens
            ]
        return torch.cat(steps, 1).float()

    expected = logits(Decoder(model))
    for name, decoder in decoders.items():
        check_close(name, logits(decoder), expected, bound_of(name))
        base = decoders.get(name.removesuffix(CPP), decoder)
        if base.generate(tokens, 16) != decoder.generate(tokens, 16):
            raise RuntimeError(f"{name}: other tokens than without the C++ wrapper")


def passes_of(name: str) -> contextlib.AbstractContextManager:
    """Where a variant is to be compiled."""
    return passes_off() if name.removesuffix(CPP) in OFF else contextlib.nullcontext()


@contextlib.contextmanager
def passes_off() -> Iterator[None]:
    """Compile without the passes over Dynamo's graph; an option of Inductor leaves out the fusions."""
    alone = mock.patch(
        "micromix_compile.passes.lower_linears.shared_inputs",
        lambda linears: [[x] for x in linears],
    )
    unfolded = mock.patch("micromix_compile.backend.fold_orders", lambda *_: Folds())
    attention = mock.patch("micromix_compile.passes.between_layers.ATTENTION", ())
    again = mock.patch("micromix_compile.passes.between_layers.materialize_shared", lambda *_: 0)
    with alone, unfolded, attention, again:
        yield


def prefill(model, compiled, ids: torch.Tensor) -> Callable[[], object]:
    """A prompt written into an empty static cache, and the logits of its last token."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 64)
    arguments = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        model(input_ids=ids[:, :1], **arguments)  # the cache allocates itself outside of a graph

    def run() -> object:
        cache.reset()
        with torch.no_grad():
            return compiled(input_ids=ids, **arguments).logits

    return run


def medians(seconds: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Median seconds of each, and the median over rounds of the first one's seconds by its own."""
    base = seconds[next(iter(seconds))]
    return {
        name: (statistics.median(own), statistics.median(b / a for a, b in zip(own, base)))
        for name, own in seconds.items()
    }


def decode_parts(
    decoders: dict[str, Decoder], tokens: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds a token in our products and in other matrix products, medians of profiles taken in turns."""
    names = ("linear", "linears", "weight_only_linear", "weight_only_linears")
    products = tuple(f"micromix::{name}" for name in names)
    others = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            decoder.restart()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(tokens):
                    decoder.feed(0)
            spent = {event.key: event.cpu_time_total for event in profiler.key_averages()}
            sums = [sum(spent.get(key, 0) for key in keys) for keys in (products, others)]
            parts[name].append(tuple(1e-3 * us / tokens for us in sums))
    return {name: tuple(map(statistics.median, zip(*own))) for name, own in parts.items()}


if __name__ == "__main__":
    main()
