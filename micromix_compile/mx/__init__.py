"""The Microscaling formats in pure torch: the reference for every kernel."""

from .bits import pack_codes, packed_bytes, unpack_codes
from .elements import E2M1, E2M3, E3M2, E4M3, ElementFormat, decode, encode
from .hadamard import hadamard
from .layout import WEIGHT_IS_MXFP4, WEIGHT_ONLY, MixedLayout, Segment
from .mixed import dequantize, linear, quantize, rearrange, weight_only_linear
from .scales import (
    BLOCK,
    NAN_SCALE,
    ScaleRule,
    inverse_scale_values,
    scale_bytes,
    scale_values,
)

__all__ = [
    "BLOCK",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "NAN_SCALE",
    "WEIGHT_IS_MXFP4",
    "WEIGHT_ONLY",
    "ElementFormat",
    "MixedLayout",
    "ScaleRule",
    "Segment",
    "decode",
    "dequantize",
    "encode",
    "hadamard",
    "inverse_scale_values",
    "linear",
    "pack_codes",
    "packed_bytes",
    "quantize",
    "rearrange",
    "scale_bytes",
    "scale_values",
    "unpack_codes",
    "weight_only_linear",
]
