"""Past torch's limit of compilations a compiled model goes on, or raises, and never runs in float."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from micromix_compile import Recipe, calibrate, explain
from micromix_compile.errors import RecompileLimitError
from micromix_compile.reference import reference_model

LIMIT = torch._dynamo.config.recompile_limit


class Twice(nn.Module):
    def __init__(self, k: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(k, 96)
        self.down = nn.Linear(96, k)

    def forward(self, x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        for _ in range(depth):
            x = self.down(torch.relu(self.up(x)))
        return x


def compiled_with(model: nn.Module, backend: str = "micromix", **options):
    return torch.compile(model, backend=backend, options={"inductor": False, **options})


def test_every_plan_of_many_runs_and_is_explained():
    model, x = Twice(512).eval(), torch.randn(5, 512)
    calibration = calibrate(model).run([x])
    parts = [i / 16 for i in range(LIMIT + 4)]
    plans = [calibration.plan(Recipe(split=(part, 0, 1 - part))) for part in parts]
    compiled = [compiled_with(model, plan=plan) for plan in plans]
    with torch.no_grad():
        for run, plan in zip(compiled, plans):
            torch.testing.assert_close(run(x), reference_model(model, plan)(x))
    for run, plan in zip(compiled, plans):
        row = explain(run).layers["up"]
        assert (row.k4, row.k6, row.k8) == plan["up"].layout.counts
        assert explain(run).graphs == 1
    assert explain(model).graphs == len(plans)


def test_equal_options_are_one_graph():
    model, x = Twice().eval(), torch.randn(5, 64)
    one, other = (compiled_with(model, recipe=Recipe(format="mxfp4")) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
    assert explain(one).graphs == explain(other).graphs == 1
    unused = compiled_with(model, recipe=Recipe(format="mxfp6"))
    assert explain(unused).graphs == 0


def test_threads_of_many_shapes():
    model = Twice().eval()
    plan = calibrate(model).run([torch.randn(50, 64)]).plan(Recipe(format="mxfp4"))
    plan.attach(model)
    reference, compiled = reference_model(model, plan), compiled_with(model)
    inputs = [torch.randn(*[2] * (i // 4), 3 + i, 64) for i in range(2 * LIMIT)]

    def call(x: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(compiled(x), reference(x))

    with ThreadPoolExecutor(len(inputs)) as pool:
        list(pool.map(call, inputs))


def test_past_the_last_limit_it_raises_each_time():
    model, x = Twice().eval(), torch.randn(5, 64)
    compiled = compiled_with(model, recipe=Recipe(format="mxfp4"))
    limits = {"recompile_limit": 2, "accumulated_recompile_limit": 3}
    with torch.no_grad(), torch._dynamo.config.patch(limits):
        known = [compiled(x, depth) for depth in (1, 2, 3)]
        for depth in (4, 4, 5):
            with pytest.raises(RecompileLimitError, match=r"forward \(.*test_recompile.py"):
                compiled(x, depth)
        assert all(torch.equal(compiled(x, i + 1), y) for i, y in enumerate(known))


def test_limits_that_raise_anyway_are_the_users():
    model, x = Twice().eval(), torch.randn(5, 64)
    compiled = compiled_with(model, recipe=Recipe(format="mxfp4"))
    limits = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch.no_grad(), torch._dynamo.config.patch(limits):
        compiled(x)
        with pytest.raises(RecompileLimitError):
            compiled(x, 2)


def test_other_backends_keep_the_limits_of_torch():
    model, x = Twice().eval(), torch.randn(5, 64)
    compiled_with(model, recipe=Recipe(format="mxfp4"))  # the backend is loaded
    graphs = []

    def count(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=count)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        results = [compiled(x, depth) for depth in (1, 2, 3)]
    assert len(graphs) == 2
    assert torch.equal(results[2], model(x, 3))
