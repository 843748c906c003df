"""The Blackwell linear's own source on the host, with every address and every wait checked.

What is compared is the rounded float64 product, bit for bit where float32 sums are exact. Then the
test is tested: faults planted in the source must be caught.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile.mx import MixedLayout
from micromix_compile.ops._fakes import _blackwell_bytes

from .products import FORMATS, MIXES, Product
from .simulator import DTYPES, SOURCES, TILES, Simulator, compile_simulator


@pytest.fixture(scope="session")
def simulator(tmp_path_factory) -> Simulator:
    library = tmp_path_factory.mktemp("simulator") / "libsimulator.so"
    compile_simulator(SOURCES, library)
    return Simulator(library)


def faults(simulator, product, tile, splits=1, late=True, dtype=torch.bfloat16, **options) -> str:
    return product.fault(simulator.linear(product, tile, splits, late, dtype, **options), dtype)


def rows_of(tile: int) -> int:
    """A count of rows that leaves a tail in the tile, and where it is small a second tile."""
    return {16: 21, 32: 29, 64: 75, 128: 131}[tile]


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_exact_sums_are_exact(simulator, tile, mix, format6, weights, late):
    product = Product(rows_of(tile), [76], MixedLayout(*mix, format6=format6), weights)
    assert not faults(simulator, product, tile, late=late)


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("tile", TILES)
def test_all_codes_are_within_the_bar(simulator, tile, format6, weights):
    layout = MixedLayout(288, 160, 96, format6=format6)
    product = Product(rows_of(tile), [72], layout, weights, exact=False)
    for dtype in DTYPES:
        assert not faults(simulator, product, tile, dtype=dtype)


@pytest.mark.parametrize("tile", TILES)
def test_k_cut_in_ranges(simulator, tile):
    for splits in (2, 3, 7, 32):  # the last: more than there are stages
        product = Product(9, [76], MixedLayout(544, 160, 96), seed=splits)
        assert not faults(simulator, product, tile, splits)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("splits", [1, 2])
def test_several_weights_in_one_launch(simulator, tile, splits):
    product = Product(17, [40, 8, 130, 1], MixedLayout(128, 64, 32))
    assert not faults(simulator, product, tile, splits)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65])
def test_every_column_tail_and_dtype(simulator, n):
    product = Product(5, [n], MixedLayout(64, 32, 32))
    for dtype in DTYPES:
        for bias_dtype in DTYPES:
            assert not faults(simulator, product, 16, dtype=dtype, bias_dtype=bias_dtype)
    assert not faults(simulator, Product(5, [n], MixedLayout(64, 32, 32), bias=False), 16)


def test_no_channels_is_the_bias(simulator):
    assert not faults(simulator, Product(3, [16], MixedLayout(0, 0, 0)), 16)


def with_nans(product: Product) -> Product:
    """NaN scales in both operands, and NaN codes of E4M3, in a few rows."""
    product.scales[1, :] = 0xFF
    product.scales[3, -1] = 0xFF
    product.scales[4, 0] = 0xFF
    product.data[6, -1] = 0x7F
    for data, scales in product.weights:
        scales[2, 0] = 0xFF
        scales[5, -1] = 0xFF
        if product.weight_layout.k8:
            data[7, -1] = 0xFF
    return product


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("tile", TILES)
def test_nan_goes_where_it_must_and_nowhere_else(simulator, tile, format6, weights):
    for mix in ((32, 32, 32), (288, 160, 96)):
        layout = MixedLayout(*mix, format6=format6)
        product = with_nans(Product(rows_of(tile), [76], layout, weights))
        expected = product.expected(torch.bfloat16)[0].isnan()
        assert expected[1].all() and not expected[0, 0] and 0 < expected[0].sum() < 4
        assert not faults(simulator, product, tile)


@pytest.mark.parametrize("tile", TILES)
def test_extreme_scales(simulator, tile):
    """Products at the lower end of float32, and ordinary ones of scales at both ends."""
    product = Product(5, [64], MixedLayout(64, 64, 64), bias=False)
    product.scales[:] = 0
    product.weights[0][1][:32] = 254
    product.weights[0][1][32:] = 120
    assert not faults(simulator, product, tile, dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    tile=st.sampled_from(sorted(TILES)),
    m=st.integers(1, 140),
    n=st.integers(1, 90),
    blocks=st.tuples(*[st.integers(0, 12)] * 3),
    formats=st.sampled_from(FORMATS),
    splits=st.integers(1, 4),
    late=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_product(simulator, tile, m, n, blocks, formats, splits, late, seed):
    layout = MixedLayout(*(32 * b for b in blocks), format6=formats[0])
    product = Product(m, [n], layout, formats[1], seed=seed)
    assert not faults(simulator, product, tile, splits, late, torch.float32, seed=seed)


def test_the_placed_size_is_that_of_the_fake(simulator):
    for mix in MIXES:
        for n in (1, 8, 77):
            for _, weights in FORMATS:
                product = Product(1, [n], MixedLayout(*mix), weights)
                placed = simulator.place(*product.weights[0], product.arguments)
                assert placed.numel() == _blackwell_bytes(n, mix, product.weight_layout)


def test_the_tile_is_the_smallest_that_holds_the_rows(simulator):
    sizes = {id: rows for rows, id in TILES.items()}
    for m in (1, 16, 17, 32, 33, 64, 65, 128, 4096):
        assert sizes[simulator.tile_for(m)] == min((r for r in TILES if r >= m), default=128)


def test_k_is_cut_where_most_of_the_gpu_would_be_idle(simulator):
    assert simulator.splits_for(64, 32, 170) == 2  # 4096 columns: 64 tiles
    assert simulator.splits_for(8, 32, 170) == 8  # not below 4 stages each
    assert simulator.splits_for(100, 32, 170) == 1
    assert simulator.splits_for(1, 1000, 1000) == 32
    assert simulator.splits_for(1, 1, 170) == 1
    assert simulator.splits_for(0, 0, 170) == 1


# Each is one fault in the kernel: what it breaks, and a text of linear_kernel.h with what replaces it.
MUTANTS = {
    "swizzle of activations": (
        "stage + chunk_at<T>(row, chunk), p.data",
        "stage + row * T::kRowBytes + chunk * 16, p.data",
    ),
    "swizzle of the weight": (
        "chunk_at<T>(row, block * kHalves + half)",
        "chunk_at<T>(row ^ 4, block * kHalves + half)",
    ),
    "wait count": ("wait_copies<T::kStages - 2>()", "wait_copies<T::kStages - 1>()"),
    "barrier before a stage": ("barrier();                      //", "//"),
    "stage that is filled": ("load(t + T::kStages - 1)", "load(t + T::kStages)"),
    "lane of a row's scale": (
        "(lane >> 2) + (lane & 1) * 8",
        "(lane >> 2) + (lane >> 1 & 1) * 8",
    ),
    "lane of a column's scale": ("j * 8 + (lane >> 2);", "j * 8 + (lane & 7);"),
    "byte of the scales": ("kShift = kBlock % 4 * 8", "kShift = 0"),
    "word of the scales": ("kWord = kBlock / 4", "kWord = 0"),
    "shift of activations' scales": ("words[w + 1], 8 * start)", "words[w + 1], 0)"),
    "shift of the weight's scales": ("8 * (t * S::kBlocks % kScaleWord)", "0"),
    "order of segments": ("load_b<T, F, 2>(p, weight, stage, t - ends[1]", "load_b<T, F, 2>(p, weight, stage, t - ends[0]"),
    "format of a segment": ("load_a<T, F, 1>(p, stage", "load_a<T, F, 2>(p, stage"),
    "row tail": ("first_row + row < p.m && block", "block"),
    "scale tail": ("? of_row + segment.blocks - at : 0", "? 4 : 0"),
    "column tail": ("m >= p.m || n >= weight.n", "n >= weight.n"),
    "tail of eight columns": ("if (weight.n % 8 == 0)", "if (true)"),
    "half of an MMA": ("(lane & 15), chunk = 2 * step + (lane >> 4)", "(lane & 15), chunk = 2 * step"),
    "sum of the warps along K": ("k == 0 ? 0.0f : as_float", "true ? 0.0f : as_float"),
    "barrier between the warps along K": ("    barrier();\n  }\n\n#pragma", "  }\n\n#pragma"),
    "range of K": ("(block_z() + 1) / p.splits", "(block_z() + 2) / p.splits"),
    "weight of a tile": ("block_x() - weight.first_tile", "block_x()"),
}  # fmt: skip


def battery() -> list[tuple[Product, dict]]:
    """Few products that together reach everything."""
    products = []
    for tile, (format6, weights) in zip(TILES, FORMATS, strict=True):
        product = Product(tile + 5, [44, 8], MixedLayout(*MIXES[0], format6=format6), weights)
        products.append((product, {"tile": tile}))
    products.append((products[0][0], {"tile": 16, "late": False}))
    layout = MixedLayout(544, 160, 96)
    products.append((Product(9, [76], layout), {"tile": 16, "splits": 3}))
    products.append((with_nans(Product(21, [76], MixedLayout(32, 32, 32))), {"tile": 16}))
    return products


def survives(library: Path, cases, limit_s: float = 60) -> bool:
    """Whether a simulator passes, asked in a child: a mutant may hang, or worse."""
    child = os.fork()
    if child == 0:
        verdict = 1
        try:
            faulthandler.disable()  # a crash is a verdict
            torch.set_num_threads(1)  # the parent's threads are not here
            simulator = Simulator(library)
            verdict = int(any(faults(simulator, product, **where) for product, where in cases))
        finally:
            os._exit(verdict)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.fixture(scope="session")
def cases() -> list[tuple[Product, dict]]:
    return battery()


def test_the_battery_passes_what_is_right(tmp_path, cases):
    compile_simulator(SOURCES, tmp_path / "libsimulator.so", few=True)
    assert survives(tmp_path / "libsimulator.so", cases)


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_planted_fault_is_caught(tmp_path, cases, fault):
    before, after = MUTANTS[fault]
    for name in ("cutlass", "mx"):
        shutil.copytree(SOURCES / name, tmp_path / name)
    shutil.copy(SOURCES / "dtype.h", tmp_path)
    kernel = tmp_path / "cutlass" / "linear_kernel.h"
    source = kernel.read_text()
    assert source.count(before) == 1, "the text is not in the kernel once"
    kernel.write_text(source.replace(before, after))
    compile_simulator(tmp_path, tmp_path / "libmutant.so", few=True)
    assert not survives(tmp_path / "libmutant.so", cases)
