"""torch's own precompilation with this backend: compiled in one process, loaded in another."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compile(lambda x: x), "aot_compile"),
    reason="this torch has no aot_compile on what torch.compile returns",
)

MODEL = """
    import sys, torch
    from torch import nn
    from torch._dynamo.utils import counters
    import micromix_compile as micromix
    from micromix_compile.planned import quantised

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(64)
            self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, x):
            x = self.norm(x)
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    path, kind = sys.argv[1:]
    model, x = Gated().eval().requires_grad_(False), torch.randn(5, 64)
    calibration = micromix.calibrate(model).run([x])
    torch.compiler.reset()
    counters.clear()
    plan = calibration.plan(micromix.Recipe(split=(0.5, 0.25, 0.25)))
    if kind == "float":
        plan.attach(model)
    else:
        context = quantised(model, plan)
        context.__enter__()
"""
SAVE = """
    with torch.no_grad():
        compiled = torch.compile(model, backend="micromix", fullgraph=True)
        function = compiled.forward.aot_compile(((x,), {}))
        function.save_compiled_function(path)
        torch.save(function(model, x), path + ".result")
    print(micromix.explain(model).passes["silu_mul"])
"""
LOAD = """
    with open(path, "rb") as file, torch.no_grad():
        function = torch.compiler.load_compiled_function(file)
        result = function(model, x)
    assert torch.equal(result, torch.load(path + ".result", weights_only=True))
    assert not counters["stats"].get("unique_graphs"), counters
    print("equal")
"""


@pytest.mark.parametrize("kind", ["float", "quantised"])
def test_saved_by_one_process_and_loaded_by_another(kind, tmp_path):
    """Of a float model with a plan, whose weights are packed again at load, and of one that is quantised."""
    printed = []
    for program in (SAVE, LOAD):
        code = textwrap.dedent(MODEL) + textwrap.dedent(program)
        command = [sys.executable, "-c", code, str(tmp_path / "function.bin"), kind]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        printed.append(run.stdout)
    assert printed == ["1\n", "equal\n"]
