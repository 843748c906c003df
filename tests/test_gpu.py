"""On a CUDA device: everything but the kernels, which are the pure-torch reference there, and say so."""

from __future__ import annotations

import pytest
import torch
from architectures import build, inputs
from reference_model import reference_model

from micromix_compile import Recipe, calibrate, explain
from micromix_compile.errors import ReferenceKernelWarning
from micromix_compile.ops import _reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device: str, arguments: dict) -> dict:
    return {name: value.to(device) for name, value in arguments.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plan_made_on_the_cpu_runs_on_the_gpu(name):
    model, arguments = build(name), inputs(name)
    plan = calibrate(model).run([arguments]).plan(Recipe(split=(0.5, 0.25, 0.25)))
    model, arguments = model.cuda(), on("cuda", arguments)
    reference = reference_model(model, plan)
    plan.attach(model)
    _reference._warned.clear()  # it warns once in a process
    with torch.no_grad():
        exact = model(**arguments).logits
        expected = reference(**arguments).logits
        compiled = torch.compile(model, backend="micromix", options={"strict": True})
        with pytest.warns(ReferenceKernelWarning, match="cuda"):
            found = compiled(**arguments).logits
    change = (expected - exact).norm()
    assert found.is_cuda and change > 0
    assert (found - expected).norm() <= 0.1 * change
    rows = [row for row in explain(compiled).layers.values() if not row.reason]
    assert len(rows) == len(plan)
    assert {row.kernel for row in rows} == {"reference"}


def test_calibration_on_the_gpu_sees_what_it_sees_on_the_cpu():
    model, arguments = build("llama"), inputs("llama")
    on_cpu = calibrate(model).run([arguments]).statistics
    on_gpu = calibrate(model.cuda()).run([arguments]).statistics
    assert list(on_gpu.layers) == list(on_cpu.layers)
    for name in on_cpu.layers:
        torch.testing.assert_close(on_gpu[name].total, on_cpu[name].total, rtol=1e-3, atol=1e-3)
        assert on_gpu[name].tokens == on_cpu[name].tokens
