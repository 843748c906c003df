"""One decoder three ways: torch.compile, its package in a fresh Python process, and the runner without Python.

    micromix quantize smollm2 smollm2-mix --samples 8 --seqlen 1024
    micromix export smollm2-mix smollm2.pt2 --max-length 512
    python benchmarks/package_cpu.py smollm2-mix smollm2.pt2 [--new 64] [--rounds 5] [--json FILE]

Each round runs the three in turns, with greedy decoding from one prompt. It fails where the tokens differ. Ratios are
of decode speed to torch.compile's of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import micromix_compile  # makes the checkpoint's format known to transformers
from micromix_compile.evaluate import Decoder

RUNNER = Path(micromix_compile.__file__).parent / "_C" / "micromix_runner"

PACKAGE = """
import json, sys, time, torch, micromix_compile
path, tokens, new, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
began = time.perf_counter()
package = micromix_compile.load_package(path)
load = time.perf_counter() - began
stream = package.stream(torch.tensor([tokens]), max_new_tokens=new, eos_token_id=[-1])
found = [int(next(stream))]
began = time.perf_counter()
found += [int(token) for token in stream]
print(json.dumps({"tokens": found, "load_s": load, "rate": (new - 1) / (time.perf_counter() - began)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("package", type=Path)
    parser.add_argument("--prompt", default="The Microscaling formats share one exponent")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    ids = AutoTokenizer.from_pretrained(arguments.checkpoint)(arguments.prompt).input_ids
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
    decoder = Decoder(model, torch.compile(model, backend="micromix"))
    decoder.feed(ids[0])  # compiles

    ways = {"torch.compile": compiled, "package": package, "runner": runner}
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            runs[name].append(way(decoder, arguments.package, ids, arguments.new))
    expected = runs["torch.compile"][0]["tokens"]
    threads = torch.get_num_threads()
    size = arguments.package.stat().st_size / 1e6
    print(f"{size:.0f} MB, {len(expected)} tokens, {threads} thread(s), torch {torch.__version__}")
    print(f"{'':14s} {'tokens':>10s} {'load':>7s} {'tok/s':>7s} {'ratio':>6s}")
    results, same = {}, True
    for name, own in runs.items():
        equal = all(run["tokens"] == expected for run in own)
        same &= equal
        load = statistics.median(run["load_s"] for run in own)
        rate = statistics.median(run["rate"] for run in own)
        ratios = (a["rate"] / b["rate"] for a, b in zip(own, runs["torch.compile"]))
        ratio = statistics.median(ratios)
        said = "equal" if equal else "DIFFERENT"
        print(f"{name:14s} {said:>10s} {load:5.2f} s {rate:7.1f} {ratio:5.2f}x")
        results[name] = {"equal": equal, "load_s": load, "tokens_per_second": rate, "ratio": ratio}
    if arguments.json:
        facts = {"megabytes": size, "new": len(expected), "threads": threads, "ways": results}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if not same:
        sys.exit("the tokens differ")


def compiled(decoder: Decoder, path: Path, ids: list[int], new: int) -> dict:
    decoder.restart()
    for given in ids[:-1]:
        decoder.feed(given)
    tokens = [decoder.feed(ids[-1])]
    began = time.perf_counter()
    while len(tokens) < new:
        tokens.append(decoder.feed(tokens[-1]))
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "load_s": 0.0, "rate": (new - 1) / seconds}


def package(decoder: Decoder, path: Path, ids: list[int], new: int) -> dict:
    arguments = [str(path), json.dumps(ids), str(new), str(torch.get_num_threads())]
    command = [sys.executable, "-c", PACKAGE, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def runner(decoder: Decoder, path: Path, ids: list[int], new: int) -> dict:
    command = [RUNNER, path, "--tokens", " ".join(map(str, ids)), "--new", str(new)]
    command += ["--threads", str(torch.get_num_threads()), "--ignore-eos"]
    libraries = str(Path(torch.__file__).parent / "lib")
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    )
    return {
        "tokens": [int(token) for token in run.stdout.split()],
        "load_s": float(re.search(r"load: ([\d.]+) s", run.stderr)[1]),
        "rate": float(re.search(r"decode: .* ([\d.]+) tokens/s", run.stderr)[1]),
    }


if __name__ == "__main__":
    main()
