"""micromix::weight_only_linear against the float64 product of the rounded activations and the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile import mx, ops
from micromix_compile.mx import MixedLayout
from micromix_compile.ops import _reference

from .cases import DTYPES, MIXES, arguments, mix_name, relative_error, rows
from .conftest import ISAS, usable_isas
from .float_operands import BARS
from .float_operands import FloatOperands as Operands

product = torch.ops.micromix.weight_only_linear


@pytest.mark.parametrize("m", [*range(1, 20), 33, 64, 70, 129, 193])
def test_every_row_count(isa, m):
    Operands(m, 48, MixedLayout(128, 64, 64)).check()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("m", [1, 2, 5, 40])
def test_every_column_tail(isa, m, n):
    Operands(m, n, MixedLayout(64, 64, 32)).check()
    Operands(m, n, MixedLayout(64, 64, 32)).check(torch.bfloat16)


@pytest.mark.parametrize("weights", ["match", "mxfp4"])
@pytest.mark.parametrize("layout", MIXES, ids=mix_name)
@pytest.mark.parametrize("m", [1, 3, 37])
def test_mixes(isa, m, layout, weights):
    Operands(m, 40, layout, weights).check()


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 33])
def test_dtypes_and_bias(isa, m, dtype, x_dtype):
    """Activations of any dtype are rounded to bfloat16."""
    bias = rows(1, 50, dtype, seed=9)[0]
    Operands(m, 50, MixedLayout(96, 32, 64), dtype=x_dtype).check(dtype, bias)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hadamard", [(), (4,), (4, 6), (4, 6, 8)], ids=str)
@pytest.mark.parametrize("m", [1, 7, 40])
def test_order_padding_and_rotation(isa, m, hadamard, x_dtype):
    layout = MixedLayout(96, 64, 32, hadamard=hadamard)
    Operands(m, 33, layout, dtype=x_dtype, k=170).check()
    Operands(m, 33, layout, dtype=x_dtype, k=170).reordered().check()


@pytest.mark.parametrize("m", [1, 4, 64])
def test_long_sums(isa, m):
    Operands(m, 32, MixedLayout(10752, 1792, 1792)).check()


@pytest.mark.parametrize("m", [1, 40])
def test_rounds_once(isa, m):
    operands = Operands(m, 64, MixedLayout(256, 128, 64))
    assert torch.equal(operands.run(torch.bfloat16), operands.run().to(torch.bfloat16))
    assert torch.equal(operands.run(torch.float16), operands.run().to(torch.float16))


@pytest.mark.parametrize("m", [1, 4, 40])
@pytest.mark.parametrize(
    ("exponent", "weight_byte"), [(-110, 200), (100, 60), (-60, 127), (60, 127), (0, 200), (80, 0)]
)
def test_ends_of_the_range(isa, m, exponent, weight_byte):
    """Activations and scales whose product is an ordinary number though one of them is near 2^±127."""
    operands = Operands(m, 24, MixedLayout(64, 32, 32))
    operands.x = (operands.x.float() * 2.0**exponent).bfloat16()
    operands.scales.fill_(weight_byte)
    operands.check()


@pytest.mark.parametrize("m", [6, 40])
def test_one_row_at_the_end_of_the_range(isa, m):
    operands = Operands(m, 24, MixedLayout(64, 32, 32))
    operands.x[m - 1] = (operands.x[m - 1].float() * 2.0**100).bfloat16()
    operands.x[1] = (operands.x[1].float() * 2.0**-100).bfloat16()
    actual, expected = operands.run(), operands.expected()
    for row in (0, 1, m - 1):
        assert relative_error(actual[row], expected[row]) <= BARS[torch.float32]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [MixedLayout(64, 32, 32), MixedLayout(32, 96, 0, "e3m2")])
@pytest.mark.parametrize("m", [1, 40])
def test_nan_and_inf_are_nan_in_their_row_only(isa, m, layout, value):
    operands = Operands(m, 24, layout)
    operands.scales[5, 3] = 0xFF
    for channel in (3, 70, 127):
        operands.x[m // 2, channel] = value
        actual, expected = operands.run(), operands.expected()
        assert torch.equal(actual.isnan(), expected.isnan())
        assert actual[m // 2].isnan().all() and actual[:, 5].isnan().all()
        assert m == 1 or relative_error(actual[0, :5], expected[0, :5]) <= BARS[torch.float32]


@pytest.mark.parametrize("m", [1, 2, 40])
@pytest.mark.parametrize("layout", [MixedLayout(64, 0, 0), MixedLayout(0, 64, 0)], ids=mix_name)
def test_outliers(isa, m, layout):
    """Beside an element that is thousands of times larger the others of its block keep their bits."""
    operands = Operands(m, 24, layout)
    operands.x[:, 5], operands.x[:, 40] = 3000.0, -0.25
    operands.data[7], operands.scales[7] = mx.quantize(torch.randn(64), layout)
    operands.data[7, :16] = 0  # a row of the weight that does not look at the outlier
    actual, expected = operands.run(), operands.expected()
    assert relative_error(actual, expected) <= BARS[torch.float32]
    assert relative_error(actual[:, 7], expected[:, 7]) <= BARS[torch.bfloat16]


@pytest.mark.parametrize("m", [1, 40])
def test_zeros(isa, m):
    operands = Operands(m, 24, MixedLayout(64, 64, 64))
    operands.x[:, 32:64] = 0
    operands.data[:, :16], operands.scales[:, 0] = 0, 0
    operands.check()
    operands.x.zero_()
    bias = torch.arange(24.0)
    assert torch.equal(operands.run(bias=bias), bias.expand(m, 24))


def test_threads_do_not_change_results(isa, threads):
    for m in (1, 3, 40, 130):
        operands = Operands(m, 200, MixedLayout(512, 256, 256, hadamard=(4, 6))).reordered()
        threads(1)
        one = operands.run()
        threads(2)
        assert torch.equal(one, operands.run())


def test_shapes_and_strides(isa):
    operands = Operands(12, 20, MixedLayout(64, 32, 32))
    flat, x = operands.run(), operands.x
    operands.x = x.view(3, 2, 2, -1)
    assert torch.equal(operands.run(), flat.view(3, 2, 2, 20))
    operands.x = x.repeat(1, 2).view(12, 2, -1)[:, 0]
    assert torch.equal(operands.run(), flat)
    operands.x = x.t().contiguous().t()
    assert torch.equal(operands.run(), flat)
    operands.x = x[3]
    assert relative_error(operands.run(), flat[3]) <= 1e-6
    operands.x = x[:0]
    assert operands.run().shape == (0, 20)
    operands.x, operands.data, operands.scales, operands.n = (
        x,
        *(t[:0] for t in (operands.data, operands.scales)),
        0,
    )
    assert operands.run().shape == (12, 0)


def test_no_channels(isa):
    nothing, bias = torch.empty(5, 0, dtype=torch.uint8), torch.arange(5.0)
    placed = torch.ops.micromix.place_weight(nothing, nothing, 0, 0, 0, 0)
    y = product(torch.empty(3, 0), None, placed, bias, 5, 0, 0, 0, 0, torch.float32)
    assert torch.equal(y, bias.expand(3, 5))


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    blocks=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)).filter(any),
    padding=st.integers(0, 31),
    format6=st.sampled_from(("e2m3", "e3m2")),
    hadamard=st.sampled_from(((), (4,), (4, 6), (6, 8), (4, 6, 8))),
    ordered=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(m, n, blocks, padding, format6, hadamard, ordered, dtype, isa, seed):
    before = ops.set_cpu_isa(isa if isa in usable_isas() else usable_isas()[-1])
    try:
        layout = MixedLayout(*(32 * b for b in blocks), format6=format6, hadamard=hadamard)
        operands = Operands(m, n, layout, seed=seed, dtype=dtype, k=layout.channels - padding)
        (operands.reordered(seed) if ordered else operands).check()
    finally:
        ops.set_cpu_isa(before)


@pytest.mark.parametrize("layout", [MixedLayout(64, 32, 32, hadamard=(4,))], ids=mix_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_in_torch_is_the_same_function(layout, dtype):
    operands = Operands(9, 30, layout, dtype=dtype, k=120).reordered()
    bias = rows(1, 30, dtype, seed=9)[0]
    weight = (operands.data, operands.scales, layout, layout)
    reference = mx.weight_only_linear(operands.x, *weight, operands.order, bias, torch.float32)
    assert torch.equal(reference, operands.expected(bias).float())
    flat = torch.cat((operands.data.flatten(), operands.scales.flatten()))
    counts = arguments(layout)
    operator = _reference.weight_only_linear(
        operands.x, operands.order, flat, bias, 30, *counts, torch.float32
    )
    assert torch.equal(operator, reference)


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("n", [(17, 40), (33, 16, 0)], ids=str)
def test_layers_that_share_a_launch(isa, m, n):
    layout = MixedLayout(64, 64, 32, hadamard=(4, 6))
    layers = [Operands(m, size, layout, seed=7, k=150).reordered() for size in n]
    x, order, counts = layers[0].x, layers[0].order, arguments(layout)
    given, expected = [], []
    for layer in layers:
        placed = torch.ops.micromix.place_weight(layer.data, layer.scales, *counts)
        bias = rows(1, max(layer.n, 1), torch.float32, seed=layer.n)[0, : layer.n]
        given += [placed, bias, layer.n]
        expected.append(product(x, order, placed, bias, layer.n, *counts, torch.bfloat16))
    several = getattr(torch.ops.micromix.weight_only_linears, {2: "two", 3: "three"}[len(n)])
    found = several(x, order, *given, *counts, torch.bfloat16)
    assert all(map(torch.equal, found, expected))
    fake = torch.library.opcheck(several, (x, order, *given, *counts, torch.bfloat16))
    assert set(fake.values()) == {"SUCCESS"}


def test_bad_arguments_are_named():
    operands = Operands(2, 16, MixedLayout(64, 32, 32))
    counts, f32 = arguments(operands.layout), torch.float32
    placed = torch.ops.micromix.place_weight(operands.data, operands.scales, *counts)
    order = torch.arange(128, dtype=torch.int32)

    def refused(match, *args):
        with pytest.raises(RuntimeError, match="weight_only_linear: " + match):
            product(*args)

    x = operands.x
    refused("weight must be the flat buffer", x, None, placed[1:], None, 16, *counts, f32)
    refused("weight was not placed", x, None, torch.zeros_like(placed), None, 16, *counts, f32)
    refused("x must be bfloat16", x.double(), None, placed, None, 16, *counts, f32)
    refused("x needs at least one", torch.tensor(1.0), None, placed, None, 16, *counts, f32)
    refused("the layout has .* 128 channels, x has 256", x.repeat(1, 2), None, placed, None, 16, *counts, f32)  # fmt: skip
    refused("order must be an int32", x, order.long(), placed, None, 16, *counts, f32)
    refused("order must have", x, order[1:], placed, None, 16, *counts, f32)
    refused("order must hold channels below", x, order + 1, placed, None, 16, *counts, f32)
    refused("n must not be negative", x, None, placed, None, -1, *counts, f32)
    refused("dtype must be", x, None, placed, None, 16, *counts, torch.float64)
    refused("bias must be .16. on", x, None, placed, torch.zeros(15), 16, *counts, f32)
    refused("k4, k6 and k8 must be multiples", x, None, placed, None, 16, 63, 33, 32, 0, f32)


@pytest.mark.parametrize("hadamard", [(), (4, 6)])
def test_opcheck(hadamard):
    operands = Operands(6, 20, MixedLayout(64, 32, 32, hadamard=hadamard), k=120).reordered()
    counts = arguments(operands.layout)
    placed = torch.ops.micromix.place_weight(operands.data, operands.scales, *counts)
    for x in (operands.x, operands.x.view(2, 3, -1)):
        for order, bias in ((None, None), (operands.order, torch.randn(20))):
            given = (x, order, placed, bias, 20, *counts, torch.bfloat16)
            torch.library.opcheck(product.default, given)
