"""What does not fit together is refused or named: a quantised layer and its input, a plan and its model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate, explain
from micromix_compile.planned import quantised


@pytest.mark.parametrize("activations", ["match", "bfloat16"])
@pytest.mark.parametrize("sort", [True, False])
@torch.no_grad()
def test_an_input_of_another_width_is_refused_as_by_a_float_layer(activations, sort):
    """K is 48, padded to 64: 64 channels would fit the operators, and so would 40 where there is no order."""
    model = nn.Sequential(nn.Linear(48, 32)).eval()
    recipe = Recipe(format="mxfp8", activations=activations)
    if sort:
        recipe = Recipe(split=(0.5, 0.0, 0.5), activations=activations)
        recipe = calibrate(model).run([torch.randn(8, 48)]).plan(recipe)
    with quantised(model, recipe):
        for size in ((2, 64), (2, 40), (64,), (2, 3, 1), ()):
            x = torch.randn(size)
            with pytest.raises(RuntimeError) as refused:
                nn.Linear(48, 32)(x)
            with pytest.raises(RuntimeError) as error:
                model(x)
            assert str(error.value) == str(refused.value)
            with pytest.raises(RuntimeError):
                torch.export.export(model, (x,), strict=False)
        compiled = torch.compile(model, backend="micromix", options={"inductor": False})
        for x in (torch.randn(2, 48), torch.randn(2, 64), torch.randn(3, 5, 48)):
            if x.shape[-1] == 48:
                assert torch.equal(compiled(x), model(x))
            else:
                with pytest.raises(RuntimeError, match="48"):
                    compiled(x)
        assert explain(compiled).passes["lowered"] == 2  # the last call's graph too: it is compiled
        dynamic = ({1: torch.export.Dim.AUTO},)
        for strict in (True, False):
            program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=dynamic)
            assert torch.equal(program.module()(x), model(x))


def test_a_package_of_another_width_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96)).eval()
    with pytest.raises(RuntimeError, match="6, 3"):
        micromix.export(
            model, tmp_path / "model.pt2", (torch.randn(6, 3),), plan=Recipe(format="mxfp8")
        )
