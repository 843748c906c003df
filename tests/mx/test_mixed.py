"""quantize, dequantize and linear over mixed rows, against a plain float64 oracle."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile.mx import (
    BLOCK,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    MixedLayout,
    ScaleRule,
    dequantize,
    linear,
    mixed,
    quantize,
    scale_bytes,
)

CASTS = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E4M3: ml_dtypes.float8_e4m3fn,
}
INF, NAN = float("inf"), float("nan")


def oracle_row(row: list[float], layout: MixedLayout, order: list[int]) -> list[float]:
    """One row reordered, padded, quantised and dequantised: float64, a block at a time."""
    padded = np.array([row[channel] if channel >= 0 else 0.0 for channel in order])
    for segment in layout.segments():
        for start in range(segment.start, segment.stop, BLOCK):
            block = padded[start : start + BLOCK]
            if not np.isfinite(block).all():
                block[:] = NAN
                continue
            amax = torch.tensor([np.abs(block).max()], dtype=torch.float32)
            scale = 2.0 ** (scale_bytes(amax, segment.fmt, segment.rule).item() - 127)
            scaled = np.clip(block / scale, -segment.fmt.largest, segment.fmt.largest)
            block[:] = scaled.astype(CASTS[segment.fmt]).astype(np.float64) * scale
    return padded.tolist()


def oracle(x: torch.Tensor, layout: MixedLayout, order: torch.Tensor | None = None):
    channels = x.shape[-1]
    if order is None:
        identity = [i if i < channels else -1 for i in range(layout.channels)]
    positions = identity if order is None else order.tolist()
    rows = x.double().reshape(x.shape[:-1].numel(), channels).tolist()
    values = [oracle_row(row, layout, positions) for row in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(*x.shape[:-1], layout.channels)


def assert_quantizes(x: torch.Tensor, layout: MixedLayout, order: torch.Tensor | None = None):
    data, scales = quantize(x, layout, order)
    assert data.dtype == scales.dtype == torch.uint8
    assert data.shape == (*x.shape[:-1], layout.row_bytes)
    assert scales.shape == (*x.shape[:-1], layout.blocks)
    result = dequantize(data, scales, layout, torch.float64)
    torch.testing.assert_close(result, oracle(x, layout, order), rtol=0, atol=0, equal_nan=True)


def test_a_block_by_hand():
    x = torch.zeros(2, 32)
    x[0, :4] = torch.tensor([7.0, -1.0, 2.5, 0.25])  # EVEN: from 7 on the scale is 2
    x[1, :4] = torch.tensor([6.9, -1.0, 2.5, 0.25])  # below 7 it is 1, and 6.9 saturates
    data, scales = quantize(x, MixedLayout(32, 0, 0))
    assert scales.tolist() == [[128], [127]]
    # 3.5, -0.5, 1.25, 0.125 -> 4, -0.5, 1, 0 and 6, -1, 2, 0; the even channel in the low nibble
    assert data[:, :2].tolist() == [[0x96, 0x02], [0xA7, 0x04]]
    assert (data[:, 2:] == 0).all()
    values = dequantize(data, scales, MixedLayout(32, 0, 0))
    assert values[:, :4].tolist() == [[8.0, -1.0, 2.0, 0.0], [6.0, -1.0, 2.0, 0.0]]


def test_segments_by_hand():
    x = torch.ones(1, 96)
    data, scales = quantize(x, MixedLayout(32, 32, 32))
    # 1.0 under EVEN, CEIL, CEIL: exponents -2, ceil(log2(1 / 7.5)) = -2, ceil(log2(1 / 448)) = -8
    assert scales.tolist() == [[125, 125, 119]]
    # 4.0 in E2M1 is 0b0110, 4.0 in E2M3 is 0b011000, 256.0 in E4M3 is 0b01111000
    assert data.tolist() == [[0x66] * 16 + [0x18, 0x86, 0x61] * 8 + [0x78] * 32]


@given(
    shape=st.lists(st.integers(0, 3), max_size=2),
    channels=st.integers(1, 100),
    blocks=st.tuples(*[st.integers(0, 2)] * 3),
    format6=st.sampled_from(["e2m3", "e3m2"]),
    rules=st.tuples(*[st.sampled_from([rule.label for rule in ScaleRule])] * 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    reordered=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_any_shape(shape, channels, blocks, format6, rules, dtype, reordered, strided, seed):
    layout = MixedLayout(*(BLOCK * count for count in blocks), format6, rules)
    generator = torch.Generator().manual_seed(seed)
    full = (*shape, channels, 2)
    octaves = torch.randint(-8, 8, full, generator=generator)
    x = (torch.randn(full, generator=generator) * torch.exp2(octaves)).to(dtype)
    x = x[..., 0] if strided else x[..., 0].contiguous()
    order = None
    if reordered:
        order = torch.randint(-1, channels, (layout.channels,), generator=generator).int()
    elif layout.channels < channels:
        with pytest.raises(ValueError, match="the layout has"):
            quantize(x, layout)
        return
    assert_quantizes(x, layout, order)


def test_chunks_do_not_show():
    layout, rows = MixedLayout(64, 32, 32), 3 * mixed._CHUNK_ELEMENTS // 128 + 5
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(4)).int()
    data, scales = quantize(x, layout, order)
    values = dequantize(data, scales, layout)
    for row in (0, 1, rows // 2, rows - 1):
        one_data, one_scales = quantize(x[row], layout, order)
        assert torch.equal(one_data, data[row]) and torch.equal(one_scales, scales[row])
        assert torch.equal(dequantize(one_data, one_scales, layout), values[row])
    weight = quantize(torch.randn(40, 128), layout)
    product = linear(data, scales, *weight, layout, layout)
    assert product.shape == (rows, 40)


def test_a_parameter_is_only_a_tensor():
    x = torch.nn.Parameter(torch.randn(4, 64))
    data, scales = quantize(x, MixedLayout(64, 0, 0))
    assert not data.requires_grad and not scales.requires_grad


def test_order_moves_and_pads():
    x = torch.tensor([[1.0, 2.0, 4.0]])
    order = torch.full((32,), -1, dtype=torch.int32)
    order[5], order[6], order[9] = 2, 0, 2  # a channel may be read twice, and one not at all
    expected = torch.zeros(1, 32)
    expected[0, 5], expected[0, 6], expected[0, 9] = 4.0, 1.0, 4.0
    layout = MixedLayout(32, 0, 0)
    assert torch.equal(dequantize(*quantize(x, layout, order), layout), expected)


def test_padding_does_not_read_nan():
    x = torch.full((1, 40), NAN)
    order = torch.arange(32, dtype=torch.int32)
    order[:] = -1
    layout = MixedLayout(0, 0, 32)
    assert torch.equal(dequantize(*quantize(x, layout, order), layout), torch.zeros(1, 32))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_block_is_nan_and_its_neighbours_are_not(bad):
    x = torch.ones(2, 96)
    x[1, 40] = bad
    layout = MixedLayout(32, 32, 32)
    data, scales = quantize(x, layout)
    assert scales[1].tolist() == [125, 0xFF, 119]
    assert (data[1, 16:40] == 0).all()
    values = dequantize(data, scales, layout)
    assert values[1, 32:64].isnan().all()
    assert (values[0] == 1).all() and (values[1, :32] == 1).all() and (values[1, 64:] == 1).all()
    product = linear(data, scales, *quantize(torch.ones(3, 96), layout), layout, layout)
    assert product[0].tolist() == [96.0] * 3 and product[1].isnan().all()


@pytest.mark.parametrize("exponent", [-149, -140, -130, -127, -126, 100, 126, 127])
@pytest.mark.parametrize("fmt", CASTS, ids=lambda fmt: fmt.name)
def test_ends_of_the_float32_range(fmt, exponent):
    x = torch.full((1, 32), 2.0**exponent)
    x[0, 1::2] *= -1.5
    format6 = "e3m2" if fmt is E3M2 else "e2m3"
    assert_quantizes(x, MixedLayout.uniform(32, fmt.bits, format6=format6))


def test_float32_overflows_to_inf_where_float64_does_not():
    layout = MixedLayout.uniform(32, 8)
    data = torch.full((1, 32), 0x7E, dtype=torch.uint8)
    scales = torch.full((1, 1), 254, dtype=torch.uint8)
    assert (dequantize(data, scales, layout, torch.float64) == 448 * 2.0**127).all()
    assert (dequantize(data, scales, layout) == INF).all()
    one = quantize(torch.full((1, 32), 2.0**-100), layout)
    assert linear(data, scales, *one, layout, layout).tolist() == [[32 * 448 * 2.0**27]]


@pytest.mark.parametrize("weights_mxfp4", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_the_float64_product(dtype, weights_mxfp4):
    generator = torch.Generator().manual_seed(5)
    layout = MixedLayout(64, 64, 32)
    weight_layout = layout.as_mxfp4() if weights_mxfp4 else layout
    x = torch.randn(2, 3, 150, generator=generator)
    w = torch.randn(20, 150, generator=generator)
    bias = torch.randn(20, generator=generator)
    order = torch.nn.functional.pad(torch.randperm(150, generator=generator), (0, 10), value=-1)
    order = order.int()
    packed, weight = quantize(x, layout, order), quantize(w, weight_layout, order)
    result = linear(*packed, *weight, layout, weight_layout, bias, dtype)
    exact = oracle(x, layout, order) @ oracle(w, weight_layout, order).T + bias.double()
    assert result.dtype == dtype and result.shape == (2, 3, 20)
    torch.testing.assert_close(result, exact.float().to(dtype), rtol=1e-6, atol=1e-6)
    unbiased = linear(*packed, *weight, layout, weight_layout, None, dtype)
    exact = (exact - bias.double()).float().to(dtype)
    torch.testing.assert_close(unbiased, exact, rtol=1e-6, atol=1e-6)


def test_linear_without_rows_or_channels():
    layout, empty = MixedLayout(32, 0, 0), MixedLayout(0, 0, 0)
    weight = quantize(torch.randn(5, 32), layout)
    assert linear(*quantize(torch.zeros(0, 32), layout), *weight, layout, layout).shape == (0, 5)
    nothing = [quantize(torch.zeros(rows, 0), empty) for rows in (2, 5)]
    bias = torch.arange(5.0)
    assert linear(*nothing[0], *nothing[1], empty, empty, bias).tolist() == [bias.tolist()] * 2


def test_refuses_what_does_not_fit():
    layout = MixedLayout(32, 0, 0)
    x, order = torch.zeros(2, 32), torch.arange(32, dtype=torch.int32)
    with pytest.raises(TypeError, match="float64"):
        quantize(x.double(), layout)
    with pytest.raises(ValueError, match="dimension"):
        quantize(torch.tensor(1.0), layout)
    with pytest.raises(TypeError, match="int32"):
        quantize(x, layout, order.long())
    with pytest.raises(ValueError, match="order must be"):
        quantize(x, layout, order[:31])
    for channel in (-2, 32):
        wrong = order.clone()
        wrong[3] = channel
        with pytest.raises(ValueError, match="order must hold"):
            quantize(x, layout, wrong)

    data, scales = quantize(x, layout)
    with pytest.raises(TypeError, match="uint8"):
        dequantize(data.int(), scales, layout)
    with pytest.raises(ValueError, match="data must be"):
        dequantize(data[:, :15], scales, layout)
    with pytest.raises(ValueError, match="scales must be"):
        dequantize(data, scales[:1], layout)
    with pytest.raises(ValueError, match="bias must be"):
        linear(data, scales, data, scales, layout, layout, torch.zeros(3))
    with pytest.raises(ValueError, match="weight must be"):
        linear(data, scales, data[0], scales[0], layout, layout)
    with pytest.raises(ValueError, match="the weight has 0"):
        linear(data, scales, data, scales, layout, MixedLayout(0, 0, 0))
