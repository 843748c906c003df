"""No kernel reads beyond its operands, or writes beyond its results and scratch: they lie flush
against pages that cannot be touched."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from micromix_compile import mx, ops
from micromix_compile.mx import MixedLayout

from .cases import arguments, rows
from .conftest import ISAS, usable_isas

NO_ACCESS = 0  # PROT_NONE, which mmap does not name
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last before an unreadable page. The memory is never freed."""
    pages = -(-max(tensor.nbytes, 1) // mmap.PAGESIZE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    access = mmap.PROT_READ | mmap.PROT_WRITE
    start = _libc.mmap(None, (pages + 1) * mmap.PAGESIZE, access, flags, -1, 0)
    end = start + pages * mmap.PAGESIZE
    assert _libc.mprotect(end, mmap.PAGESIZE, NO_ACCESS) == 0
    if tensor.nbytes == 0:
        return tensor
    buffer = (ctypes.c_char * tensor.nbytes).from_address(end - tensor.nbytes)
    copy = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def check(isa: str) -> None:
    ops.set_cpu_isa(isa)
    quantize, linear = torch.ops.micromix.quantize, torch.ops.micromix.linear
    place, weight_only = torch.ops.micromix.place_weight, torch.ops.micromix.weight_only_linear
    for counts in ((32, 0, 0), (0, 32, 0), (0, 0, 32), (64, 96, 32), (608, 32, 64), (1312, 0, 0)):
        for format6 in ("e2m3", "e3m2"):
            layout = MixedLayout(*counts, format6=format6)
            channels = layout.channels - 5
            order = torch.randperm(channels, dtype=torch.int32)
            order = guarded(torch.cat((order, torch.full((5,), -1, dtype=torch.int32))))
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for m in (1, 3):
                    x = guarded(rows(m, channels, dtype))
                    quantize(x, None, *arguments(layout))
                    quantize(x, order, *arguments(layout))
                    rest = (dtype, True, order, *arguments(layout))
                    channel = guarded(rows(1, channels, dtype)[0])
                    torch.ops.micromix.rms_norm_quantize(x, x, channel, 1e-6, 0, *rest)
                    torch.ops.micromix.layer_norm_quantize(x, x, channel, channel, 1e-6, *rest)
                    torch.ops.micromix.pointwise_quantize(x, x, 2, *rest)
            for m, n, weights in (
                (1, 1, "match"),
                (2, 33, "match"),
                (7, 17, "match"),
                (70, 33, "mxfp4"),
                (140, 9, "match"),
                (140, 48, "match"),
            ):
                own = layout.as_mxfp4() if weights == "mxfp4" else layout
                code = arguments(layout, weights)
                data, scales = mx.quantize(rows(m, layout.channels, torch.float32), layout)
                weight = mx.quantize(rows(n, layout.channels, torch.float32), own)
                placed = place(*(guarded(t) for t in weight), *code)
                bias = guarded(torch.randn(n))
                operands = (guarded(data), guarded(scales), guarded(placed), bias)
                for dtype in (torch.bfloat16, torch.float32):
                    linear(*operands, n, *code, dtype)
                    x = guarded(rows(m, channels, dtype))
                    for own_order in (None, order):
                        weight_only(x, own_order, *operands[2:], n, *code, dtype)
    check_attention()


def check_attention() -> None:
    for queries, keys, size in ((1, 1, 8), (1, 131, 64), (3, 40, 33), (50, 257, 48)):
        shapes = ((1, 6, queries, size), (1, 2, keys, size), (1, 2, keys, size + 8))
        operands = [guarded(torch.randn(shape).bfloat16()) for shape in shapes]
        float_mask = torch.randn(1, 6, queries, keys)
        for mask in (None, float_mask, float_mask.bfloat16(), float_mask > 0):
            guarded_mask = None if mask is None else guarded(mask)
            torch.ops.micromix.attention(*operands, guarded_mask, mask is None, 0.1)


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own: a step too far is a fault."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def guard_allocator(tmp_path_factory) -> str:
    """A library to preload, for results and scratch: guard_allocator.c says how it lays them out."""
    source = Path(__file__).with_name("guard_allocator.c")
    library = tmp_path_factory.mktemp("guard") / "guard_allocator.so"
    compiler = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC"]
    subprocess.run([*compiler, str(source), "-o", str(library)], check=True)
    return str(library)


@pytest.mark.parametrize("isa", ISAS)
def test_operands_results_and_scratch_end_where_memory_ends(isa, guard_allocator):
    if isa not in usable_isas():
        pytest.skip(f"this machine has no {isa}")
    program = f"from ops import test_bounds; test_bounds.check({isa!r}); print('in bounds')"
    result = run(program, LD_PRELOAD=guard_allocator)
    assert (result.returncode, result.stdout) == (0, "in bounds\n"), result.stderr


def test_the_guard_of_operands_works():
    program = (
        "import ctypes, torch; from ops.test_bounds import guarded; x = guarded(torch.zeros(64));"
        " ctypes.string_at(x.data_ptr(), x.nbytes + 1)"
    )
    assert run(program).returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    "offset, failure",
    [(100, "written 0 bytes beyond"), (127, "27 bytes beyond"), (128, ""), (-1, "written before")],
)
def test_the_guard_of_results_works(offset, failure, guard_allocator):
    program = (
        "import ctypes, torch; x = torch.empty(100, dtype=torch.uint8);"
        f" ctypes.memset(x.data_ptr() + {offset}, 1, 1); del x"
    )
    result = run(program, LD_PRELOAD=guard_allocator)
    expected = -signal.SIGABRT if failure else -signal.SIGSEGV
    assert result.returncode == expected and failure in result.stderr
