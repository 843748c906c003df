"""What a benchmark makes sure of before and while it times: right results, and nothing compiled."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from micromix_compile.files import write_text

# Relative Frobenius error of a product of normally distributed numbers, half as much again as is usual.
BOUNDS = {
    "fp32": 1e-4,  # sums in another order
    "bf16": 0.004,  # the result's rounding
    "mxfp8": 0.06,
    "5.5": 0.18,
    "4.5": 0.24,
    "mxfp4": 0.24,
    "int8": 0.05,
    "int4": 0.2,
    "q4_0": 0.2,
}


def check_product(name: str, result: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError where a contender's result is not the float product within what its format, a word of its name, loses."""
    bound = next(bound for kind, bound in BOUNDS.items() if kind in name.split())
    check_close(name, result, expected, bound)


def check_close(name: str, result: Tensor, expected: Tensor, bound: float) -> None:
    if result.shape != expected.shape:
        raise RuntimeError(f"{name}: the result is {result.shape}, not {expected.shape}")
    wide = expected.double()
    error = ((result.double() - wide).norm() / wide.norm()).item()
    if not error <= bound:  # nor NaN
        raise RuntimeError(f"{name}: the result is wrong by {error:.3g}, more than {bound:.3g}")


@contextlib.contextmanager
def nothing_compiles() -> Iterator[None]:
    """Raises RuntimeError where Dynamo compiled something within: what was timed is not what was made."""
    before = counters["stats"]["unique_graphs"]
    yield
    compiled = counters["stats"]["unique_graphs"] - before
    if compiled:
        raise RuntimeError(f"{compiled} graphs were compiled while contenders were timed")


def facts() -> dict[str, object]:
    """What a table is of: the command, the day, torch, the processor, the threads."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "torch": torch.__version__,
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, document: dict) -> None:
    """In one step: a reader, or an end in between, finds the document before or this one."""
    write_text(path, json.dumps(document, indent=1) + "\n")
