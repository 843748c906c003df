"""micromix::place_weight and micromix::linear against the float64 product of the operands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile import mx, ops
from micromix_compile.mx import MixedLayout

from .cases import DTYPES, MIXES, arguments, mix_name, relative_error, rows, weight_layout
from .conftest import ISAS, usable_isas

linear = torch.ops.micromix.linear
place = torch.ops.micromix.place_weight

BAR = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


# On AMX a long MXFP4 segment is multiplied as integers, and K in steps: LONG has two of integers, the
# last of them with half a tile, and one of bfloat16 numbers.
SHORT, LONG = MixedLayout(64, 32, 32), MixedLayout(1312, 32, 32)
SIZES = pytest.mark.parametrize(
    ("m", "layout"),
    [(1, SHORT), (40, SHORT), (140, LONG), (140, MixedLayout(320, 0, 0))],
    ids=["1", "40", "140", "140-mxfp4"],
)


class Operands:
    """Packed activations and a packed weight, which a test may change before it calls `run`."""

    def __init__(self, m, n, layout, weights="match", seed=0):
        self.layout, self.weights, self.n = layout, weights, n
        self.own = weight_layout(layout, weights)
        self.data, self.scales = mx.quantize(rows(m, layout.channels, torch.float32, seed), layout)
        weight = rows(n, layout.channels, torch.float32, seed + 1) * 0.1
        self.weight_data, self.weight_scales = mx.quantize(weight, self.own)

    def run(self, dtype=torch.float32, bias=None):
        counts = arguments(self.layout, self.weights)
        placed = place(self.weight_data, self.weight_scales, *counts)
        return linear(self.data, self.scales, placed, bias, self.n, *counts, dtype)

    def expected(self, bias=None):
        x = mx.dequantize(self.data, self.scales, self.layout, torch.float64)
        w = mx.dequantize(self.weight_data, self.weight_scales, self.own, torch.float64)
        return x @ w.T + (0 if bias is None else bias.double())

    def check(self, dtype=torch.float32, bias=None):
        error = relative_error(self.run(dtype, bias), self.expected(bias))
        assert error <= BAR[dtype], f"relative error {error:.2e} > {BAR[dtype]:.2e}"


@pytest.mark.parametrize("m", [*range(1, 71, 2), 129, 191, 193, 230])
def test_every_row_count(isa, m):
    Operands(m, 48, MixedLayout(128, 64, 64)).check()


@pytest.mark.parametrize("n", [1024, 1040, 1000])
def test_results_larger_than_caches(isa, n):
    """From 1 MB on whole lines are written past the caches; n = 1040 and 1000 end within a panel pair, or a line."""
    bias = rows(1, n, torch.float32, seed=9)[0]
    Operands(610, n, MixedLayout(32, 32, 32)).check(torch.bfloat16, bias)


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 33, 64, 100])
@pytest.mark.parametrize("m", [1, 2, 5, 19, 40])
def test_every_column_tail(isa, m, n):
    Operands(m, n, MixedLayout(64, 64, 32)).check()
    Operands(m, n, MixedLayout(64, 64, 32)).check(torch.bfloat16)


@pytest.mark.parametrize("weights", ["match", "mxfp4"])
@pytest.mark.parametrize("layout", MIXES, ids=mix_name)
@pytest.mark.parametrize("m", [1, 3, 37])
def test_mixes(isa, m, layout, weights):
    Operands(m, 40, layout, weights).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 33])
def test_dtypes_and_bias(isa, m, bias_dtype, dtype):
    bias = rows(1, 50, bias_dtype, seed=9)[0]
    Operands(m, 50, MixedLayout(96, 32, 64)).check(dtype, bias)


@pytest.mark.parametrize("m", [1, 2, 64])
def test_long_sums(isa, m):
    """One rounding at the end, none between segments: the bar holds at a K of 14336."""
    Operands(m, 32, MixedLayout(10752, 1792, 1792)).check()


@pytest.mark.parametrize("m", [1, 40])
def test_rounds_once(isa, m):
    """The bfloat16 result is the rounded float32 result of the same kernel."""
    operands = Operands(m, 64, MixedLayout(256, 128, 64))
    assert torch.equal(operands.run(torch.bfloat16), operands.run().to(torch.bfloat16))
    assert torch.equal(operands.run(torch.float16), operands.run().to(torch.float16))


@pytest.mark.parametrize("weights", ["match", "mxfp4"])
@SIZES
@pytest.mark.parametrize(
    ("activation_byte", "weight_byte"),
    [
        (0, 254),
        (1, 253),
        (254, 1),
        (120, 0),
        (0, 200),
        (127, 200),
        (200, 127),
        (60, 190),
        (200, 20),
        (0, 175),
        (70, 175),
        (254, 79),
        (200, 79),
    ],
)
def test_ends_of_the_scale_range(isa, m, layout, activation_byte, weight_byte, weights):
    """Scales whose product is an ordinary number though one of them is near 2^±127."""
    operands = Operands(m, 24, layout, weights)
    operands.scales.fill_(activation_byte)
    operands.weight_scales.fill_(weight_byte)
    operands.check()


@SIZES
def test_one_row_at_the_end_of_the_range(isa, m, layout):
    operands = Operands(m, 24, layout)
    operands.scales[m - 1] = 3
    operands.scales[m - 1, 0] = 248
    actual, expected = operands.run(), operands.expected()
    for row in (0, m - 1):
        assert relative_error(actual[row], expected[row]) <= BAR[torch.float32]


@pytest.mark.parametrize("weights", ["match", "mxfp4"])
@pytest.mark.parametrize(("m", "layout"), [(5, SHORT), (40, SHORT), (140, LONG)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 8, 19, None])
def test_rows_at_the_end_of_the_range_do_not_depend_on_each_other(isa, m, layout, count, weights):
    """However many rows have a block of tiny numbers, each has the bits that it has as the only one."""
    operands = Operands(m, 40, layout, weights)
    plain = operands.scales.clone()
    wide = torch.randperm(m, generator=torch.Generator().manual_seed(2))[:count]
    operands.scales[wide, 1] = 60
    together, expected = operands.run(), operands.expected()
    assert relative_error(together, expected) <= BAR[torch.float32]
    tiny = operands.scales.clone()
    for row in wide[:5]:
        operands.scales = plain.clone()
        operands.scales[row] = tiny[row]
        assert torch.equal(operands.run()[row], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "layout"), [(1, SHORT), (40, SHORT), (140, LONG)], ids=str)
@pytest.mark.parametrize("panels", [(0,), (1,), (6,), (1, 2, 4), range(7)], ids=str)
def test_panels_at_the_end_of_the_range(isa, threads, m, layout, panels, dtype):
    """What lies outside of the plain range in some panels of a weight changes no other panel."""
    operands = Operands(m, 100, layout)
    before = operands.run(dtype)
    changed = torch.zeros(100, dtype=torch.bool)
    for panel in panels:
        operands.weight_scales[16 * panel + 3, 1] = 40 if panel % 2 else 190
        changed[16 * panel : 16 * panel + 16] = True
    operands.scales[m // 2, 0] = 70  # a row with such a scale
    threads(1)
    after, expected = operands.run(dtype), operands.expected()
    threads(2)
    assert torch.equal(operands.run(dtype), after)
    for column in (3, 19, 35, 51, 99):
        assert relative_error(after[:, column], expected[:, column]) <= BAR[dtype]
    if isa in ("avx512_bf16", "amx"):
        others = torch.arange(m) != m // 2
        assert torch.equal(after[others][:, ~changed], before[others][:, ~changed])


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("weights", ["match", "mxfp4"])
@pytest.mark.parametrize("format6", ["e2m3", "e3m2"])
@pytest.mark.parametrize("m", [1, 2, 40])
def test_largest_elements(isa, m, format6, weights, signs):
    """Every element the largest of its format: sums of products in narrow integers must hold them."""
    layout = MixedLayout(256, 64, 64, format6)
    largest = {"e2m3": 7.5, "e3m2": 28.0}[format6]
    values = torch.tensor([6.0] * 256 + [largest] * 64 + [448.0] * 64)
    operands = Operands(m, 24, layout, weights)
    own = values if weights == "match" else torch.full((384,), 6.0)
    operands.data, operands.scales = mx.quantize(signs[0] * values.expand(m, -1), layout)
    weight = signs[1] * own.expand(24, -1)
    operands.weight_data, operands.weight_scales = mx.quantize(weight, operands.own)
    dequantized = mx.dequantize(operands.data, operands.scales, layout, torch.float64)
    assert torch.equal(dequantized, signs[0] * values.double().expand(m, -1))
    operands.check()


def test_random_scales(isa):
    """Any scale bytes: results that float32 can hold are right, row by row and column by column."""
    operands = Operands(40, 24, MixedLayout(32, 0, 0))
    generator = torch.Generator().manual_seed(5)
    operands.scales = torch.randint(0, 255, (40, 1), generator=generator).byte()
    operands.weight_scales = torch.randint(0, 255, (24, 1), generator=generator).byte()
    actual, expected = operands.run().double(), operands.expected()
    x = mx.dequantize(operands.data, operands.scales, operands.layout, torch.float64)
    w = mx.dequantize(operands.weight_data, operands.weight_scales, operands.own, torch.float64)
    largest = torch.finfo(torch.float32).max
    held = (x.abs() @ w.abs().T < largest) & (expected.abs() > torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(actual[held], expected[held], rtol=1e-5, atol=0)
    assert not actual[expected.abs() > largest].isfinite().any()


@SIZES
def test_nan_scales_spread_to_their_row_or_column_only(isa, m, layout):
    operands = Operands(m, 24, layout)
    operands.scales[m // 2, 1] = 0xFF
    operands.weight_scales[5, 3] = 0xFF
    actual, expected = operands.run(), operands.expected()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual[m // 2].isnan().all() and actual[:, 5].isnan().all()


@pytest.mark.parametrize("m", [1, 40])
def test_nan_elements(isa, m):
    """MXFP8 has NaN elements of its own, which a foreign checkpoint may hold."""
    operands = Operands(m, 24, MixedLayout(0, 0, 64))
    operands.data[m // 2, 3] = 0x7F
    operands.weight_data[5, 40] = 0xFF
    assert torch.equal(operands.run().isnan(), operands.expected().isnan())


@SIZES
def test_zero_blocks(isa, m, layout):
    """A block of zeros has scale byte 0, which must not send the call out of the plain range."""
    operands = Operands(m, 24, layout)
    for data, scales in (
        (operands.data, operands.scales),
        (operands.weight_data, operands.weight_scales),
    ):
        data[:, :16], scales[:, 0] = 0, 0
        data[:, -32:], scales[:, -1] = 0x80, 255 - 1  # negative zeros under a huge scale
    operands.check()
    operands.weight_data.zero_()
    assert (operands.run() == 0).all()


def with_scales(operands, activations, weights, seed=0):
    """Random scale bytes: of the first `activations` and `weights` values up from 2^-20."""
    generator = torch.Generator().manual_seed(seed)
    for scales, count in ((operands.scales, activations), (operands.weight_scales, weights)):
        scales.copy_(107 + torch.randint(0, count, scales.shape, generator=generator))
    return operands


@pytest.mark.parametrize("m", [49, 65, 200, 540])
@pytest.mark.parametrize("weights", ["match", "mxfp4"])
@pytest.mark.parametrize(
    "counts", [(256, 0, 0), (480, 64, 32), (1312, 32, 32), (640, 704, 0)], ids=str
)
def test_steps_of_many_rows(isa, m, counts, weights):
    bias = rows(1, 56, torch.float32, seed=9)[0]
    operands = Operands(m, 56, MixedLayout(*counts), weights)
    operands.check(torch.float32, bias)
    operands.check(torch.bfloat16, bias)


@pytest.mark.parametrize("counts", [(480, 32, 32), (1312, 0, 32), (1312, 0, 0)], ids=str)
@pytest.mark.parametrize(
    ("activations", "weights"), [(4, 4), (5, 1), (1, 5), (12, 9), (41, 1), (1, 41)]
)
def test_scales_of_several_bands(isa, counts, activations, weights):
    """Scales of a row more than 2^3 apart: row by row and column by column, as large ones hide small ones."""
    operands = Operands(150, 70, MixedLayout(*counts))
    with_scales(operands, activations, weights)
    actual, expected = operands.run().double(), operands.expected()
    for dim in (0, 1):
        errors = (actual - expected).norm(dim=dim) / expected.norm(dim=dim)
        assert errors.max() <= BAR[torch.float32]


def test_each_band_by_itself(isa):
    """Row n of the weight is zero but for block n, so no larger block hides it."""
    layout = MixedLayout(23 * 32, 0, 0)
    operands = Operands(150, 23, layout)
    operands.scales[:] = 175 - 4 * torch.arange(23)
    operands.weight_data *= torch.eye(23, dtype=torch.uint8).repeat_interleave(16, dim=1)
    actual, expected = operands.run().double(), operands.expected()
    assert ((actual - expected).norm(dim=0) / expected.norm(dim=0)).max() <= BAR[torch.float32]


@pytest.mark.parametrize(("activations", "weights"), [(4, 4), (7, 1), (1, 7), (6, 6)])
def test_exact_sums(isa, activations, weights):
    """Few elements that are not zero, all within 24 bits: float32 sums are exact in any order."""
    operands = with_scales(Operands(150, 40, MixedLayout(1312, 0, 0)), activations, weights)
    keep = torch.rand(operands.data.shape, generator=torch.Generator().manual_seed(3)) < 0.02
    operands.data *= keep
    expected = operands.expected()
    assert torch.equal(expected, expected.float().double())
    assert torch.equal(operands.run(), expected.float())


def test_a_row_has_the_same_bits_whatever_the_others_hold(isa):
    operands = with_scales(Operands(150, 40, MixedLayout(1312, 32, 0)), 6, 2)
    before = operands.run()
    others = torch.arange(150) % 7 != 3
    operands.scales[others] = 107 + 8 * torch.randint(0, 9, operands.scales[others].shape).byte()
    operands.scales[0, 0] = 0xFF
    after = operands.run()
    assert torch.equal(before[~others], after[~others])
    assert not torch.equal(before[others], after[others])


def test_threads_do_not_change_results(isa, threads):
    for m in (1, 3, 40, 130):
        operands = Operands(m, 200, MixedLayout(512, 256, 256))
        threads(1)
        one = operands.run()
        threads(2)
        assert torch.equal(one, operands.run())


@pytest.mark.parametrize("bits", [0x000B, 0xFFC0], ids=["subnormal", "NaN with a sign"])
def test_threads_do_not_change_how_results_are_rounded(isa, threads, bits):
    """Not even those that AMX's conversion does not round as the others do."""
    for m, n in ((32, 96), (256, 400)):
        operands = Operands(m, n, MixedLayout(4096, 0, 0))
        operands.data.zero_()
        bias = torch.full((n,), bits, dtype=torch.uint16).view(torch.bfloat16)
        results = []
        for count in (1, 2):
            threads(count)
            results.append(operands.run(torch.bfloat16, bias).view(torch.int16))
        assert torch.equal(*results) and len(results[0].unique()) == 1


def test_rows_do_not_depend_on_each_other(isa):
    """A row's result is within rounding of the same row alone: batching changes no answer."""
    operands = Operands(50, 64, MixedLayout(256, 128, 128))
    together = operands.run()
    operands.data, operands.scales = operands.data[7:8], operands.scales[7:8]
    assert relative_error(together[7:8], operands.run()) <= 1e-6


def test_rows_that_do_not_fit_the_cache_together(isa):
    """A part of the rows meets all panels, then the next does: the bits are the same in any part."""
    operands = Operands(100, 40, MixedLayout(4096, 1024, 1024))
    together = operands.run()
    assert relative_error(together, operands.expected()) <= BAR[torch.float32]
    data, scales = operands.data, operands.scales
    parts = (
        (slice(0, 64), slice(13, 96)) if isa not in ("avx512_bf16", "amx") else (slice(0, 99),)
    )  # one kernel
    for part in parts:
        operands.data, operands.scales = data[part], scales[part]
        assert torch.equal(operands.run(), together[part])


def test_shapes(isa):
    layout = MixedLayout(64, 32, 32)
    counts = arguments(layout)
    operands = Operands(12, 20, layout)
    placed = place(operands.weight_data, operands.weight_scales, *counts)
    flat = operands.run()
    shaped = linear(
        *(t.view(3, 2, 2, -1) for t in (operands.data, operands.scales)),
        *(placed, None, 20, *counts, torch.float32),
    )
    assert torch.equal(shaped, flat.view(3, 2, 2, 20))
    strided = linear(
        *(t.repeat(1, 2).view(12, 2, -1)[:, 0] for t in (operands.data, operands.scales)),
        *(placed, None, 20, *counts, torch.float32),
    )
    assert torch.equal(strided, flat)
    one = linear(operands.data[3], operands.scales[3], placed, None, 20, *counts, torch.float32)
    assert relative_error(one, flat[3]) <= 1e-6
    none = linear(operands.data[:0], operands.scales[:0], placed, None, 20, *counts, torch.float32)
    assert none.shape == (0, 20)
    empty = place(operands.weight_data[:0], operands.weight_scales[:0], *counts)
    none = linear(operands.data, operands.scales, empty, None, 0, *counts, torch.float32)
    assert none.shape == (12, 0)


def test_no_channels(isa):
    """K = 0: the sum of nothing, plus the bias."""
    layout, bias = MixedLayout(0, 0, 0), torch.arange(5.0)
    placed = place(
        torch.empty(5, 0, dtype=torch.uint8), torch.empty(5, 0, dtype=torch.uint8), 0, 0, 0, 0
    )
    for m in (1, 3, 20):
        nothing = torch.empty(m, 0, dtype=torch.uint8)
        actual = linear(nothing, nothing, placed, bias, 5, *arguments(layout), torch.float32)
        assert torch.equal(actual, bias.expand(m, 5))


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    blocks=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)).filter(any),
    format6=st.sampled_from(("e2m3", "e3m2")),
    weights=st.sampled_from(("match", "mxfp4")),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120, deadline=None)
def test_any_shape(m, n, blocks, format6, weights, isa, seed):
    before = ops.set_cpu_isa(min(isa, usable_isas()[-1], key=ISAS.index))
    try:
        layout = MixedLayout(*(32 * b for b in blocks), format6=format6)
        Operands(m, n, layout, weights, seed).check()
    finally:
        ops.set_cpu_isa(before)


@pytest.mark.parametrize("layout", MIXES, ids=mix_name)
def test_placed_size_is_what_the_fake_says(layout):
    for n in (0, 1, 16, 33):
        operands = Operands(1, n, layout)
        counts = arguments(layout)
        placed = place(operands.weight_data, operands.weight_scales, *counts)
        assert placed.numel() == ops.placed_bytes(n, *counts)
        assert placed.data_ptr() % 64 == 0


def test_large_weights_start_at_a_huge_page():
    layout = MixedLayout(4096, 0, 0)
    data = torch.zeros(2048, layout.row_bytes, dtype=torch.uint8)
    scales = torch.zeros(2048, layout.blocks, dtype=torch.uint8)
    placed = place(data, scales, *arguments(layout))
    assert placed.numel() > 2**21 and placed.data_ptr() % 2**21 == 0


def test_bad_arguments_are_named():
    operands = Operands(2, 16, MixedLayout(64, 32, 32))
    counts = arguments(operands.layout)
    placed = place(operands.weight_data, operands.weight_scales, *counts)
    data, scales = operands.data, operands.scales

    def refused(match, *args):
        with pytest.raises(RuntimeError, match=match):
            linear(*args)

    f32 = torch.float32
    refused("flat buffer of", data, scales, placed[1:], None, 16, *counts, f32)
    refused("flat buffer of", data, scales, placed, None, 17, *counts, f32)
    refused("was not placed", data, scales, torch.zeros_like(placed), None, 16, *counts, f32)
    refused("was not placed", data, scales, placed, None, 15, *counts, f32)
    other = (counts[0], counts[1], counts[2], counts[3] | 1)
    refused("was not placed", data, scales, placed, None, 16, *other, f32)
    refused("aligned", data, scales, torch.cat((placed[:1], placed))[1:], None, 16, *counts, f32)
    refused("data must be uint8", data.char(), scales, placed, None, 16, *counts, f32)
    refused(
        "data must be .*the last dimension is 1",
        data[:, :1],
        scales,
        placed,
        None,
        16,
        *counts,
        f32,
    )
    refused("scales must be", data, scales[:1], placed, None, 16, *counts, f32)
    refused("scales must be", data, scales[:, :1], placed, None, 16, *counts, f32)
    refused("dtype must be", data, scales, placed, None, 16, *counts, torch.float64)
    refused("bias must be .16. on", data, scales, placed, torch.zeros(15), 16, *counts, f32)
    refused("bias must be bfloat16", data, scales, placed, torch.zeros(16).int(), 16, *counts, f32)
    refused("multiples of 32", data, scales, placed, None, 16, 64, 33, 31, counts[3], f32)
    with pytest.raises(RuntimeError, match="place_weight: data must be"):
        place(operands.weight_data[:, 1:], operands.weight_scales, *counts)
    with pytest.raises(RuntimeError, match="place_weight: scales must be"):
        place(operands.weight_data, operands.weight_scales[1:], *counts)


def test_scales_of_other_leading_sizes_are_refused():
    """Though there are as many rows of them."""
    operands = Operands(6, 16, MixedLayout(64, 32, 32))
    counts = arguments(operands.layout)
    layer = (place(operands.weight_data, operands.weight_scales, *counts), None, 16)

    def refused(op, data_sizes, scales_sizes, layers=1):
        data = operands.data.view(*data_sizes, -1)
        scales = operands.scales.view(*scales_sizes, -1)
        with pytest.raises(RuntimeError, match="leading sizes of data"):
            op(data, scales, *layer * layers, *counts, torch.float32)

    for sizes in ((3, 2), (6, 1), (1, 6), (6,), (1, 2, 3)):
        refused(linear, (2, 3), sizes)
    refused(linear, (6,), (1, 6))
    refused(torch.ops.micromix.linears.two, (2, 3), (3, 2), 2)
    refused(torch.ops.micromix.linears.three, (2, 3), (3, 2), 3)


def test_sizes_whose_placed_weight_wraps_around_are_refused():
    """n is such that the bytes of its placed weight are 0 modulo 2^64, those of an empty tensor."""
    counts = (32, 0, 0, 0)
    header = ops.placed_bytes(0, *counts)
    panel = ops.placed_bytes(16, *counts) - header
    assert header % 64 == panel % 64 == 0
    panels = -(header // 64) * pow(panel // 64, -1, 2**58) % 2**58
    assert (header + panels * panel) % 2**64 == 0
    empty = torch.empty(0, dtype=torch.uint8)
    data, scales = mx.quantize(rows(1, 32, torch.float32), MixedLayout(32, 0, 0))
    unplace = torch.ops.micromix.unplace_weight
    for n in (16 * panels, 2**31):
        layer = (empty, None, n)
        with pytest.raises(RuntimeError, match="linear: n and .* below 2.31"):
            linear(data, scales, *layer, *counts, torch.float32)
        with pytest.raises(RuntimeError, match="linears: n and .* below 2.31"):
            torch.ops.micromix.linears.two(data, scales, *layer, *layer, *counts, torch.float32)
        with pytest.raises(RuntimeError, match="unplace_weight: n and .* below 2.31"):
            unplace(empty, n, *counts)
    with pytest.raises(RuntimeError, match="below 2.31"):
        unplace(empty, 1, 2**31, 0, 0, 0)
    with pytest.raises(RuntimeError, match="k4, k6 and k8 must be below 2.31"):  # their sum is 64
        torch.ops.micromix.place_weight(data, scales, 2**63 - 32, 2**63 - 32, 128, 0)


def test_results_without_memory_say_so():
    """2^53 bytes, of products of no channels."""
    nothing, weight = (torch.empty(n, 0, dtype=torch.uint8) for n in (2**30, 2**21))
    placed = place(weight, weight, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        linear(nothing, nothing, placed, None, 2**21, 0, 0, 0, 0, torch.float32)


@pytest.mark.parametrize("weights", ["match", "mxfp4"])
def test_opcheck(weights):
    operands = Operands(6, 20, MixedLayout(64, 32, 32), weights)
    counts = arguments(operands.layout, weights)
    weight = (operands.weight_data, operands.weight_scales)
    torch.library.opcheck(place.default, (*weight, *counts))
    placed = place(*weight, *counts)
    bias = torch.randn(20)
    for data, scales in (
        (operands.data, operands.scales),
        (operands.data.view(2, 3, -1), operands.scales.view(2, 3, -1)),
    ):
        for b in (None, bias):
            arguments_ = (data, scales, placed, b, 20, *counts, torch.bfloat16)
            torch.library.opcheck(linear.default, arguments_)


def test_the_emulation_of_blackwell_is_not_for_the_cpu():
    layout = MixedLayout(64, 32, 32)
    data, scales = mx.quantize(rows(3, 128, torch.float32), layout)
    with pytest.raises((RuntimeError, ValueError), match="not a format code"):
        place(data, scales, 64, 32, 32, layout.code | ops.EMULATED)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_large_results_on_threads_whose_shares_begin_at_odd_panels(isa, threads):
    """36 panels: 3 and 4 threads get 12 and 9 each; 30 panels on 2 threads, 15. Results of more than 1 MiB."""
    layout, before = MixedLayout(32, 0, 0), torch.get_num_threads()
    for outputs in (576, 480):
        data, scales = mx.quantize(rows(2048, 32, torch.bfloat16), layout)
        packed_weight = mx.quantize(rows(outputs, 32, torch.bfloat16, seed=1), layout)
        placed = torch.ops.micromix.place_weight(*packed_weight, *arguments(layout))
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            try:
                results.append(
                    torch.ops.micromix.linear(
                        data, scales, placed, None, outputs, *arguments(layout), torch.bfloat16
                    )
                )
            finally:
                torch.set_num_threads(before)
        assert torch.equal(*results)
