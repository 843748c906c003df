"""A small module of the layers that passes meet in a decoder's block."""

from __future__ import annotations

from torch import Tensor, nn


class Gated(nn.Module):
    """A norm, gate and up that share an input, down."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64)

    def products(self, x: Tensor) -> Tensor:
        """What comes after the norm."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.products(self.norm(x))
