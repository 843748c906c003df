"""Products of decoded operands, as far as no thread waits for another, on the host: placing a weight,
decoding it to memory, finishing sums. The kernels' own source, with g++ and stand-ins for CUDA (host/)."""

from __future__ import annotations

import ctypes
import os
import subprocess
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from micromix_compile import mx
from micromix_compile.mx import MixedLayout
from micromix_compile.ops._fakes import _decoded_bytes

from .products import FORMATS, MIXES, Product
from .simulator import SOURCES

HOST = Path(__file__).with_name("host")
STAND_INS = ("cuda_runtime_api.h", "early_launch.h", "vectors.cuh")
KERNELS = ("decode.cu", "place_decoded.cu")
HEADERS = ("arranged_codes.h", "decode.h", "decode.cuh", "decoded_weight.h")
PAIRS = [0, 4, 1, 5, 2, 6, 3, 7]  # the order of eight decoded channels


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/ with the stand-ins in their places."""
    root = tmp_path_factory.mktemp("decoded")
    cuda = root / "cuda"
    cuda.mkdir()
    for name in ("mx", "dtype.h"):
        (root / name).symlink_to(SOURCES / name)
    for name in (*KERNELS, *HEADERS):
        (cuda / name).symlink_to(SOURCES / "cuda" / name)
    for name in (*STAND_INS, "decoded.cpp"):
        (cuda / name).symlink_to(HOST / name)
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
    command += [f"-I{cuda}", "-x", "c++", *(str(cuda / name) for name in (*KERNELS, "decoded.cpp"))]
    subprocess.run([*command, "-o", str(root / "decoded.so")], check=True)
    loaded = ctypes.CDLL(str(root / "decoded.so"))
    loaded.placed_bytes.restype = c_int64
    loaded.placed_bytes.argtypes = [*[c_int64] * 4, c_int]
    loaded.place_and_decode.argtypes = [*[c_void_p] * 3, *[c_int64] * 4, c_int, *[c_void_p] * 2]
    loaded.finish_sums.argtypes = [*[c_void_p] * 4, c_int64, c_int64, c_void_p]
    return loaded


def largest_of(scales: torch.Tensor) -> torch.Tensor:
    return scales.where(scales != 0xFF, 0).amax(1)


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("n", [1, 16, 17, 76])
def test_a_weight_is_placed_and_decoded(library, n, mix, format6, weights):
    product = Product(1, [n], MixedLayout(*mix, format6=format6), weights, exact=False)
    layout, (data, scales) = product.weight_layout, product.weights[0]
    scales[0, 0], scales[-1, -1] = 0xFF, 1
    nan = layout.counts[2] > 0
    if nan:
        data[n // 2, -1] = 0xFF  # a NaN of E4M3: its block's scale says so
    counts = (*layout.counts, layout.code)
    size = library.placed_bytes(n, *counts)
    assert size == _decoded_bytes(n, layout)
    placed, largest = torch.zeros(size, dtype=torch.uint8), largest_of(scales)
    values = torch.zeros(n, layout.channels, dtype=torch.bfloat16)
    rows = (t.data_ptr() for t in (data, scales, largest))
    library.place_and_decode(*rows, n, *counts, placed.data_ptr(), values.data_ptr())
    found = torch.empty(n, layout.channels // 8, 8, dtype=torch.float64)
    found[..., PAIRS] = values.double().view(found.shape)
    found = found.view(n, -1) * 2.0 ** (largest.double()[:, None] - 127)
    expected = mx.dequantize(data, scales, layout).double()
    if nan:
        expected[n // 2, -mx.BLOCK :] = torch.nan
    assert torch.equal(found.nan_to_num(7e99), expected.nan_to_num(7e99))


def test_sums_are_finished(library):
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(5, 9, generator=generator)
    rows, columns = (torch.randint(256, (n,), generator=generator) for n in (5, 9))
    rows[0], columns[:3] = 254, torch.tensor([0, 127, 128])
    bias, out = torch.randn(9, generator=generator), torch.empty(5, 9)
    bytes_of = [t.to(torch.uint8) for t in (rows, columns)]
    pointers = (t.data_ptr() for t in (sums, *bytes_of, bias))
    library.finish_sums(*pointers, 5, 9, out.data_ptr())
    powers = rows.double()[:, None] + columns.double() - 254
    expected = (sums.double() * 2.0**powers + bias.double()).float()
    assert torch.equal(out, expected)
