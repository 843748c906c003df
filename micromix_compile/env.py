"""``python -m micromix_compile.env [--json]``: versions, devices, and which kernels are present."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from micromix_compile import ops

PACKAGES = ("micromix-compile", "torch", "transformers", "accelerate", "optree", "safetensors")
CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
)
_INSTRUCTION_SETS = (
    *("sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "movbe", "popcnt", "adx", "aes", "pclmul"),
    *("vaes", "vpclmul", "gfni", "sha_ni", "lzcnt", "abm"),
)


def collect() -> dict[str, Any]:
    """The facts as nested dicts of plain values. Raises RuntimeError for a bad MICROMIX_CPU_ISA, as ops does."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cpu": {
            "machine": platform.machine(),
            "features": sorted(_cpu_features()),
            "threads": torch.get_num_threads(),
            "transparent_hugepages": _transparent_hugepages(),
        },
        "devices": {
            "cpu": ops.kernel_name("cpu"),
            **{
                f"cuda:{i} {torch.cuda.get_device_name(i)}": ops.kernel_name(f"cuda:{i}")
                for i in range(torch.cuda.device_count())
            },
        },
        "extension": {"loaded": ops.loaded(), **ops.build_info(), "build_id": ops.build_id()},
        "cuda extension": {"loaded": bool(ops.cuda_build_info()), **ops.cuda_build_info()},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MICROMIX_")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_flags() -> set[str]:
    """The instruction sets of the CPU, as Linux names them: what code for this very machine may use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return {flag for flag in next(lines, "").split() if flag.startswith(_INSTRUCTION_SETS)}


def _cpu_features() -> set[str]:
    """Those flags of the CPU that the kernels know how to use."""
    return cpu_flags() & set(CPU_FLAGS)


def _transparent_hugepages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text[text.index("[") + 1 : text.index("]")]


def show(as_json: bool = False) -> int:
    """Prints the facts, as a table or as JSON; returns the exit code: 1 where the kernels cannot be told."""
    try:
        facts = collect()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, values in facts.items():
        print(section)
        for key, value in values.items():
            print(f"  {key:<22} {' '.join(value) if isinstance(value, list) else value}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m micromix_compile.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return show(parser.parse_args(argv).json)


if __name__ == "__main__":
    sys.exit(main())
