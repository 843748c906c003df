"""Loads the compiled extension (and, with a torch for CUDA, its CUDA kernels) and says what it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from micromix_compile.errors import ExtensionError
from micromix_compile.mx import WEIGHT_ONLY

from ._schemas import EMULATED, NAMESPACE, SCHEMAS

ABI = 7
"""What this Python code expects of the library: MICROMIX_ABI of csrc/abi.h."""

LIBRARY = Path(__file__).parent.parent / "_C" / "libmicromix.so"
CUDA_LIBRARY = LIBRARY.with_name("libmicromix_cuda.so")

_library: torch.library.Library | None = None  # holds the Python definitions, without the extension
_info: dict[str, str] = {}
_cuda_info: dict[str, str] = {}


def load() -> None:
    """Loads the extension, or defines the operators in Python where it was not built.

    The CUDA kernels are a second library, which only a torch for CUDA can load.
    Raises ExtensionError if a library is there and cannot be used.
    """
    global _library
    if not LIBRARY.exists():
        _library = torch.library.Library(NAMESPACE, "DEF")
        for name, schema in SCHEMAS.items():
            _library.define(name + schema)
        return
    _load_library(LIBRARY)
    _info.update(_checked_info(LIBRARY, "build_info"))
    _check_schemas()
    if torch.version.cuda and CUDA_LIBRARY.exists():
        _load_library(CUDA_LIBRARY)
        _cuda_info.update(_checked_info(CUDA_LIBRARY, "cuda_build_info"))


def _load_library(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = (
            f"it does not load into torch {torch.__version__} ({error.__cause__ or error}); "
            "it needs torch 2.11 or newer and the CPU architecture that it was built for"
        )
        raise ExtensionError(path=path, reason=reason) from error


def _checked_info(path: Path, function: str) -> dict[str, str]:
    """A library from other sources is refused before it is called with arguments it misreads."""
    ops = getattr(torch.ops, NAMESPACE)
    text = getattr(ops, function)() if hasattr(ops, function) else ""
    info = dict(line.split("=", 1) for line in text.splitlines())
    if info.get("abi") != str(ABI):
        reason = (
            f"it is build {info.get('build_id', 'unknown')} with ABI version {info.get('abi', 'unknown')}, "
            f"and this package needs ABI version {ABI}: they come from different sources"
        )
        raise ExtensionError(path=path, reason=reason)
    return info


def _check_schemas() -> None:
    ops = getattr(torch.ops, NAMESPACE)
    for name, schema in SCHEMAS.items():
        packet, _, overload = name.partition(".")
        built = getattr(getattr(ops, packet), overload or "default")._schema
        expected = torch._C.parse_schema(f"{NAMESPACE}::{name}{schema}")
        if built != expected:
            reason = (
                f"in its build {_info['build_id']} the operator is {built}, "
                f"and this package needs {expected}"
            )
            raise ExtensionError(path=LIBRARY, reason=reason)


def loaded() -> bool:
    """Whether the compiled extension is in use."""
    return bool(_info)


def build_info() -> dict[str, str]:
    """What the extension was built from and with; empty without it."""
    return dict(_info)


def cuda_build_info() -> dict[str, str]:
    """What the CUDA kernels were built from and for; empty where they are not loaded."""
    return dict(_cuda_info)


def build_id() -> str:
    """Identifies the kernels, for cache keys: a hash of the sources that were built in.

    Without the extension, a hash of the reference.
    """
    if loaded():
        cuda = [_cuda_info["build_id"], _cuda_info["architectures"]] if _cuda_info else []
        return "-".join((_info["build_id"], *cuda))
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted((LIBRARY.parent.parent / "mx").glob("*.py")):
        digest.update(path.read_bytes())
    return "reference-" + digest.hexdigest()[:16]


def cpu_isa() -> str:
    """The instruction set of the CPU kernels: portable, avx2, avx512, avx512_bf16 or amx; "none" without them.

    The best one of the machine, or what the environment variable MICROMIX_CPU_ISA says.
    Raises RuntimeError if that names one that is unknown or that the machine lacks.
    """
    return torch.ops.micromix.cpu_isa() if loaded() else "none"


def set_cpu_isa(name: str) -> str:
    """Changes the instruction set of the CPU kernels of this process; returns the one before.

    For tests and benchmarks. Raises RuntimeError as :func:`cpu_isa` does, and ExtensionError without
    the extension.
    """
    if not loaded():
        reason = "it was not built, so there is no instruction set to choose"
        raise ExtensionError(path=LIBRARY, reason=reason)
    return torch.ops.micromix.set_cpu_isa(name)


def _cuda_atoms(device: torch.device) -> str:
    """What a device is to the CUDA kernels: "native", "emulated" or "none" (csrc/cutlass/linear.cpp)."""
    if device.type != "cuda" or not _cuda_info:
        return "none"
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.ops.micromix.cuda_atoms(index)


def blackwell_kernel(device: torch.device | str, format: int = 0) -> str:
    """Which form of the Blackwell linear a CUDA device runs for a format code.

    "native" where the device has its instructions, "emulated" where the code says EMULATED and the
    device can, else "": it decodes the operands, or runs the reference.
    """
    atoms = _cuda_atoms(torch.device(device))
    wanted = atoms == "native" or (atoms == "emulated" and format & EMULATED)
    return atoms if wanted else ""


def decodes_operands(device: torch.device | str, format: int = 0) -> bool:
    """Whether a device runs products whose operands are decoded (csrc/cuda/decoded_linear.cpp) for a format code."""
    atoms = _cuda_atoms(torch.device(device))
    return atoms == "emulated" or (atoms == "native" and bool(format & WEIGHT_ONLY))


def kernel_name(device: torch.device | str, format: int = 0) -> str:
    """What runs the linear layers on a device: "cpu_amx", "cpu_avx512", ..., "cuda_sm120",
    "mx_emulated" (where the format code says EMULATED), "cuda_decoded" (operands decoded to bfloat16),
    or "reference"."""
    device = torch.device(device)
    if device.type == "cpu" and loaded():
        return f"cpu_{cpu_isa()}"
    blackwell = "" if format & WEIGHT_ONLY else blackwell_kernel(device, format)
    if blackwell == "native":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda_sm{major}{minor}"
    if blackwell:
        return "mx_emulated"
    return "cuda_decoded" if decodes_operands(device, format) else "reference"


def why_reference(device: torch.device) -> str:
    """Why a device has no kernel, for the warning."""
    if device.type == "cuda":
        if not _cuda_info:
            return "the CUDA kernels were not built (`make cuda` does it)"
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"the CUDA kernels were built for {_cuda_info['architectures']}, and none of that runs on "
            f"a GPU of compute capability {major}.{minor}"
        )
    if device.type != "cpu":
        return f"this build has no kernels for {device.type}"
    if os.environ.get("MICROMIX_CPU_ISA"):
        return "the extension was not built, so MICROMIX_CPU_ISA has no effect either"
    return "the extension was not built"
