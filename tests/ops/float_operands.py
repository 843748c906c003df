"""Float activations and a packed weight: what the tests of weight-only products multiply, on a CPU and on a GPU."""

from __future__ import annotations

import torch

from micromix_compile import mx
from micromix_compile.mx import WEIGHT_ONLY

from .cases import arguments, relative_error, rows, weight_layout

BARS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


class FloatOperands:
    """Float activations [m, k] and a packed weight [n, Kp], which a test may change before it calls `run`."""

    device = "cpu"

    def __init__(self, m, n, layout, weights="match", seed=0, dtype=torch.bfloat16, k=None):
        k = layout.channels if k is None else k
        self.layout, self.weights, self.n, self.order = layout, weights, n, None
        self.own = weight_layout(layout, weights)
        self.x = rows(m, k, dtype, seed)
        weight = rows(n, layout.channels, torch.float32, seed + 1) * 0.1
        self.data, self.scales = mx.quantize(weight, self.own)

    def reordered(self, seed=0):
        """With an order that has padding anywhere."""
        generator = torch.Generator().manual_seed(seed)
        k, positions = self.x.shape[-1], self.layout.channels
        order = torch.full((positions,), -1, dtype=torch.int32)
        place = torch.randperm(positions, generator=generator)[:k]
        order[place] = torch.arange(k, dtype=torch.int32)
        self.order = order
        return self

    def run(self, dtype=torch.float32, bias=None):
        *counts, code = arguments(self.layout, self.weights)
        counts = (*counts, code | WEIGHT_ONLY)
        data, scales, x, order, bias = (
            None if t is None else t.to(self.device)
            for t in (self.data, self.scales, self.x, self.order, bias)
        )
        placed = torch.ops.micromix.place_weight(data, scales, *counts)
        product = torch.ops.micromix.weight_only_linear
        return product(x, order, placed, bias, self.n, *counts, dtype).cpu()

    def expected(self, bias=None):
        x = self.x.float()
        if self.order is not None:
            padded = torch.nn.functional.pad(x, (0, 1))
            x = padded[..., self.order.long()]
        else:
            x = torch.nn.functional.pad(x, (0, self.layout.channels - x.shape[-1]))
        for segment in self.layout.segments():
            if segment.hadamard:
                part = slice(segment.start, segment.stop)
                x[..., part] = mx.hadamard(x[..., part])
        w = mx.dequantize(self.data, self.scales, self.own, torch.float64)
        x = x.bfloat16().double()
        for block in x.view(-1, 32):
            if not block.isfinite().all():
                block.fill_(torch.nan)
        return x @ w.T + (0 if bias is None else bias.double())

    def check(self, dtype=torch.float32, bias=None):
        error = relative_error(self.run(dtype, bias), self.expected(bias))
        assert error <= BARS[dtype], f"relative error {error:.2e} > {BARS[dtype]:.2e}"
