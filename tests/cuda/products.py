"""Products for the CUDA linear: the same for the simulator on the host and for a GPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from micromix_compile import mx
from micromix_compile.mx import WEIGHT_IS_MXFP4, MixedLayout
from micromix_compile.mx.bits import pack_codes
from micromix_compile.mx.elements import encode

# Segments that are absent, a block, a block beyond a stage, and several stages; odd numbers of MXFP6
# blocks leave rows that start at multiples of 8 bytes only.
MIXES = [
    (288, 160, 96),
    (32, 32, 32),
    (128, 64, 128),
    (0, 96, 160),
    (320, 0, 64),
    (192, 224, 0),
    (544, 0, 0),
    (0, 352, 0),
    (0, 0, 288),
]
LINEARS = {
    1: torch.ops.micromix.linear,
    2: torch.ops.micromix.linears.two,
    3: torch.ops.micromix.linears.three,
}
FORMATS = list(itertools.product(("e2m3", "e3m2"), ("match", "mxfp4")))


class Product:
    """Packed activations ``[m, ...]`` and packed weights, one for each of ``n``, with biases.

    ``exact``: small integers under scales near 1, whose sums float32 holds; else all codes that are
    not NaN, under scales that differ by 2^16.
    """

    def __init__(self, m, n, layout, weights="match", exact=True, bias=True, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.m, self.n, self.layout, self.exact = m, n, layout, exact
        self.weight_layout = layout.as_mxfp4() if weights == "mxfp4" else layout
        code = layout.code | (WEIGHT_IS_MXFP4 if weights == "mxfp4" else 0)
        self.arguments = (*layout.counts, code)
        self.data, self.scales = self._rows(m, layout)
        self.weights = [self._rows(size, self.weight_layout) for size in n]
        self.biases = [self._integers(size, 8).float() if bias else None for size in n]

    def _integers(self, size, most):
        return torch.randint(-most, most + 1, (size,), generator=self.generator)

    def _rows(self, rows: int, layout: MixedLayout) -> tuple[Tensor, Tensor]:
        parts = []
        for segment in layout.segments():
            shape = (rows, segment.stop - segment.start)
            if self.exact:
                values = torch.randint(-2, 3, shape, generator=self.generator)
                codes = encode(values.float(), segment.fmt)
            else:
                top = 1 << segment.fmt.bits
                codes = torch.randint(top, shape, generator=self.generator).to(torch.uint8)
                if segment.fmt.has_nan:
                    codes[codes & 0x7F == 0x7F] ^= 1
            parts.append(pack_codes(codes, segment.fmt.bits))
        low, high = (126, 129) if self.exact else (106, 122)
        shape = (rows, layout.blocks)
        scales = torch.randint(low, high, shape, generator=self.generator).to(torch.uint8)
        data = torch.cat(parts, 1) if parts else torch.empty(rows, 0, dtype=torch.uint8)
        return data, scales

    def place_on_gpu(self, bit: int = 0) -> list[Tensor]:
        """The placed weights; ``bit``: of `format`, as ops.EMULATED."""
        *counts, format = self.arguments
        return [
            torch.ops.micromix.place_weight(data.cuda(), scales.cuda(), *counts, format | bit)
            for data, scales in self.weights
        ]

    def on_gpu(
        self,
        dtype=torch.bfloat16,
        bias_dtype=torch.float32,
        *,
        placed=None,
        data=None,
        bit: int = 0,
    ) -> tuple[Tensor, ...]:
        """What a GPU gives, with weights that are placed already or activations ``data`` that are there."""
        *counts, format = self.arguments
        biases = [None if b is None else b.cuda().to(bias_dtype) for b in self.biases]
        layers = zip(placed or self.place_on_gpu(bit), biases, self.n, strict=True)
        found = LINEARS[len(self.n)](
            *(self.data.cuda() if data is None else data, self.scales.cuda()),
            *(*itertools.chain(*layers), *counts, format | bit, dtype),
        )
        return found if isinstance(found, tuple) else (found,)

    def expected(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """The reference: float64 sums, rounded to ``dtype``, of the same bits on every ``device``."""
        layouts = (self.layout, self.weight_layout)
        x = [packed.to(device) for packed in (self.data, self.scales)]
        found = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            packed = [part.to(device) for part in weight]
            bias = None if bias is None else bias.to(device)
            found.append(mx.linear(*x, *packed, *layouts, bias, dtype))
        return found

    def fault(self, found: list[Tensor], dtype: torch.dtype) -> str:
        """What is wrong with a kernel's results, with the first place where it is; "" if nothing."""
        reference = self.expected(dtype, found[0].device)
        for i, (y, expected) in enumerate(zip(found, reference, strict=True)):
            if self.exact:
                wrong = (y != expected) & ~(y.isnan() & expected.isnan())
                if wrong.any():
                    at = tuple(wrong.nonzero()[0].tolist())
                    return f"[{i}]{at}: {y[at]} for {expected[at]}; {wrong.sum()} of {y.numel()}"
                continue
            error = (y.double() - expected.double()).norm() / expected.double().norm()
            bar = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
            if not error <= bar:
                return f"[{i}]: relative error {error:.2e} > {bar:.2e}"
        return ""
