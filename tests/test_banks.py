import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile.allocation import allocate
from micromix_compile.banks import banks, gathers, spread_over_banks
from micromix_compile.mx import BLOCK
from micromix_compile.recipe import Recipe
from micromix_compile.statistics import ModelStatistics

SOURCES = Path(__file__).parents[1] / "csrc"
PROGRAM = """
#include <cstdio>
#include "cuda/gathers.h"
using namespace micromix::cuda;
int main() {
  std::printf("%d %d %d\\n", kPairedGroup * kPairedThreads, kPairedGroup, kStreamedGroup);
  for (unsigned c = 0; c < 1 << 16; ++c)
    std::printf("%u %u\\n", paired_place(c) / 4 % 32, streamed_place(c) / 4 % 32);
}
"""


def loads(order: torch.Tensor) -> list[torch.Tensor]:
    """How often each gather of each warp reads each bank, ``[gathers, 32]`` a warp."""
    k, count = len(order), gathers(len(order))
    bank = torch.tensor(banks(k))
    result = []
    for warp in order.long().split(BLOCK * count):
        read = bank[warp].view(-1, count)  # thread, gather
        result.append(torch.stack([g.bincount(minlength=32) for g in read.T]))
    return result


def is_even(order: torch.Tensor) -> bool:
    """Whether each gather reads its share of each bank, rounded up or down."""
    for of_gathers in loads(order):
        share = of_gathers.sum(dim=0) / len(of_gathers)
        if (of_gathers > share.ceil()).any() or (of_gathers < share.floor()).any():
            return False
    return True


def waits(order: torch.Tensor) -> float:
    """Cycles that a gather takes: the reads of its busiest bank."""
    return torch.cat(loads(order)).max(dim=1).values.double().mean().item()


@settings(max_examples=50)
@given(
    blocks=st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 448])),
    seed=st.integers(0, 99),
)
def test_every_gather_reads_its_share_of_a_bank(blocks, seed):
    order = torch.randperm(BLOCK * blocks, generator=torch.Generator().manual_seed(seed)).int()
    spread = spread_over_banks(order)
    assert spread.dtype == torch.int32
    # The same channels in each block.
    in_blocks = [x.view(-1, BLOCK).sort(dim=1).values for x in (order, spread)]
    assert torch.equal(*in_blocks)
    assert is_even(spread)


@pytest.mark.parametrize("k", [4096, 16384])
def test_random_orders_wait_half_as_long(k):
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0)).int()
    assert waits(order) > 3.4
    assert waits(spread_over_banks(order)) < 2.1


def test_runs_of_neighbours_wait_for_nothing():
    order = torch.arange(16384, dtype=torch.int32).view(-1, BLOCK).flip(0).flatten()
    assert waits(order) == 16
    assert waits(spread_over_banks(order)) == 1


def test_blocks_with_padding_stay():
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).int()
    order = torch.cat([order[:38], torch.full((26,), -1), order[38:]]).int()
    spread = spread_over_banks(order)
    assert torch.equal(spread[32:64], order[32:64])
    assert not torch.equal(spread[64:], order[64:])
    assert torch.equal(spread[64:].sort().values, order[64:].sort().values)


@pytest.mark.parametrize("recipe", [Recipe(split=(0.5, 0.25, 0.25)), Recipe(bits=5.0)])
def test_plans_are_spread(recipe):
    statistics = ModelStatistics()
    statistics.add_group({"fc": (8, 512)})
    statistics.add_weight("fc", torch.randn(8, 512))
    statistics.update("fc", torch.randn(64, 512) * torch.logspace(0, 2, 512)[torch.randperm(512)])
    order = allocate(statistics, recipe)["fc"].order
    assert is_even(order) and not is_even(order.view(-1, BLOCK).sort(dim=1).values.flatten())


def test_the_kernels_have_these_banks(tmp_path):
    source, program = tmp_path / "banks.cpp", tmp_path / "banks"
    source.write_text(PROGRAM)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++20", f"-I{SOURCES}", source, "-o", program], check=True)
    head, *lines = subprocess.run(
        [program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    longest, paired, streamed = map(int, head.split())
    assert gathers(longest) == paired and gathers(longest + BLOCK) == streamed
    of_kernels = torch.tensor([list(map(int, line.split())) for line in lines])
    assert banks(longest) == of_kernels[:longest, 0].tolist()
    assert banks(len(lines)) == of_kernels[:, 1].tolist()
