from __future__ import annotations

import pytest
import torch

from micromix_compile import ops

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def usable_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run."""
    if not ops.loaded():
        return ()
    return ISAS[: ISAS.index(ops.build_info()["cpu_best"]) + 1]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Runs a test once per instruction set of the machine."""
    if request.param not in usable_isas():
        pytest.skip(f"this machine has no {request.param}")
    before = ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture
def threads():
    """Sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
