"""The same passes in AOTInductor, which packages a graph for use without Dynamo."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from micromix_compile import _torch_compat as compat
from micromix_compile.passes.manager import counted, pass_manager


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6)

    def forward(self, x):
        return torch.ops.micromix.quantize(self.norm(x), None, 32, 0, 32, 88)


@pytest.mark.skipif(not compat.runs_packages(), reason="torch 2.11 mistakes dtypes")
def test_a_package_has_the_same_fusions(tmp_path):
    model, x = Quantised().eval(), torch.randn(4, 64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    path, fused, missed = counted(
        lambda: torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"post_grad_custom_pre_pass": pass_manager()},
        )
    )
    assert list(fused.values()) == ["rms_norm"] and not missed
    package = torch._inductor.aoti_load_package(path)
    for rows in (4, 9):
        y = torch.randn(rows, 64)
        with torch.no_grad():
            expected = torch.ops.micromix.rms_norm_quantize(
                *(y, None, model.norm.weight, 1e-6, 1, torch.float32, False, None, 32, 0, 32, 88)
            )[2:]
        assert all(map(torch.equal, package(y), expected))
