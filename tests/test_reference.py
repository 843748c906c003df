"""The reference model: the arithmetic of docs/numerics.md on a whole model, rounded weights included."""

import pytest
import torch
from tiny_llama import VOCABULARY, tiny_llama

from micromix_compile import Recipe, calibrate
from micromix_compile.errors import PlanMismatchError
from micromix_compile.reference import reference_model


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 1, 48)
    return [{"input_ids": ids} for ids in torch.randint(0, VOCABULARY, shape, generator=generator)]


@torch.no_grad()
def test_rounded_weights_are_those_of_the_plan():
    """MXFP4 sums are exact, so the kernels must give the same bits; and other ones than without GPTQ."""
    model, own = tiny_llama(), batches()
    plan = calibrate(model).run(own).plan(Recipe(format="mxfp4", rounding="gptq"))
    options = {"plan": plan, "strict": True, "inductor": False}
    compiled = torch.compile(model, backend="micromix", options=options, fullgraph=True)
    found = compiled(**own[0]).logits
    assert torch.equal(found, reference_model(model, plan)(**own[0]).logits)
    nearest = reference_model(model, plan.without_rounding())
    assert not torch.equal(found, nearest(**own[0]).logits)


@torch.no_grad()
def test_the_model_stays_as_it_is_and_shares_its_parameters():
    model, own = tiny_llama(), batches(1)
    before = model(**own[0]).logits
    plan = calibrate(model).run(own).plan(Recipe(format="mxfp4"))
    reference = reference_model(model, plan)
    assert not torch.equal(reference(**own[0]).logits, before)
    assert torch.equal(model(**own[0]).logits, before)
    for mine, its in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine is its


def test_a_plan_of_another_model():
    plan = calibrate(tiny_llama()).run(batches(1)).plan(Recipe(format="mxfp4"))
    with pytest.raises(PlanMismatchError, match="no such layer"):
        reference_model(tiny_llama(layers=1), plan)
