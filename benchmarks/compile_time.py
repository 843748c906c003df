"""Compile time of SmolLM2: stock Inductor, micromix with its passes off, and micromix.

    python benchmarks/compile_time.py [--layers 30] [--rounds 1]

Each variant is compiled for one decode step over a static cache, without any earlier kernel on disk, in turns
(A B C A B C). Weights are packed before. What the compiled steps cost is in decode_cpu.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from micromix_compile import Recipe, calibrate, explain
from micromix_compile._torch_compat import fresh_compile_cache
from micromix_compile.evaluate import Decoder
from micromix_compile.models import builtin_text, load_smollm2

VARIANTS = {
    "inductor": {"backend": "inductor"},
    "passes off": {"backend": "micromix", "options": {"post_grad_custom_pre_pass": None}},
    "micromix": {"backend": "micromix"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1, help="compilations of each variant")
    arguments = parser.parse_args()

    model, tokenizer = load_smollm2()
    del model.model.layers[arguments.layers :]
    model.config.num_hidden_layers = arguments.layers
    ids = tokenizer(builtin_text()[:4000], return_tensors="pt").input_ids[:, :512]
    calibrate(model).run([ids]).plan(Recipe(split=(0.6, 0.3, 0.1))).attach(model)

    began = time.perf_counter()
    decoder(model, {"backend": "micromix", "options": {"inductor": False}}).feed(0)
    print(f"weights packed, with one trace, in {time.perf_counter() - began:.1f} s")

    with fresh_compile_cache():  # what a process does at its first compilation alone
        torch.compile(torch.nn.Linear(8, 8), backend="inductor")(torch.ones(1, 8))
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        torch.compiler.reset()
        decoders = {}
        for name, how in VARIANTS.items():
            decoders[name] = decoder(model, how)
            began = time.perf_counter()
            with fresh_compile_cache():
                decoders[name].feed(0)
            seconds[name].append(time.perf_counter() - began)
    print(dict(explain(model).passes))

    print(f"{'':12s} {'compile':>9s} {'ratio':>6s}")
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["inductor"]))
        print(f"{name:12s} {statistics.median(own):7.1f} s {ratio:6.2f}")


def decoder(model, how) -> Decoder:
    return Decoder(model, torch.compile(model, **how))


if __name__ == "__main__":
    main()
