"""In which order the channels of a block stand: so that a GPU's gather finds them in different banks of its shared memory.

Which 32 channels form a block is the allocation's. Where each stands in it changes no scale, no code and no
memory; of a product only the order of its sum, of a rotation only the signs. But a warp reads 32 channels at a
time, from 32 banks of 4 bytes, and waits for the bank that holds most of them: 3.6 of 32 at random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .mx import BLOCK

__all__ = ["banks", "gathers", "spread_over_banks"]

_PAIRED_CHANNELS = (
    4096  # of the rows that the paired kernel takes; the streamed one takes longer ones
)


def gathers(channels: int) -> int:
    """Into how many gathers the kernel for rows of so many channels (csrc/cuda/gathers.h) divides a block.

    Threads have as many neighbouring channels each, and a warp as many blocks: its gather i reads from each
    block the channels i, i + gathers, i + 2 * gathers, ...
    """
    return 8 if channels <= _PAIRED_CHANNELS else 32


def banks(channels: int) -> list[int]:
    """The bank of each channel in that kernel: paired rows have 4 bytes a channel and 16 after every 32, streamed 2."""
    if channels <= _PAIRED_CHANNELS:
        return [(c + 4 * (c // 32)) % 32 for c in range(channels)]
    return [c // 2 % 32 for c in range(channels)]


def spread_over_banks(order: Tensor) -> Tensor:
    """``order`` int32 ``[Kp]``, -1 for padding, with the channels of each block in another order.

    No gather of a warp finds more channels in a bank than its even share of those that the warp's blocks have
    there, rounded up. Blocks with padding stay as they are: an order that ends with it can be folded.
    """
    channels = order.tolist()
    count, bank = gathers(len(channels)), banks(len(channels))
    for first in range(0, len(channels), BLOCK * count):
        blocks = range(first, min(first + BLOCK * count, len(channels)), BLOCK)
        whole = [block for block in blocks if min(channels[block : block + BLOCK]) >= 0]
        parts = [[(block, c) for block in whole for c in channels[block : block + BLOCK]]]
        while len(parts) < count:
            parts = [half for part in parts for half in _halves(part, bank)]
        for gather, part in enumerate(parts):
            taken: Counter[int] = Counter()
            for block, channel in part:
                channels[block + gather + count * taken[block]] = channel
                taken[block] += 1
    return torch.tensor(channels, dtype=order.dtype, device="cpu")


def _halves(
    part: Sequence[tuple[int, int]], bank: Sequence[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Channels and their blocks, in two halves: of each block as many in both, of each bank as many or one more.

    Two neighbours of a block, and two of a bank, must part. So every channel is tied to one of its block and to
    at most one of its bank: in chains and in rings of even length, along which the halves take turns.
    """
    single: dict[int, int] = {}
    tied: dict[int, int] = {}
    for i, (_, channel) in enumerate(part):
        j = single.pop(bank[channel], None)
        if j is None:
            single[bank[channel]] = i
        else:
            tied[i], tied[j] = j, i
    halves = [-1] * len(part)
    for start in (*single.values(), *range(len(part))):  # chains from their ends, then rings
        i: int | None = start
        while i is not None and halves[i] < 0:
            halves[i], halves[i ^ 1] = 0, 1  # i ^ 1: the neighbour in its block
            i = tied.get(i ^ 1)
    first = [x for x, half in zip(part, halves, strict=True) if half == 0]
    second = [x for x, half in zip(part, halves, strict=True) if half == 1]
    return first, second
