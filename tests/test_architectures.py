"""Every architecture: all of its linear layers are lowered, and the output is that of the reference arithmetic."""

from __future__ import annotations

import pytest
import torch
from architectures import MODELS, build, inputs
from linear_modules import linears_that_run

from micromix_compile import Recipe, calibrate, explain
from micromix_compile.reference import reference_model


def outputs(result) -> torch.Tensor:
    first = next(v for k, v in result.items() if "logits" in k or k == "last_hidden_state")
    return first.float()


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_lowered_and_the_numbers_are_the_references(name):
    model, arguments = build(name), inputs(name)
    recipe = Recipe(split=(0.5, 0.25, 0.25))
    plan = calibrate(model).run([arguments, inputs(name, length=9)]).plan(recipe)
    expected = [layer for layer in linears_that_run(model, **arguments) if not recipe.skips(layer)]
    assert sorted(plan) == expected

    plan.attach(model)
    with torch.no_grad():
        exact = outputs(model(**arguments))
        reference = outputs(reference_model(model, plan)(**arguments))
        # Inductor's own check of the operators' sizes and strides.
        options = {"strict": True, "size_asserts": True}
        compiled = torch.compile(model, backend="micromix", options=options)
        lowered = outputs(compiled(**arguments))

    explanation = explain(compiled)
    lowered_layers = [row.name for row in explanation.layers.values() if not row.reason]
    assert sorted(lowered_layers) == expected
    assert explanation.passes["lowered"] == len(expected)
    change = (reference - exact).norm()
    assert change > 0
    assert (lowered - reference).norm() <= 0.1 * change
