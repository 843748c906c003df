"""The operators that quantise what they compute: the value against float64, its quantised form bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile import ops
from micromix_compile.ops import fused
from micromix_compile.ops._schemas import SCHEMAS
from micromix_compile.ops.fused import Pointwise, RmsForm

from .cases import DTYPES, VIEWS, arguments, mix_name, new_rows, rows, without_and_with_order
from .cases import MIXES as ALL_MIXES

micromix = torch.ops.micromix
MIXES = [layout for layout in ALL_MIXES if layout.channels >= 128]
EPS = 1e-5


def step(y: torch.Tensor) -> torch.Tensor:
    """The distance from y to its neighbour in its type that is further from zero."""
    return (torch.nextafter(y.abs(), torch.full_like(y, torch.inf)) - y.abs()).double()


def assert_value(y: torch.Tensor, exact: torch.Tensor) -> None:
    """y is `exact` (float64) rounded to its type, with float32 arithmetic before that."""
    slack = 2**-20 * exact.abs() + 1e-30
    assert ((y.double() - exact).abs() <= 0.5001 * step(y) + slack).all()


def assert_quantised(y: torch.Tensor, quantised: list[torch.Tensor], order, *layout) -> None:
    """What the operator quantised is bit for bit what `micromix::quantize` makes of the value it returned."""
    assert all(map(torch.equal, quantised, micromix.quantize(y, order, *layout)))


def ordered(layout):
    """An order of the channels, and the layout, as an operator takes them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(layout.channels, generator=generator).int(), *arguments(layout)


@pytest.mark.parametrize("form", RmsForm)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MIXES, ids=mix_name)
def test_rms_norm(isa, form, dtype, layout):
    k = layout.channels
    x, weight = rows(5, k, dtype), rows(1, k, dtype, 3)[0]
    quantise = ordered(layout)
    total, y, *quantised = micromix.rms_norm_quantize(
        x, None, weight, EPS, form, dtype, True, *quantise
    )
    assert total.shape == (0,)
    wide = x.double()
    normalised = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    if form == RmsForm.WEIGHT_AFTER_CAST and dtype != torch.float32:
        # Rounded twice, and a value next to a midpoint may be rounded to either side.
        exact = normalised * weight.double()
        assert (
            (y.double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6
        ).all()
        eager = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(
            dtype
        ) * weight
        assert (y != eager).float().mean() <= 0.01
    else:
        assert_value(y, normalised * (weight.double() + (form == RmsForm.ONE_PLUS_WEIGHT)))
    assert_quantised(y, quantised, *quantise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MIXES[:3], ids=mix_name)
def test_layer_norm(isa, dtype, layout):
    k = layout.channels
    x, weight, bias = rows(5, k, dtype), rows(1, k, dtype, 3)[0], rows(1, k, dtype, 4)[0]
    quantise = ordered(layout)
    total, y, *quantised = micromix.layer_norm_quantize(
        x, None, weight, bias, EPS, dtype, True, *quantise
    )
    assert total.shape == (0,)
    exact = F.layer_norm(x.double(), (k,), weight.double(), bias.double(), EPS)
    scale = F.layer_norm(x.double(), (k,), weight.double(), None, EPS).abs() + bias.double().abs()
    assert ((y.double() - exact).abs() <= 0.5001 * step(y) + 2**-20 * scale + 1e-6).all()
    assert_quantised(y, quantised, *quantise)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_return_the_sum_they_normalise(isa, op, dtype):
    layout = MIXES[0]
    k = layout.channels
    x, residual = rows(6, k, dtype).view(2, 3, k), rows(6, k, dtype, 2).view(2, 3, k)
    weight = rows(1, k, torch.float32, 3)[0]
    fused = getattr(micromix, f"{op}_quantize")
    extra = (0,) if op == "rms_norm" else ()
    bias = () if op == "rms_norm" else (None,)
    rest = (EPS, *extra, dtype, True, None, *arguments(layout))
    total, *with_sum = fused(x, residual, weight, *bias, *rest)
    assert torch.equal(total, x + residual)
    _, *without = fused(total, None, weight, *bias, *rest)
    assert all(torch.equal(a, b) for a, b in zip(with_sum, without, strict=True))


REFERENCES = {
    Pointwise.CAST: lambda x: x,
    Pointwise.RELU: F.relu,
    Pointwise.SILU: F.silu,
    Pointwise.GELU: F.gelu,
    Pointwise.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Pointwise.QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("function", REFERENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise(isa, function, dtype):
    layout = MIXES[0]
    quantise = ordered(layout)
    x, other = rows(40, layout.channels, dtype), rows(40, layout.channels, dtype, 2)
    y, *quantised = micromix.pointwise_quantize(x, None, function, dtype, True, *quantise)
    exact = REFERENCES[function](x.double())
    assert ((y.double() - exact).abs() <= 0.5001 * step(y) + 1e-6 * exact.abs() + 1e-9).all()
    assert_quantised(y, quantised, *quantise)

    product, *quantised = micromix.pointwise_quantize(x, other, function, dtype, True, *quantise)
    assert torch.equal(
        product, y * other
    )  # the activation is rounded before the product, as in the model
    assert_quantised(product, quantised, *quantise)


@pytest.fixture(params=[False, True], ids=["", "flushed"])
def flushed(request):
    """Runs a test once more with subnormal numbers of float32 taken for zero in this thread."""
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Signs of zeros count; which NaN it is does not."""
    words = torch.int16 if a.element_size() == 2 else torch.int32
    return bool(((a.view(words) == b.view(words)) | (a.isnan() & b.isnan())).all())


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, `[rows, 512]`, as a fused operator reads and writes it."""
    return micromix.pointwise_quantize(x, None, Pointwise.CAST, dtype, True, None, 512, 0, 0, 0)[0]


FLOAT16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
WIDE = FLOAT16.float()


def test_every_float16_number_is_read_and_written(isa, flushed):
    """Subnormal ones are normal in float32, whatever the thread wants of those of float32."""
    x = FLOAT16.view(-1, 512)
    assert same_bits(cast(x, torch.float32), WIDE.view(-1, 512))
    assert same_bits(cast(x, torch.float16), x)
    signs = (FLOAT16.view(torch.int16) < 0)[FLOAT16.isnan()]
    quiet = torch.where(signs, -0x200, 0x7E00).short()
    assert torch.equal(cast(x, torch.float16).view(-1)[FLOAT16.isnan()].view(torch.int16), quiet)


def test_rounding_to_float16(isa, flushed):
    """At, below and above every midpoint, the one before infinity included."""
    numbers = WIDE[WIDE.isfinite() & (WIDE != 0)].double()
    away = torch.where(numbers.abs() == 65504, 65536 * numbers.sign(), 0.0)
    up = (numbers.half().view(torch.int16) + 1).view(torch.float16).double()
    middle = ((numbers + torch.where(away == 0, up, away)) / 2).float()
    x = torch.stack([middle, *(middle.nextafter(torch.tensor(end)) for end in (-1e9, 1e9))])
    x = F.pad(x.view(-1), (0, -x.numel() % 512)).view(-1, 512)
    assert same_bits(cast(x, torch.float16), x.half())


def test_norms_of_subnormal_float16(isa, flushed):
    layout = MIXES[0]
    x = (rows(4, layout.channels, torch.float32) * 2**-16).half()
    rest = (torch.float16, True, None, *arguments(layout))
    wide = x.double()
    for y, exact in (
        (
            micromix.rms_norm_quantize(x, None, None, 0.0, 1, *rest)[1],
            wide / wide.pow(2).mean(-1, keepdim=True).sqrt(),
        ),
        (
            micromix.layer_norm_quantize(x, None, None, None, 0.0, *rest)[1],
            F.layer_norm(wide, wide.shape[-1:], eps=0.0),
        ),
    ):
        assert ((y.double() - exact).abs() <= 2**-10 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("function", REFERENCES)
def test_numbers_far_from_zero(isa, function, dtype):
    """Activations are 0 where their true value is, however large the number that it is a factor of."""
    far = torch.tensor([110.0, 1e3, 1e10, 1e20, 1e30, 1e36, 1e38, 3e38])
    x = torch.cat([-far, far, torch.tensor([-torch.inf, torch.inf, torch.nan])])
    x = F.pad(x, (0, 32 - len(x))).to(dtype)[None]
    y = micromix.pointwise_quantize(x, None, function, dtype, True, None, 32, 0, 0, 0)[0]
    assert same_bits(y, REFERENCES[function](x.double()).to(dtype))


def test_sum(isa):
    layout = MIXES[0]
    x, other = rows(4, layout.channels, torch.bfloat16), rows(4, layout.channels, torch.bfloat16, 2)
    rest = (torch.bfloat16, True, None, *arguments(layout))
    y, *quantised = micromix.pointwise_quantize(x, other, Pointwise.ADD, *rest)
    assert torch.equal(y, x + other)
    assert_quantised(y, quantised, None, *arguments(layout))


def test_all_instruction_sets_give_the_same_bits():
    layout = MIXES[-1]
    x, other = rows(9, layout.channels, torch.float32), rows(9, layout.channels, torch.float32, 2)
    rest = (torch.float32, True, None, *arguments(layout))
    results = {}
    before = ops.cpu_isa()
    for name in ("portable", "avx2", "avx512"):
        try:
            ops.set_cpu_isa(name)
        except RuntimeError:
            continue
        results[name] = [
            *micromix.rms_norm_quantize(x, other, None, EPS, 1, *rest),
            *(t for f in range(5) for t in micromix.pointwise_quantize(x, other, f, *rest)),
        ]
    ops.set_cpu_isa(before)
    for name, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(result, results["portable"])), name


@pytest.mark.parametrize("function", REFERENCES)
def test_every_bfloat16_number_gives_the_same_bits_on_all_instruction_sets(function):
    """Some activations are approximated differently for bfloat16, and rounding must hide that."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = numbers.view(-1, 512)
    rest = (torch.bfloat16, True, None, 512, 0, 0, 0)
    results = {}
    before = ops.cpu_isa()
    for name in ("portable", "avx2", "avx512"):
        try:
            ops.set_cpu_isa(name)
        except RuntimeError:
            continue
        y, *_ = micromix.pointwise_quantize(x, None, function, *rest)
        results[name] = y.view(torch.int16)
    ops.set_cpu_isa(before)
    for name, result in results.items():
        assert torch.equal(result, results["portable"]), name


@pytest.mark.parametrize("k", [32, 33, 47, 576])
def test_any_number_of_channels(isa, k):
    padded = -(-k // 32) * 32
    x, other = rows(3, k, torch.bfloat16), rows(3, k, torch.bfloat16, 2)
    quantise = (None, 0, 0, padded, 88)
    rest = (torch.bfloat16, True, *quantise)
    norm = micromix.rms_norm_quantize(x, None, None, EPS, 1, *rest)
    for (y, *quantised), exact in (
        (micromix.pointwise_quantize(x, other, 2, *rest), F.silu(x) * other),
        (norm[1:], F.rms_norm(x, (k,), None, EPS)),
    ):
        assert torch.equal(y, exact)
        assert_quantised(y, quantised, *quantise)


def test_strided_rows_are_read_where_they_are(isa):
    layout = MIXES[0]
    k = layout.channels
    both = rows(6, 2 * k, torch.bfloat16).view(2, 3, 2 * k)
    gate, up = both.chunk(2, dim=-1)
    rest = (torch.bfloat16, True, None, *arguments(layout))
    expected = micromix.pointwise_quantize(gate.contiguous(), up.contiguous(), 2, *rest)
    for g, u in ((gate, up), (gate.mT.contiguous().mT, up), (gate[:1].expand(2, 3, k), up)):
        want = micromix.pointwise_quantize(g.contiguous(), u.contiguous(), 2, *rest)
        assert all(map(torch.equal, micromix.pointwise_quantize(g, u, 2, *rest), want))
    assert not torch.equal(expected[0], want[0])


def assert_read_as_dense(op, tensors: tuple[torch.Tensor, ...], *rest) -> None:
    """What `op` makes of these views is bit for bit what it makes of dense copies."""
    found = op(*tensors, *rest)
    expected = op(*(t.contiguous() for t in tensors), *rest)
    assert all(map(torch.equal, found, expected))
    assert all(t.is_contiguous() for t in found)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(isa, view):
    for dtype in DTYPES:
        x, other = (view(new_rows(dtype, seed)) for seed in (0, 1))
        weight = rows(1, x.shape[-1], dtype, 2)[0]
        for quantise in without_and_with_order(x.shape[-1]):
            rest = (dtype, True, *quantise)
            silu = (Pointwise.SILU, *rest)
            assert_read_as_dense(micromix.quantize, (x,), *quantise)
            assert_read_as_dense(micromix.pointwise_quantize, (x, other), *silu)
            assert_read_as_dense(micromix.rms_norm_quantize, (x, other), weight, EPS, 1, *rest)
            norm = (weight, weight, EPS, *rest)
            assert_read_as_dense(micromix.layer_norm_quantize, (x, other), *norm)


@st.composite
def any_view(draw):
    """Sizes of a dense tensor, an order of its dimensions, a slice of each, and what they are expanded to."""
    sizes = draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=3, max_size=4))
    order = [*draw(st.permutations(range(len(sizes)))), len(sizes)]
    sizes.append(draw(st.sampled_from((1, 32, 70))))
    if draw(st.integers(0, 7)) == 0:  # seldom: rows are never read where they lie then
        order = draw(st.permutations(order))
    parts = (slice(None), slice(None), slice(-1, None), slice(None, None, 2), slice(1, 3))
    slices, expanded = [], []
    for size in (sizes[i] for i in order):
        some = [part for part in parts if range(size)[part]]
        slices.append(draw(st.sampled_from(some)))
        one = len(range(size)[slices[-1]]) == 1
        expanded.append(draw(st.sampled_from((1, 1, 1, 3))) if one else -1)
    return sizes, order, tuple(slices), expanded


@given(any_view(), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_view(view, dtype, reorder):
    sizes, order, slices, expanded = view
    x, other = (
        new_rows(dtype, seed)(*sizes).permute(order)[slices].expand(expanded) for seed in (0, 1)
    )
    rest = (Pointwise.SILU, dtype, True, *without_and_with_order(x.shape[-1])[reorder])
    assert_read_as_dense(micromix.pointwise_quantize, (x, other), *rest)
    assert_read_as_dense(micromix.pointwise_quantize, (x, other.contiguous()), *rest)


def transposed(*sizes: int) -> torch.Tensor:
    """Rows in another order in memory, which elementwise functions keep."""
    return rows(sizes[0] * sizes[1], sizes[2], torch.float32).view(sizes).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [new_rows(torch.float32), transposed], ids=["dense", "transposed"])
def test_results_of_the_reference_are_dense_tensors_of_their_own(make, dtype):
    """As those of the kernels are: with the strides of the fakes, and no views of the arguments."""
    x, residual = make(4, 3, 64), make(4, 3, 64) + 1
    weight = torch.ones(64)
    rest = (dtype, True, None, *arguments(MIXES[0]))
    results = [
        fused._rms_norm_quantize(x, residual, weight, EPS, form, *rest) for form in RmsForm
    ] + [
        fused._rms_norm_quantize(x, None, None, EPS, 0, *rest),
        fused._layer_norm_quantize(x, residual, weight, None, EPS, *rest),
        fused._layer_norm_quantize(x, None, None, None, EPS, *rest),
    ]
    for function in Pointwise:
        results.append(fused._pointwise_quantize(x, residual, function, *rest))
        if function != Pointwise.ADD:
            results.append(fused._pointwise_quantize(x, None, function, *rest))
    memory = {t.untyped_storage().data_ptr() for t in (x, residual, weight)}
    for result in results:
        assert all(t.is_contiguous() for t in result)
        assert memory.isdisjoint(t.untyped_storage().data_ptr() for t in result)
        assert len({t.untyped_storage().data_ptr() for t in result}) == len(result)


def test_threads_do_not_change_results(isa, threads):
    layout = MIXES[0]
    k = layout.channels
    x, other = rows(600, k, torch.bfloat16), rows(600, k, torch.bfloat16, 2)
    weight = rows(1, k, torch.bfloat16, 3)[0]
    rest = (torch.bfloat16, True, *ordered(layout))
    results = []
    for count in (1, 2):
        threads(count)
        results.append(
            [
                *micromix.rms_norm_quantize(x, other, weight, EPS, 1, *rest),
                *micromix.layer_norm_quantize(x, other, weight, weight, EPS, *rest),
                *micromix.pointwise_quantize(x, other, Pointwise.SILU, *rest),
            ]
        )
    assert all(map(torch.equal, *results))


def test_no_rows():
    layout = MIXES[0]
    x = torch.empty(2, 0, layout.channels)
    rest = (torch.float32, False, None, *arguments(layout))
    for *_, data, scales in (
        micromix.rms_norm_quantize(x, None, None, EPS, 0, *rest),
        micromix.pointwise_quantize(x, x, 2, *rest),
    ):
        assert data.shape == (2, 0, layout.row_bytes) and scales.shape == (2, 0, layout.blocks)


@pytest.mark.parametrize("k", [7, 64, 2048])
def test_an_order_of_no_channels(isa, k):
    """It is no identity: nothing is quantised, and the value is there."""
    x, order = rows(3, k, torch.float32), torch.empty(0, dtype=torch.int32)
    rest = (torch.float32, True, order, 0, 0, 0, 0)
    _, y, *quantised = micromix.rms_norm_quantize(x, None, None, EPS, 0, *rest)
    all_channels = (torch.float32, True, None, 2048, 0, 0, 0)
    assert torch.equal(y, micromix.rms_norm_quantize(x, None, None, EPS, 0, *all_channels)[1])
    for found in (quantised, micromix.quantize(x, *rest[2:])):
        assert [tuple(t.shape) for t in found] == [(3, 0), (3, 0)]
    assert micromix.pointwise_quantize(x, None, Pointwise.SILU, *rest)[0].shape == (3, k)
    assert micromix.layer_norm_quantize(x, None, None, None, EPS, *rest)[1].shape == (3, k)


def test_wrong_arguments_are_refused():
    layout = MIXES[0]
    k = layout.channels
    x, good = rows(2, k, torch.float32), arguments(layout)
    rest = (torch.float32, False)
    cases = {
        "multiples of 32": (x, None, 2, *rest, None, 31, *good[1:]),
        "have x's sizes": (x, x[:1], 2, *rest, None, *good),
        "function must be": (x, None, 7, *rest, None, *good),
        "a sum needs two": (x, None, 5, *rest, None, *good),
        "order must have": (x, None, 2, *rest, torch.zeros(3, dtype=torch.int32), *good),
        "must be bfloat16": (x.long(), None, 2, *rest, None, *good),
    }
    for message, wrong in cases.items():
        with pytest.raises(RuntimeError, match=message):
            micromix.pointwise_quantize(*wrong)
    with pytest.raises(RuntimeError, match="weight must be"):
        micromix.rms_norm_quantize(x, None, torch.ones(k + 1), EPS, 0, *rest, None, *good)
    with pytest.raises(RuntimeError, match="form must be"):
        micromix.rms_norm_quantize(x, None, None, EPS, 3, *rest, None, *good)
    with pytest.raises(RuntimeError, match="residual must have x's type"):
        micromix.rms_norm_quantize(x, x.bfloat16(), None, EPS, 0, *rest, None, *good)


@pytest.mark.parametrize("keep", [False, True])
def test_registrations(keep):
    layout = MIXES[0]
    k = layout.channels
    x, weight = rows(2, k, torch.bfloat16), torch.ones(k)
    rest = (torch.bfloat16, keep, *ordered(layout))
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(
        micromix.rms_norm_quantize.default, (x, x, weight, EPS, 0, *rest), **checks
    )
    torch.library.opcheck(
        micromix.layer_norm_quantize.default, (x, None, weight, weight, EPS, *rest), **checks
    )
    torch.library.opcheck(micromix.pointwise_quantize.default, (x, x, 2, *rest), **checks)


def test_no_operator_has_a_list():
    """Inductor's C++ wrapper would call it through Python."""
    for name, schema in SCHEMAS.items():
        assert "[]" not in schema, name


@pytest.mark.parametrize("m", [0, 1, 3, 40])
@pytest.mark.parametrize("layout", MIXES[:4], ids=mix_name)
@pytest.mark.parametrize("count", [2, 3])
def test_linears_is_linear_of_each_layer(isa, m, layout, count):
    k, sizes = layout.channels, [48, 16, 5][-count:]
    operands = micromix.quantize(rows(m, k, torch.bfloat16), None, *arguments(layout))
    layers = [
        (
            micromix.place_weight(
                *micromix.quantize(rows(n, k, torch.float32, n), None, *arguments(layout)),
                *arguments(layout),
            ),
            bias,
            n,
        )
        for n, bias in zip(sizes, (None, torch.randn(16), torch.randn(5).bfloat16())[-count:])
    ]
    rest = (*arguments(layout), torch.bfloat16)
    linears = {2: micromix.linears.two, 3: micromix.linears.three}[count]
    together = (*operands, *(argument for layer in layers for argument in layer), *rest)
    for result, layer in zip(linears(*together), layers, strict=True):
        assert result.is_contiguous()
        assert torch.equal(result, micromix.linear(*operands, *layer, *rest))
    if isa == "portable" and m:
        checks = {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(linears, together, **checks)
