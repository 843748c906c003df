"""The element formats of OCP Microscaling v1.0 (section 5.3), and their casts from and to float32."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FLOAT32_MANTISSA_BITS = 23
FLOAT32_BIAS = 127
FLOAT32_MAGNITUDE = 0x7FFFFFFF
FLOAT32_EXPONENT = 0x7F800000  # also the bits of +Inf


@dataclass(frozen=True)
class ElementFormat:
    """One element format: sign, ``exponent_bits``, ``mantissa_bits``, from the high bit down.

    ``emax`` is the exponent of the largest power of two and ``largest`` the largest magnitude
    that the format holds. No format has an infinity; only E4M3 has a NaN (0x7F and 0xFF).
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    emax: int
    largest: float
    has_nan: bool = False

    @property
    def largest_bits(self) -> int:
        """The float32 bit pattern of ``largest``."""
        return struct.unpack("<i", struct.pack("<f", self.largest))[0]

    @property
    def smallest_normal_exponent(self) -> int:
        return 1 - self.bias


E2M1 = ElementFormat("mxfp4_e2m1", 4, 2, 1, bias=1, emax=2, largest=6.0)
E2M3 = ElementFormat("mxfp6_e2m3", 6, 2, 3, bias=1, emax=2, largest=7.5)
E3M2 = ElementFormat("mxfp6_e3m2", 6, 3, 2, bias=3, emax=4, largest=28.0)
E4M3 = ElementFormat("mxfp8_e4m3", 8, 4, 3, bias=7, emax=8, largest=448.0, has_nan=True)


def encode(x: Tensor, fmt: ElementFormat) -> Tensor:
    """Casts float32 ``x`` (any shape) to element codes, uint8 of the same shape, one code a byte.

    Rounds to nearest even, keeps subnormals and the sign of zero, saturates what is larger than
    ``fmt.largest``, Inf included. NaN becomes 0x7F or 0xFF (its sign is kept) in E4M3 and saturates
    in the other formats; :func:`~micromix_compile.mx.mixed.quantize` never casts a NaN.
    Raises TypeError if ``x`` is not float32.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"encode needs float32, got {x.dtype}")
    bits = x.view(torch.int32)
    dropped_bits = FLOAT32_MANTISSA_BITS - fmt.mantissa_bits
    smallest_normal = (fmt.smallest_normal_exponent + FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS

    # The exponent that sets the rounding step: that of the value, or of the smallest normal, below
    # which the step no longer shrinks.
    magnitude = (bits & FLOAT32_MAGNITUDE).clamp_(max=fmt.largest_bits)
    exponent = (magnitude & FLOAT32_EXPONENT).clamp_(min=smallest_normal)
    # One unit in the last place of `anchor` is that step, so the float32 sum rounds to nearest even
    # exactly where the element does, and counts the steps in its low bits.
    anchor = exponent + (dropped_bits << FLOAT32_MANTISSA_BITS)
    steps = (magnitude.view(torch.float32) + anchor.view(torch.float32)).view(torch.int32) - anchor
    # `steps` holds the implicit bit of a normal number, which adds the 1 that an exponent field of
    # a normal number starts from; a mantissa that rounds over carries into the exponent.
    codes = (exponent.sub_(smallest_normal) >> dropped_bits).add_(steps)

    sign_bit = 1 << (fmt.bits - 1)
    if fmt.has_nan:
        codes.masked_fill_(x.isnan(), sign_bit - 1)
    codes |= (bits >> (32 - fmt.bits)) & sign_bit
    return codes.to(torch.uint8)


def decode(codes: Tensor, fmt: ElementFormat) -> Tensor:
    """The values of element codes (uint8, any shape) as float32, exact; 0x7F and 0xFF are NaN in E4M3.

    Bits above ``fmt.bits`` must be zero. Raises TypeError if ``codes`` is not uint8.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"decode needs uint8, got {codes.dtype}")
    values = torch.tensor(_values(fmt), dtype=torch.float32, device=codes.device)
    return values.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


@lru_cache
def _values(fmt: ElementFormat) -> tuple[float, ...]:
    """The value of every code of a format, by the definition of the format."""
    values = []
    for code in range(1 << fmt.bits):
        sign = -1.0 if code >> (fmt.bits - 1) else 1.0
        exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
        mantissa = (code & ((1 << fmt.mantissa_bits) - 1)) / (1 << fmt.mantissa_bits)
        if exponent:
            magnitude = (1.0 + mantissa) * 2.0 ** (exponent - fmt.bias)
        else:
            magnitude = mantissa * 2.0**fmt.smallest_normal_exponent
        is_nan = fmt.has_nan and magnitude > fmt.largest
        values.append(float("nan") if is_nan else sign * magnitude)
    return tuple(values)
