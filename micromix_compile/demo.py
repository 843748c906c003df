"""`micromix demo`: SmolLM2-135M as it is, in MXFP8, MXFP4 and the MicroMix mix, side by side. Every figure is measured in the run.

As it is: in bf16, or, on a CPU for which torch has no fast bf16 products, in float32, and so is then what surrounds the quantised layers.

What is measured how, so that the table can be judged:

* perplexity: half of the built-in text, which calibration has not seen. The model as it is runs eagerly; the others run the lowered graph, with
  the same operators and weights as the decode graph, without Inductor around it (a second graph each would double the demo's time).
* weight bytes: of the decoder's linear layers, scales and padding counted. Embedding and output head stay as they are.
* decode: batch 1, static cache, one compiled step, the variants in turns.
* compile: from the first call of the step to its first token, caches empty; packing of the weights included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import micromix_compile as micromix
from micromix_compile import _torch_compat as compat
from micromix_compile.evaluate import (
    Decoder,
    DecodeSpeed,
    Perplexity,
    decode_speed,
    lowered,
    perplexity,
)
from micromix_compile.files import write_text
from micromix_compile.models import builtin_text, fast_dtype, halves, load_smollm2, token_windows
from micromix_compile.picture import draw
from micromix_compile.plan import ModelPlan

PROMPT = "Explain in one sentence what a compiler does."
_WINDOW = 512
_CALIBRATION_WINDOWS = 16
_TEST_WINDOWS = 24
_NEW_TOKENS = 40
_CACHE_TOKENS = 256


@dataclass
class Variant:
    """One row of the table. `plan` is None for the model as it is; what is measured is filled in as the demo goes."""

    name: str
    plan: ModelPlan | None
    perplexity: Perplexity | None = None
    weight_bytes: int = 0
    weight_bits: float = 16.0
    compile_seconds: float = 0.0
    text: str = ""
    speed: DecodeSpeed | None = None
    decoder: Decoder | None = field(default=None, repr=False)


def run(
    prompt: str = PROMPT,
    output: str | Path = "demo-output",
    dtype: torch.dtype | None = None,
) -> list[Variant]:
    """Run the demo; prints the table, writes `plan.png`, `results.json` and the plan to `output`, returns the rows.

    `dtype` is the model's: float32, bfloat16 or float16; None takes `fast_dtype()`.
    """
    chosen = dtype is None
    dtype = dtype or fast_dtype()
    base = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    began = time.perf_counter()

    def say(what: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:4.0f} s[/dim]  {what} ...")

    say(f"loading SmolLM2-135M in {base}")
    model, tokenizer = load_smollm2(dtype)
    seen, unseen = halves(builtin_text())
    calibration_windows = token_windows(tokenizer, seen, _WINDOW, _CALIBRATION_WINDOWS)
    windows = token_windows(tokenizer, unseen, _WINDOW, _TEST_WINDOWS)
    prompt_tokens = _prompt_tokens(tokenizer, prompt)

    say(f"calibrating on {calibration_windows.numel()} tokens of half of the built-in text")
    batches = [{"input_ids": window[None]} for window in calibration_windows]
    calibration = micromix.calibrate(model).run(batches)
    variants = [
        Variant(base, None, weight_bits=8.0 * dtype.itemsize),
        Variant("MXFP8", calibration.plan(micromix.Recipe(format="mxfp8"))),
        Variant("MXFP4", calibration.plan(micromix.Recipe(format="mxfp4"))),
        Variant("mix", calibration.plan(micromix.Recipe())),
    ]
    mix = variants[-1].plan
    elements = sum(shape.out_features * shape.in_features for shape in mix.shapes.values())
    variants[0].weight_bytes = elements * dtype.itemsize
    mix.save(output / "smollm2.micromix.safetensors")

    for variant in variants:
        say(f"{variant.name}: perplexity on {windows.numel()} tokens of the other half")
        with _lowered(model, variant.plan) as forward:
            variant.perplexity = perplexity(forward, windows, label=variant.name)

    # This starts the compiler's workers, whose start the first row would pay for otherwise.
    torch.compile(lambda x: x + 1)(torch.ones(1))
    for variant in variants:
        say(f"{variant.name}: compiling the decode step (about a minute) and generating")
        _compile(model, variant)
        tokens = variant.decoder.generate(prompt_tokens, _NEW_TOKENS, tokenizer.eos_token_id)
        variant.text = tokenizer.decode(tokens, skip_special_tokens=True).strip()

    say("decode speed, the variants in turns")
    speeds = decode_speed({variant.name: variant.decoder for variant in variants})
    for variant in variants:
        variant.speed = speeds[variant.name]

    write_text(output / "results.json", json.dumps(results(variants), indent=2) + "\n")
    draw(mix, points(variants), output / "plan.png")
    console.print(f"\n[bold]{prompt}[/bold]")
    for variant in variants:
        console.print(f"{variant.name:>6}: {variant.text}", markup=False)
    console.print()
    console.print(table(variants))
    console.print(_NOTE.format(base=base), style="dim")
    if chosen and dtype == torch.float32:
        console.print(_FLOAT32_NOTE, style="dim")
    rates = variants[0].speed.rates
    if max(rates) > 1.5 * min(rates):
        console.print(
            f"This machine was busy with other work: {base} decode varied from {min(rates):.1f} "
            f"to {max(rates):.1f} tok/s between rounds. Run it again on an idle one for speeds."
        )
    console.print(f"written: {output}/plan.png, results.json, smollm2.micromix.safetensors")
    console.print(f"the whole demo took {time.perf_counter() - began:.0f} s")
    return variants


def _prompt_tokens(tokenizer, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def _lowered(model, plan: ModelPlan | None) -> AbstractContextManager[Callable]:
    """What perplexity is measured with: the model as it is, or its lowered graph without Inductor."""
    if plan is None:
        return nullcontext(model)
    return lowered(model, {"plan": plan, "strict": True}, fullgraph=True)


def _compile(model, variant: Variant) -> None:
    """Compile the decode step of a variant, and time it. `fullgraph`: nothing may silently run uncompiled."""
    if variant.plan is None:
        step = torch.compile(model, fullgraph=True, dynamic=False)
    else:
        options = {"plan": variant.plan, "strict": True}
        step = torch.compile(
            model, backend="micromix", options=options, fullgraph=True, dynamic=False
        )
    variant.decoder = Decoder(model, step, max_tokens=_CACHE_TOKENS)
    with compat.fresh_compile_cache():
        began = time.perf_counter()
        variant.decoder.feed(0)
        variant.compile_seconds = time.perf_counter() - began
    if variant.plan is not None:
        variant.weight_bits = variant.plan.weight_bits
        lowered = [r for r in micromix.explain(step).layers.values() if not r.reason]
        variant.weight_bytes = sum(report.bytes_after for report in lowered)


_NOTE = (
    "Perplexity on half of the text that calibration has not seen, its difference to {base} ± "
    "standard error ({base} runs eagerly, the others their lowered graph without Inductor). "
    "MB: the decoder's linear layers in memory. bits: per weight, scales counted. tok/s: decode at "
    "batch 1, compiled, the median of turns, and its ratio to {base} of stock Inductor. compile: "
    "the first decode call with empty caches, packing included."
)

_FLOAT32_NOTE = (
    "fp32: torch has no fast bf16 products for this CPU (they need AVX-512), and is several times "
    "slower in bf16. --dtype bfloat16 runs the demo in it all the same."
)


def table(variants: list[Variant]) -> Table:
    """The table of the demo; the first variant is what the others are compared with."""
    base = variants[0]
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "perplexity", f"to {base.name}", "MB", "", "bits", "tok/s", "", "compile"):
        result.add_column(heading)
    for column in result.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for variant in variants:
        increase, error = variant.perplexity.increase_over(base.perplexity)
        result.add_row(
            variant.name,
            f"{variant.perplexity.value:.2f}",
            "" if variant is base else f"{increase:+.1%} ± {error:.1%}",
            f"{variant.weight_bytes / 1e6:.1f}",
            f"{variant.weight_bytes / base.weight_bytes:.0%}",
            f"{variant.weight_bits:.2f}",
            f"{variant.speed.tokens_per_second:.1f}",
            f"{variant.speed.ratio:.2f}x",
            f"{variant.compile_seconds:.0f} s",
        )
    return result


def results(variants: list[Variant]) -> dict:
    """The rows as plain values, with every loss and every round, for who wants to recompute the table."""
    return {
        variant.name: {
            "perplexity": variant.perplexity.value,
            "perplexity_standard_error": variant.perplexity.standard_error,
            "window_losses": variant.perplexity.losses,
            "weight_bytes": variant.weight_bytes,
            "weight_bits": variant.weight_bits,
            "decode_tokens_per_second": variant.speed.tokens_per_second,
            "decode_ratio": variant.speed.ratio,
            "decode_rounds": variant.speed.rates,
            "compile_seconds": variant.compile_seconds,
            "text": variant.text,
        }
        for variant in variants
    }


def points(variants: list[Variant]) -> list[tuple[str, float, float, float]]:
    """What the picture plots of each variant: name, bits per weight, perplexity, standard error of its difference to the first."""
    base = variants[0].perplexity
    return [
        (
            v.name,
            v.weight_bits,
            v.perplexity.value,
            base.value * v.perplexity.increase_over(base)[1],
        )
        for v in variants
    ]
