"""The rotation of a block: the Sylvester-Hadamard matrix of order 32, divided by sqrt(32).

It spreads an outlier over its block, and since it is symmetric and orthogonal it is its own inverse: a
product of two rotated operands is the product of the operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scales import BLOCK

# float32(1 / sqrt(32)): one multiplication, after the sums.
NORM = 0.17677669529663687


def hadamard(x: Tensor) -> Tensor:
    """Rotates each block of 32 channels of ``x`` ``[..., K]``, float32 or float64, K a multiple of 32.

    The sums are taken in pairs of distance 1, 2, 4, 8, 16, in that order, as every kernel does: float32
    results are the same bits everywhere. Sums above the float32 range become Inf.
    """
    values = x.unflatten(-1, (-1, BLOCK))
    distance = 1
    while distance < BLOCK:
        low, high = values.unflatten(-1, (-1, 2, distance)).unbind(-2)
        values = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        distance *= 2
    return (values * torch.tensor(NORM, dtype=x.dtype, device=x.device)).flatten(-2)
