"""The CUDA quantise kernels: bit for bit against the reference of micromix_compile.mx, and values against float64."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from micromix_compile import mx
from micromix_compile.mx import MixedLayout
from micromix_compile.ops import kernel_name
from micromix_compile.ops.fused import Pointwise, RmsForm

from .cases import (
    DTYPES,
    MIXES,
    RULES,
    VIEWS,
    arguments,
    mix_name,
    new_rows,
    rows,
    without_and_with_order,
)
from .test_fused import EPS, REFERENCES, assert_read_as_dense, assert_value, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
micromix = torch.ops.micromix

FORMATS = {
    "mxfp4": lambda k, rules: MixedLayout(k, 0, 0, rules=rules),
    "mxfp6_e2m3": lambda k, rules: MixedLayout(0, k, 0, "e2m3", rules),
    "mxfp6_e3m2": lambda k, rules: MixedLayout(0, k, 0, "e3m2", rules),
    "mxfp8": lambda k, rules: MixedLayout(0, 0, k, rules=rules),
}


@pytest.fixture(autouse=True)
def kernels():
    """A device whose kernels were not built is a failure, not a run of the reference."""
    assert kernel_name("cuda") != "reference", "run `make cuda`"


def mixed(k: int, format6: str = "e2m3", extra: int = 0) -> MixedLayout:
    """About half MXFP4, a quarter of each other format, and `extra` blocks of padding."""
    blocks = -(-k // 32) + extra
    k6, k8 = (32 * (blocks // 4) for _ in range(2))
    return MixedLayout(32 * blocks - k6 - k8, k6, k8, format6)


def random_order(k: int, layout: MixedLayout, seed: int = 2) -> torch.Tensor:
    """A permutation of k channels, with the padding anywhere between them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.full((layout.channels,), -1, dtype=torch.int32)
    places = torch.randperm(layout.channels, generator=generator)[:k]
    order[places] = torch.randperm(k, generator=generator).int()
    return order.cuda()


def assert_same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def check(x: torch.Tensor, layout: MixedLayout, order: torch.Tensor | None = None) -> None:
    assert_same(micromix.quantize(x, order, *arguments(layout)), mx.quantize(x, layout, order))


def check_quantised(y, quantised, order, layout) -> None:
    assert_same(quantised, mx.quantize(y, layout, order))


def check_kept(x: torch.Tensor, layout: MixedLayout, order: torch.Tensor | None = None) -> None:
    """The same by the kernels that also keep the value: they are those of few rows."""
    y, *quantised = micromix.pointwise_quantize(
        x, None, Pointwise.CAST, x.dtype, True, order, *arguments(layout)
    )
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    check_quantised(x, quantised, order, layout)


def with_and_without_order(k: int, **extra):
    """Two quantises of k channels, the second one without an order, in another layout."""
    first, second = mixed(k), mixed(k, "e3m2", **extra)
    return (random_order(k, first), first), (None, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FORMATS)
def test_random_bits(name, rule, dtype):
    """2^17 blocks of each format, rule and type: 1.2 million of each format, half of them of wild exponents."""
    k = 1024
    layout = FORMATS[name](k, (rule,) * 3)
    generator = torch.Generator("cuda").manual_seed(1)
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    limits = torch.iinfo(integer)
    x = torch.randint(
        limits.min, limits.max + 1, (4096, k), generator=generator, device="cuda", dtype=torch.int64
    )
    x = x.to(integer).view(dtype)
    usual = torch.randn(2048, k, generator=generator, device="cuda")
    x[2048:] = (usual * torch.rand(2048, 1, generator=generator, device="cuda")).to(dtype)
    for order in (None, random_order(k, layout)):
        check(x, layout, order)
        check_kept(x, layout, order)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_bfloat16_as_amax(name, rule):
    """A block whose largest element is each bfloat16, the others fractions of it with ties."""
    layout = FORMATS[name](64, (rule,) * 3)
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    fractions = torch.linspace(-1, 1, 64)
    for x in (amax[:, None].float() * fractions, amax[:, None].float() / 2 ** (fractions * 8)):
        for dtype in DTYPES:
            for order in (None, torch.randperm(64).int().cuda()):
                check(x.to(dtype).cuda(), layout, order)
                check_kept(x.to(dtype).cuda(), layout, order)


@pytest.mark.parametrize("layout", MIXES, ids=mix_name)
def test_mixes_orders_and_padding(layout):
    channels = layout.channels - 7
    x = rows(5, channels, torch.bfloat16).cuda()
    check(x, layout)
    order = random_order(channels, layout)
    check(x, layout, order)
    check(x, layout, torch.full_like(order, channels - 1))  # one channel everywhere
    check(x, layout, torch.full_like(order, -1))  # padding only


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "k", [32, 33, 47, 64, 100, 576, 1000, 1536, 4096, 4097, 11008, 14336, 16384, 65535, 65536]
)
def test_any_number_of_channels(k, dtype):
    """Rows that begin anywhere, and, in float32, rows too long for shared memory."""
    layout = mixed(k, "e3m2", extra=1)
    x = rows(3, k, dtype).cuda()
    check(x, layout)
    check(x, layout, random_order(k, layout))


def test_rows_longer_than_shared_memory():
    k = 120_000
    layout = mixed(k)
    x, residual = rows(2, k, torch.bfloat16).cuda(), rows(2, k, torch.bfloat16, 1).cuda()
    weight = rows(1, k, torch.float32, 2)[0].cuda()
    order = random_order(k, layout)
    check(x, layout, order)
    for channels in (order, None):
        rest = (torch.bfloat16, True, channels, *arguments(layout))
        for norm, form in (("rms_norm", (1,)), ("layer_norm", ())):
            bias = () if form else (weight,)
            op = getattr(micromix, f"{norm}_quantize")
            total, y, *quantised = op(x, residual, weight, *bias, EPS, *form, *rest)
            assert torch.equal(total, x + residual)
            check_quantised(y, quantised, channels, layout)
        y, *quantised = micromix.pointwise_quantize(x, residual, Pointwise.SILU, *rest)
        check_quantised(y, quantised, channels, layout)


ROTATED = [
    MixedLayout(64, 96, 64, "e2m3", hadamard=(4,)),
    MixedLayout(64, 96, 64, "e3m2", hadamard=(4, 6)),
    MixedLayout(64, 96, 64, "e2m3", hadamard=(4, 6, 8)),
    MixedLayout(0, 32, 64, "e2m3", ("floor", "ceil", "even"), hadamard=(8,)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ROTATED, ids=lambda l: f"{mix_name(l)}-{l.hadamard}")
def test_rotated_blocks(layout, dtype):
    """In registers, staged, with padding, with rows that begin anywhere, and in pairs."""
    k = layout.channels
    for count, channels in ((5, k), (5, k - 7), (700, k)):
        x = rows(count, channels, dtype)
        x[1, 3], x[2, -1] = float("nan"), float("inf")
        check(x.cuda(), layout)
        check(x.cuda(), layout, random_order(channels, layout))


def test_a_rotated_row_longer_than_shared_memory():
    k = 120_000
    layout = MixedLayout(k - 64, 64, 0, hadamard=(4, 6))
    check(rows(2, k, torch.bfloat16).cuda(), layout, random_order(k, layout))


def test_special_values():
    x = rows(9, 192, torch.float32)
    x[0, 5], x[1, 70], x[2, 190] = float("nan"), float("inf"), float("-inf")
    x[3], x[4], x[5] = float("nan"), float("inf"), -0.0
    x[6] = torch.finfo(torch.float32).tiny / 8
    x[7] = torch.finfo(torch.float32).max
    layout = MixedLayout(64, 96, 32)
    for dtype in DTYPES:
        for order in (None, random_order(192, layout)):
            check(x.to(dtype).cuda(), layout, order)


def test_a_channel_out_of_range_is_nan():
    """An order cannot be checked without waiting for the device; a wrong one must not go unseen."""
    x, layout = rows(4, 64, torch.bfloat16).cuda(), MixedLayout(32, 0, 32)
    order = torch.arange(64, dtype=torch.int32)
    order[3], order[40] = 64, -2
    _, scales = micromix.quantize(x, order.cuda(), *arguments(layout))
    assert (scales == mx.NAN_SCALE).all()


def test_strided_and_unaligned_inputs():
    k, layout = 192, MixedLayout(64, 96, 32)
    whole = rows(6, 2 * k + 8, torch.bfloat16).cuda()
    orders = torch.cat((torch.zeros(1, device="cuda").int(), random_order(k, layout)))
    for x in (
        whole[:, :k],
        whole[:, 1 : k + 1],
        whole[::2, k : 2 * k],
        whole[:1, :k].expand(6, k),
        whole[:, :k].mT.contiguous().mT,
        whole[:, : 2 * k : 2],
        whole.view(2, 3, -1)[..., 8 : 8 + k],
        whole[0, :k],
    ):
        check(x, layout)
        check(x, layout, orders[1:])
        y, *quantised = micromix.pointwise_quantize(
            x, x, Pointwise.ADD, torch.bfloat16, True, None, *arguments(layout)
        )
        assert torch.equal(y, x + x)
        check_quantised(y, quantised, None, layout)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    for dtype in DTYPES:
        x, other = (view(new_rows(dtype, seed, "cuda")) for seed in (0, 1))
        for quantise in without_and_with_order(x.shape[-1], "cuda"):
            silu = (Pointwise.SILU, dtype, True, *quantise)
            assert_read_as_dense(micromix.quantize, (x,), *quantise)
            assert_read_as_dense(micromix.pointwise_quantize, (x, other), *silu)


def test_no_rows():
    layout = MixedLayout(64, 96, 32)
    x = torch.empty(2, 0, layout.channels, device="cuda")
    data, scales = micromix.quantize(x, None, *arguments(layout))
    assert data.shape == (2, 0, layout.row_bytes) and scales.shape == (2, 0, layout.blocks)


@pytest.mark.parametrize("k", [7, 64, 2048])
def test_an_order_of_no_channels(k):
    x, order = rows(3, k, torch.float32).cuda(), torch.empty(0, dtype=torch.int32, device="cuda")
    results = [
        micromix.rms_norm_quantize(x, None, None, EPS, 0, torch.float32, True, *rest)
        for rest in ((order, 0, 0, 0, 0), (None, 2048, 0, 0, 0))
    ]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)
    assert [tuple(t.shape) for t in results[0][2:]] == [(3, 0), (3, 0)]


@pytest.mark.parametrize("form", RmsForm)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [32, 47, 576, 4096, 16384])
def test_rms_norm(k, dtype, form):
    x, residual = rows(9, k, dtype).cuda(), rows(9, k, dtype, 2).cuda()
    weight = rows(1, k, dtype, 3)[0].cuda()
    wide = x.double()
    normalised = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    for order, layout in with_and_without_order(k, extra=1):
        rest = (EPS, form, dtype, True, order, *arguments(layout))
        total, y, *quantised = micromix.rms_norm_quantize(x, None, weight, *rest)
        assert total.shape == (0,)
        if form == RmsForm.WEIGHT_AFTER_CAST and dtype != torch.float32:
            # Rounded twice, and a value next to a midpoint may be rounded to either side.
            exact = normalised * weight.double()
            allowed = 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6
            assert ((y.double() - exact).abs() <= allowed).all()
            eager = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(
                dtype
            ) * weight
            assert (y != eager).float().mean() <= 0.01
        else:
            assert_value(y, normalised * (weight.double() + (form == RmsForm.ONE_PLUS_WEIGHT)))
        check_quantised(y, quantised, order, layout)

        total, *with_sum = micromix.rms_norm_quantize(x, residual, weight, *rest)
        assert torch.equal(total, x + residual)
        assert_same(with_sum, micromix.rms_norm_quantize(total, None, weight, *rest)[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [32, 47, 576, 4096, 16384])
def test_layer_norm(k, dtype):
    x, residual = rows(9, k, dtype).cuda(), rows(9, k, dtype, 2).cuda()
    weight, bias = rows(1, k, dtype, 3)[0].cuda(), rows(1, k, dtype, 4)[0].cuda()
    exact = F.layer_norm(x.double(), (k,), weight.double(), bias.double(), EPS)
    scale = F.layer_norm(x.double(), (k,), weight.double(), None, EPS).abs() + bias.double().abs()
    for order, layout in with_and_without_order(k, extra=1):
        rest = (EPS, dtype, True, order, *arguments(layout))
        total, y, *quantised = micromix.layer_norm_quantize(x, None, weight, bias, *rest)
        assert total.shape == (0,)
        assert ((y.double() - exact).abs() <= 0.5001 * step(y) + 2**-20 * scale + 1e-6).all()
        check_quantised(y, quantised, order, layout)

        total, *with_sum = micromix.layer_norm_quantize(x, residual, weight, None, *rest)
        assert torch.equal(total, x + residual)
        assert_same(with_sum, micromix.layer_norm_quantize(total, None, weight, None, *rest)[1:])


@pytest.mark.parametrize("function", REFERENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise(function, dtype):
    k = 4096
    x, other = rows(40, k, dtype).cuda(), rows(40, k, dtype, 2).cuda()
    for order, layout in with_and_without_order(k):
        rest = (dtype, True, order, *arguments(layout))
        y, *quantised = micromix.pointwise_quantize(x, None, function, *rest)
        check_quantised(y, quantised, order, layout)
        product, *quantised = micromix.pointwise_quantize(x, other, function, *rest)
        assert torch.equal(product, y * other)  # the activation is rounded before the product
        check_quantised(product, quantised, order, layout)


@pytest.mark.parametrize("function", REFERENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_every_number(function, dtype):
    """Every finite bfloat16 and float16, and as many float32 numbers: as accurate as on the CPU."""
    if dtype == torch.float32:
        x = torch.randn(1 << 16, device="cuda") * torch.logspace(-6, 2, 1 << 16, device="cuda")
    else:
        x = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16).view(dtype)
        x = x.where(x.isfinite(), 0)
    layout = arguments(mixed(len(x)))
    y, *_ = micromix.pointwise_quantize(x, None, function, dtype, True, None, *layout)
    exact = REFERENCES[function](x.double())
    assert ((y.double() - exact).abs() <= 0.5001 * step(y) + 1e-6 * exact.abs() + 1e-9).all()
    assert torch.equal(y.isfinite(), exact.to(dtype).isfinite())


def test_activations_of_nan_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0], device="cuda")
    layout = arguments(MixedLayout(32, 0, 0))
    for function, reference in REFERENCES.items():
        y, *_ = micromix.pointwise_quantize(x, None, function, x.dtype, True, None, *layout)
        expected = reference(x)
        expected[2] = y[2] if function in (Pointwise.GELU, Pointwise.GELU_TANH) else expected[2]
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_in_any_mix(x_dtype, other_dtype, dtype):
    k = 576
    x, other = rows(8, k, x_dtype).cuda(), rows(8, k, other_dtype, 2).cuda()
    wide = (x + x).double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * other[0].double()
    for order, layout in with_and_without_order(k, extra=1):
        rest = (dtype, True, order, *arguments(layout))
        y, *quantised = micromix.pointwise_quantize(x, other, Pointwise.ADD, *rest)
        assert torch.equal(y, (x.float() + other.float()).to(dtype))
        check_quantised(y, quantised, order, layout)
        _, y, *quantised = micromix.rms_norm_quantize(x, x, other[0], EPS, 1, *rest)
        assert_value(y, exact)
        check_quantised(y, quantised, order, layout)


def many_rows() -> int:
    """Enough for the kernels whose thread blocks stay, and not the same number for every thread block."""
    return 4 * torch.cuda.get_device_properties(0).multi_processor_count + 37


def kernels_of(function) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return {event.name for event in profile.events()}


def assert_stays(function, channels: int) -> None:
    """The paired kernel runs, or for long rows the streamed one."""
    if channels <= 4096:
        assert any("paired_rows_kernel" in name for name in kernels_of(function))
    elif torch.cuda.get_device_capability()[0] >= 9:
        assert any("streamed_rows_kernel" in name for name in kernels_of(function))


def exact_rows(k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small integers, every row's sum 0: any order of a norm's sums gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-3, 4, (many_rows(), k // 2), generator=generator)
    return torch.cat((half, -half), 1).to(dtype).cuda()


MANY = [  # channels, and blocks of padding
    (32, 0),
    (64, 0),
    (576, 1),
    (1008, 0),
    (4064, 1),
    (4096, 0),
    (4112, 0),
    (11008, 2),
    (16384, 0),
]


@pytest.mark.parametrize("ordered", (True, False), ids=("ordered", "plain"))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("k, extra", MANY)
def test_norms_of_many_rows(k, extra, dtype, ordered):
    """What the staged kernel gives, which keeps the norm's own value."""
    layout = mixed(k, "e3m2", extra)
    order = random_order(k, layout) if ordered else None
    x, residual = exact_rows(k, dtype), exact_rows(k, dtype, 1)
    weight, bias = (rows(1, k, dtype, seed)[0].cuda() for seed in (3, 4))
    for second in (None, residual):
        for parameters in ((weight, bias), (None, None)):
            for form in RmsForm:
                norm = (micromix.rms_norm_quantize, (x, second, parameters[0], EPS, form))
                assert_as_staged(*norm, dtype, order, layout)
            norm = (micromix.layer_norm_quantize, (x, second, *parameters, EPS))
            fits = second is None or k < 16384  # in shared memory, with weight and bias
            assert_as_staged(*norm, dtype, order, layout, fits)


def assert_as_staged(op, args, dtype, order, layout, stays=True) -> None:
    def run(keep: bool):
        return op(*args, dtype, keep, order, *arguments(layout))

    if stays:
        assert_stays(lambda: run(False), layout.channels)
    *total, y, data, scales = run(True)
    *found, _, found_data, found_scales = run(False)
    assert_same((*found, found_data, found_scales), (*total, data, scales))
    check_quantised(y, (data, scales), order, layout)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("k, extra", MANY)
def test_activations_of_many_rows(k, extra, dtype):
    layout = mixed(k, "e2m3", extra)
    order = random_order(k, layout)
    x, other = (rows(many_rows(), k, dtype, seed).cuda() for seed in (1, 2))
    assert_stays(lambda: check(x, layout, order), layout.channels)
    check(x[:, : k // 32 * 32], layout, order.clamp_max(k // 32 * 32 - 1))  # rows with a stride
    for function in Pointwise:
        assert_as_staged(micromix.pointwise_quantize, (x, other, function), dtype, order, layout)
        if function != Pointwise.ADD:
            one = (micromix.pointwise_quantize, (x, None, function), dtype)
            assert_as_staged(*one, order, layout)
            assert_as_staged(*one, None, layout, layout.channels <= 4096)


@pytest.mark.parametrize("k", [4096, 8192])
def test_norms_of_many_random_rows(k):
    """Sums in another order: a code differs now and then, by a rounding of the norm's value."""
    layout = mixed(k)
    x, weight = rows(many_rows(), k, torch.bfloat16).cuda(), rows(1, k, torch.bfloat16, 3)[0].cuda()
    x += 3 * weight
    x[::2] += 8 * x[::2].std()  # a mean, in some rows
    for order in (None, random_order(k, layout)):
        for op, args in (
            (micromix.rms_norm_quantize, (x, None, weight, EPS, 0)),
            (micromix.layer_norm_quantize, (x, None, weight, weight, EPS)),
        ):
            found, expected = (
                op(*args, torch.bfloat16, keep, order, *arguments(layout))[2]
                for keep in (False, True)
            )
            assert (found != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("k", [64, 576, 4096, 16384])
def test_layer_norm_of_many_rows_with_a_mean(k, dtype):
    """Their squares are summed up from the mean: as exact as without one."""
    layout = mixed(k)
    x = exact_rows(k, dtype)
    x[::3] += 16
    weight, bias = (rows(1, k, dtype, seed)[0].cuda() for seed in (3, 4))
    for order in (None, random_order(k, layout)):
        op = micromix.layer_norm_quantize
        assert_as_staged(op, (x, None, weight, bias, EPS), dtype, order, layout)


@pytest.mark.parametrize("residual", (False, True), ids=("one", "sum"))
@pytest.mark.parametrize("ordered", (True, False), ids=("ordered", "plain"))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("k", [576, 896, 1008, 1152, 1600, 4112])
def test_norms_whose_threads_have_no_channels(k, dtype, ordered, residual):
    """Thread blocks take many turns; what threads beyond K make of nothing is in no later row, nor in the padding."""
    layout = MixedLayout(-(-k // 32) * 32, 0, 0)
    order = random_order(k, layout) if ordered else None
    x = (rows(20000, k, torch.float32, 1) * 0.05 + 0.02).to(dtype).cuda()
    x[0, 3] = float("nan")
    second = torch.zeros_like(x) if residual else None
    norms = (
        (micromix.layer_norm_quantize, (x, second, None, None, EPS)),
        (micromix.rms_norm_quantize, (x, second, None, EPS, RmsForm.WEIGHT_AFTER_CAST)),
    )
    for op, args in norms:
        staged, found = (
            op(*args, dtype, keep, order, *arguments(layout))[2:] for keep in (True, False)
        )
        # Sums have other orders, so some values differ in their last bit.
        changed = [(a != b).float().mean().item() for a, b in zip(found, staged, strict=True)]
        assert max(changed) < 1e-3
        assert (found[1] == mx.NAN_SCALE).any(1).nonzero().flatten().tolist() == [0]
        if k % 32 and order is None:
            assert not found[0][1:, k // 2 :].any()


PROGRAM = """
    import torch, micromix_compile.ops
    from micromix_compile.mx import MixedLayout
    m, bf16 = torch.ops.micromix, torch.bfloat16
    def arguments(k):
        layout = MixedLayout(k, 0, 0)
        return layout.k4, layout.k6, layout.k8, layout.code
    x = lambda rows, k: torch.randn(rows, k, device="cuda").bfloat16()
    order = lambda k: torch.randperm(k).int().cuda()
    m.layer_norm_quantize(x(2000, 4544), None, None, None, 1e-5, bf16, False, None, *arguments(4544))
    m.rms_norm_quantize(x(600, 4608), None, None, 1e-5, 0, bf16, False, order(4608), *arguments(4608))
    m.rms_norm_quantize(x(2000, 5888), None, None, 1e-5, 0, bf16, False, None, *arguments(5888))
    m.rms_norm_quantize(x(4, 24512), None, None, 1e-5, 0, bf16, False, None, *arguments(24512))
    assert m.quantize(x(1000, 8)[:, :0], None, *arguments(0))[0].shape == (1000, 0)
    torch.cuda.synchronize()
"""


def test_launches_at_the_edge_of_what_needs_no_leave():
    """Just below 48 KB of shared memory, with the kernel's own beyond; in a process that asked for no more before."""
    program = textwrap.dedent(PROGRAM)
    result = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_threads_launch_one_kernel_with_different_sizes():
    layouts = [mixed(k) for k in (8192, 16384)]
    expected = [
        micromix.quantize(long_rows(layout), None, *arguments(layout)) for layout in layouts
    ]

    def run(i: int) -> None:
        layout = layouts[i % 2]
        x, order = long_rows(layout), torch.arange(layout.channels).int().cuda()
        for _ in range(200):
            assert_same(micromix.quantize(x, order, *arguments(layout)), expected[i % 2])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def long_rows(layout: MixedLayout) -> torch.Tensor:
    return rows(many_rows(), layout.channels, torch.bfloat16, 1).cuda()


@pytest.mark.parametrize("k", [4096, 8192])
def test_reads_what_the_kernel_before_wrote(k):
    """Kernels start before the one before them ends: operands, weights and orders made just before, and results
    that the next one reads, are those of a run with waits between."""
    count = many_rows()
    layout = mixed(k)
    source, weights = rows(count, k, torch.bfloat16).cuda(), rows(8, k, torch.bfloat16, 3).cuda()
    orders = torch.stack([random_order(k, layout, seed) for seed in range(8)])

    def run(wait):
        found, total, order = [], source.clone(), orders[0].clone()
        for i in range(8):
            order.copy_(orders[i])
            residual, weight = source * (i + 1), weights[i] * 2
            rest = (order, *arguments(layout))
            wait()
            total, _, *quantised = micromix.rms_norm_quantize(
                total, residual, weight, EPS, 0, torch.bfloat16, False, *rest
            )
            wait()
            found += [*quantised, *micromix.quantize(total, *rest)]
            wait()
            found += micromix.quantize(total, None, *rest[1:])
            wait()
        return found

    expected = run(torch.cuda.synchronize)
    for _ in range(5):
        assert_same(run(lambda: None), expected)


@pytest.mark.parametrize("k", [64, 4160])
def test_order_out_of_range_is_nan_in_many_rows(k):
    layout = MixedLayout(32, 0, k - 32)
    x = rows(many_rows(), k, torch.bfloat16).cuda()
    order = torch.arange(k, dtype=torch.int32)
    order[3], order[40::32] = k, -2
    _, scales = micromix.quantize(x, order.cuda(), *arguments(layout))
    assert (scales == mx.NAN_SCALE).all()


def test_wrong_arguments_are_refused():
    layout = MixedLayout(64, 96, 32)
    x, good = rows(2, 192, torch.float32).cuda(), arguments(layout)
    cases = {
        "int32 tensor on the device of x": (x, torch.arange(192).int(), *good),
        "order must have": (x, torch.zeros(3, dtype=torch.int32, device="cuda"), *good),
        "must be bfloat16": (x.long(), None, *good),
        "has k4 ": (x.repeat(1, 2), None, *good),
        "not a format code": (x, None, *good[:3], 300),
    }
    for message, wrong in cases.items():
        with pytest.raises(RuntimeError, match=message):
            micromix.quantize(*wrong)
    rest = (torch.float32, False, None, *good)
    with pytest.raises(RuntimeError, match="weight must be"):
        micromix.rms_norm_quantize(x, None, torch.ones(192), EPS, 0, *rest)
    with pytest.raises(RuntimeError, match="have x's sizes"):
        micromix.pointwise_quantize(x, x.cpu(), Pointwise.SILU, *rest)


def test_registrations():
    layout = MixedLayout(64, 96, 32)
    k = layout.channels
    x, weight = rows(2, k, torch.bfloat16).cuda(), torch.ones(k, device="cuda")
    order = torch.arange(k, device="cuda").int()
    rest = (torch.bfloat16, True, order, *arguments(layout))
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for op, args in (
        (micromix.quantize, (x, order, *arguments(layout))),
        (micromix.rms_norm_quantize, (x, x, weight, EPS, 0, *rest)),
        (micromix.layer_norm_quantize, (x, None, weight, weight, EPS, *rest)),
        (micromix.pointwise_quantize, (x, x, 2, *rest)),
    ):
        torch.library.opcheck(op.default, args, **checks)


def test_results_do_not_change_from_run_to_run():
    k = 16384
    layout = mixed(k)
    x, order = rows(64, k, torch.bfloat16).cuda(), random_order(k, layout)
    rest = (torch.bfloat16, True, order, *arguments(layout))
    first = micromix.layer_norm_quantize(x, x, None, None, EPS, *rest)
    for _ in range(20):
        assert_same(micromix.layer_norm_quantize(x, x, None, None, EPS, *rest), first)


def test_runs_on_the_current_stream():
    k, layout = 4096, MixedLayout(4096, 0, 0)
    x = torch.zeros(2048, k, device="cuda", dtype=torch.bfloat16)
    value = torch.randn_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(value)  # a kernel on another stream would read the zeros
        found = micromix.quantize(x, None, *arguments(layout))
    stream.synchronize()
    assert_same(found, mx.quantize(value, layout))


def test_in_a_cuda_graph():
    k = 4096
    layout = mixed(k)
    x, residual = (rows(32, k, torch.bfloat16, i).cuda() for i in range(2))
    order = random_order(k, layout)
    rest = (torch.bfloat16, True, order, *arguments(layout))

    def run():
        return [
            *micromix.quantize(x, order, *arguments(layout)),
            *micromix.rms_norm_quantize(x, residual, residual[0], EPS, 0, *rest),
            *micromix.pointwise_quantize(x, residual, Pointwise.SILU, *rest),
        ]

    graph = torch.cuda.CUDAGraph()
    run()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (5, 6):
        x.copy_(rows(32, k, torch.bfloat16, seed))
        graph.replay()
        assert_same(captured, run())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_where_its_input_is():
    k = 120 * 1024 // 2  # more shared memory than a kernel has without asking for it
    layout = mixed(k)
    with torch.cuda.device(0):
        for device in ("cuda:1", "cuda:0"):
            x = rows(64, k, torch.bfloat16).to(device)
            order = random_order(k, layout).to(device)
            found = micromix.quantize(x, order, *arguments(layout))
            assert all(t.device == x.device for t in found)
            assert_same(found, mx.quantize(x, layout, order))
        assert torch.cuda.current_device() == 0
