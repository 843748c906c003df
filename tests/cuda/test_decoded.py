"""micromix::linear and linears on a CUDA device without block-scaled instructions: operands decoded to bfloat16."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile import mx, ops
from micromix_compile.errors import ReferenceKernelWarning
from micromix_compile.mx import MixedLayout
from micromix_compile.ops import EMULATED

from .products import FORMATS, LINEARS, MIXES, Product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Up to 16 rows have a kernel of their own, more have tiles of 32, 64, 128 and 256 on Hopper.
ROWS = (1, 8, 9, 16, 17, 33, 65, 130, 257)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def decodes():
    """Nothing here is to run on another kernel, and least of all on the reference."""
    if ops.blackwell_kernel("cuda") == "native":
        pytest.skip("this device runs the Blackwell kernel")
    assert ops.kernel_name("cuda") == "cuda_decoded", "make cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceKernelWarning)
        yield


def test_the_emulated_kernel_is_another():
    assert ops.kernel_name("cuda", EMULATED) == "mx_emulated"


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_exact_sums_are_exact(m, mix, format6, weights):
    product = Product(m, [76], MixedLayout(*mix, format6=format6), weights)
    assert not product.fault(product.on_gpu(), torch.bfloat16)


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("m", ROWS)
def test_all_codes_are_within_the_bar(m, format6, weights):
    layout = MixedLayout(1568, 544, 480, format6=format6)
    product = Product(m, [200], layout, weights, exact=False)
    for dtype in DTYPES:
        assert not product.fault(product.on_gpu(dtype), dtype)


@pytest.mark.parametrize("m", [5, 20])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 65, 127, 129])
def test_every_column_tail_and_dtype(m, n):
    product = Product(m, [n], MixedLayout(64, 32, 32))
    for dtype in DTYPES:
        for bias_dtype in DTYPES:
            assert not product.fault(product.on_gpu(dtype, bias_dtype), dtype)


@given(
    m=st.integers(0, 300),
    n=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    blocks=st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)),
    kind=st.sampled_from(FORMATS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(m, n, blocks, kind, bias, seed):
    layout = MixedLayout(*(32 * b for b in blocks), format6=kind[0])
    product = Product(m, n, layout, kind[1], bias=bias, seed=seed)
    assert not product.fault(product.on_gpu(), torch.bfloat16)


@pytest.mark.parametrize("m", [20, 60, 120, 250, 600])
@pytest.mark.parametrize("n", [128, 4096, 20000])
def test_long_rows(m, n):
    """Many steps of K, in 8 parts to 1: every stage of the rings is used again."""
    product = Product(m, [n], MixedLayout(2048 + 32, 512 + 32, 256 + 64), exact=False)
    assert not product.fault(product.on_gpu(), torch.bfloat16)


@pytest.mark.parametrize("mix", [(288, 32, 64), (2048, 160, 64)], ids=str)
@pytest.mark.parametrize("m", [20, 40, 100, 500])
def test_more_tiles_than_run_at_once(m, mix):
    """On Hopper thread blocks stay for several of them: of rows that end with a tile or not, and of results that are
    stored 16 bytes at a time or one by one."""
    product = Product(m, [17048, 16900, 17024], MixedLayout(*mix))
    for dtype in (torch.bfloat16, torch.float16):
        assert not product.fault(product.on_gpu(dtype), dtype)


@pytest.mark.parametrize(
    "n", [(300, 40, 17000), (1024, 8, 136), (0, 256, 0), (2560, 8448)], ids=str
)
@pytest.mark.parametrize("m", [3, 12, 20, 40, 100, 300])
def test_layers_that_share_a_launch(m, n):
    product = Product(m, n, MixedLayout(288, 160, 96))
    for dtype in (torch.bfloat16, torch.float32):
        assert not product.fault(product.on_gpu(dtype), dtype)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_placed_bytes_are_those_of_the_fake(mix):
    for _, weights in FORMATS:
        product = Product(1, [77], MixedLayout(*mix), weights)
        (placed,) = product.place_on_gpu()
        assert placed.numel() == ops.placed_bytes(77, *product.arguments, "cuda")


def test_a_weight_that_is_decoded_in_parts():
    """128 MiB at a time, where it is decoded to memory: of 8192 channels, 8192 rows."""
    product = Product(20, [8200], MixedLayout(8192, 0, 0), exact=False)
    assert not product.fault(product.on_gpu(), torch.bfloat16)


@pytest.mark.parametrize("m", [6, 40])
@pytest.mark.parametrize("low, high", [(0, 9), (100, 160), (246, 255)])
def test_scales_at_the_ends_of_their_range(m, low, high):
    """Rows of tiny numbers meet rows of huge ones: results lie where float32 holds them."""
    product = Product(m, [40], MixedLayout(64, 32, 32), bias=False)
    generator = torch.Generator().manual_seed(0)
    shape = product.scales.shape
    product.scales = torch.randint(low, high, shape, generator=generator).to(torch.uint8)
    data, scales = product.weights[0]
    scales = torch.randint(254 - high + 1, 255 - low, scales.shape, generator=generator)
    product.weights = [(data, scales.to(torch.uint8))]
    product.exact = False
    assert not product.fault(product.on_gpu(torch.float32), torch.float32)


@pytest.mark.parametrize("m", [4, 20])
def test_nan_scales_and_elements_are_nan(m):
    product = Product(m, [24], MixedLayout(64, 32, 64))
    product.scales[1, 0] = 0xFF
    product.scales[2, :] = 0xFF
    product.weights[0][1][5, 3] = 0xFF
    product.data[3, -1] = 0x7F
    product.weights[0][0][9, -1] = 0x7F
    product.weights[0][0][20, -64] = 0xFF
    (found,) = product.on_gpu()
    assert not product.fault([found], torch.bfloat16)
    others = torch.cat((found[:1], found[4:]))
    assert found[1:4].isnan().all() and others.isnan().sum() == 3 * len(others)
    assert others[:, [5, 9, 20]].isnan().all()


def test_views_and_leading_dimensions():
    product = Product(6, [24], MixedLayout(64, 32, 32))
    wide = torch.cat((product.data, product.data), dim=1).cuda()
    assert not product.fault(product.on_gpu(data=wide[:, : product.data.shape[1]]), torch.bfloat16)
    *counts, code = product.arguments
    found = torch.ops.micromix.linear(
        product.data.cuda().view(2, 3, -1),
        product.scales.cuda().view(2, 3, -1),
        *(product.place_on_gpu()[0], product.biases[0].cuda(), 24, *counts, code, torch.bfloat16),
    )
    assert found.shape == (2, 3, 24)
    assert not product.fault([found.view(6, 24)], torch.bfloat16)


def test_a_cuda_graph_and_another_stream():
    product = Product(5, [40, 24], MixedLayout(96, 32, 32), exact=False)
    expected = product.on_gpu()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = product.on_gpu()
    torch.cuda.synchronize()
    data, scales = product.data.cuda(), product.scales.cuda()
    placed, biases = product.place_on_gpu(), [bias.cuda() for bias in product.biases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = itertools.chain(*zip(placed, biases, product.n, strict=True))
        captured = LINEARS[2](data, scales, *layers, *product.arguments, torch.bfloat16)
    graph.replay()
    for found in (on_stream, captured):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_largest_numbers_are_not_lost_on_the_way():
    """A block of ones at scale 2^127 beside one at 2^-127: the first is exact, the second far below."""
    layout = MixedLayout(64, 0, 0)
    ones = torch.full((1, 32), 0x22, dtype=torch.uint8)  # two codes of 1.0 a byte
    scales = torch.tensor([[254, 0]], dtype=torch.uint8)
    small = torch.tensor([[60, 60]], dtype=torch.uint8)
    counts = (64, 0, 0, layout.code)
    placed = torch.ops.micromix.place_weight(ones.cuda(), small.cuda(), *counts)
    found = torch.ops.micromix.linear(
        ones.cuda(), scales.cuda(), placed, None, 1, *counts, torch.float32
    )
    expected = mx.linear(ones, scales, ones, small, layout, layout, None, torch.float32)
    assert found.cpu() == expected == 2.0**65


def test_a_weight_may_start_anywhere():
    product = Product(5, [76], MixedLayout(64, 32, 32))
    data, scales = product.weights[0]
    flat = torch.zeros(data.numel() + 1, dtype=torch.uint8, device="cuda")
    flat[1:] = data.flatten().cuda()
    placed = torch.ops.micromix.place_weight(
        flat[1:].view_as(data), scales.cuda(), *product.arguments
    )
    assert torch.equal(placed, product.place_on_gpu()[0])


def rows_of_powers(rows: int, codes: list[int], scales: list[int]):
    """Packed MXFP4: in each row, blocks of 32 times the same code under these scales, on the GPU."""
    data = torch.tensor([code * 0x11 for code in codes], dtype=torch.uint8)
    bytes = torch.tensor(scales, dtype=torch.uint8)
    data, bytes = data.repeat_interleave(16).expand(rows, -1), bytes.expand(rows, -1)
    return data.contiguous().cuda(), bytes.contiguous().cuda()


ONE = 2  # the code of 1.0


@pytest.mark.parametrize("n", [300, 304, 17000])
@pytest.mark.parametrize("m", [1, 12, 20, 130, 250])
@pytest.mark.parametrize(
    "codes, scales, columns, of_columns, expected",
    [
        # Ones at 2^127 meet zeros on either side.
        ([ONE, 0], [254, 0], [0, ONE], [0, 254], 0.0),
        # The sum, 2^8, is within the type times both powers, and beyond it times one of them.
        ([ONE] * 8, [117] * 8, [ONE] * 8, [254] * 8, 2.0**125),
        # The same for what is too small.
        ([0, ONE], [254, 150], [ONE, ONE], [0, 0], 2.0**-99),
    ],
    ids=["zero", "large", "small"],
)
def test_powers_meet_in_any_order(m, n, codes, scales, columns, of_columns, expected):
    layout = MixedLayout(32 * len(codes), 0, 0)
    counts = (layout.k4, 0, 0, layout.code)
    placed = torch.ops.micromix.place_weight(*rows_of_powers(n, columns, of_columns), *counts)
    found = torch.ops.micromix.linear(
        *rows_of_powers(m, codes, scales), placed, None, n, *counts, torch.bfloat16
    )
    assert torch.equal(found.cpu(), torch.full((m, n), expected, dtype=torch.bfloat16))
