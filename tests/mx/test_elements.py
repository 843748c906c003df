"""The element casts against tables worked out by hand, and against ml_dtypes bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch

from micromix_compile.mx import E2M1, E2M3, E3M2, E4M3, decode, encode

FORMATS = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E4M3: ml_dtypes.float8_e4m3fn,
}
INF, NAN = float("inf"), float("nan")

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def assert_casts_as_ml_dtypes(x: torch.Tensor, fmt) -> None:
    # ml_dtypes overflows to NaN in E4M3; the contract saturates.
    clamped = x.clamp(-fmt.largest, fmt.largest).numpy()
    expected = torch.from_numpy(clamped.astype(FORMATS[fmt]).view(np.uint8))
    codes = encode(x, fmt)
    wrong = (codes != expected).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {x.numel()} differ; first {x[at].item().hex()}: "
            f"{codes[at]:#04x}, expected {expected[at]:#04x}"
        )


def magnitudes(fmt) -> torch.Tensor:
    """The finite magnitudes of a format, ascending, float64, as ml_dtypes decodes them."""
    codes = np.arange(1 << (fmt.bits - 1), dtype=np.uint8)
    values = torch.from_numpy(codes.view(FORMATS[fmt]).astype(np.float64))
    return values[values.isfinite()]


@each_format
def test_describes_itself(fmt):
    values = magnitudes(fmt)
    assert fmt.bits == 1 + fmt.exponent_bits + fmt.mantissa_bits
    assert values.max() == fmt.largest
    assert 2.0**fmt.emax <= fmt.largest < 2.0 ** (fmt.emax + 1)
    assert values[1] == 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)


def test_e2m1_by_hand():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.arange(16, dtype=torch.uint8)
    expected = torch.tensor(values + [-v for v in values])
    assert torch.equal(decode(codes, E2M1), expected)
    assert decode(codes, E2M1).signbit().tolist() == [False] * 8 + [True] * 8
    assert torch.equal(encode(expected, E2M1), codes)


@pytest.mark.parametrize(
    ("fmt", "value", "code"),
    [
        (E2M1, 0.25, 0x0),  # halfway: to the even code
        (E2M1, 0.75, 0x2),
        (E2M1, 1.25, 0x2),
        (E2M1, 2.5, 0x4),
        (E2M1, 5.0, 0x6),
        (E2M1, 5.0000005, 0x7),
        (E2M1, -0.2500001, 0x9),
        (E2M1, -1e30, 0xF),
        (E2M3, 0.125, 0x01),  # the smallest subnormal
        (E2M3, 0.875, 0x07),  # the largest subnormal
        (E2M3, 0.9375, 0x08),  # rounds up to the smallest normal
        (E2M3, 7.5, 0x1F),
        (E2M3, 7.9, 0x1F),
        (E2M3, -7.25, 0x3E),  # halfway between 7 and 7.5
        (E3M2, 0.0625, 0x01),
        (E3M2, 0.03125, 0x00),
        (E3M2, 0.25, 0x04),
        (E3M2, 28.0, 0x1F),
        (E3M2, 26.0, 0x1E),  # halfway between 24 and 28
        (E4M3, 2.0**-9, 0x01),
        (E4M3, 2.0**-10, 0x00),
        (E4M3, 1.5 * 2.0**-10, 0x01),
        (E4M3, 2.0**-6, 0x08),
        (E4M3, 448.0, 0x7E),
        (E4M3, 464.0, 0x7E),  # would be halfway to the NaN code
        (E4M3, 1e5, 0x7E),
        (E4M3, -INF, 0xFE),
        (E4M3, NAN, 0x7F),
        (E4M3, -0.0, 0x80),
        (E3M2, -0.0, 0x20),
        (E2M3, -1e-40, 0x20),
        (E2M1, INF, 0x7),
    ],
)
def test_encodes_by_hand(fmt, value, code):
    assert encode(torch.tensor([value]), fmt).tolist() == [code]


@each_format
def test_decodes_as_ml_dtypes(fmt):
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    expected = codes.view(FORMATS[fmt]).astype(np.float32)
    result = decode(torch.from_numpy(codes), fmt).numpy()
    np.testing.assert_array_equal(result, expected)  # NaN where NaN
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.signbit(result[finite]), np.signbit(expected[finite]))


@each_format
def test_encodes_what_it_decodes(fmt):
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    values = decode(codes, fmt)
    finite = values.isfinite()
    assert torch.equal(encode(values[finite], fmt), codes[finite])


@each_format
def test_rounds_at_every_midpoint(fmt):
    values = magnitudes(fmt)
    midpoints = ((values[1:] + values[:-1]) / 2).float()  # exact in float32
    points = torch.cat((values.float(), midpoints)).numpy()
    below, above = np.nextafter(points, np.float32(-1)), np.nextafter(points, np.float32(INF))
    x = torch.from_numpy(np.concatenate((below, points, above)))
    assert_casts_as_ml_dtypes(torch.cat((x, -x)), fmt)


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_every_16_bit_number(fmt, dtype):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    x = bits.view(dtype).float()
    assert_casts_as_ml_dtypes(x[~x.isnan()], fmt)


@each_format
def test_casts_random_floats(fmt):
    generator = torch.Generator().manual_seed(0)
    count = 1 << 20
    everywhere = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).int()
    everywhere = everywhere.view(torch.float32)
    in_range = torch.randn(count, generator=generator) * fmt.largest / 3
    small = torch.randn(count, generator=generator) * 2.0 ** (2 - fmt.bias)
    assert_casts_as_ml_dtypes(torch.cat((everywhere[~everywhere.isnan()], in_range, small)), fmt)


def test_nan_keeps_its_sign_in_e4m3():
    nan = torch.tensor([0x7FC00000, 0x7FC00000 - (1 << 31), 0x7F800001]).int().view(torch.float32)
    assert encode(nan, E4M3).tolist() == [0x7F, 0xFF, 0x7F]
    assert decode(torch.tensor([0x7F, 0xFF], dtype=torch.uint8), E4M3).isnan().all()


def test_keeps_shape_and_reads_any_strides():
    x = torch.randn(3, 4, 5)
    assert torch.equal(encode(x.mT, E2M3), encode(x, E2M3).mT)
    assert encode(torch.empty(0, 32), E2M3).shape == (0, 32)
    assert torch.equal(decode(encode(x, E2M3).mT, E2M3), decode(encode(x, E2M3), E2M3).mT)


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="float32"):
        encode(torch.zeros(1, dtype=torch.bfloat16), E2M1)
    with pytest.raises(TypeError, match="uint8"):
        decode(torch.zeros(1, dtype=torch.int32), E2M1)
