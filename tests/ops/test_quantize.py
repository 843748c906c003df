"""micromix::quantize against the reference of micromix_compile.mx, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile.mx import MixedLayout, quantize

from .cases import DTYPES, MIXES, RULES, arguments, mix_name, rows

op = torch.ops.micromix.quantize

UNIFORM = [
    MixedLayout(64, 0, 0),
    MixedLayout(0, 64, 0, format6="e2m3"),
    MixedLayout(0, 64, 0, format6="e3m2"),
    MixedLayout(0, 0, 64),
]


def check(x: torch.Tensor, layout: MixedLayout, order: torch.Tensor | None = None) -> None:
    data, scales = op(x, order, *arguments(layout))
    expected_data, expected_scales = quantize(x, layout, order)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0)
    torch.testing.assert_close(data, expected_data, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", UNIFORM, ids=mix_name)
def test_random_bits(isa, layout, rule, dtype):
    """Random bit patterns: every exponent, subnormals, NaN and Inf among them."""
    layout = MixedLayout(*layout.counts, layout.format6, (rule,) * 3)
    width = 16 if dtype.itemsize == 2 else 32
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (4096, 64), generator=generator)
    # Wild exponents in the first half; in the second, blocks whose elements are of like size.
    x = bits.to({16: torch.int16, 32: torch.int32}[width]).view(dtype)
    x[2048:] = (torch.randn(2048, 64, generator=generator) * 2.0**-3).to(dtype)
    check(x, layout)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", UNIFORM, ids=mix_name)
def test_every_bfloat16_as_amax(isa, layout, rule):
    """A block whose largest element is each bfloat16, the others fractions of it with ties."""
    layout = MixedLayout(*layout.counts, layout.format6, (rule,) * 3)
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    fractions = torch.linspace(-1, 1, 64)
    check((amax[:, None].float() * fractions).to(torch.bfloat16), layout)
    check(amax[:, None].float() * fractions, layout)


@pytest.mark.parametrize("amax", (7.0, 6.0 * 2.0**-126, 5.5 * 2.0**-122, 6.0 * 2.0**100))
@pytest.mark.parametrize("layout", UNIFORM, ids=mix_name)
def test_every_bfloat16_below_an_amax(isa, layout, amax):
    """Every number that a block with this amax can hold, of both signs: every tie is among them."""
    bits = torch.arange(int(torch.tensor(amax, dtype=torch.bfloat16).view(torch.int16)) + 1)
    x = torch.full((-(-len(bits) // 31), 32), amax, dtype=torch.bfloat16)
    padded = torch.nn.functional.pad(bits, (0, 31 * len(x) - len(bits))).to(torch.int16)
    x[:, 1:] = padded.view(torch.bfloat16).view(-1, 31)
    check(torch.cat((x, -x), dim=1), layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_segments(isa, dtype):
    """Segments of more blocks than kernels do at once, and more rows than they gather at once."""
    for hadamard in ((), (4, 8)):
        layout = MixedLayout(2080, 1056, 1120, hadamard=hadamard)
        x = rows(7, layout.channels - 40, dtype)
        x[1] *= 2.0**-126
        check(x, layout)
        order = torch.randperm(layout.channels, generator=torch.Generator().manual_seed(3)).int()
        order[order >= x.shape[1]] = -1
        for count in (1, 2, 3, 7):
            check(x[:count], layout, order)


@pytest.mark.parametrize("layout", MIXES, ids=mix_name)
def test_mixes_orders_and_padding(isa, layout):
    channels = layout.channels - 7
    x = rows(5, channels, torch.bfloat16)
    check(x, layout)
    generator = torch.Generator().manual_seed(2)
    order = torch.full((layout.channels,), -1, dtype=torch.int32)
    places = torch.randperm(layout.channels, generator=generator)[:channels]
    order[places] = torch.randperm(channels, generator=generator).int()
    check(x, layout, order)
    check(x, layout, torch.full_like(order, channels - 1))  # one channel everywhere
    check(x, layout, torch.full_like(order, -1))  # padding only


def test_negative_zero_keeps_its_sign(isa):
    x = torch.full((1, 32), -0.0)
    x[0, 0] = 1.0
    check(x, MixedLayout(32, 0, 0))
    check(x, MixedLayout(0, 0, 32))


def test_special_values(isa):
    x = rows(8, 192, torch.float32)
    x[0, 5], x[1, 70], x[2, 190] = float("nan"), float("inf"), float("-inf")
    x[3] = 0.0
    x[4] = torch.finfo(torch.float32).max
    x[5] = 1e-45
    x[6, ::2] = torch.finfo(torch.float32).tiny
    layout = MixedLayout(64, 64, 64)
    check(x, layout)
    _, scales = op(x, None, *arguments(layout))
    assert scales[0, 0] == scales[1, 2] == scales[2, 5] == 0xFF
    assert (scales[3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(isa, dtype):
    layout = MixedLayout(32, 32, 32)
    wide = rows(12, 200, dtype)
    check(wide[:, :1], layout)  # K = 1
    check(wide[:0, :96], layout)  # no rows
    check(wide[:, :96].t()[:12, :], MixedLayout(0, 0, 32))  # transposed
    check(wide[:, 3:99], layout)  # a slice
    check(wide[:, ::3], layout)  # strided channels
    check(wide.view(3, 2, 2, 200)[..., :90], layout)
    check(wide[0, :70], layout)  # one dimension
    check(wide[:1, :96].expand(4, 96), layout)
    check(wide[:, :0], MixedLayout(0, 0, 0))  # no channels at all
    check(wide[:, :0], MixedLayout(32, 0, 0))  # padding only


@given(
    m=st.integers(0, 9),
    blocks=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)),
    missing=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    format6=st.sampled_from(("e2m3", "e3m2")),
    seed=st.integers(0, 2**16),
    reorder=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(m, blocks, missing, dtype, format6, seed, reorder):
    layout = MixedLayout(*(32 * b for b in blocks), format6=format6)
    channels = max(0, layout.channels - missing)
    x = rows(m, channels, dtype, seed)
    order = None
    if reorder:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(-1, max(channels, 1), (layout.channels,), generator=generator).int()
        if channels == 0:
            order.fill_(-1)
    check(x, layout, order)


def test_threads_do_not_change_results(isa, threads):
    x = rows(257, 500, torch.bfloat16)
    layout = MixedLayout(256, 128, 128)
    threads(1)
    data, scales = op(x, None, *arguments(layout))
    threads(2)
    data2, scales2 = op(x, None, *arguments(layout))
    assert torch.equal(data, data2) and torch.equal(scales, scales2)


def test_bad_arguments_are_named():
    x = rows(2, 64, torch.float32)
    order = torch.arange(64, dtype=torch.int32)
    code = MixedLayout(64, 0, 0).code
    with pytest.raises(RuntimeError, match="x must be bfloat16, float16 or float32; got Double"):
        op(x.double(), None, 64, 0, 0, code)
    with pytest.raises(RuntimeError, match="multiples of 32"):
        op(x, None, 65, 0, 0, code)
    with pytest.raises(RuntimeError, match="multiples of 32"):
        op(x, None, 96, -32, 0, code)
    with pytest.raises(RuntimeError, match="not a format code"):
        op(x, None, 64, 0, 0, 0b1100)
    with pytest.raises(RuntimeError, match="not a format code"):
        op(x, None, 64, 0, 0, 256)
    with pytest.raises(RuntimeError, match="has k4 . k6 . k8 = 32 channels, x has 64"):
        op(x, None, 32, 0, 0, code)
    with pytest.raises(RuntimeError, match="order must be an int32"):
        op(x, order.long(), 64, 0, 0, code)
    with pytest.raises(RuntimeError, match="order must have k4 . k6 . k8 = 64 entries; got 32"):
        op(x, order[:32], 64, 0, 0, code)
    with pytest.raises(RuntimeError, match="channels below 64, or -1 for padding; got 64"):
        op(x, order + 1, 64, 0, 0, code)
    with pytest.raises(RuntimeError, match="channels below 64, or -1 for padding; got -2"):
        op(x, order - 2, 64, 0, 0, code)
    with pytest.raises(RuntimeError, match="at least one dimension"):
        op(x[0, 0], None, 64, 0, 0, code)


def test_results_without_memory_say_so():
    """Who catches torch's own error looks for these words. No machine has 2^51 bytes of addresses."""
    x, rest = torch.randn(1, 32).expand(2**22, 32), (None, 2**30, 0, 0, MixedLayout(32, 0, 0).code)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        op(x, *rest)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.ops.micromix.pointwise_quantize(x, None, 0, torch.float32, False, *rest)


def test_opcheck():
    layout = MixedLayout(64, 32, 32)
    order = torch.arange(127, -1, -1, dtype=torch.int32)
    for x in (rows(3, 128, torch.bfloat16), rows(6, 128, torch.float32).view(2, 3, 128)):
        torch.library.opcheck(op.default, (x, None, *arguments(layout)))
        torch.library.opcheck(op.default, (x, order, *arguments(layout)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [(4,), (6,), (8,), (4, 6), (4, 6, 8)], ids=str)
def test_rotated_segments(isa, rotated, dtype):
    """Bit for bit: the sums of the rotation have one order in every kernel."""
    generator = torch.Generator().manual_seed(3)
    for mix in MIXES:
        layout = replace(mix, hadamard=rotated)
        channels = layout.channels - 7
        check(rows(9, channels, dtype), layout)
        shuffled = torch.randperm(layout.channels, generator=generator).to(torch.int32)
        check(
            rows(9, channels, dtype, seed=1), layout, torch.where(shuffled < channels, shuffled, -1)
        )


def test_rotated_blocks_with_nan_inf_and_sums_beyond_float32(isa):
    layout = MixedLayout(64, 0, 0, hadamard=(4,))
    x = torch.ones(3, 64)
    x[0, 3], x[1, 40], x[2, :32] = float("nan"), float("inf"), 3e38
    check(x, layout)
    assert op(x, None, *arguments(layout))[1].tolist()[2][0] == 0xFF
