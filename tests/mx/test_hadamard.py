"""The rotation of blocks: against the matrix, its own inverse, and nothing lost in a product."""

from __future__ import annotations

import pytest
import torch

from micromix_compile.errors import InvalidPlanError
from micromix_compile.mx import BLOCK, MixedLayout, dequantize, hadamard, linear, quantize
from micromix_compile.plan import LayerPlan


def matrix() -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < BLOCK:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / BLOCK**0.5


def test_is_the_product_with_sylvesters_matrix():
    x = torch.randn(5, 96, dtype=torch.float64)
    expected = (x.unflatten(1, (-1, BLOCK)) @ matrix()).flatten(1)
    torch.testing.assert_close(hadamard(x), expected, rtol=0, atol=1e-6)  # the norm is a float32
    torch.testing.assert_close(hadamard(x.float()).double(), expected, rtol=0, atol=1e-5)


def test_is_its_own_inverse():
    x = torch.randn(7, 3, 64) * torch.logspace(-3, 3, 64)
    error = (hadamard(hadamard(x)) - x).norm() / x.norm()
    assert error < 1e-6
    # Whole numbers, whose sums are exact: nothing is lost but in the two products with the norm.
    x = torch.randint(-100, 100, (4, 32)).float()
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=3e-7, atol=3e-5)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 64)
    x[0, 5] = 32.0
    rotated = hadamard(x)
    assert rotated[0, :32].abs().allclose(torch.tensor(32 / 32**0.5))
    assert not rotated[0, 32:].any()


def test_a_product_of_rotated_operands_is_the_product():
    """In MXFP8 the rotation costs about nothing; order and padding change nothing."""
    x, w = torch.randn(16, 90), torch.randn(24, 90)
    order = torch.cat([torch.randperm(90), torch.full((6,), -1)]).to(torch.int32)
    layout = MixedLayout(0, 32, 64, hadamard=(6, 8))
    y = linear(*quantize(x, layout, order), *quantize(w, layout, order), layout, layout)
    assert (y - x @ w.T).norm() / (x @ w.T).norm() < 0.06


def test_rotation_lowers_the_error_of_blocks_with_outliers():
    x = torch.randn(256, 64)
    x[:, ::32] *= 30
    errors = []
    for rotated in ((), (4,)):
        layout = MixedLayout(64, 0, 0, hadamard=rotated)
        values = dequantize(*quantize(x, layout), layout)
        values = hadamard(values) if rotated else values
        errors.append(float(((values - x)[:, 1:32]).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_layout_and_code():
    layout = MixedLayout(32, 32, 32, hadamard=(4, 8))
    assert layout.code == 0b101_0_01_01_10_00
    assert MixedLayout.from_code(32, 32, 32, layout.code) == layout
    assert [segment.hadamard for segment in layout.segments()] == [True, False, True]
    assert layout.rotates_any and not layout.rotates_all
    assert not MixedLayout(0, 32, 0, hadamard=(4, 8)).rotates_any
    assert MixedLayout(0, 32, 0, hadamard=(6,)).as_mxfp4().hadamard == (4,)
    for bad in ((5,), (8, 4), (4, 4)):
        with pytest.raises(ValueError, match="hadamard"):
            MixedLayout(32, 0, 0, hadamard=bad)


def test_weights_of_one_format_need_one_rotation():
    with pytest.raises(InvalidPlanError, match="only some segments"):
        LayerPlan(64, MixedLayout(32, 32, 0, hadamard=(4,)), weights="mxfp4")
    LayerPlan(64, MixedLayout(32, 32, 0, hadamard=(4, 6)), weights="mxfp4")
