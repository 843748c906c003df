"""torch's own precompilation with this backend: compiled in one process, loaded in another."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from micromix_compile import Recipe, calibrate
from micromix_compile.attachment import detach
from micromix_compile.errors import OtherPlanError

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compile(lambda x: x), "aot_compile"),
    reason="this torch has no aot_compile on what torch.compile returns",
)

MODEL = """
    import sys, torch
    from contextlib import ExitStack
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

    def planned(path, kind):
        # The model, its plan attached to it or quantised by it, its input, and the name of its file.
        torch.manual_seed(0)
        model, x = Gated().eval().requires_grad_(False), torch.randn(5, 64)
        plan = micromix.load_plan(path + ".plan")
        torch.compiler.reset()
        counters.clear()
        if kind == "float":
            plan.attach(model)
        else:
            contexts.enter_context(quantised(model, plan))
        return model, x, f"{path}.{kind}"

    contexts, path = ExitStack(), sys.argv[1]
"""
SAVE = """
    model, x = Gated().eval().requires_grad_(False), torch.randn(5, 64)
    plan = micromix.calibrate(model).run([x]).plan(micromix.Recipe(split=(0.5, 0.25, 0.25)))
    plan.save(path + ".plan")
    for kind in ("float", "quantised"):
        model, x, file = planned(path, kind)
        with torch.no_grad():
            compiled = torch.compile(model, backend="micromix", fullgraph=True)
            function = compiled.forward.aot_compile(((x,), {}))
            function.save_compiled_function(file)
            torch.save(function(model, x), file + ".result")
        print(kind, micromix.explain(model).passes["silu_mul"])
"""
LOAD = """
    for kind in ("float", "quantised"):
        model, x, name = planned(path, kind)
        with open(name, "rb") as file, torch.no_grad():
            function = torch.compiler.load_compiled_function(file)
            result = function(model, x)
        assert torch.equal(result, torch.load(name + ".result", weights_only=True))
        assert not counters["stats"].get("unique_graphs"), counters
        print(kind, "equal")
"""


def test_saved_by_one_process_and_loaded_by_another(tmp_path):
    """Of a float model with a plan, whose weights are packed again at load, and of one that is quantised."""
    printed = []
    for program in (SAVE, LOAD):
        code = textwrap.dedent(MODEL) + textwrap.dedent(program)
        command = [sys.executable, "-c", code, str(tmp_path / "function")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        printed.append(run.stdout)
    assert printed == ["float 1\nquantised 1\n", "float equal\nquantised equal\n"]


class Layer(nn.Module):  # torch's own is no model that Dynamo would compile
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(x)


def test_plans_attached_afterwards(tmp_path):
    """A function follows those of the structure it was compiled for, and refuses others; one from a file keeps its own."""
    model, x = Layer().eval().requires_grad_(False), torch.randn(5, 64)
    scale = torch.exp(2 * torch.randn(64))
    first, second = (
        calibrate(model).run([x * s]).plan(Recipe(split=(0.5, 0.25, 0.25)))
        for s in (scale, scale.flip(0))
    )

    def compiled(plan):
        plan.attach(model)
        return torch.compile(model, backend="micromix", fullgraph=True)

    expected = [compiled(plan)(x) for plan in (first, second)]
    assert not torch.equal(*expected)
    torch.compiler.reset()
    function = compiled(first).forward.aot_compile(((x,), {}))
    function.save_compiled_function(tmp_path / "function")
    with open(tmp_path / "function", "rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    for plan, result in zip((first, second), expected, strict=True):
        plan.attach(model)
        assert torch.equal(function(model, x), result)
        assert torch.equal(loaded(model, x), expected[0])
    calibration = calibrate(model).run([x])
    for counts in ((32, 0, 32), (0, 64, 0), None):
        if counts is None:
            detach(model)
        else:
            calibration.plan(Recipe(counts={"*": counts})).attach(model)
        with pytest.raises(OtherPlanError, match="another plan attached"):
            function(model, x)
        assert torch.equal(loaded(model, x), expected[0])
    first.attach(model)
    assert torch.equal(function(model, x), expected[0])


def test_with_cuda_graphs_the_whole_plan_is_constant():
    model, x = Layer().eval().requires_grad_(False), torch.randn(5, 64)
    scale = torch.exp(2 * torch.randn(64))
    plans = [
        calibrate(model).run([x * s]).plan(Recipe(split=(0.5, 0.25, 0.25)))
        for s in (scale, scale.flip(0))
    ]
    plans[0].attach(model)
    compiled = torch.compile(model, backend="micromix", mode="reduce-overhead", fullgraph=True)
    function = compiled.forward.aot_compile(((x,), {}))
    expected = function(model, x)
    plans[1].attach(model)
    with pytest.raises(OtherPlanError, match="fc"):
        function(model, x)
    compiled(x)  # by itself
    plans[0].attach(model)
    assert torch.equal(function(model, x), expected)
