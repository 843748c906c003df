"""A decoder's package on a GPU beside torch.compile, both with CUDA graphs: a Llama as wide as an 8B one, in one process.

    python benchmarks/package_cuda.py [--layers 4] [--new 64] [--rounds 7] [--json FILE]

Needs torch 2.12 or newer. Weights are random: speed does not depend on them. Each way reads one prompt of 9 tokens and
decodes greedily; milliseconds are of a new token, the prompt's among them:

    inductor           bf16 under torch.compile(mode="reduce-overhead")
    torch.compile      the mix at 4.5 bits of decode_cuda.py, the same way
    package            the mix, `generate` of what export_decoder wrote
    package, launched  the same without the CUDA graph of its steps

The package's own check is its logits against those of the same weights under torch.compile. A ratio is the median of
the rounds' ratios to the first. What the exports and the load took is printed beside.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from checks import check_close, facts, nothing_compiles, write_json
from decode_cuda import MIX, cache_of, random_llama
from turns import in_turns

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate

ROOM = 512  # tokens of a cache
# Of logits: attention is torch's own there and over the whole cache here, and roundings grow from layer to layer.
BOUND = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    model = random_llama(arguments.layers)
    prompt = torch.randint(model.config.vocab_size, (1, 9), device="cuda")
    plan = calibrate(model).run([prompt.repeat(1, 32)]).plan(Recipe(**MIX))
    results = facts() | {"device": torch.cuda.get_device_name(), "layers": arguments.layers}
    print(f"{results['device']}, torch {torch.__version__}, {arguments.layers} layers", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder, "llama.pt2"), time.perf_counter()
        micromix.export_decoder(model, path, plan=plan, max_length=ROOM)
        results |= {"export_s": time.perf_counter() - began, "bytes": path.stat().st_size}
        began = time.perf_counter()
        package, launched = micromix.load_package(path), micromix.load_package(path)
        results["load_s"] = (time.perf_counter() - began) / 2
    launched.entries["decode"].captures = False
    print(
        f"a package of {results['bytes'] / 1e9:.2f} GB: exported in {results['export_s']:.0f} s, "
        f"loaded in {results['load_s']:.1f} s"
    )

    graphs = {"mode": "reduce-overhead"}
    options = {"plan": plan, "strict": True}
    runs = {
        "inductor": decoding(model, torch.compile(model, **graphs), prompt, arguments.new),
        "torch.compile": decoding(
            model,
            compiled := torch.compile(model, backend="micromix", options=options | graphs),
            prompt,
            arguments.new,
        ),
        "package": generating(package, prompt, arguments.new),
        "package, launched": generating(launched, prompt, arguments.new),
    }
    with torch.inference_mode():
        for run in runs.values():
            for _ in range(3):  # compiles, records, replays
                run()
        cache = cache_of(model, 1, ROOM)
        cache.reset()
        torch.compiler.cudagraph_mark_step_begin()
        expected = compiled(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1]
        check_close("package", package(prompt, 0, package.new_cache()), expected, BOUND)
        if not torch.equal(runs["package"](), runs["package, launched"]()):
            raise RuntimeError("the package's graph gives other tokens than its launches")
        with nothing_compiles():
            seconds = in_turns(runs, arguments.rounds)
    results["ways"] = {}
    for name, own in seconds.items():
        ms = 1e3 * statistics.median(own) / arguments.new
        ratio = statistics.median(b / a for a, b in zip(own, seconds["inductor"]))
        results["ways"][name] = {"ms": ms, "ratio": ratio}
        print(f"{name:20s} {ms:7.3f} ms {ratio:6.2f}x", flush=True)
    if arguments.json:
        write_json(arguments.json, results)


def decoding(model, step: Callable, prompt: torch.Tensor, new: int) -> Callable[[], torch.Tensor]:
    """Greedy tokens after a prompt, over one static cache."""
    cache = cache_of(model, 1, ROOM)

    def run() -> torch.Tensor:
        cache.reset()
        tokens, found = prompt, []
        for _ in range(new):
            torch.compiler.cudagraph_mark_step_begin()
            logits = step(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1:].argmax(-1)
            found.append(tokens)
        found = torch.cat([prompt, *found], dim=1)
        torch.cuda.synchronize()
        return found

    return run


def generating(package, prompt: torch.Tensor, new: int) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        found = package.generate(prompt, new, eos_token_id=[])
        torch.cuda.synchronize()
        return found

    return run


if __name__ == "__main__":
    main()
