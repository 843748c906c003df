"""E8M0 block scales (OCP Microscaling v1.0, sections 5.4 and 6.3): one byte per 32 elements.

A byte b means 2^(b - 127); 0xFF means NaN. Everything here works on the bits of float32, so that
every backend gets the same byte: ``log2`` in float32 is wrong close to powers of two.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from .elements import FLOAT32_EXPONENT, FLOAT32_MANTISSA_BITS, ElementFormat

BLOCK = 32
NAN_SCALE = 0xFF


class ScaleRule(IntEnum):
    """How the exponent of a block's scale follows from ``amax``, its largest magnitude.

    * ``FLOOR`` (OCP v1.0): floor(log2(amax)) - emax.
    * ``CEIL`` (MicroMix; NVIDIA's RCEIL): ceil(log2(amax / largest)), so that nothing saturates.
    * ``EVEN``: as FLOOR, after rounding amax to the mantissa bits of the element, half away from zero.
      For E2M1 amax goes up to the next power of two from 7 on, and values in (6, 7) saturate.
    """

    FLOOR = 0
    CEIL = 1
    EVEN = 2

    @classmethod
    def from_name(cls, name: str) -> ScaleRule:
        """The rule called "floor", "ceil" or "even". Raises ValueError for another name."""
        for rule in cls:
            if rule.label == name:
                return rule
        known = ", ".join(rule.label for rule in cls)
        raise ValueError(f"unknown scale rule {name!r}; known rules: {known}")

    @property
    def label(self) -> str:
        """The name that users write: "floor", "ceil" or "even"."""
        return self.name.lower()


def scale_bytes(amax: Tensor, fmt: ElementFormat, rule: ScaleRule) -> Tensor:
    """The scale bytes, uint8, of blocks whose largest magnitudes are ``amax``, float32, same shape.

    ``amax`` must not be negative. The exponent is clamped to [-127, 127]; a block of zeros gets
    byte 0; NaN and Inf get 0xFF. No finite ``amax`` gets more than 253, for every format has emax >= 2.
    Raises TypeError if ``amax`` is not float32.
    """
    if amax.dtype != torch.float32:
        raise TypeError(f"scale_bytes needs float32, got {amax.dtype}")
    bits = amax.view(torch.int32)
    # The exponent field less emax is FLOOR. The other rules first add what carries into the exponent
    # when the mantissa is beyond that of `largest` (CEIL) or within half a step of the top (EVEN).
    # Subnormal numbers, whose mantissa is not normalised, end at byte 0 in any case.
    mantissa_mask = (1 << FLOAT32_MANTISSA_BITS) - 1
    increment = {
        ScaleRule.FLOOR: 0,
        ScaleRule.CEIL: mantissa_mask - (fmt.largest_bits & mantissa_mask),
        ScaleRule.EVEN: 1 << (FLOAT32_MANTISSA_BITS - fmt.mantissa_bits - 1),
    }[rule]
    exponent = ((bits + increment) >> FLOAT32_MANTISSA_BITS).sub_(fmt.emax).clamp_(min=0)
    return exponent.masked_fill_(bits >= FLOAT32_EXPONENT, NAN_SCALE).to(torch.uint8)


def scale_values(scales: Tensor) -> Tensor:
    """The values 2^(byte - 127) of scale bytes, uint8 to float32, same shape, exact; 0xFF is NaN.

    Byte 0 is 2^-127, a float32 subnormal.
    """
    bits = scales.int() << FLOAT32_MANTISSA_BITS
    bits.masked_fill_(scales == 0, 1 << (FLOAT32_MANTISSA_BITS - 1))
    return bits.view(torch.float32).masked_fill_(scales == NAN_SCALE, float("nan"))


def inverse_scale_values(scales: Tensor) -> Tensor:
    """The factors 2^(127 - byte), uint8 to float32, by which quantisation multiplies a block.

    A block is divided by its scale as one float32 multiplication with this power of two, whose bits
    are ``(254 - byte) << 23``: a normal number for every byte from 0 (2^127) to 253 (2^-126), all
    that :func:`scale_bytes` gives to finite blocks. The product is exact, or so small that it becomes
    a zero element in any case, so a kernel that divides gets the same codes. A kernel must not take
    float32 subnormals of the input for zero: 2^-130 is 0.125 in a block of scale 2^-127. Bytes 254
    and 255 have no factor here: no block that is cast has them.
    """
    return ((254 - scales.int()) << FLOAT32_MANTISSA_BITS).view(torch.float32)
