"""No kernel reads beyond its operands: each lies flush against a page that cannot be read."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

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
    for counts in ((32, 0, 0), (0, 32, 0), (0, 0, 32), (64, 96, 32), (608, 32, 64)):
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
            for m, n, weights in (
                (1, 1, "match"),
                (7, 17, "match"),
                (70, 33, "mxfp4"),
                (140, 9, "match"),
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


@pytest.mark.parametrize("isa", ISAS)
def test_operands_end_where_memory_ends(isa):
    if isa not in usable_isas():
        pytest.skip(f"this machine has no {isa}")
    # In a process of its own: a read too far is a fault.
    program = f"from ops import test_bounds; test_bounds.check({isa!r}); print('in bounds')"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=__file__.rsplit("/", 2)[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "in bounds\n"), result.stderr


def test_the_guard_works():
    program = (
        "import ctypes, torch; from ops.test_bounds import guarded; x = guarded(torch.zeros(64));"
        " ctypes.string_at(x.data_ptr(), x.nbytes + 1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=__file__.rsplit("/", 2)[0],
        capture_output=True,
        check=False,
    )
    assert result.returncode < 0
