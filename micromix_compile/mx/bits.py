"""Packing of element codes into bytes, along the last dimension.

8 bits: one code a byte. 4 bits: two codes a byte, the even channel in the low nibble. 6 bits: four
codes in three bytes, as one little-endian 24-bit number whose low bits are the first code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(channels: int, bits: int) -> int:
    """The bytes that ``channels`` codes of 4, 6 or 8 bits take. Raises ValueError unless it is whole
    groups of 2, 4 or 1 codes."""
    group = {4: 2, 6: 4, 8: 1}.get(bits)
    if group is None:
        raise ValueError(f"codes have 4, 6 or 8 bits, not {bits}")
    if channels % group:
        raise ValueError(f"{bits}-bit codes are packed in groups of {group}; got {channels}")
    return channels * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes ``[..., n]`` into uint8 bytes ``[..., n * bits / 8]``.

    ``bits`` is 4, 6 or 8; the bits of a code above that must be zero. Raises ValueError for another
    ``bits``, or an ``n`` that does not fill whole bytes (n % 2 for 4 bits, n % 4 for 6).
    """
    packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes
    if bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    a, b, c, d = (codes[..., i::4] for i in range(4))
    packed = torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), dim=-1)
    return packed.flatten(-2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Unpacks uint8 bytes ``[..., m]`` into uint8 codes ``[..., m * 8 / bits]``.

    The inverse of :func:`pack_codes`. Raises ValueError for a ``bits`` other than 4, 6, 8, or
    an ``m`` that is not whole groups of codes (m % 3 for 6 bits).
    """
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    if bits != 6:
        raise ValueError(f"codes have 4, 6 or 8 bits, not {bits}")
    if packed.shape[-1] % 3:
        raise ValueError(f"6-bit codes come in groups of 3 bytes; got {packed.shape[-1]}")
    a, b, c = (packed[..., i::3] for i in range(3))
    codes = (a & 0x3F, (a >> 6) | ((b & 0xF) << 2), (b >> 4) | ((c & 0x3) << 4), c >> 2)
    return torch.stack(codes, dim=-1).flatten(-2)
