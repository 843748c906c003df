"""A bounded, weighted sample of rows: what an input looks like to a format that is not chosen yet."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowSample"]

SIZE = 128
_HASHED = 16  # elements of a row that its random number is made of
_MASK = (1 << 53) - 1
_ODD = 0x2545F4914F6CDD1D


class RowSample:
    """At most ``SIZE`` rows, drawn without replacement with probabilities that follow their weights.

    Each row has the key -log(u) / weight, u uniform in (0, 1), and the smallest keys stay (Efraimidis and
    Spirakis 2006). u is a hash of the row, of its place among the rows that are offered with it, and of all of them,
    since rows are often equal (those of one token, in the first layer), and each must have its own chance: a sample
    does not depend on the order of the batches, nor on how they were split between runs that are merged. ``rows`` is
    bfloat16 ``[S, K]``, ``keys`` float64 ``[S]``, falling chances first.
    """

    def __init__(self, channels: int) -> None:
        self.rows = torch.empty(0, channels, dtype=torch.bfloat16, device="cpu")
        self.keys = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Offers the rows ``[M, K]`` of a batch with weights ``[M]``, float64; a weight of 0 keeps a row out."""
        rows = rows.to(torch.bfloat16)
        keys = -_uniform(rows).log() / weights
        chosen = keys.topk(min(SIZE, len(keys)), largest=False).indices
        chosen = chosen[keys[chosen].isfinite()]
        # A float32 may round to Inf.
        self._keep(rows[chosen].nan_to_num().cpu(), keys[chosen].cpu())

    def merge(self, other: RowSample) -> None:
        """Makes this the sample of what both have been offered."""
        self._keep(other.rows, other.keys)

    def _keep(self, rows: Tensor, keys: Tensor) -> None:
        rows, keys = torch.cat([self.rows, rows]), torch.cat([self.keys, keys])
        order = keys.argsort(stable=True)[:SIZE]
        self.rows, self.keys = rows[order], keys[order]


def _uniform(rows: Tensor) -> Tensor:
    """A number in (0, 1) for each bfloat16 row of a batch, float64, from the bits of some elements of all of them."""
    channels = rows.shape[1]
    picked = torch.arange(min(_HASHED, channels), device=rows.device) * channels // _HASHED
    picked = picked.clamp(max=channels - 1)
    state = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for bits in rows.index_select(1, picked).contiguous().view(torch.int16).long().unbind(1):
        state = _mixed(state ^ bits)
    places = torch.arange(len(rows), device=rows.device)
    state = _mixed(_mixed(state + places * _ODD) ^ state.sum())
    return ((state & _MASK).double() + 0.5) / (_MASK + 1)


def _mixed(state: Tensor) -> Tensor:
    state = state * _ODD  # wraps, as xorshift* multiplies
    return state ^ ((state >> 29) & 0x7FFFFFFFF)
