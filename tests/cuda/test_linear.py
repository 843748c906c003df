"""micromix::linear, linears and place_weight on a CUDA device: native where it can, else emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile import ops
from micromix_compile.mx import MixedLayout
from micromix_compile.ops import EMULATED

from .products import FORMATS, MIXES, Product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = (1, 9, 16, 29, 61, 130)  # every tile, with tails
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_the_kernels_are_there():
    """So that no other test passes on the reference."""
    assert ops.cuda_build_info(), "make cuda"
    assert ops.blackwell_kernel("cuda", EMULATED) in ("native", "emulated")


def place(product: Product) -> list[torch.Tensor]:
    return product.place_on_gpu(EMULATED)


def run(product: Product, *dtypes: torch.dtype, placed=None) -> tuple[torch.Tensor, ...]:
    return product.on_gpu(*dtypes, placed=placed, bit=EMULATED)


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_exact_sums_are_exact(m, mix, format6, weights):
    product = Product(m, [76], MixedLayout(*mix, format6=format6), weights)
    assert not product.fault(run(product), torch.bfloat16)


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("m", ROWS)
def test_all_codes_are_within_the_bar(m, format6, weights):
    layout = MixedLayout(1568, 544, 480, format6=format6)
    product = Product(m, [200], layout, weights, exact=False)
    for dtype in DTYPES:
        assert not product.fault(run(product, dtype), dtype)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 65])
def test_every_column_tail_and_dtype(n):
    product = Product(5, [n], MixedLayout(64, 32, 32))
    for dtype in DTYPES:
        for bias_dtype in DTYPES:
            assert not product.fault(run(product, dtype, bias_dtype), dtype)
    product = Product(5, [n], MixedLayout(64, 32, 32), bias=False)
    assert not product.fault(run(product), torch.bfloat16)


@pytest.mark.parametrize("format6, weights", FORMATS)
@pytest.mark.parametrize("m", [9, 29, 61, 130])
def test_nan_goes_where_it_must_and_nowhere_else(m, format6, weights):
    product = Product(m, [76], MixedLayout(288, 160, 96, format6=format6), weights)
    product.scales[1, 2] = product.scales[3, -1] = product.scales[4, 0] = 0xFF
    product.data[6, -1] = 0x7F
    product.weights[0][1][2, 0] = product.weights[0][1][5, -1] = 0xFF
    assert 0 < product.expected(torch.bfloat16)[0].isnan().sum() < m * 76
    assert not product.fault(run(product), torch.bfloat16)


@pytest.mark.parametrize("m", [1, 100])
def test_extreme_scales(m):
    """Products at the lower end of float32, and ordinary ones of scales at both ends."""
    product = Product(m, [64], MixedLayout(64, 64, 64), bias=False)
    product.scales[:] = 0
    product.weights[0][1][:32] = 254
    product.weights[0][1][32:] = 120
    assert not product.fault(run(product, torch.float32), torch.float32)


@pytest.mark.parametrize("n", [(40, 8), (130, 1), (40, 8, 130), (1, 64, 72), (100, 0, 3)])
@pytest.mark.parametrize("m", [3, 200])
def test_several_layers(m, n):
    product = Product(m, list(n), MixedLayout(128, 64, 32))
    assert not product.fault(run(product), torch.bfloat16)


def test_a_large_product_cut_along_k_gives_the_same_bits_every_time():
    product = Product(8, [512], MixedLayout(3072, 1024, 512), exact=False)
    placed = place(product)
    first, *rest = (run(product, torch.float32, placed=placed)[0] for _ in range(5))
    assert not product.fault([first], torch.float32)
    assert all(torch.equal(first, other) for other in rest)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 300),
    n=st.integers(0, 300),
    blocks=st.tuples(*[st.integers(0, 20)] * 3),
    formats=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
)
def test_any_product(m, n, blocks, formats, seed):
    layout = MixedLayout(*(32 * b for b in blocks), format6=formats[0])
    product = Product(m, [n], layout, formats[1], seed=seed)
    assert not product.fault(run(product, torch.float32), torch.float32)


def test_placed_bytes_are_those_of_the_fake():
    for mix in MIXES:
        for _, weights in FORMATS:
            product = Product(1, [77], MixedLayout(*mix), weights)
            *counts, format = product.arguments
            expected = ops.placed_bytes(77, *counts, format | EMULATED, "cuda")
            assert place(product)[0].numel() == expected


def test_views_and_batches():
    product = Product(12, [64], MixedLayout(64, 32, 32))
    *counts, format = product.arguments
    (placed,) = place(product)
    bias = product.biases[0].cuda()
    expected = product.expected(torch.bfloat16)[0]

    wide = torch.zeros(12, product.data.shape[1] + 3, dtype=torch.uint8, device="cuda")
    wide[:, 3:] = product.data.cuda()
    flat = torch.zeros(product.scales.numel() + 1, dtype=torch.uint8, device="cuda")
    flat[1:] = product.scales.cuda().flatten()
    scales = flat[1:].view_as(product.scales)  # dense, and not aligned
    arguments = (placed, bias, 64, *counts, format | EMULATED, torch.bfloat16)
    assert torch.equal(torch.ops.micromix.linear(wide[:, 3:], scales, *arguments).cpu(), expected)
    data = product.data.cuda().view(3, 4, -1)
    found = torch.ops.micromix.linear(data, scales.view(3, 4, -1), *arguments)
    assert torch.equal(found.cpu(), expected.view(3, 4, 64))


def test_a_stream_and_a_cuda_graph():
    product = Product(8, [64], MixedLayout(512, 256, 256))
    *counts, format = product.arguments
    (placed,) = place(product)
    data, scales, bias = product.data.cuda(), product.scales.cuda(), product.biases[0].cuda()
    arguments = (placed, bias, 64, *counts, format | EMULATED, torch.bfloat16)
    static = torch.zeros_like(data)
    graph = torch.cuda.CUDAGraph()
    torch.ops.micromix.linear(static, scales, *arguments)
    with torch.cuda.graph(graph):
        found = torch.ops.micromix.linear(static, scales, *arguments)
    static.copy_(data)
    graph.replay()
    torch.cuda.synchronize()
    assert not product.fault([found], torch.bfloat16)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = data.clone()
        found = torch.ops.micromix.linear(late, scales, *arguments)
    stream.synchronize()
    assert not product.fault([found], torch.bfloat16)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_is_that_of_the_tensors():
    product = Product(8, [64], MixedLayout(64, 32, 32))
    *counts, format = product.arguments
    (data, scales), device = product.weights[0], "cuda:1"
    placed = torch.ops.micromix.place_weight(
        data.to(device), scales.to(device), *counts, format | EMULATED
    )
    found = torch.ops.micromix.linear(
        *(product.data.to(device), product.scales.to(device), placed),
        *(product.biases[0].to(device), 64, *counts, format | EMULATED, torch.bfloat16),
    )
    assert found.device == torch.device(device) and torch.cuda.current_device() == 0
    assert not product.fault([found], torch.bfloat16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": lambda t: t[:-1]}, "flat buffer of"),
        ({"weight": lambda t: t.cpu()}, "weight must be on the GPU"),
        ({"data": lambda t: t[:, :-1]}, "data must be"),
        ({"scales": lambda t: t[:-1]}, "scales must be"),
        ({"bias": lambda t: t[:-1]}, "bias must be"),
        ({"bias": lambda t: t.cpu()}, "bias must be"),
        ({"dtype": lambda _: torch.float64}, "must be bfloat16, float16 or float32"),
        ({"n": lambda _: -1}, "n must not be negative"),
    ],
)
def test_bad_arguments_are_clear_errors(change, message):
    product = Product(4, [24], MixedLayout(64, 32, 32))
    *counts, format = product.arguments
    arguments = {
        "data": product.data.cuda(),
        "scales": product.scales.cuda(),
        "weight": place(product)[0],
        "bias": product.biases[0].cuda(),
        "n": 24,
        **dict(zip(("k4", "k6", "k8"), counts, strict=True)),
        "format": format | EMULATED,
        "dtype": torch.bfloat16,
    }
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.micromix.linear(*arguments.values())


def test_opcheck():
    product = Product(5, [24], MixedLayout(64, 32, 32))
    *counts, format = product.arguments
    data, scales = (t.cuda() for t in product.weights[0])
    counts = (*counts, format | EMULATED)
    torch.library.opcheck(torch.ops.micromix.place_weight, (data, scales, *counts))
    torch.library.opcheck(
        torch.ops.micromix.linear,
        (product.data.cuda(), product.scales.cuda(), place(product)[0], None, 24, *counts)
        + (torch.bfloat16,),
    )
