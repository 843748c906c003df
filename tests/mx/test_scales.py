"""The scale rules against their definitions in exact arithmetic, and against tables."""

import math
from fractions import Fraction

import pytest
import torch

from micromix_compile.mx import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    ScaleRule,
    inverse_scale_values,
    scale_bytes,
    scale_values,
)

FORMATS = (E2M1, E2M3, E3M2, E4M3)
FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT32_TINY = 2.0**-149  # the smallest subnormal

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
each_rule = pytest.mark.parametrize("rule", ScaleRule, ids=lambda rule: rule.label)


def floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def exact_byte(amax: float, fmt, rule: ScaleRule) -> int:
    """The definition of each rule, in rational numbers."""
    if not math.isfinite(amax):
        return 0xFF
    if amax == 0:
        return 0
    amax = Fraction(amax)
    if rule is ScaleRule.FLOOR:
        exponent = floor_log2(amax) - fmt.emax
    elif rule is ScaleRule.CEIL:
        ratio = amax / Fraction(fmt.largest)
        exponent = floor_log2(ratio)
        exponent += ratio != Fraction(2) ** exponent
    else:
        # The next power of two begins half a step of the mantissa below itself.
        top = 2 - Fraction(1, 2 ** (fmt.mantissa_bits + 1))
        exponent = floor_log2(amax)
        exponent += amax / Fraction(2) ** exponent >= top
        exponent -= fmt.emax
    return min(max(exponent, -127), 127) + 127


def byte_of(amax: float, fmt, rule: ScaleRule) -> int:
    return scale_bytes(torch.tensor([amax]), fmt, rule).item()


@each_format
@each_rule
def test_follows_the_definition(fmt, rule):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 0x7F800000, (4000,), generator=generator).int()
    corners = [0.0, FLOAT32_TINY, 2.0**-127, 2.0**-126, FLOAT32_MAX, math.inf, math.nan]
    mantissas = torch.tensor([1.0, 1.5, 1.75, 1.875, 1.9375, 2 - 2.0**-23])
    edges = torch.outer(mantissas, torch.exp2(torch.arange(-126.0, 128.0))).flatten()
    edges = edges[edges.isfinite()]
    edge_bits = edges.view(torch.int32)
    near_edges = torch.cat((edge_bits - 1, edge_bits, edge_bits + 1)).view(torch.float32)
    amax = torch.cat((bits.view(torch.float32), torch.tensor(corners), near_edges))

    expected = [exact_byte(value, fmt, rule) for value in amax.tolist()]
    assert scale_bytes(amax, fmt, rule).tolist() == expected


@pytest.mark.parametrize(
    ("fmt", "rule", "amax", "exponent"),
    [
        (E2M1, ScaleRule.FLOOR, 6.0, 0),
        (E2M1, ScaleRule.FLOOR, 7.999, 0),
        (E2M1, ScaleRule.FLOOR, 8.0, 1),
        (E2M1, ScaleRule.CEIL, 6.0, 0),
        (E2M1, ScaleRule.CEIL, 6.0000005, 1),
        (E2M1, ScaleRule.CEIL, 3.0, -1),
        (E2M1, ScaleRule.EVEN, 6.9999995, 0),
        (E2M1, ScaleRule.EVEN, 7.0, 1),
        (E2M3, ScaleRule.CEIL, 7.5, 0),
        (E2M3, ScaleRule.EVEN, 7.75, 1),
        (E3M2, ScaleRule.CEIL, 28.0, 0),
        (E3M2, ScaleRule.CEIL, 28.000002, 1),
        (E3M2, ScaleRule.EVEN, 29.999998, 0),
        (E4M3, ScaleRule.CEIL, 448.0, 0),
        (E4M3, ScaleRule.CEIL, 1.0, -8),
        (E4M3, ScaleRule.EVEN, 479.0, 0),
        (E4M3, ScaleRule.EVEN, 496.0, 1),
        (E4M3, ScaleRule.FLOOR, 1e-45, -127),
        (E2M1, ScaleRule.EVEN, FLOAT32_MAX, 126),  # the largest of all finite blocks
        (E4M3, ScaleRule.CEIL, FLOAT32_MAX, 120),
    ],
)
def test_by_hand(fmt, rule, amax, exponent):
    assert byte_of(amax, fmt, rule) == exponent + 127


@each_format
@each_rule
def test_zero_and_not_finite(fmt, rule):
    assert [byte_of(v, fmt, rule) for v in (0.0, math.inf, math.nan)] == [0, 0xFF, 0xFF]


@each_format
def test_nothing_saturates_under_ceil(fmt):
    amax = torch.rand(100_000, generator=torch.Generator().manual_seed(2)) + 2.0**-20
    scaled = amax * inverse_scale_values(scale_bytes(amax, fmt, ScaleRule.CEIL))
    assert scaled.max() <= fmt.largest
    assert (scaled * 2 > fmt.largest).all()  # and no smaller scale would do


def test_values_are_powers_of_two():
    scales = torch.arange(256, dtype=torch.uint8)
    values = scale_values(scales).tolist()
    assert values[:255] == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(values[255])
    inverses = inverse_scale_values(scales[:254]).tolist()
    assert inverses == [2.0 ** (127 - byte) for byte in range(254)]


def test_rule_names():
    assert [rule.label for rule in ScaleRule] == ["floor", "ceil", "even"]
    assert [int(ScaleRule.from_name(name)) for name in ("floor", "ceil", "even")] == [0, 1, 2]
    with pytest.raises(ValueError, match="rceil.*floor, ceil, even"):
        ScaleRule.from_name("rceil")


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="float32"):
        scale_bytes(torch.ones(1, dtype=torch.float64), E2M1, ScaleRule.FLOOR)
